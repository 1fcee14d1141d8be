"""``uwm finetune``: continue from a trained model on other data, also of another embodiment.

The model is extended to what the data need (actions, cameras, instructions, embodiments, frame size). It is made
smaller only if the recipe says so. A table shows which weights are loaded, fresh, left out and learning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from infra import tracking
from pipelines.console import say
from pipelines.models import checkpoint
from pipelines.models.checkpoint import Normalizers, Settings
from pipelines.models.data import fit_of, stride_of, training_rows
from pipelines.models.resolve import resolve
from pipelines.recipe import Recipe
from pipelines.train.embodiments import Embodiments, keep_slots, match_embodiments, model_inputs
from pipelines.train.run import RunOptions, tracked
from pipelines.train.trainable import learning_sizes
from preprocessing.dataset.embodiment import Embodiment
from preprocessing.dataset.selection import text_encoder_of
from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore
from uwm_model.config import ModelConfig
from uwm_model.model import Model
from uwm_model.transplant import Inputs, part_of, plan_transplant, transplant


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """A planned finetuning: the new model's settings, its parent's checkpoint, and the inputs of both."""

    settings: Settings
    initial: Path
    before: Inputs  # of the parent
    after: Inputs  # of the new model


def plan(initial: Path, store_uri: str, recipe: Recipe, snapshot_id: str | None = None) -> Finetuning:
    """Plan the finetuning of the checkpoint ``initial`` on a snapshot, with the model extended to what the data need.

    Known embodiments keep their slots, and their normalisation unless the recipe has ``statistics: data``; new ones
    take free slots. Raises UserError if the store has no latents of the model's encoder, if an embodiment differs from
    the model's of that name, or if the recipe changes what cannot change.
    """
    parent = checkpoint.load_intact(initial)
    if recipe.diffusion:
        raise UserError("recipe: a finetuned model keeps its diffusion settings; remove the section diffusion")
    snapshot = LatentStore.open(store_uri).snapshot(snapshot_id)
    all_rows = snapshot.rows(parent.encoder_digest)
    if not all_rows:
        raise UserError(
            f"{store_uri}: holds no latents of the model's encoder, {parent.encoder} ({parent.encoder_digest}); "
            f"ingest with: uwm ingest SOURCE --store {store_uri} --encoder {parent.encoder}"
        )
    rows = training_rows(all_rows, recipe, store_uri)
    if (fit := fit_of(rows, store_uri)) != parent.fit:
        raise UserError(
            f"{store_uri}: its frames became squares by {fit}, those of the model by {parent.fit}; ingest with: "
            f"uwm ingest SOURCE --store {store_uri} --set fit={parent.fit}"
        )
    known_text = recipe.text_encoder in (None, parent.text_encoder)
    text = parent.text_encoder_digest if known_text else recipe.text_encoder
    language: dict[str, Any] = {"text_encoder": None, "text_encoder_digest": None, "text_width": 0}
    if text and recipe.model.get("text_width") != 0:
        language = text_encoder_of(snapshot, text, rows)
    found = match_embodiments(parent, rows, recipe)
    slots = found.slots(parent.model.cameras, recipe.model.get("cameras"))
    shape = snapshot.shape(rows[0]["cameras"][0]["segments"][0])
    size, stride = shape[2:], stride_of(rows[0], shape)
    # With frames of the pretraining's size, the model keeps its crop.
    seen_size = size if size[0] * stride != parent.frame_size else parent.model.latent_size
    model = _extend(parent, found, recipe, seen_size, len(slots), language.pop("text_width"))
    if any(seen > held for seen, held in zip(model.latent_size, size, strict=True)):
        raise UserError(
            f"{store_uri}: latents are {size}, but the model sees {model.latent_size}; ingest with --image-size "
            f"{model.latent_size[0] * stride}, or set model.latent_size={list(size)}"
        )
    settings = parent.model_copy(
        update={
            "model": model,
            "image_size": size[0] * stride,
            "stride": stride,
            **language,
            "embodiments": {
                name: keep_slots(spec, slots) for name, spec in found.known.items() if not _too_small(model, spec)
            },
            "pretrained_statistics": {
                name: Normalizers(spec.action_normalizer, spec.proprio_normalizer)
                for name, spec in parent.embodiments.items()
                if name in found.in_data
            },
            "data_statistics": found.data_statistics,
            "store": snapshot.uri,
            "snapshot": snapshot.id,
            "recipe": recipe.model_dump(),
            "parent": parent.run_id or str(initial),
            "step": 0,
            "checksums": False,  # its first checkpoint is to come
        }
    )
    before, after = model_inputs(parent, found, slots, model, settings.text_encoder_digest)
    try:
        settings.transplant = plan_transplant(
            checkpoint.shapes(initial), before, _fresh(settings, "meta").state_dict(), after
        )
    except ValueError as error:
        raise UserError(f"recipe: model.{error}") from None
    table(settings)  # raises its errors before anything is written
    return Finetuning(settings, initial, before, after)


def _extend(
    parent: Settings, found: Embodiments, recipe: Recipe, size: Sequence[int], cameras: int, text_width: int
) -> ModelConfig:
    """Return the parent's configuration, extended to the data, whose latents are of ``size``.

    Raises UserError if the recipe makes it too small for the data.
    """
    old, here = parent.model, [found.known[name] for name in found.in_data]
    needed = {
        "cameras": cameras,
        "latent_size": (max(old.latent_size[0], size[0]), max(old.latent_size[1], size[1])),
        "action_dim": max(old.action_dim, *(spec.action_dim for spec in here)),
        "proprio_dim": max(old.proprio_dim, *(spec.proprio_dim for spec in here)),
        "embodiments": max(old.embodiments, *(spec.index + 1 for spec in here)),
        "text_width": text_width,
    }
    try:
        model = ModelConfig(**dataclasses.asdict(old) | needed | recipe.model)
    except (TypeError, ValueError) as error:
        raise UserError(f"recipe: {error}") from None
    for name in found.in_data:
        for key, least in _too_small(model, found.known[name]).items():
            raise UserError(f"recipe: model.{key}: embodiment {name} needs {least}; remove the key, or raise it")
    return model


def _too_small(model: ModelConfig, spec: Embodiment) -> dict[str, int]:
    """Return the sizes of the model that are too small for an embodiment, with the sizes it needs.

    A model made smaller drops such embodiments.
    """
    needs = {"action_dim": spec.action_dim, "proprio_dim": spec.proprio_dim, "embodiments": spec.index + 1}
    return {key: needed for key, needed in needs.items() if getattr(model, key) < needed}


def _fresh(settings: Settings, device: str) -> Model:
    """Return the new model with fresh weights, which depend on the recipe's seed only."""
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(settings.recipe["seed"])
        return settings.build()


