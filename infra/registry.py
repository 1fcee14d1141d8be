"""The MLflow model registry: versions of policies, their evaluations, and the alias that names the champion."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec


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
    """Log the checkpoint as a model of its run and register it; returns the version.

    ``code`` is a models-from-code file; ``inputs`` gives (dtype, shape) by name, so that MLflow refuses any other;
    ``parameters`` are texts that may come with them.
    """
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(dtype), shape, key) for key, (dtype, shape) in inputs.items()]),
        outputs=Schema([TensorSpec(np.dtype("float32"), output)]),
        params=ParamSchema([ParamSpec(name, DataType.string, "") for name in parameters]),
    )
    with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would have predict's type hints, in place of the signature
        info = mlflow.pyfunc.log_model(
            name="policy",
            python_model=str(code),
            artifacts={"checkpoint": str(checkpoint)},
            model_config=model_config,
            signature=signature,
            pip_requirements=["unified-world-models"],
        )
    client = MlflowClient()  # MLflow's own way through log_model prints to stderr, and sets tags one by one
    with contextlib.suppress(MlflowException):  # it is there already
        client.create_registered_model(name)
    created = client.create_model_version(name, f"models:/{info.model_id}", run_id, tags, model_id=info.model_id)
    return str(created.version)


def version_of(name: str, version_or_alias: str) -> tuple[str, str] | None:
    """(version, run id) of NAME at a version number or an alias; None where there is none."""
    client = MlflowClient()
    try:
        if version_or_alias.isdigit():
            found = client.get_model_version(name, version_or_alias)
        else:
            found = client.get_model_version_by_alias(name, version_or_alias)
    except MlflowException:
        return None
    return str(found.version), str(found.run_id)


def metrics(run_id: str) -> dict[str, float]:
    return dict(MlflowClient().get_run(run_id).data.metrics)


def move_alias(name: str, alias: str, version: str, notes: dict[str, str]) -> None:
    """Point the alias at the version, with notes (the previous champion among them) on the version first."""
    client = MlflowClient()
    for key, value in notes.items():
        client.set_model_version_tag(name, version, key, value)
    client.set_registered_model_alias(name, alias, version)


def promotion_lock(name: str) -> FileLock:
    """Held while a gate is judged and the alias moved: MLflow itself lets the last of two writers win."""
    return FileLock(Path(tempfile.gettempdir()) / f"uwm-promote-{name.replace('/', '_')}.lock")


def download(model: str) -> Path | None:
    """The checkpoint folder inside ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``; None where there is none."""
    try:
        return Path(mlflow.artifacts.download_artifacts(f"{model}/artifacts/checkpoint"))
    except (MlflowException, OSError):
        return None
