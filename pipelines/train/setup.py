"""Build what a worker trains (model, optimizer, engine), restored from a checkpoint if there is one."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from infra import engine
from infra.engine import EngineSettings
from pipelines.models import checkpoint
from pipelines.models.checkpoint import Settings
from pipelines.recipe import Recipe
from pipelines.train.checkpoints import RunFolder
from pipelines.train.state import SavedState
from pipelines.train.trainable import adapt
from preprocessing.dataset.loader import LatentDataset
from uwm_model.blocks import Block
from uwm_model.model import Model
from uwm_model.optimizer import OptimizerSettings, adamw


@dataclass
class Training:
    """``averaged`` is a plain float32 copy of the model; it receives the averaged weights at each checkpoint."""

    engine: Any
    averaged: Model


def passes(recipe: Recipe, world: int) -> int:
    """Return the number of forward and backward passes per optimizer step of a worker."""
    return math.ceil(max(1, recipe.batch_size // world) / (recipe.micro_batch_size or recipe.batch_size))


def loss_divisors(model: Model, data: LatentDataset, recipe: Recipe, world: int) -> Tensor:
    """Return what each pass of each worker divides its action and its video loss by, float32 [2].

    These are the numbers of values to expect, not those present: if one sample in a hundred is of a robot, a batch may
    hold none, one or three, and each of them must weigh the same.
    """
    share = recipe.batch_size / (world * passes(recipe, world))
    counts = share * model.expected_counts(*data.average_sample())
    return counts.where(counts > 0, 1)  # without any values the loss is 0, whatever divides it


def set_up(settings: Settings, recipe: Recipe, folder: RunFolder, step: int, world: int) -> Training:
    """Build the model and its engine as they were after ``step``, or as training starts if it is 0."""
    torch.manual_seed(recipe.seed)
    if settings.parent:  # the weights that finetuning starts from
        with folder.fetched(0) as start:
            model = checkpoint.load(start)[0].train()
    else:
        model = settings.build()
    adapt(model, recipe, settings.fresh)
    with contextlib.ExitStack() as opened:
        saved = None
        if step:
            saved = opened.enter_context(SavedState(opened.enter_context(folder.fetched(step))))
            shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
            weights = {name: saved.read("weight", name).view(shapes[name]) for name in saved.names()}
            model.load_state_dict(weights, strict=False)
        averaged = copy.deepcopy(model)
        prepare(model, recipe)
        trained = engine.initialize(
            model,
            *adamw(model, optimizer_settings(recipe)),
            recipe.gradient_clip,
            EngineSettings(recipe.zero_stage, recipe.precision, recipe.offload, passes(recipe, world)),
        )
        if saved:
            engine.restore(trained, step, saved.read)
    return Training(trained, averaged.to(trained.device).eval())


def optimizer_settings(recipe: Recipe) -> OptimizerSettings:
    names = [field.name for field in dataclasses.fields(OptimizerSettings)]
    return OptimizerSettings(**{name: getattr(recipe, name) for name in names})


def prepare(model: Model, recipe: Recipe) -> None:
    """Apply activation checkpointing and compilation to the transformer blocks, in place."""
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        if recipe.activation_checkpointing:
            block.forward = _computed_again(block.forward)  # type: ignore[method-assign]
        if recipe.compile:
            block.compile()


def _computed_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a plain function, which torch.compile traces as part of the block; it skips a functools.partial."""

    def checkpointed(*arguments: Any) -> Any:
        return recompute(forward, *arguments, use_reentrant=False)

    return checkpointed
