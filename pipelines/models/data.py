"""The windows that a recipe selects of a store, and their batches as the model takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipelines.models.checkpoint import Settings
from pipelines.recipe import Recipe
from preprocessing.dataset.loader import LatentDataset, WindowShape
from preprocessing.dataset.selection import left_out, sources, split
from preprocessing.encoders.vae import PIXELS
from preprocessing.errors import UserError
from preprocessing.store.store import Snapshot


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


def training_rows(rows: list[dict[str, Any]], recipe: Recipe, store_uri: str) -> list[dict[str, Any]]:
    """The rows the recipe trains on; UserError where none is left, or its mixture does not fit them."""
    chosen = split(rows, recipe.instructions, recipe.validation_share, validation=False)
    if not chosen:
        held = sorted({row["instruction"] for row in rows if row["instruction"]})
        raise UserError(f"{store_uri}: no episode with instructions {recipe.instructions}; it holds {held}")
    sources(chosen, recipe.mixture)
    return [row for row in chosen if not left_out(row, recipe.mixture)]
