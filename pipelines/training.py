"""The training loop that every Ray Train worker runs, and the call that starts it.

One process a worker; DeepSpeed shards the optimizer, the loader needs no processes of its own. Batches, noise and
timesteps are functions of (seed, step), so a run is repeatable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import WorkerGroupError
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from infra import engine, tracking
from infra.cluster import Meter, cluster, watch
from pipelines import checkpoint
from pipelines.adaptation import adapt, adapters, merged
from pipelines.checkpoint import Settings
from pipelines.recipe import Recipe
from preprocessing.encoders import PIXELS
from preprocessing.episode import UserError
from preprocessing.loader import LatentDataset, WindowShape
from preprocessing.store import Snapshot
from preprocessing.windows import split
from uwm_model.augment import augment, centre
from uwm_model.batch import Batch

VALIDATION_BATCHES = 4


class Diverged(Exception):
    """A loss is not a number, or infinite: nothing that follows would mean anything."""


def train(
    settings: Settings,
    recipe: Recipe,
    initial: Path | None,
    output: Path,
    address: str | None = None,
    verbose: bool = False,
) -> Path:
    """Train on Ray and return the folder of the final checkpoint, ``output/checkpoint``.

    ``initial`` is a checkpoint whose weights (not optimizer) the run starts from.
    """
    output.mkdir(parents=True, exist_ok=True)
    tracking_uri = tracking.connect()
    config = {
        "settings": settings.model_dump_json(),
        "recipe": recipe.model_dump_json(),
        "initial": str(initial) if initial else None,
        "tracking_uri": tracking_uri,
    }
    with cluster(address, verbose):
        gpus = ray.cluster_resources().get("GPU", 0) >= recipe.workers
        meter = Meter.remote()  # type: ignore[attr-defined]
        trainer = TorchTrainer(
            _worker,
            train_loop_config={**config, "meter": meter},
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            scaling_config=ScalingConfig(num_workers=recipe.workers, use_gpu=gpus),
            run_config=RunConfig(name="ray", storage_path=str(output)),
        )
        with (
            tqdm(total=recipe.steps, desc=recipe.name, unit="step", mininterval=0.5) as bar,
            watch(meter, lambda values: _show(bar, values)),
            _quiet(verbose),
        ):
            bar.set_postfix_str("starting the workers")
            try:
                result = trainer.fit()
            except WorkerGroupError as error:
                for cause in error.worker_failures.values():
                    if isinstance(cause, UserError | Diverged):
                        raise cause from None
                raise
    assert result.checkpoint is not None
    folder = output / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(result.checkpoint.path, folder)
    shutil.rmtree(output / "ray")
    return folder


def _show(bar: tqdm, values: dict[str, float]) -> None:
    bar.n = int(values.get("step", 0))
    if "loss" in values:
        bar.set_postfix_str(
            f"loss {values['loss']:.3f}, {values['rate']:.0f} samples/s, data wait {100 * values['wait']:.1f} %"
        )


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Ray Train prints its state to stdout through loggers it configures late; keep stdout for results."""
    if verbose:
        yield
        return
    with Path(os.devnull).open("w") as sink, contextlib.redirect_stdout(sink):
        yield


def dataset(settings: Settings, validation: bool, recipe: Recipe) -> LatentDataset:
    """The training or the held-out episodes of the settings' snapshot that the recipe selects.

    UserError where the model observes pixels that the store does not hold.
    """
    snapshot = Snapshot(settings.store, settings.snapshot)
    rows = [
        row
        for row in split(
            snapshot.rows(settings.encoder_digest), recipe.instructions, recipe.validation_share, validation
        )
        if row["embodiment"] in settings.embodiments
    ]
    model = settings.model
    shape = WindowShape(
        model.cameras,
        model.observed_frames,
        model.future_frames,
        model.action_chunk,
        model.action_dim,
        model.proprio_dim,
    )
    pixels = snapshot.rows(PIXELS) if model.observation == "pixels" else None
    sentences = None
    if settings.text_encoder_digest:
        sentences = snapshot.sentences(settings.text_encoder_digest)
    return LatentDataset(snapshot, rows, settings.embodiments, shape, pixels, sentences)


def to_batch(arrays: dict[str, np.ndarray], device: torch.device, dtype: torch.dtype) -> Batch:
    """Arrays of LatentDataset.gather as the model's batch."""
    return Batch(**{name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}).to(
        device, dtype
    )


