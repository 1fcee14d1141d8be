"""Select the episodes and windows of a store that a recipe trains or validates on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from pipelines.models.checkpoint import Settings
from pipelines.recipe import Recipe
from preprocessing.dataset.loader import LatentDataset, WindowShape
from preprocessing.dataset.selection import check_names, left_out, only_from, source_names, split
from preprocessing.encoders.vae import PIXELS
from preprocessing.episode import Fit
from preprocessing.errors import UserError
from preprocessing.store.rows import EpisodeRow, TrainingRow
from preprocessing.store.snapshot import Snapshot
from uwm_model.config import ModelConfig


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
        for row in selected(snapshot.rows(settings.encoder_digest), recipe, validation)
        if row["embodiment"] in settings.embodiments and not left_out(row, recipe.mixture)
    ]
    shape = window_shape(settings.model)
    pixels = snapshot.rows(PIXELS) if settings.model.observation == "pixels" else None
    instructions = None
    if settings.text_encoder_digest:
        instructions = snapshot.instruction_vectors(settings.text_encoder_digest)
    mixture = {} if validation else {name: share for name, share in recipe.mixture.items() if share}
    return LatentDataset(
        snapshot,
        rows,
        settings.embodiments,
        shape,
        pixels,
        instructions,
        mixture,
        recipe.shuffle_windows,
        tell,
        inside=recipe.windows == "inside" and not validation,
    )


def window_shape(model: ModelConfig) -> WindowShape:
    return WindowShape(
        model.cameras,
        model.observed_frames,
        model.future_frames,
        model.action_chunk,
        model.action_dim,
        model.proprio_dim,
    )


def selected(rows: list[TrainingRow], recipe: Recipe, validation: bool) -> list[TrainingRow]:
    """Return the training or the held-out rows of the recipe's ``data``, before its mixture leaves any out."""
    return split(only_from(rows, recipe.data), recipe.instructions, recipe.validation_share, validation)


def training_rows(rows: list[TrainingRow], recipe: Recipe, store_uri: str) -> list[TrainingRow]:
    """Return the rows that the recipe trains on. Raises UserError if there are none, or its mixture does not fit."""
    check_names(rows, recipe.data)
    chosen = selected(rows, recipe, validation=False)
    if not chosen and recipe.instructions:
        held = sorted({row["instruction"] for row in only_from(rows, recipe.data) if row["instruction"]})
        raise UserError(f"{store_uri}: no episode with instructions {recipe.instructions}; it holds {held}")
    if not chosen:
        raise UserError(f"{store_uri}: no episode to train on, all are held out; lower validation_share")
    source_names(chosen, recipe.mixture)
    return [row for row in chosen if not left_out(row, recipe.mixture)]


def fit_of(rows: Sequence[EpisodeRow], store_uri: str) -> Fit:
    """Return how the frames of these rows became squares. Raises UserError if they did so in several ways."""
    found = Counter(row["fit"] or "stretch" for row in rows)
    if len(found) > 1:
        held = ", ".join(f"{fit} ({count} episodes)" for fit, count in found.items())
        raise UserError(
            f"{store_uri}: its frames became squares in several ways: {held}; ingest all with the same --set fit=..."
        )
    return next(iter(found))


def stride_of(row: EpisodeRow, shape: Sequence[int]) -> int:
    """Return the encoder's stride in pixels per latent. ``shape`` [N, C, h, w] is that of the row's latents."""
    return row["image_size"] // shape[2] if row["image_size"] else 8  # before version 0.2 always 8, and not recorded
