"""MLflow tracking: the server or database, and a run's metrics, settings and files.

Whatever MLflow, its database or its server raise becomes a ConnectionError of one line: where it looked, what was wrong
there, how to mend it. A server that does not answer is given up within a minute (infra/__init__.py), and never taken
for one that says that there is no such run or model.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient as MlflowClient
from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

SQLITE = "sqlite:///"
ENGINE_TRIES = 5  # to open a database: 3 seconds; MLflow's ten take 100
# What raises: MLflow, and what it talks to its servers, databases and artifact stores with.
RAISERS = ("mlflow", "sqlalchemy", "sqlite3", "alembic", "requests", "urllib3", "botocore", "boto3", "s3transfer")

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
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{Path.cwd() / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    for name in ("mlflow", "mlflow.store.db.utils", "alembic"):  # creating a database logs many lines
        logging.getLogger(name).setLevel(logging.ERROR)
    return uri


def place() -> str:
    """Return the URI in use, without a password."""
    return re.sub(r"//[^/@]*@", "//", mlflow.get_tracking_uri())


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Raise ConnectionError, with one line for a user, in place of what the block raises about MLflow."""
    from mlflow.store.db import utils  # imported lazily: slow

    utils.MAX_RETRY_COUNT = ENGINE_TRIES
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError) or type(error).__module__.partition(".")[0] in RAISERS):
            raise
        if type(error) is ConnectionError:  # of a call inside this one
            raise
        raise ConnectionError(_complaint(error)) from error


@contextlib.contextmanager
def if_there() -> Iterator[None]:
    """Leave the block if MLflow answers that there is no such thing, or that there can be none of that name."""
    try:
        yield
    except UnsupportedModelRegistryStoreURIException:
        raise
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise


def holds_nothing() -> bool:
    """Whether the SQLite file is missing. MLflow would make one, to find nothing in it."""
    uri = mlflow.get_tracking_uri()
    return uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE).partition("?")[0]).exists()


def _complaint(error: Exception) -> str:
    where, code = place(), getattr(error, "error_code", "")
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    reason = re.sub(r"^\([\w.]+\) ", "", first)[:200]  # SQLAlchemy's begin with a class in brackets
    hint = "check MLFLOW_TRACKING_URI"
    if "://" in where and where.startswith("http"):
        if "failed with exception" in reason or type(error).__module__.startswith(("requests", "urllib3")):
            return f"the MLflow server at {where} does not answer, or only with errors; is it up? {hint}"
        if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            signing_in = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            return f"the MLflow server at {where} refuses the credentials ({reason}); {signing_in}"
        if code == "ENDPOINT_NOT_FOUND" or "not in a valid JSON format" in reason:
            return f"{where}: what answers there is no MLflow server; {hint}"
    elif where.startswith(SQLITE) and "schema" not in reason:
        hint = "restore the file, wait for whoever holds it, or set MLFLOW_TRACKING_URI to another"
    return f"MLflow at {where}: {reason}; {hint}"


@answering()
def start_run(experiment: str, name: str, tags: dict[str, str]) -> str:
    """Start a run and return its id. With SQLite, artifacts go to ``mlartifacts`` next to the database."""
    uri = connect()
    client = MlflowClient()
    found = client.get_experiment_by_name(experiment)
    if found is None:
        root = None
        if uri.startswith(SQLITE):
            root = (Path(uri.removeprefix(SQLITE)).resolve().parent / "mlartifacts").as_uri()
        experiment_id = client.create_experiment(experiment, artifact_location=root, tags=OPENS_ON_RUNS)
    else:
        experiment_id = found.experiment_id
    return client.create_run(experiment_id, run_name=name, tags=tags).info.run_id


@answering()
def resume_run(run_id: str) -> None:
    """Mark an interrupted run as running again."""
    if holds_nothing():
        raise FileNotFoundError(f"the file is missing, and run {run_id} with it")
    MlflowClient().update_run(run_id, status="RUNNING")


@answering()
def end_run(run_id: str, status: str = "FINISHED") -> None:
    MlflowClient().set_terminated(run_id, status)


@answering()
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


@answering()
def log_metrics(run_id: str, metrics: dict[str, float], step: int) -> None:
    now = int(time.time() * 1000)
    MlflowClient().log_batch(run_id, metrics=[Metric(name, float(value), now, step) for name, value in metrics.items()])


@answering()
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


@answering()
def log_text(run_id: str, text: str, name: str) -> None:
    MlflowClient().log_text(run_id, text, name)


@answering()
def log_file(run_id: str, file: Path, folder: str) -> None:
    MlflowClient().log_artifact(run_id, str(file), folder)


@answering()
def log_folder(run_id: str, folder: Path, name: str) -> None:
    MlflowClient().log_artifacts(run_id, str(folder), name)


@answering()
def has_run(run_id: str) -> bool:
    connect()
    if holds_nothing():
        return False
    with if_there():
        return bool(MlflowClient().get_run(run_id))
    return False


@answering()
def tags(run_id: str) -> dict[str, str]:
    return dict(MlflowClient().get_run(run_id).data.tags)


@answering()
def run_ids(start: str) -> list[str]:
    """Return the ids of the runs that begin with ``start``, hexadecimal digits."""
    connect()
    if not re.fullmatch("[0-9a-f]{1,32}", start) or holds_nothing():
        return []
    client = MlflowClient()
    experiments = [one.experiment_id for one in client.search_experiments()]
    found = client.search_runs(experiments, f"attributes.run_id LIKE '{start}%'", max_results=100)
    return [run.info.run_id for run in found]


@answering()
def history(run_id: str, metric: str) -> list[tuple[int, float]]:
    """Return (step, value) of every logged point of a metric."""
    return [(point.step, point.value) for point in MlflowClient().get_metric_history(run_id, metric)]


@answering()
def last_steps(run_id: str) -> dict[str, int]:
    """Return the last step of each metric that the run has logged."""
    metrics = MlflowClient().get_run(run_id).data._metric_objs  # the same request without steps is what is public
    return {metric.key: metric.step for metric in metrics}


@answering()
def download(run_id: str, name: str) -> Path | None:
    """Download an artifact folder of a run; None if there is no such run or folder."""
    connect()
    if holds_nothing():
        return None
    with if_there():
        return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name))
    return None
