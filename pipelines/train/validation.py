"""Validate a model in training on held-out windows: its losses and predicted frames."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch

from pipelines.models.batch import to_batch
from pipelines.models.checkpoint import Settings
from pipelines.models.data import dataset
from pipelines.recipe import Recipe
from preprocessing.encoders.vae import load_encoder
from uwm_model.augment import centre
from uwm_model.batch import Batch
from uwm_model.model import Model
from uwm_model.randomness import SampleGenerators

BATCHES, SIZE = 4, 64
PICTURES = "held-out frames - now - predicted - true"  # the image's name in MLflow
MEASURED = ("validation_loss", "validation_loss_action", "validation_loss_video")
SHOWN_WINDOWS = 4  # in the image of predicted frames


class Validation:
    """This worker's share of fixed held-out windows, which do not depend on the number of workers.

    ``model`` is a plain float32 model; the caller updates its weights. ``tell`` receives the progress of copying.
    """

    def __init__(
        self, settings: Settings, recipe: Recipe, model: Model, rank: int, world: int, tell: Callable[[int, int], None]
    ):
        self._settings, self._recipe, self._model = settings, recipe, model
        self._rank, self._world = rank, world
        self._batches: list[Batch] = []
        data = dataset(settings, validation=True, recipe=recipe, tell=tell)
        if data.rows:
            drawn = data.batches(recipe.seed, SIZE)
            for _, samples in zip(range(BATCHES), drawn, strict=False):
                batch = to_batch(samples.arrays, torch.device("cpu"), torch.float32)
                self._batches.append(centre(batch, settings.model.latent_size))
        modes = [mode for mode in ("forward_dynamics", "joint") if mode in model.modes and self._batches]
        self._mode = next(iter(modes), None)
        if rank == 0 and self._mode:
            # Loading takes seconds. It happens now because during training all workers would wait for it.
            with contextlib.suppress(Exception):  # no image is worth a failed run
                _ = self._encoder

    @torch.inference_mode()
    def losses(self) -> dict[str, float]:
        """Return the losses over all windows, empty if no episode is held out. Collective."""
        device = next(self._model.parameters()).device
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        for number, batch in enumerate(self._batches):
            places = range(self._rank, SIZE, self._world)
            if not places:  # more workers than windows; this one only takes part in the sum
                continue
            mine = batch[self._rank :: self._world].to(device, torch.float32)
            random = SampleGenerators.of(self._recipe.seed, number, places, "held_out")
            found = self._model.loss(mine, random, counts=self._model.loss_counts(batch).clamp(min=1).to(device))
            totals += torch.stack([found.action, found.video]).double() / len(self._batches)
        torch.distributed.all_reduce(totals)
        if not self._batches:
            return {}
        action, video = totals.tolist()
        return dict(zip(MEASURED, (self._model.total_loss(action, video), action, video), strict=True))

    @torch.inference_mode()
    def predicted_frames(self) -> tuple[str, Callable[[], np.ndarray]] | None:
        """Return an image's name and a slow function that draws it, uint8 [H, W, 3]; None if there is nothing to show.

        One row per window. Each camera has three columns: the current frame, the model's last future frame, and the
        true one.
        """
        if self._mode is None:
            return None
        device = next(self._model.parameters()).device
        batch = self._batches[0][:SHOWN_WINDOWS].to(device, torch.float32)
        _, future = self._model.sample(self._mode, batch, generator=torch.Generator().manual_seed(self._recipe.seed))
        assert future is not None and batch.future_latents is not None
        shown = [each[:, :, -1].cpu().numpy() for each in (batch.current_latents, future, batch.future_latents)]

        def draw() -> np.ndarray:
            cameras = range(batch.camera_mask.shape[1])
            columns = [self._encoder.decode(latents[:, camera]) for camera in cameras for latents in shown]
            return np.concatenate(list(np.concatenate(columns, axis=2)), axis=0)

        return PICTURES, draw

    @cached_property
    def _encoder(self) -> Any:
        return load_encoder(self._settings.encoder)
