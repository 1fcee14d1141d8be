"""Checkpoints: folders of ``model.safetensors``, ``settings.json`` and a manifest, readable without this project."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from pipelines.models import manifest
from preprocessing.dataset.embodiment import Embodiment
from preprocessing.dataset.normalizer import Normalizer
from preprocessing.episode import Fit
from preprocessing.errors import UserError
from uwm_model.config import DiffusionConfig, ModelConfig
from uwm_model.kinds import build
from uwm_model.model import Model
from uwm_model.transplant import TransplantedPart


@dataclass(frozen=True)
class Normalizers:
    """The normalizers of one embodiment."""

    action: Normalizer
    proprio: Normalizer


SPARE_EMBODIMENTS = 4  # free slots of a new model, for embodiments added in finetuning
FORMAT = 1  # of settings.json; raise it when an older program would misread a newer file


class Settings(BaseModel):
    """Everything needed to use the weights, and where they come from."""

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    checksums: bool = False  # whether a manifest with checksums was written beside; not before version 0.2
    model: ModelConfig
    diffusion: DiffusionConfig
    encoder: str
    encoder_digest: str
    image_size: int = 0  # side of the encoded frames in pixels; 0 in old checkpoints: see frame_size
    fit: Fit = "stretch"  # how a frame of another shape becomes a square
    stride: int = 8  # of the encoder: pixels per latent
    text_encoder: str | None = None
    text_encoder_digest: str | None = None
    embodiments: dict[str, Embodiment]
    store: str
    snapshot: str
    recipe: dict[str, Any]
    parent: str | None = None  # the checkpoint this was finetuned from
    run_id: str | None = None
    step: int = 0
    # Finetuned models only, by embodiment: the parent's normalizers and those of the data. ``embodiments`` holds the
    # ones in use.
    pretrained_statistics: dict[str, Normalizers] = {}
    data_statistics: dict[str, Normalizers] = {}
    transplant: tuple[TransplantedPart, ...] = ()  # how the parent's weights were used

    def build(self) -> Model:
        """Return a model of the settings' kind with fresh weights. Settings without a kind are UWM's."""
        return build(self.model, self.diffusion)

    @property
    def frame_size(self) -> int:
        """Side of this model's input frames in pixels."""
        return self.image_size or self.model.latent_size[0] * self.stride

    def acting(self, embodiment: str | None, who: str) -> str:
        """Return the embodiment to act as: the given one, or the only one with actions.

        Raises UserError, on behalf of ``who``, if it has no actions or if there is a choice.
        """
        known = [name for name, spec in self.embodiments.items() if spec.action_dim]
        chosen = embodiment or (known[0] if len(known) == 1 else None)
        if chosen not in known:
            wrong = f"no embodiment {embodiment} with actions" if embodiment else "choose an embodiment"
            held = ", ".join(known) or "none with actions"
            raise UserError(f"{who}: {wrong}; give --embodiment NAME; the model knows {held}")
        return chosen

    @property
    def fresh(self) -> set[str]:
        """Names of a finetuned model's parameters that did not, or not fully, come from its parent."""
        return {name for part in self.transplant for name in part.names}


def save(
    folder: Path, weights: dict[str, torch.Tensor], settings: Settings, adapter: dict[str, torch.Tensor] | None = None
) -> None:
    """Write a checkpoint atomically.

    ``adapter`` holds LoRA adapters, which are already merged into the weights and also kept in a separate file.
    """
    building = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    write(building, weights, settings.model_copy(update={"checksums": True}), adapter)
    (building / manifest.MANIFEST).write_bytes(manifest.dump(manifest.measure(building.iterdir()), {}))
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)


def write(
    folder: Path, weights: dict[str, torch.Tensor], settings: Settings, adapter: dict[str, torch.Tensor] | None = None
) -> None:
    """Write a checkpoint's files, except for the manifest, into an existing folder; ``adapter`` as in ``save``."""
    for name, tensors in (("model", weights), ("adapter", adapter)):
        if tensors:
            contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, folder / f"{name}.safetensors")
    (folder / "settings.json").write_text(settings.model_dump_json(indent=1))


def load_settings(folder: Path) -> Settings:
    """Read ``settings.json``. Raises UserError if the folder is no checkpoint, or was written by a newer version."""
    try:
        text = (folder / "settings.json").read_text()
        if (made_by := json.loads(text).get("format", FORMAT)) > FORMAT:
            raise UserError(
                f"{folder}: settings of format {made_by}; this version reads up to {FORMAT}; upgrade this project"
            )
        return Settings.model_validate_json(text)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: not a checkpoint of this project ({reason})") from None


def load_intact(folder: Path) -> Settings:
    """Read ``settings.json``, and compare all files with their checksums. Raises UserError if one is damaged."""
    settings = load_settings(folder)
    manifest.verify(folder, settings.checksums)
    return settings


def load(folder: Path) -> tuple[Model, Settings]:
    """Load the model with its weights, in evaluation mode, and its settings.

    Raises UserError if that fails, or if a file is damaged.
    """
    settings = load_intact(folder)
    model = settings.build()
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder}: weights do not load ({str(error).splitlines()[0]})") from None
    return model.eval(), settings


def shapes(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights by name as meta tensors; only the shapes are read."""
    try:
        with safe_open(folder / "model.safetensors", "pt") as held:
            return {name: torch.empty(held.get_slice(name).get_shape(), device="meta") for name in held.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: weights do not load ({str(error).splitlines()[0]})") from None