def _worker(config: dict[str, Any]) -> None:
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    settings = Settings.model_validate_json(config["settings"])
    recipe = Recipe.model_validate_json(config["recipe"])
    tracking.mlflow.set_tracking_uri(config["tracking_uri"])
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # a worker is a core; more threads only fight
    torch.manual_seed(recipe.seed)

    model = checkpoint.load(Path(config["initial"]))[0].train() if config["initial"] else settings.build()
    adapt(model, recipe, settings.fresh)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    deepspeed = engine.initialize(
        model, optimizer_settings(recipe), recipe.zero_stage, recipe.precision, recipe.batch_size // world
    )
    dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
    device = deepspeed.device

    data = dataset(settings, validation=False, recipe=recipe)
    weights = {settings.embodiments[name].index: weight for name, weight in recipe.mixture.items()}
    batches = data.batches(recipe.seed, weights, recipe.batch_size, 0, rank, world)
    began = marked = time.monotonic()
    waited = 0.0
    for step in range(1, recipe.steps + 1):
        fetching = time.monotonic()
        batch = to_batch(next(batches), device, dtype)
        waited += time.monotonic() - fetching
        generator = torch.Generator(device).manual_seed(hash((recipe.seed, step, rank)) % 2**63)
        batch = augment(batch, settings.model.latent_size, recipe.augment, generator)
        losses = deepspeed(batch, generator=generator)
        if not math.isfinite(losses.total.item()):
            episodes = data.drawn(recipe.seed, weights, recipe.batch_size, step - 1, rank, world)
            raise Diverged(
                f"step {step}: the loss is {losses.total:g} (action {losses.action:g}, video {losses.video:g}); no "
                f"checkpoint was kept; try a lower learning_rate, or look at these episodes: {', '.join(episodes)}"
            )
        deepspeed.backward(losses.total)
        deepspeed.step()
        average.update_parameters(model)
        if rank == 0 and (step % recipe.log_every == 0 or step == recipe.steps):
            now = time.monotonic()
            done = recipe.log_every if step % recipe.log_every == 0 else step % recipe.log_every
            metrics = {
                "loss": losses.total.item(),
                "loss_action": losses.action.item(),
                "loss_video": losses.video.item(),
                "learning_rate": deepspeed.get_lr()[0],
                "gradient_norm": float(deepspeed.get_global_grad_norm() or 0.0),
                "samples_per_second": done * recipe.batch_size / (now - marked),
                "data_wait_share": waited / (now - began),
            }
            marked = now
            config["meter"].put.remote(
                step=step,
                loss=metrics["loss"],
                rate=metrics["samples_per_second"],
                wait=metrics["data_wait_share"],
            )
            if settings.run_id:
                tracking.log_metrics(settings.run_id, metrics, step)

    final = None
    if rank == 0:
        if settings.run_id:
            held_out = _validate(average.module, settings, recipe, device)
            tracking.log_metrics(settings.run_id, held_out, recipe.steps)
        final = Path(tempfile.mkdtemp()) / "checkpoint"
        settings.step = recipe.steps
        state = average.module.state_dict()
        checkpoint.save(final, merged(state, recipe), settings, adapters(state))
    ray.train.report({}, checkpoint=Checkpoint.from_directory(str(final)) if final else None)


def optimizer_settings(recipe: Recipe) -> engine.OptimizerSettings:
    names = [field.name for field in dataclasses.fields(engine.OptimizerSettings)]
    return engine.OptimizerSettings(**{name: getattr(recipe, name) for name in names})


@torch.inference_mode()
def _validate(model: Any, settings: Settings, recipe: Recipe, device: torch.device) -> dict[str, float]:
    data = dataset(settings, validation=True, recipe=recipe)
    if not data.rows:
        return {}
    totals: dict[str, list[float]] = {"validation_loss_action": [], "validation_loss_video": []}
    generator = torch.Generator(device).manual_seed(recipe.seed)
    batches = data.batches(recipe.seed, {}, 64)
    for _, arrays in zip(range(VALIDATION_BATCHES), batches, strict=False):
        batch = centre(to_batch(arrays, device, torch.float32), settings.model.latent_size)
        losses = model.float().loss(batch, generator=generator)
        totals["validation_loss_action"].append(losses.action.item())
        totals["validation_loss_video"].append(losses.video.item())
    return {name: float(np.mean(values)) for name, values in totals.items()}
