"""Select the episodes and windows of a store that a recipe trains or validates on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipelines.models.checkpoint import Settings
from pipelines.recipe import Recipe
from preprocessing.dataset.loader import LatentDataset, WindowShape
from preprocessing.dataset.selection import left_out, source_names, split
from preprocessing.encoders.vae import PIXELS
from preprocessing.errors import UserError
from preprocessing.store.rows import EpisodeRow, TrainingRow
from preprocessing.store.snapshot import Snapshot


def dataset(
    settings: Settings, validation: bool, recipe: Recipe, tell: Callable[[int, int], None] | None = None
) -> LatentDataset:
    """Return the training or the held-out episodes of the settings' snapshot, as the recipe selects them.

    ``tell(done, total)`` is called with the bytes copied to the local cache. Raises UserError if the model observes
    pixels that the store does not hold.
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
    instructions = None
    if settings.text_encoder_digest:
        instructions = snapshot.instruction_vectors(settings.text_encoder_digest)
    mixture = {} if validation else {name: share for name, share in recipe.mixture.items() if share}
    return LatentDataset(
        snapshot, rows, settings.embodiments, shape, pixels, instructions, mixture, recipe.shuffle_windows, tell
    )


def training_rows(rows: list[TrainingRow], recipe: Recipe, store_uri: str) -> list[TrainingRow]:
    """Return the rows that the recipe trains on. Raises UserError if there are none, or its mixture does not fit."""
    chosen = split(rows, recipe.instructions, recipe.validation_share, validation=False)
    if not chosen:
        held = sorted({row["instruction"] for row in rows if row["instruction"]})
        raise UserError(f"{store_uri}: no episode with instructions {recipe.instructions}; it holds {held}")
    source_names(chosen, recipe.mixture)
    return [row for row in chosen if not left_out(row, recipe.mixture)]


def stride_of(row: EpisodeRow, shape: Sequence[int]) -> int:
    """Return the encoder's stride in pixels per latent. ``shape`` [N, C, h, w] is that of the row's latents."""
    return row["image_size"] // shape[2] if row["image_size"] else 8  # before version 0.2 always 8, and not recorded
