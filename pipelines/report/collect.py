"""``uwm report MODEL``: the page of a run or a registered model, from what was recorded of it.

The checkpoint leads to its run, the run to its parents, evaluations and model versions, the settings to the snapshot of
the store. What is gone or was never recorded is left out, with a sentence.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from infra import registry, tracking
from pipelines.models.checkpoint import Settings, load_settings
from pipelines.models.resolve import resolve
from pipelines.outputs import check_writable
from pipelines.registry.promote import Promotion
from pipelines.report.page import write_report
from preprocessing.errors import UserError
from preprocessing.store.snapshot import Snapshot
from preprocessing.store.store import LatentStore


def report(model: str, output: Path, store_uri: str | None = None) -> list[str]:
    """Write the page of MODEL to ``output`` and to its MLflow run; return sentences on what is missing.

    ``store_uri`` says where the store is now, if it has moved.
    """
    check_writable(output.parent, "--output")
    settings = load_settings(resolve(model))
    missing: list[str] = []
    runs = _runs(settings, missing)
    versions = registry.versions_of(settings.run_id) if settings.run_id and runs else []
    with TemporaryDirectory() as scratch:
        evaluations = _evaluations(settings.run_id, Path(scratch)) if runs else {}
        if not evaluations:
            missing.append("No evaluation was recorded: uwm evaluate MODEL --store URI, --env SUITE:TASK, or both.")
        elif not any("closed_loop" in _numbers(folder) for folder in evaluations.values()):
            missing.append("No rollouts were recorded: uwm evaluate MODEL --env SUITE:TASK.")
        output.parent.mkdir(parents=True, exist_ok=True)
        write_report(
            output,
            title=f"{_name(model, settings)}: {', '.join(settings.embodiments)}",
            stages=[],
            snapshot=_snapshot(settings, store_uri, missing),
            runs=runs,
            evaluations=evaluations,
            promotion=_promotion(versions),
            missing=missing,
        )
    if runs and settings.run_id:
        tracking.log_file(settings.run_id, output, "report")
    return missing


def _name(model: str, settings: Settings) -> str:
    if model.startswith("models:/"):
        return model.removeprefix("models:/")
    return f"{settings.recipe.get('name', 'run')} {(settings.run_id or '')[:8]}".strip()


def _runs(settings: Settings, missing: list[str]) -> dict[str, str]:
    """Return the run and its parents by label, the first one first."""
    chain: list[str] = []
    run_id = settings.run_id
    while run_id and run_id not in chain and tracking.has_run(run_id):
        chain.insert(0, run_id)
        run_id = tracking.tags(run_id).get("parent") or None
    if run_id and run_id not in chain:
        missing.append(f"MLflow does not know the run {run_id}: check MLFLOW_TRACKING_URI.")
    elif not chain:
        missing.append("The checkpoint has no run, so there are no learning curves.")
    labels: dict[str, str] = {}
    for one in chain:
        name = tracking.tags(one).get("kind") or one[:6]
        labels[f"{name} {one[:6]}" if name in labels else name] = one
    return labels


def _snapshot(settings: Settings, store_uri: str | None, missing: list[str]) -> Snapshot | None:
    try:
        return LatentStore.open(store_uri or settings.store).snapshot(settings.snapshot)
    except UserError as error:
        if store_uri:
            raise
        missing.append(f"The data are not described ({error}); if the store has moved, give --store URI.")
        return None


def _numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def _evaluations(run_id: str | None, scratch: Path) -> dict[str, Path]:
    """Return a folder for each task that the run's model was evaluated on, with the open loop's results in the last."""
    logged = tracking.download(run_id, "evaluation") if run_id else None
    if logged is None:
        return {}
    parts = {file.stem: json.loads(file.read_text()) for file in sorted(logged.glob("*.json"))}
    whole = parts.pop("evaluation", None)
    opened = sorted((part for part in parts.values() if part.get("open_loop")), key=lambda part: bool(part.get("fast")))
    closed = [part for part in parts.values() if part.get("closed_loop")]
    if not opened and not closed:  # recorded by an earlier version
        return {"this model": logged} if whole else {}
    folders: dict[str, Path] = {}
    for number, numbers in enumerate(closed or [{}]):
        last = opened[0] | numbers if opened and number == len(closed or [{}]) - 1 else numbers
        task = last["closed_loop"]["task"] if "closed_loop" in last else ""
        label = (task if len(closed) > 1 else "this model") + " (fast)" * bool(last.get("fast"))
        folder = scratch / f"{number}"
        folder.mkdir()
        for item in [*last.get("pictures", []), *last.get("videos", [])]:
            shutil.copyfile(logged / item["file"], folder / item["file"])
        (folder / "evaluation.json").write_text(json.dumps(last))
        folders[label] = folder
    return folders


def _promotion(versions: list[registry.RegisteredVersion]) -> Promotion | None:
    """Return the promotion of the newest version that has an alias, as the gate noted it."""
    for version in versions:
        for alias in version.aliases[:1]:
            previous = version.tags.get("previous_champion", "none")
            return Promotion(
                version.name,
                alias,
                version.version,
                None if previous == "none" else previous,
                version.tags.get("gate", ""),
            )
    return None
