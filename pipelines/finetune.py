"""``uwm finetune``: go on from a trained model, on other data."""

from __future__ import annotations

from pathlib import Path

from pipelines import checkpoint
from pipelines.checkpoint import Settings
from pipelines.pretrain import sentences_of, training_rows
from pipelines.published import resolve
from pipelines.recipe import STRIDE, Recipe
from pipelines.runs import tracked
from preprocessing.episode import UserError
from preprocessing.store import LatentStore
from preprocessing.windows import by_embodiment, describe


def plan(initial: Path, store_uri: str, recipe: Recipe, snapshot_id: str | None = None) -> Settings:
    """The pretrained model's settings over another snapshot.

    Embodiments that pretraining knew keep their slots and normalisation; new ones take free slots. Raises UserError
    where the store's encoder, cameras or widths do not fit the model.
    """
    settings = checkpoint.load_settings(initial)
    if recipe.model or recipe.diffusion:
        raise UserError("recipe: a finetuned model keeps its shape; remove the sections model and diffusion")
    snapshot = LatentStore.open(store_uri).snapshot(snapshot_id)
    all_rows = snapshot.rows(settings.encoder_digest)
    if not all_rows:
        raise UserError(
            f"{store_uri}: holds no latents of the model's encoder, {settings.encoder} ({settings.encoder_digest}); "
            f"ingest with: uwm ingest SOURCE --store {store_uri} --encoder {settings.encoder}"
        )
    rows = training_rows(all_rows, recipe, store_uri)
    if settings.text_encoder_digest:
        sentences_of(snapshot, settings.text_encoder_digest, rows)
    elif recipe.text_encoder:
        raise UserError(
            f"text_encoder: the model was pretrained without; pretrain with text_encoder={recipe.text_encoder}"
        )
    shape = snapshot.shape(rows[0]["cameras"][0]["segments"][0])
    size = settings.image_size or settings.model.latent_size[0] * STRIDE
    if (shape[1], shape[2] * STRIDE) != (settings.model.latent_channels, size):
        raise UserError(f"{store_uri}: latents are {shape[1:]}, not the model's; ingest with --image-size {size}")
    for name, members in by_embodiment(rows).items():
        known = settings.embodiments.get(name)
        index = known.index if known else len(settings.embodiments)
        normalise = settings.recipe.get("normalise", "extremes") if known else recipe.normalise  # like with like
        fresh = describe(name, members, index, settings.model.cameras, normalise)
        if known is not None:
            if misfits := known.misfits(fresh):
                raise UserError(
                    f"embodiment {name} is not as in pretraining: {'; '.join(misfits)}; if it is another robot, give "
                    "it a name of its own (--contract, embodiment: NAME)"
                )
            continue
        for what, needed, limit in (
            ("embodiments", index + 1, settings.model.embodiments),
            ("action_dim", fresh.action_dim, settings.model.action_dim),
            ("proprio_dim", fresh.proprio_dim, settings.model.proprio_dim),
        ):
            if needed > limit:
                raise UserError(
                    f"embodiment {name}: needs {what} {needed}, the model has {limit}; "
                    f"pretrain with model.{what}={needed}"
                )
        settings.embodiments[name] = fresh
    return settings.model_copy(
        update={
            "store": snapshot.uri,
            "snapshot": snapshot.id,
            "recipe": recipe.model_dump(),
            "parent": settings.run_id or str(initial),
            "step": 0,
        }
    )


def finetune(
    model: str,
    store_uri: str,
    recipe: Recipe,
    output: Path,
    snapshot_id: str | None = None,
    address: str | None = None,
    verbose: bool = False,
    embodiment: str | None = None,
    checkpoints: str | None = None,
    new: bool = False,
) -> tuple[str, Path]:
    """Train on from MODEL; returns (MLflow run id, checkpoint folder)."""
    initial = resolve(model, store_uri, embodiment, snapshot_id)
    asked = {"model": model, "store": LatentStore.open(store_uri).uri, "snapshot": snapshot_id}
    planned = lambda: plan(initial, store_uri, recipe, snapshot_id)  # noqa: E731
    return tracked("finetune", asked, planned, recipe, initial, output, checkpoints, new, address, verbose)
