"""MLflow tracking: the server or database, and a run's metrics, settings and files."""

from __future__ import annotations

import logging
import os
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient as MlflowClient

OPENS_ON_RUNS = {"mlflow.experimentKind": "custom_model_development"}  # otherwise the UI opens on traces of chats


def ui() -> str:
    """Return what opens MLflow: the server's address, or the command that starts one. Holds no password."""
    uri = connect()
    if not uri.startswith("http"):
        return f"mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite:") else "mlflow ui"
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def connect(uri: str | None = None) -> str:
    """Use this URI, MLFLOW_TRACKING_URI, or the SQLite file ``mlflow.db`` in the current folder; return the URI."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    for name in ("mlflow", "mlflow.store.db.utils", "alembic"):  # creating a database logs many lines
        logging.getLogger(name).setLevel(logging.ERROR)
    return uri


def start_run(experiment: str, name: str, tags: dict[str, str]) -> str:
    """Start a run and return its id. With SQLite, artifacts go to ``mlartifacts`` next to the database."""
    uri = connect()
    client = MlflowClient()
    found = client.get_experiment_by_name(experiment)
    if found is None:
        root = None
        if uri.startswith("sqlite:///"):
            root = (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()
        experiment_id = client.create_experiment(experiment, artifact_location=root, tags=OPENS_ON_RUNS)
    else:
        experiment_id = found.experiment_id
    return client.create_run(experiment_id, run_name=name, tags=tags).info.run_id


def resume_run(run_id: str) -> None:
    """Mark an interrupted run as running again."""
    MlflowClient().update_run(run_id, status="RUNNING")


def end_run(run_id: str, status: str = "FINISHED") -> None:
    MlflowClient().set_terminated(run_id, status)


def log_settings(run_id: str, settings: dict[str, Any]) -> None:
    """Log nested settings as flat parameters, such as ``model.width``."""
    client = MlflowClient()

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            client.log_param(run_id, prefix, str(value)[:500])

    walk("", settings)


def log_metrics(run_id: str, metrics: dict[str, float], step: int) -> None:
    now = int(time.time() * 1000)
    MlflowClient().log_batch(run_id, metrics=[Metric(name, float(value), now, step) for name, value in metrics.items()])


def log_image(run_id: str, image: Any, name: str, step: int) -> None:
    """Log an image, uint8 array [H, W, 3], of the series ``name``."""
    MlflowClient().log_image(run_id, image, key=name, step=step)


def system_metrics(run_id: str) -> Any:
    """Start a monitor of this machine; ``finish()`` stops it. A resumed run continues its series."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    monitor = SystemMetricsMonitor(run_id, resume_logging=True)
    monitor.start()
    return monitor


def log_text(run_id: str, text: str, name: str) -> None:
    MlflowClient().log_text(run_id, text, name)


def log_file(run_id: str, file: Path, folder: str) -> None:
    MlflowClient().log_artifact(run_id, str(file), folder)


def log_folder(run_id: str, folder: Path, name: str) -> None:
    MlflowClient().log_artifacts(run_id, str(folder), name)


def has_run(run_id: str) -> bool:
    connect()
    try:
        return bool(MlflowClient().get_run(run_id))
    except MlflowException:
        return False


def tags(run_id: str) -> dict[str, str]:
    return dict(MlflowClient().get_run(run_id).data.tags)


def run_ids(start: str) -> list[str]:
    """Return the ids of the runs that begin with ``start``, hexadecimal digits."""
    if not re.fullmatch("[0-9a-f]{1,32}", start):
        return []
    connect()
    client = MlflowClient()
    experiments = [one.experiment_id for one in client.search_experiments()]
    found = client.search_runs(experiments, f"attributes.run_id LIKE '{start}%'", max_results=100)
    return [run.info.run_id for run in found]


def history(run_id: str, metric: str) -> list[tuple[int, float]]:
    """Return (step, value) of every logged point of a metric."""
    return [(point.step, point.value) for point in MlflowClient().get_metric_history(run_id, metric)]


def download(run_id: str, name: str) -> Path | None:
    """Download an artifact folder of a run; None if there is no such run or folder."""
    connect()
    try:
        return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name))
    except (MlflowException, OSError):
        return None
