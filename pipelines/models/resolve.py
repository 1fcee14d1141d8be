"""MODEL on the command line: what it may name, and the checkpoint folder behind it."""

from __future__ import annotations

from pathlib import Path

from infra import registry, tracking
from preprocessing.errors import UserError


def resolve(model: str) -> Path:
    """The checkpoint folder of MODEL: a folder, ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or a run id."""
    folder = Path(model)
    if folder.is_dir():
        return folder if (folder / "settings.json").exists() else folder / "checkpoint"
    if model.startswith("models:/"):
        tracking.connect()
        found = registry.download(model)
        hint = "list versions in the MLflow page, or check MLFLOW_TRACKING_URI"
    else:
        found = tracking.download(model, "checkpoint")
        hint = "give a checkpoint folder, a run id, models:/NAME@ALIAS or a published checkpoint's file"
    if found is None:
        raise UserError(f"{model}: no such model; {hint}")
    return found