def table(settings: Settings) -> list[dict[str, Any]]:
    """Return for each part of a finetuned model how many values are loaded, fresh, left in the parent, learning.

    ``note`` names what is fresh or left. Raises UserError like ``learning``.
    """
    model, learn = _fresh(settings, "meta"), dict.fromkeys((part.part for part in settings.transplant), 0)
    for name, size in learning_sizes(model, Recipe.model_validate(settings.recipe), settings.fresh).items():
        learn[part_of(name)] += size
    rows = []
    for row in settings.transplant:
        counts = {"loaded": row.loaded, "fresh": row.fresh, "left": row.left, "learning": learn[row.part]}
        rows.append({"part": row.part, **counts, "note": row.note})
    return rows


def lines(settings: Settings) -> list[str]:
    """Return the table as text, with a last row for all parts together."""
    counts = ("loaded", "fresh", "left", "learning")
    rows = table(settings)
    rows.append({"part": "all", **{key: sum(row[key] for row in rows) for key in counts}, "note": ""})
    text = [f"{'part':<18}" + "".join(f"{key:>14}" for key in counts) + "  note"]
    text += [f"{row['part']:<18}" + "".join(f"{row[key]:>14,}" for key in counts) + f"  {row['note']}" for row in rows]
    if settings.recipe["lora"]:
        text.append("learning: the adapters, and all fresh values")
    return [line.rstrip() for line in text]


def write_start(finetuning: Finetuning, folder: Path) -> None:
    """Write the new model's initial checkpoint to ``folder``, and the table to the folder and the MLflow run."""
    settings = finetuning.settings
    text = "\n".join(lines(settings)) + "\n"
    (folder / "transplant.txt").write_text(text)
    if settings.run_id:
        tracking.log_text(settings.run_id, text, "transplant.txt")
    weights = checkpoint.load(finetuning.initial)[0].state_dict()
    fresh = _fresh(settings, "cpu").state_dict()
    checkpoint.write(folder, transplant(weights, finetuning.before, fresh, finetuning.after), settings)


def finetune(
    model: str,
    store_uri: str,
    recipe: Recipe,
    options: RunOptions,
    *,
    snapshot_id: str | None = None,
    embodiment: str | None = None,
) -> tuple[str, Path]:
    """Continue training from MODEL; return (MLflow run id, checkpoint folder).

    ``embodiment`` is needed only for a published MODEL (see :func:`pipelines.models.published.adopt`).
    """
    asked = {"model": model, "store": LatentStore.open(store_uri).uri, "snapshot": snapshot_id}

    def begin() -> tuple[Settings, Callable[[Path], None]]:
        planned = plan(resolve(model, store_uri, embodiment, snapshot_id, extend=True), store_uri, recipe, snapshot_id)
        if options.accept:
            options.accept(planned.settings)
        for line in lines(planned.settings):
            say(line)
        return planned.settings, partial(write_start, planned)

    return tracked("finetune", asked, begin, recipe, options)
