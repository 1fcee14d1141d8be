"""DeepSpeed around a module: an engine that trains it, and all that it keeps, in parts that any other engine can take.

The module's ``forward`` is what ``engine(...)`` calls. The optimizer is torch's own fused AdamW: DeepSpeed's would be
compiled for over a minute at first use. DeepSpeed's own checkpoints are pickles, and bound to a number of workers and a
ZeRO stage; a ``Part`` says of which parameter it is, and which of its values.
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
    ema_decay: float = 0.0  # 0: no average is kept


@dataclass(frozen=True)
class EngineSettings:
    """How the work is shared out, which changes no result but by rounding."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    offload: bool = False  # the optimizer and what it keeps are in the host's memory; from stage 1 on
    passes: int = 1  # forward and backward, for each step of the optimizer


class AveragingAdamW(torch.optim.AdamW):
    """AdamW that keeps a moving average of the weights as one more of its states, ``average``.

    So whatever shares out, offloads or saves the others does it with this one. The average's decay grows to
    ``ema_decay`` with the steps, (1 + n) / (10 + n) at first, so that a short run's does not remember its beginning.
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


def initialize(module: nn.Module, optimizer: OptimizerSettings, settings: EngineSettings) -> Any:
    """A DeepSpeedEngine in the process group that Ray Train has made."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    # A shared-memory collective for inference that would be compiled for a minute, and hang after a killed build.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    stepper, scheduler = adamw(module, optimizer)
    clip = optimizer.gradient_clip
    if settings.zero_stage == 0:  # there DeepSpeed's clipping tells nobody the norm, and has the workers wait once more
        clip = 0.0

        def clipped(stepper: Any, *_: Any) -> None:  # DeepSpeed looks for the norm where its own optimizers have it
            stepper._global_grad_norm = clip_grad_norm_(module.parameters(), optimizer.gradient_clip or math.inf)

        stepper.register_step_pre_hook(clipped)
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=stepper,
        lr_scheduler=scheduler,
        config={
            "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own reports, which nobody asks for
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


def adamw(module: nn.Module, settings: OptimizerSettings) -> tuple[AveragingAdamW, torch.optim.lr_scheduler.LambdaLR]:
    """The optimizer, whose weight decay spares vectors, and the schedule of its rate."""
    decay = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = AveragingAdamW(
        [group for group in groups if group["params"]],  # DeepSpeed cannot flatten an empty one
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
        done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
        return 0.1 + 0.9 * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@dataclass(frozen=True)
class Part:
    """Values ``[start, start + len)`` of a parameter, flat: of its float32 weight, and of each state of the optimizer.

    They are views of what the engine works on. ``state`` is empty before the first step.
    """

    name: str
    start: int
    weight: Tensor
    state: dict[str, Tensor]

    def copied(self) -> Part:
        """As it is now, in the host's memory."""
        state = {kind: values.to("cpu", copy=True) for kind, values in self.state.items()}
        return Part(self.name, self.start, self.weight.to("cpu", copy=True), state)


STATES = ("exp_avg", "exp_avg_sq", "average")


def parts(engine: Any) -> Iterator[Part]:
    """What this worker keeps of the trained parameters. Those of all workers together are all there is, once or more.

    In stage 0 every worker keeps everything.
    """
    inner = engine.basic_optimizer
    for name, start, master, first, count in _masters(engine):
        flat = master.detach().view(-1)[first : first + count]
        kept = inner.state.get(master, {})
        state = {key: kept[key].view(-1)[first : first + count] for key in STATES if key in kept}
        yield Part(name, start, flat, state)


def whole(engine: Any, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Each trained parameter's weight, or one of its STATES, float32 and complete, on every worker.

    All workers have to ask, and to take all that comes.
    """
    kept: dict[str, list[Part]] = {}
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
    """Put the engine where it was after ``step``: ``read(kind, name)`` gives a whole parameter's values, float32.

    ``kind`` is "weight" or one of STATES, as far as the optimizer keeps it. The module had those weights when the
    engine was made: what else the engine has of them it has from there.
    """
    inner = engine.basic_optimizer
    kinds = STATES if inner.ema_decay else STATES[:2]
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
    """Where the float32 values are that this worker moves.

    (parameter's name, the first of its values, the optimizer's tensor, where in it they begin, how many they are).
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
