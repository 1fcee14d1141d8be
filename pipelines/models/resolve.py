"""Find the checkpoint folder of a MODEL given on the command line."""

from __future__ import annotations

from pathlib import Path

from preprocessing.errors import UserError, only


def registered_embodiment(model: str) -> str | None:
    """Return the embodiment that ``models:/...`` was registered for; None for any other MODEL."""
    if not model.startswith("models:/"):
        return None
    from infra import registry, tracking  # imports MLflow: slow

    tracking.connect()
    return registry.embodiment_of(model)


def resolve(
    model: str,
    store_uri: str | None = None,
    embodiment: str | None = None,
    snapshot_id: str | None = None,
    extend: bool = False,
    cache: Path | None = None,
) -> Path:
    """Return the checkpoint folder of MODEL.

    MODEL is a checkpoint folder or a run's folder, ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, a run id, or a
    published UWM file. A run id may be shortened to its first characters. Only a published file needs the other
    arguments (see :func:`pipelines.models.published.adopt`).
    Raises UserError if there is no such model.
    """
    path = Path(model)
    if path.is_file():
        from pipelines.models.published import adopt

        if store_uri is None:
            raise UserError(f"{model}: a published checkpoint records no embodiment; give --store with episodes of it")
        return adopt(path, store_uri, embodiment, snapshot_id, extend, cache)
    if path.is_dir():
        return path if (path / "settings.json").exists() else path / "checkpoint"

    from infra import registry, tracking  # imports MLflow: slow

    tracking.connect()
    if model.startswith("models:/"):
        found = registry.download(model)
        hint = "look up the versions in MLflow, or check MLFLOW_TRACKING_URI"
    else:
        found = tracking.download(_run_id(model), "checkpoint")
        hint = "give a checkpoint folder, a run id, models:/NAME@ALIAS or a published checkpoint's file"
    if found is None:
        raise UserError(f"{model}: no such model in {tracking.place()}; {hint}")
    return found


def _run_id(start: str) -> str:
    """Return the id of the only run whose id begins with ``start``; ``start`` itself if there is none."""
    from infra import tracking

    found = tracking.run_ids(start)
    return only(start, found, "runs") if found else start
