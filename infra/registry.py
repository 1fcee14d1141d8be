"""The MLflow model registry: versions of policies, their metrics, and the alias of the champion."""

from __future__ import annotations

import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

from infra.tracking import answering, holds_nothing, if_there

NAME = re.compile(r"[\w .-]{1,200}")  # of a model: MLflow refuses / and :, and @ separates an alias
# MLflow gives "latest" and "v1" a meaning of their own.
ALIAS = re.compile(r"(?!latest$|v\d+$)[\w-]{1,200}", re.IGNORECASE | re.ASCII)


@answering()
def register(
    run_id: str,
    name: str,
    *,
    checkpoint: Path,
    code: Path,
    inputs: dict[str, tuple[str, tuple[int, ...]]],
    output: tuple[int, ...],
    parameters: tuple[str, ...],
    model_config: dict[str, Any],
    tags: dict[str, str],
) -> str:
    """Log the checkpoint as a model of its run and register it; return the version number.

    ``code`` is a models-from-code file. ``inputs`` gives (dtype, shape) by name; MLflow refuses others. ``parameters``
    names optional strings of a request.
    """
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(dtype), shape, key) for key, (dtype, shape) in inputs.items()]),
        outputs=Schema([TensorSpec(np.dtype("float32"), output)]),
        params=ParamSchema([ParamSpec(name, DataType.string, "") for name in parameters]),
    )
    with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow asks for type hints in predict, which would replace the signature
        info = mlflow.pyfunc.log_model(
            name="policy",
            python_model=str(code),
            artifacts={"checkpoint": str(checkpoint)},
            model_config=model_config,
            signature=signature,
            pip_requirements=["unified-world-models"],
        )
    client = MlflowClient()  # registering through log_model prints to stderr, and sets tags one by one
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = client.create_model_version(name, f"models:/{info.model_id}", run_id, tags, model_id=info.model_id)
    return str(created.version)


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model, with the aliases that point to it."""

    name: str
    version: str
    aliases: tuple[str, ...]
    tags: dict[str, str]


@answering()
def versions_of(run_id: str) -> list[RegisteredVersion]:
    """Return the registered versions of a run's model, the newest first."""
    client = MlflowClient()
    found = client.search_model_versions(f"run_id='{run_id}'")
    read = [client.get_model_version(one.name, one.version) for one in found]  # a search returns no aliases
    newest = sorted(read, key=lambda one: one.creation_timestamp, reverse=True)
    return [RegisteredVersion(one.name, str(one.version), tuple(one.aliases), dict(one.tags)) for one in newest]


@answering()
def version_of(name: str, version_or_alias: str) -> tuple[str, str] | None:
    """Return (version, run id) of a model's version number or alias, None if there is no such version."""
    if holds_nothing():
        return None
    client = MlflowClient()
    find = client.get_model_version if version_or_alias.isdigit() else client.get_model_version_by_alias
    with if_there():
        found = find(name, version_or_alias)
        return str(found.version), str(found.run_id)
    return None


@answering()
def embodiment_of(model: str) -> str | None:
    """Return the embodiment that ``models:/...`` was registered for; None if there is no such model."""
    if holds_nothing():
        return None
    with if_there():
        return (_flavor(model).get("config") or {}).get("embodiment")
    return None


def _flavor(model: str) -> dict[str, Any]:
    """Return what MLflow recorded of the model: its ``config``, and its ``artifacts`` with their paths."""
    return mlflow.models.get_model_info(model).flavors["python_function"]


@answering()
def metrics(run_id: str) -> dict[str, float]:
    return dict(MlflowClient().get_run(run_id).data.metrics)


@answering()
def move_alias(name: str, alias: str, version: str, notes: dict[str, str]) -> None:
    """Set notes as tags of the version, then point the alias at it."""
    client = MlflowClient()
    for key, value in notes.items():
        client.set_model_version_tag(name, version, key, value)
    client.set_registered_model_alias(name, alias, version)


def promotion_lock(name: str) -> FileLock:
    """Return the lock to hold while the gate decides and the alias moves: in MLflow the last of two writers wins."""
    return FileLock(Path(tempfile.gettempdir()) / f"uwm-promote-{name.replace('/', '_')}.lock")


@answering()
def download(model: str) -> Path | None:
    """Download the checkpoint of ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``; None if there is none."""
    if holds_nothing():
        return None
    with if_there():
        folder = _flavor(model)["artifacts"]["checkpoint"]["path"]  # named like the folder that was registered
        return Path(mlflow.artifacts.download_artifacts(f"{model}/{folder}"))
    return None
