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

    decay = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    adamw = torch.optim.AdamW(
        [{"params": decay, "weight_decay": optimizer.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=optimizer.learning_rate,
        betas=optimizer.betas,
        fused=True,
    )

    def schedule(step: int) -> float:
        if step < optimizer.warmup_steps:
            return (step + 1) / optimizer.warmup_steps
        if optimizer.decay == "none":
            return 1.0
        done = (step - optimizer.warmup_steps) / max(1, optimizer.steps - optimizer.warmup_steps)
        return 0.1 + 0.9 * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=adamw,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(adamw, schedule),
        config={
            "train_micro_batch_size_per_gpu": batch_size_per_worker,
            "gradient_clipping": optimizer.gradient_clip,
            "zero_optimization": {"stage": zero_stage},
            "bf16": {"enabled": precision == "bfloat16"},
            "steps_per_print": 10**9,
        },
    )
    return engine
