"""DeepSpeed around a module: one function that gives an engine, on GPUs or on CPUs.

The module's ``forward`` is what ``engine(...)`` calls. The optimizer is torch's own fused AdamW: DeepSpeed's would be
compiled for over a minute at first use.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with a linear warm-up to ``learning_rate``, then constant, or a cosine to a tenth of it at ``steps``."""

    learning_rate: float
    weight_decay: float
    warmup_steps: int
    steps: int
    gradient_clip: float  # 0: none
    betas: tuple[float, float]
    decay: Literal["cosine", "none"]


def initialize(
    module: nn.Module,
    optimizer: OptimizerSettings,
    zero_stage: Literal[0, 1, 2],
    precision: Literal["float32", "bfloat16"],
    batch_size_per_worker: int,
) -> Any:
    """A DeepSpeedEngine in the process group that Ray Train has made."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    # A shared-memory collective for inference that would be compiled for a minute, and hang after a killed build.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    stepper, scheduler = adamw(module, optimizer)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=stepper,
        lr_scheduler=scheduler,
        config={
            "train_micro_batch_size_per_gpu": batch_size_per_worker,
            "gradient_clipping": optimizer.gradient_clip,
            "zero_optimization": {"stage": zero_stage},
            "bf16": {"enabled": precision == "bfloat16"},
            "steps_per_print": 10**9,
        },
    )
    return engine


def adamw(
    module: nn.Module, settings: OptimizerSettings
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """The optimizer, whose weight decay spares vectors, and the schedule of its rate."""
    decay = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],  # DeepSpeed cannot flatten an empty one
        lr=settings.learning_rate,
        betas=settings.betas,
        fused=True,
    )

    def factor(step: int) -> float:
        if step < settings.warmup_steps:
            return (step + 1) / settings.warmup_steps
        if settings.decay == "none":
            return 1.0
        done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
        return 0.1 + 0.9 * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
