"""DeepSpeed around a module: an engine that trains it, and its training state in slices that any other engine can load.

``engine(...)`` calls the module's ``forward``. DeepSpeed's own checkpoints are pickles, bound to the number of workers
and the ZeRO stage; a ``ParameterSlice`` names its parameter and the range of values it holds.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class EngineSettings:
    """How the work is distributed. It changes results only by rounding."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    offload: bool = False  # keep the optimizer and its states in host memory; needs stage 1 or above
    passes: int = 1  # forward and backward passes per optimizer step


def initialize(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
    gradient_clip: float,
    settings: EngineSettings,
) -> Any:
    """Return a DeepSpeedEngine in the current process group.

    ``gradient_clip`` is the maximum norm of the gradient of all parameters; 0: no clipping.
    """
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    # A shared-memory collective for inference: it would compile for a minute, and hang after an interrupted build.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    clip = gradient_clip
    if settings.zero_stage == 0:  # DeepSpeed's stage-0 clipping does not expose the norm, and synchronises once more
        clip = 0.0

        def clip_gradients(stepped: Any, *_: Any) -> None:  # DeepSpeed reads the norm from this attribute
            stepped._global_grad_norm = clip_grad_norm_(module.parameters(), gradient_clip or math.inf)

        optimizer.register_step_pre_hook(clip_gradients)
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config={
            "train_micro_batch_size_per_gpu": 1,  # required; only DeepSpeed's own reports use it
            "gradient_accumulation_steps": settings.passes,
            "gradient_clipping": clip,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": settings.precision == "bfloat16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": 10**9,
        },
    )
    return engine


@dataclass(frozen=True)
class ParameterSlice:
    """Values ``[start, start + len)`` of a flattened parameter: its float32 weight and each optimizer state.

    The tensors are views of the engine's own. ``state`` is empty before the first step.
    """

    name: str
    start: int
    weight: Tensor
    state: dict[str, Tensor]

    def copied(self) -> ParameterSlice:
        """Return a copy in host memory."""
        state = {kind: values.to("cpu", copy=True) for kind, values in self.state.items()}
        return ParameterSlice(self.name, self.start, self.weight.to("cpu", copy=True), state)


STATES = ("exp_avg", "exp_avg_sq", "average")  # "average" if the optimizer has an ``ema_decay`` above 0


def parts(engine: Any) -> Iterator[ParameterSlice]:
    """Yield this worker's slices of the trained parameters. Together the workers hold every value at least once.

    In stage 0 every worker holds everything.
    """
    inner = engine.basic_optimizer
    for name, start, master, first, count in _masters(engine):
        flat = master.detach().view(-1)[first : first + count]
        kept = inner.state.get(master, {})
        state = {key: kept[key].view(-1)[first : first + count] for key in STATES if key in kept}
        yield ParameterSlice(name, start, flat, state)


def whole(engine: Any, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Yield each trained parameter's complete float32 weight, or one of its STATES, on every worker.

    Collective: every worker must call it and exhaust the iterator.
    """
    kept: dict[str, list[ParameterSlice]] = {}
    for part in parts(engine):
        kept.setdefault(part.name, []).append(part)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # in stage 3 the parameter itself is empty
            values = torch.zeros(math.prod(shape), device=engine.device)
            for part in kept.get(name, []):
                held = part.weight if kind == "weight" else part.state[kind]
                values[part.start : part.start + len(held)] = held
            if engine.zero_optimization_stage():
                torch.distributed.all_reduce(values)
            yield name, values.view(shape)


@torch.no_grad()
def restore(engine: Any, step: int, read: Callable[[str, str], Tensor]) -> None:
    """Restore the engine's state after ``step``. ``read(kind, name)`` returns a parameter's complete float32 values.

    ``kind`` is "weight" or one of the STATES that the optimizer keeps. The module must already have had these weights
    when the engine was made: the engine's other copies derive from them.
    """
    inner = engine.basic_optimizer
    kinds = STATES if getattr(inner, "ema_decay", 0) else STATES[:2]
    for name, start, master, first, count in _masters(engine):
        state = inner.state[master]
        if "step" not in state:
            state["step"] = torch.tensor(float(step), device=master.device)
            state.update({kind: torch.zeros_like(master) for kind in kinds})
        for kind, held in (("weight", master.detach()), *((kind, state[kind]) for kind in kinds)):
            held.view(-1)[first : first + count].copy_(read(kind, name).reshape(-1)[start : start + count])
    schedule = engine.lr_scheduler
    schedule.last_epoch = step
    for group, base, factor in zip(inner.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(step)
    engine.global_steps = step


def _masters(engine: Any) -> Iterator[tuple[str, int, Tensor, int, int]]:
    """Locate the float32 values that this worker updates.

    Yields (parameter name, index of its first value here, the optimizer's tensor, offset in that tensor, count).
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    rank = torch.distributed.get_rank()
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            continue
        if stage == 0:
            yield name, 0, p, 0, p.numel()
        elif stage == 3:
            group, at, padded = optimizer.grad_position[optimizer.get_param_id(p)]
            if (count := min(padded, p.ds_numel - rank * padded)) > 0:
                yield name, rank * padded, optimizer.fp32_partitioned_groups_flat[group], at, count
        elif (place := p._hp_mapping) is not None:
            [master] = engine.basic_optimizer.param_groups[place.param_group_index]["params"]
            yield (
                name,
                place.lp_fragment_address.start,
                master,
                place.hp_fragment_address.start,
                place.hp_fragment_address.numel,
            )
