"""Estimate the memory, time and cost of a training before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.models.checkpoint import Settings
from pipelines.recipe import Recipe
from pipelines.train.setup import optimizer_settings, prepare
from preprocessing.errors import UserError
from uwm_model.batch import Batch
from uwm_model.config import ModelConfig
from uwm_model.model import Model
from uwm_model.optimizer import adamw

MEASURED = 4  # samples of the step that is timed on a core, which takes as many times longer for more


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds of a training. Step times assume that every worker has this machine's ``device``."""

    parameters: int
    trained: int
    workers: int
    steps: int
    samples: int
    state_bytes: int  # on a worker's device: weights, gradients, optimizer states
    host_bytes: int  # in its host's memory, if the optimizer is offloaded
    activation_bytes: int  # of one forward pass
    device: str
    step_seconds: float
    seconds: float
    cost: float


def estimate(settings: Settings, recipe: Recipe, model: Model) -> Estimate:
    """Measure one training step of ``model``, which is changed by it, and extrapolate."""
    device = torch.device("cuda" if torch.cuda.is_available() and recipe.device != "cpu" else "cpu")
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)  # like a worker, which has one core
    workers = recipe.most_workers
    share = max(1, recipe.batch_size // workers)
    micro = min(share, recipe.micro_batch_size or share)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state, host = _state_bytes(parameters, trained, recipe)

    prepare(model, recipe)
    dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
    model.to(device, dtype).train()
    optimizer, _ = adamw(model, optimizer_settings(recipe))
    measured = micro if device.type == "cuda" else min(micro, MEASURED)  # a GPU is no faster with less than it can take
    while True:
        try:
            batch = _sample(settings.model, measured, settings.stride).to(device, dtype)
            of_samples, of_optimizer, activations = _measure(model, optimizer, batch, device)
            break
        except torch.OutOfMemoryError:
            if measured == 1:
                raise UserError(f"recipe: one sample does not fit on this {torch.cuda.get_device_name()}") from None
            measured //= 2
    torch.set_num_threads(threads)
    step = share * of_samples / measured + of_optimizer / (workers if recipe.zero_stage else 1)
    return Estimate(
        parameters=parameters,
        trained=trained,
        workers=workers,
        steps=recipe.steps,
        samples=recipe.steps * recipe.batch_size,
        state_bytes=state,
        host_bytes=host,
        activation_bytes=activations * micro // measured,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "core",
        step_seconds=step,
        seconds=step * recipe.steps,
        cost=step * recipe.steps / 3600 * workers * recipe.worker_price,
    )


def _measure(
    model: Model, optimizer: torch.optim.Optimizer, batch: Batch, device: torch.device
) -> tuple[float, float, int]:
    """Return the seconds of both passes and of the optimizer, and the bytes that the forward pass keeps."""
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    seconds = (0.0, 0.0)
    activations = 0
    for _ in range(2):  # the first warms up
        began = now(device)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.loss(batch).total
        activations = sum(held.values())
        loss.backward()
        computed = now(device)
        optimizer.step()
        optimizer.zero_grad()
        seconds = (computed - began, now(device) - computed)
    return *seconds, activations


def now(device: torch.device) -> float:
    """Return the time, in seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def _state_bytes(parameters: int, trained: int, recipe: Recipe) -> tuple[int, int]:
    """Return the bytes that infra.engine keeps on a worker's device and in its host's memory."""
    stage, shares = recipe.zero_stage, recipe.most_workers
    low = 2 if recipe.precision == "bfloat16" else 4
    weights = parameters * low // (shares if stage == 3 else 1)
    gradients = trained * 4 // (shares if stage >= 2 else 1)
    master = 4 if stage in (1, 2) or low == 2 else 0  # a float32 copy for the optimizer
    optimizer = trained * (master + 8 + (4 if recipe.ema_decay else 0)) // (shares if stage else 1)
    averaged = parameters * 4  # for validation
    on_device = weights + gradients + averaged
    return (on_device, optimizer) if recipe.offload else (on_device + optimizer, 0)


def _sample(model: ModelConfig, count: int, stride: int) -> Batch:
    """Return ``count`` random samples of the model's shapes."""
    V, Tf, C, h, w = model.latents_shape
    pixels = (
        torch.rand(count, V, model.observed_frames, 3, stride * h, stride * w)
        if model.observation == "pixels"
        else None
    )
    return Batch(
        current_latents=torch.randn(count, V, model.observed_frames, C, h, w),
        camera_mask=torch.ones(count, V, dtype=torch.bool),
        action_mask=torch.ones(count, *model.action_shape, dtype=torch.bool),
        proprio=torch.randn(count, model.observed_frames, model.proprio_dim),
        proprio_mask=torch.ones(count, model.proprio_dim, dtype=torch.bool),
        embodiment=torch.zeros(count, dtype=torch.long),
        future_latents=torch.randn(count, V, Tf, C, h, w),
        action=torch.rand(count, *model.action_shape),
        current_pixels=pixels,
        instruction=torch.randn(count, model.text_width) if model.text_width else None,
        instruction_mask=torch.ones(count, dtype=torch.bool) if model.text_width else None,
    )
