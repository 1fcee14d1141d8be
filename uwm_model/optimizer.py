"""AdamW with a moving average of the weights, and the schedule of its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with a linear warm-up to ``learning_rate``, then constant or a cosine decay to a tenth of it at ``steps``.

    ``gradient_clip`` is applied by whoever steps the optimizer (infra.engine).
    """

    learning_rate: float
    weight_decay: float
    warmup_steps: int
    steps: int
    gradient_clip: float  # maximum gradient norm; 0: no clipping
    betas: tuple[float, float]
    decay: Literal["cosine", "none"]
    ema_decay: float = 0.0  # 0: no moving average


class AveragingAdamW(torch.optim.AdamW):
    """AdamW that keeps an exponential moving average of the weights as one more optimizer state, ``average``.

    Whatever shards, offloads or saves the optimizer's states therefore handles the average too. Its decay rises to
    ``ema_decay`` as min(ema_decay, (1 + n) / (10 + n)) after n steps, so that a short run's average forgets its
    initial weights.
    """

    def __init__(self, params: Any, ema_decay: float, **options: Any):
        super().__init__(params, **options)
        self.ema_decay = ema_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        if self.ema_decay:
            moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            for p in moved:
                state = self.state[p]
                if "average" not in state:
                    state["average"] = p.detach().clone()
            if moved:
                n = float(self.state[moved[0]]["step"])
                decay = min(self.ema_decay, (1 + n) / (10 + n))
                torch._foreach_lerp_([self.state[p]["average"] for p in moved], [p.detach() for p in moved], 1 - decay)
        return result


def adamw(module: nn.Module, settings: OptimizerSettings) -> tuple[AveragingAdamW, LambdaLR]:
    """Return the module's optimizer and its learning-rate schedule. Biases and other vectors have no weight decay.

    It is torch's fused AdamW: DeepSpeed's own would compile for over a minute at first use.
    """
    decay = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = AveragingAdamW(
        [group for group in groups if group["params"]],  # DeepSpeed cannot flatten an empty group
        ema_decay=settings.ema_decay,
        lr=settings.learning_rate,
        betas=settings.betas,
        fused=True,
    )

    def factor(step: int) -> float:
        if step < settings.warmup_steps:
            return (step + 1) / settings.warmup_steps
        if settings.decay == "none":
            return 1.0
        progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
        return 0.1 + 0.9 * (1 + math.cos(math.pi * min(progress, 1.0))) / 2

    return optimizer, LambdaLR(optimizer, factor)
