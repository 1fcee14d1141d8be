"""The windows that a recipe selects of a store, and their batches as the model takes them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from pipelines.models.checkpoint import Settings
from pipelines.recipe import Recipe
from preprocessing.dataset.embodiment import left_out, split
from preprocessing.dataset.loader import LatentDataset, WindowShape
from preprocessing.dataset.prefetch import tensors
from preprocessing.encoders.vae import PIXELS
from preprocessing.store.store import Snapshot
from uwm_model.batch import Batch


def dataset(
    settings: Settings, validation: bool, recipe: Recipe, tell: Callable[[int, int], None] | None = None
) -> LatentDataset:
    """The training or the held-out episodes of the settings' snapshot that the recipe selects.

    UserError where the model observes pixels that the store does not hold.
    """
    snapshot = Snapshot(settings.store, settings.snapshot)
    rows = [
        row
        for row in split(
            snapshot.rows(settings.encoder_digest), recipe.instructions, recipe.validation_share, validation
        )
        if row["embodiment"] in settings.embodiments and not left_out(row, recipe.mixture)
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
    mixture = {} if validation else {name: share for name, share in recipe.mixture.items() if share}
    return LatentDataset(
        snapshot, rows, settings.embodiments, shape, pixels, sentences, mixture, recipe.shuffle_windows, tell
    )


def to_batch(arrays: dict[str, np.ndarray], device: torch.device, dtype: torch.dtype) -> Batch:
    """Arrays of LatentDataset.gather as the model's batch."""
    return Batch(**tensors(arrays)).to(device, dtype)
