"""``uwm finetune``: go on from a trained model, on other data, of another robot if need be.

The model is extended to what the data need (actions, cameras, instructions, robots, sizes), and never made smaller
unless the recipe says so. What of its weights is loaded, what is fresh, what is left and what learns is a table.
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
from pipelines.models.data import stride_of, training_rows
from pipelines.models.resolve import resolve
from pipelines.recipe import Recipe
from pipelines.train.embodiments import Robots, in_slots, inputs, robots
from pipelines.train.run import RunOptions, tracked
from pipelines.train.trainable import learning_sizes
from preprocessing.dataset.embodiment import Embodiment
from preprocessing.dataset.selection import text_encoder_of
from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore
from uwm_model.config import ModelConfig
from uwm_model.kinds import Model
from uwm_model.transplant import Inputs, part_of, plan_transplant, transplant


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """The new model's settings, the checkpoint it goes on from, and what both of them read."""

    settings: Settings
    initial: Path
    before: Inputs
    after: Inputs


def plan(initial: Path, store_uri: str, recipe: Recipe, snapshot_id: str | None = None) -> Finetuning:
    """A trained model's settings over another snapshot, extended to what its data need.

    Embodiments that the model knows keep their slots, and their normalisation unless the recipe's ``statistics`` are
    those of the data; new ones take free slots. Raises UserError where the store has no latents of the model's encoder,
    an embodiment is not what the model knows by its name, or the recipe asks for another model.
    """
    parent = checkpoint.load_settings(initial)
    if recipe.diffusion:
        raise UserError("recipe: a finetuned model keeps its diffusion; remove the section diffusion")
    snapshot = LatentStore.open(store_uri).snapshot(snapshot_id)
    all_rows = snapshot.rows(parent.encoder_digest)
    if not all_rows:
        raise UserError(
            f"{store_uri}: holds no latents of the model's encoder, {parent.encoder} ({parent.encoder_digest}); "
            f"ingest with: uwm ingest SOURCE --store {store_uri} --encoder {parent.encoder}"
        )
    rows = training_rows(all_rows, recipe, store_uri)
    known_text = recipe.text_encoder in (None, parent.text_encoder)
    text = parent.text_encoder_digest if known_text else recipe.text_encoder
    told: dict[str, Any] = {"text_encoder": None, "text_encoder_digest": None, "text_width": 0}
    if text and recipe.model.get("text_width") != 0:
        told = text_encoder_of(snapshot, text, rows)
    found = robots(parent, rows, recipe)
    slots = found.slots(parent.model.cameras, recipe.model.get("cameras"))
    shape = snapshot.shape(rows[0]["cameras"][0]["segments"][0])
    size, stride = shape[2:], stride_of(rows[0], shape)
    whole = size if size[0] * stride != parent.frame_size else parent.model.latent_size  # as in pretraining
    model = _extended(parent, found, recipe, whole, len(slots), told.pop("text_width"))
    if any(seen > held for seen, held in zip(model.latent_size, size, strict=True)):
        raise UserError(
            f"{store_uri}: latents are {size}, the model sees {model.latent_size} of them; ingest with --image-size "
            f"{model.latent_size[0] * stride}, or set model.latent_size={list(size)}"
        )
    settings = parent.model_copy(
        update={
            "model": model,
            "image_size": size[0] * stride,
            "stride": stride,
            **told,
            "embodiments": {
                name: in_slots(robot, slots) for name, robot in found.known.items() if not _lacking(model, robot)
            },
            "pretrained_statistics": {
                name: Normalizers(robot.action_normalizer, robot.proprio_normalizer)
                for name, robot in parent.embodiments.items()
                if name in found.here
            },
            "data_statistics": found.data_statistics,
            "store": snapshot.uri,
            "snapshot": snapshot.id,
            "recipe": recipe.model_dump(),
            "parent": parent.run_id or str(initial),
            "step": 0,
        }
    )
    before, after = inputs(parent, found, slots, model, settings.text_encoder_digest)
    try:
        settings.transplant = plan_transplant(
            checkpoint.shapes(initial), before, _fresh(settings, "meta").state_dict(), after
        )
    except ValueError as error:
        raise UserError(f"recipe: model.{error}") from None
    table(settings)  # whose errors come before anything is written
    return Finetuning(settings, initial, before, after)


def _extended(
    parent: Settings, found: Robots, recipe: Recipe, size: Sequence[int], cameras: int, text_width: int
) -> ModelConfig:
    """Return the parent's configuration with room for the data, whose latents are of ``size``.

    Raises UserError if the recipe leaves too little.
    """
    old, here = parent.model, [found.known[name] for name in found.here]
    needed = {
        "cameras": cameras,
        "latent_size": (max(old.latent_size[0], size[0]), max(old.latent_size[1], size[1])),
        "action_dim": max(old.action_dim, *(robot.action_dim for robot in here)),
        "proprio_dim": max(old.proprio_dim, *(robot.proprio_dim for robot in here)),
        "embodiments": max(old.embodiments, *(robot.index + 1 for robot in here)),
        "text_width": text_width,
    }
    try:
        model = ModelConfig(**dataclasses.asdict(old) | needed | recipe.model)
    except (TypeError, ValueError) as error:
        raise UserError(f"recipe: {error}") from None
    for name in found.here:
        for key, needs in _lacking(model, found.known[name]).items():
            raise UserError(f"recipe: model.{key}: embodiment {name} needs {needs}; leave it out, or give no less")
    return model


def _lacking(model: ModelConfig, robot: Embodiment) -> dict[str, int]:
    """What a robot needs of the sizes that are too small for it. A smaller model forgets such robots."""
    needs = {"action_dim": robot.action_dim, "proprio_dim": robot.proprio_dim, "embodiments": robot.index + 1}
    return {key: needed for key, needed in needs.items() if getattr(model, key) < needed}


def _fresh(settings: Settings, device: str) -> Model:
    """The new model before anything is loaded: the same for the same seed."""
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(settings.recipe["seed"])
        return settings.build()


def table(settings: Settings) -> list[dict[str, Any]]:
    """A row for each part of a finetuned model: values loaded, fresh, left in its parent, learning; and what is new."""
    model, learn = _fresh(settings, "meta"), dict.fromkeys((part.part for part in settings.transplant), 0)
    for name, size in learning_sizes(model, Recipe.model_validate(settings.recipe), settings.fresh).items():
        learn[part_of(name)] += size
    rows = []
    for row in settings.transplant:
        counts = {"loaded": row.loaded, "fresh": row.fresh, "left": row.left, "learning": learn[row.part]}
        rows.append({"part": row.part, **counts, "note": row.note})
    return rows


def lines(settings: Settings) -> list[str]:
    """The table for people, with a line for all parts together."""
    counts = ("loaded", "fresh", "left", "learning")
    rows = table(settings)
    rows.append({"part": "all", **{key: sum(row[key] for row in rows) for key in counts}, "note": ""})
    said = [f"{'part':<18}" + "".join(f"{key:>14}" for key in counts) + "  note"]
    said += [f"{row['part']:<18}" + "".join(f"{row[key]:>14,}" for key in counts) + f"  {row['note']}" for row in rows]
    if settings.recipe["lora"]:
        said.append("learning: the adapters, and what is fresh, in full")
    return [line.rstrip() for line in said]


def write_start(finetuning: Finetuning, folder: Path) -> None:
    """The checkpoint that training starts from, of the new model. The table goes beside it, and to the run."""
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
        for line in lines(planned.settings):
            say(line)
        return planned.settings, partial(write_start, planned)

    return tracked("finetune", asked, begin, recipe, options)
