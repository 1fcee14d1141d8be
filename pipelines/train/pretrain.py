"""``uwm pretrain``: train one joint diffusion model of actions and video on all episodes of a store."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from pipelines.models.checkpoint import SPARE_EMBODIMENTS, Settings
from pipelines.models.data import fit_of, stride_of, training_rows
from pipelines.recipe import Recipe
from pipelines.train.run import RunOptions, tracked
from pipelines.train.trainable import learning
from preprocessing.dataset.embodiment import describe
from preprocessing.dataset.selection import by_embodiment, choose_encoder, text_encoder_of
from preprocessing.dataset.slots import share_slots
from preprocessing.encoders.vae import PIXELS
from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore
from uwm_model.config import DiffusionConfig, ModelConfig


def plan(store_uri: str, recipe: Recipe, snapshot_id: str | None = None) -> Settings:
    """Return the settings of a new model that fits the snapshot. Raises UserError if recipe and data disagree."""
    if recipe.lora:
        raise UserError("lora: adapters need trained weights; use uwm finetune, or remove the section lora")
    snapshot = LatentStore.open(store_uri).snapshot(snapshot_id)
    rows = training_rows(snapshot.rows(choose_encoder(snapshot, recipe.encoder)), recipe, store_uri)
    slots = recipe.model.get("cameras") or max(len(row["cameras"]) for row in rows)
    embodiments = {
        name: describe(name, members, index, slots, recipe.normalise)
        for index, (name, members) in enumerate(by_embodiment(rows).items())
    }
    rigs = share_slots([spec.cameras for spec in embodiments.values()], slots)
    embodiments = {
        name: dataclasses.replace(spec, cameras=rig)
        for (name, spec), rig in zip(embodiments.items(), rigs, strict=True)
    }
    shape = snapshot.shape(rows[0]["cameras"][0]["segments"][0])
    stride = stride_of(rows[0], shape)
    if recipe.model.get("observation") == "pixels" and not snapshot.rows(PIXELS):
        raise UserError(
            f"{store_uri}: holds no pixels, which this model observes; ingest again with --encoder {PIXELS}"
        )
    derived: dict[str, Any] = {
        "cameras": slots,
        "latent_channels": shape[1],
        "latent_size": shape[2:],
        "action_dim": max(1, *(spec.action_dim for spec in embodiments.values()), 1),
        "proprio_dim": max(1, *(spec.proprio_dim for spec in embodiments.values()), 1),
        "embodiments": len(embodiments) + SPARE_EMBODIMENTS,
    }
    text = text_encoder_of(snapshot, recipe.text_encoder, rows) if recipe.text_encoder else {}
    if text:
        derived["text_width"] = text.pop("text_width")
    try:
        model = ModelConfig(**derived | recipe.model)
        diffusion = DiffusionConfig(**recipe.diffusion)
    except (TypeError, ValueError) as error:
        raise UserError(f"recipe: {error}") from None
    sizes = (model.latent_channels, *model.latent_size)
    if sizes[0] != shape[1] or sizes[1] > shape[2] or sizes[2] > shape[3]:
        raise UserError(f"{store_uri}: latents are {shape[1:]}, but the recipe's model reads {sizes}")
    settings = Settings(
        model=model,
        diffusion=diffusion,
        encoder=rows[0]["encoder"],
        encoder_digest=rows[0]["encoder_digest"],
        image_size=stride * shape[2],
        fit=fit_of(rows, store_uri),
        stride=stride,
        **text,
        embodiments=embodiments,
        store=snapshot.uri,
        snapshot=snapshot.id,
        recipe=recipe.model_dump(),
    )
    with torch.device("meta"):
        learning(settings.build(), recipe)  # raises its errors before anything is written
    return settings


def pretrain(
    store_uri: str, recipe: Recipe, options: RunOptions, *, snapshot_id: str | None = None
) -> tuple[str, Path]:
    """Train from scratch; return (MLflow run id, checkpoint folder)."""
    asked = {"store": LatentStore.open(store_uri).uri, "snapshot": snapshot_id}
    return tracked("pretrain", asked, lambda: (plan(store_uri, recipe, snapshot_id), None), recipe, options)
