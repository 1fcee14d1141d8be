"""The report: one self-contained HTML page on a model, from the promotion back to the source files.

Facts come from where they were recorded: the store's snapshot, the MLflow runs, the folders of ``uwm evaluate``. The
template is ``page.html``. Images and videos are embedded unchanged and curves are drawn as SVG, so the page opens from
disk without a network; its content security policy forbids it to load anything.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from infra import registry, tracking
from pipelines.registry.promote import Promotion
from preprocessing.store.snapshot import Snapshot
from preprocessing.store.store import LatentStore, LogEntry

CLIPS = 10  # maximum number of episodes with a video: failures first, then in order, so that nobody picks them
MEDIA_BYTES = 13 * 2**20  # images and videos together; base64 adds a third, which keeps the page below 20 MB
FILES = 1000  # maximum number of source files, and of quarantined episodes, to list
POINTS = 600  # maximum number of points of a curve
MODALITIES = ("action", "video")
PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 44, 450, 12, 172  # in a curve's panel of 460 x 200


@dataclass(frozen=True)
class Stage:
    """One verb that was run, its duration and a summary."""

    name: str
    seconds: float
    summary: str


def write_report(
    path: Path,
    *,
    title: str,
    stages: list[Stage],
    snapshot: Snapshot | None,
    runs: dict[str, str],
    evaluations: dict[str, Path],
    promotion: Promotion | None,
    missing: Sequence[str] = (),
) -> None:
    """Write the page to ``path`` atomically.

    ``runs`` are MLflow run ids by label, in the order of training; ``evaluations`` are folders of ``uwm evaluate`` by
    label, the baseline first. Sections with nothing to show are left out; ``missing`` says in sentences why.
    """
    tracking.connect()
    described = _runs(runs)
    shown = [_evaluation(label, folder, MEDIA_BYTES // len(evaluations)) for label, folder in evaluations.items()]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # instructions and URIs are untrusted text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": _duration, "percent": _percent}
    page = environment.get_template("page.html").render(
        title=title,
        promotion=promotion,
        version=registry.version_of(promotion.name, promotion.version) if promotion else None,
        evaluations=shown,
        keys=list(dict.fromkeys(clip["episode"] for one in reversed(shown) for clip in one["clips"])),
        data=_data(snapshot) if snapshot else None,
        missing=missing,
        runs=described,
        ranges={metric: _log_range(run["losses"][metric] for run in described) for metric in MODALITIES},
        curve=_curve,
        stages=stages,
        snapshot=snapshot,
        store=_shortener([snapshot.uri])(snapshot.uri) if snapshot else "",
        commit=_commit(snapshot) if snapshot else None,
    )
    building = path.with_name(f".{path.name}.{os.getpid()}")
    building.write_text(page, encoding="utf-8")
    building.replace(path)


def _evaluation(label: str, folder: Path, budget: int) -> dict[str, Any]:
    """Return an evaluation's numbers, images, and videos of some episodes, failures first, within ``budget`` bytes."""
    numbers = json.loads((folder / "evaluation.json").read_text())
    opened, closed = numbers.get("open_loop"), numbers.get("closed_loop")
    pictures = [
        {"columns": picture["columns"], "uri": _embedded(folder / picture["file"], "image/png")}
        for picture in numbers.get("pictures", [])
    ]
    budget -= sum(len(picture["uri"]) * 3 // 4 for picture in pictures)
    videos = sorted(numbers.get("videos", []), key=lambda video: (video["success"], video["episode"]))
    clips = []
    for video in videos[:CLIPS]:
        budget -= (folder / video["file"]).stat().st_size
        if budget < 0:
            break
        task = closed["task"].partition(":")[2]
        outcome = "success" if video["success"] else "failure"
        uri = _embedded(folder / video["file"], "video/mp4")
        clips.append({"episode": (task, video["episode"]), "outcome": outcome, "uri": uri})
    return {
        "label": label,
        "embodiment": numbers.get("embodiment"),
        "closed": closed,
        "opened": opened,
        "pictures": pictures,
        "clips": clips,
        "videos": len(videos),
    }


def _embedded(file: Path, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(file.read_bytes()).decode()}"


def _data(snapshot: Snapshot) -> dict[str, Any]:
    """Return the snapshot's content by embodiment and by source file, its repairs and its quarantine."""
    table = snapshot.episodes()
    encoders = Counter(zip(table["encoder"].to_pylist(), table["encoder_digest"].to_pylist(), strict=True))
    columns = ["id", "uri", "index", "format", "frames", "fps", "embodiment", "instruction", "cameras", "action_dim"]
    # One row per episode, not per encoder.
    rows = {row["id"]: row for row in table.select([*columns, "repairs"]).to_pylist()}.values()
    embodiments: dict[str, list[dict[str, Any]]] = {}
    files: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        embodiments.setdefault(row["embodiment"], []).append(row)
        files.setdefault((row["uri"], row["format"]), []).append(row)
    refused = snapshot.quarantine()
    relative = _shortener([*(uri for uri, _ in files), *(row["uri"] for row in refused)])
    folders: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (uri, format), members in sorted(files.items())[:FILES]:
        folder, _, name = relative(uri).rpartition("/")
        file = {
            "name": name,
            "episodes": len(members),
            "frames": _total(members),
            "ids": [row["id"] for row in members],
        }
        folders.setdefault((folder, format), []).append(file)
    return {
        "episodes": len(rows),
        "frames": _total(rows),
        "embodiments": [_embodiment(name, members) for name, members in sorted(embodiments.items())],
        "cameras": {name: _cameras(members) for name, members in embodiments.items()},
        "encoders": [{"name": name, "digest": digest, "episodes": n} for (name, digest), n in encoders.items()],
        "repairs": Counter(repair for row in rows for repair in row["repairs"] or ()).most_common(),
        "quarantine": [row | {"uri": relative(row["uri"])} for row in refused[:FILES]],
        "quarantined": len(refused),
        "folders": [{"uri": uri, "format": format, "files": found} for (uri, format), found in folders.items()],
        "files": len(files),
        "unlisted": max(0, len(files) - FILES),
    }


def _embodiment(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "episodes": len(rows),
        "frames": _total(rows),
        "seconds": sum(row["frames"] / row["fps"] for row in rows),
        "cameras": _cameras(rows),
        "widths": sorted({row["action_dim"] for row in rows}),
        "instructions": Counter(row["instruction"] for row in rows if row["instruction"]).most_common(),
    }


def _cameras(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(camera["name"] for row in rows for camera in row["cameras"]))


def _total(rows: Iterable[dict[str, Any]]) -> int:
    return sum(row["frames"] for row in rows)


def _shortener(uris: Iterable[str]) -> Callable[[str], str]:
    """Return what shortens local paths to what follows their common parent: a page, passed on, names no home folder."""
    local = [uri for uri in uris if uri.startswith("/")]
    parent = os.path.dirname(os.path.commonpath(local)) if local else ""  # noqa: PTH120
    return lambda uri: uri.removeprefix(parent).lstrip("/") if uri.startswith("/") else uri


def _commit(snapshot: Snapshot) -> LogEntry | None:
    """Return the snapshot's entry in the store's log; None if a rollback removed it from the log."""
    log = LatentStore.open(snapshot.uri).log()
    return next((entry for entry in log if entry["snapshot"] == snapshot.id), None)


def _runs(runs: dict[str, str]) -> list[dict[str, Any]]:
    """Return each run with its losses, its speed, and the tags for its snapshot and parent."""
    labels = {run_id: label for label, run_id in runs.items()}
    described = []
    for label, run_id in runs.items():
        found = tracking.MlflowClient().get_run(run_id)
        pace = [value for _, value in tracking.history(run_id, "samples_per_second")]
        tags, last = found.data.tags, found.data.metrics
        described.append(
            {
                "label": label,
                "id": run_id,
                "status": found.info.status.lower(),
                "snapshot": tags.get("snapshot", ""),
                "parent": tags.get("parent", "").rpartition("/")[2],  # a run, or a file's name
                "commit": tags.get("mlflow.source.git.commit", ""),
                "version": tags.get("version", ""),
                "hardware": tags.get("hardware", ""),
                "parent_label": labels.get(tags.get("parent", "")),
                "losses": {metric: tracking.history(run_id, f"loss_{metric}") for metric in MODALITIES},
                "held_out": {metric: last.get(f"validation_loss_{metric}") for metric in MODALITIES},
                "pace": float(np.median(pace)) if pace else None,
                "data_wait": last.get("data_wait_share"),
            }
        )
    return described


def _log_range(histories: Iterable[list[tuple[int, float]]]) -> tuple[float, float]:
    """Return the bounds of one logarithmic axis for all these curves. Both bounds are ticks."""
    values = [value for history in histories for _, value in history if _drawable(value)] or [1.0]
    ticks = [digit * 10.0**power for power in range(-12, 13) for digit in (1, 2, 5)]
    low = max((tick for tick in ticks if tick <= min(values)), default=ticks[0])
    high = min((tick for tick in ticks if tick >= max(values) and tick > low), default=ticks[-1])
    return low, high


def _curve(history: list[tuple[int, float]], held_out: float | None, bounds: tuple[float, float]) -> dict[str, Any]:
    """Return one panel: logged values and their moving average in SVG coordinates, on a logarithmic axis."""
    drawn = [(step, value) for step, value in history if _drawable(value)]
    last = max((step for step, _ in history), default=0) or 1
    low, high = bounds

    def x(step: float) -> float:
        return PLOT_LEFT + (PLOT_RIGHT - PLOT_LEFT) * step / last

    def y(value: float) -> float:
        share = math.log(min(max(value, low), high) / low) / math.log(high / low)
        return PLOT_BOTTOM - (PLOT_BOTTOM - PLOT_TOP) * share

    def line(values: Iterable[float]) -> str:
        points = list(zip((step for step, _ in drawn), values, strict=True))
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points[:: -(-len(points) // POINTS) or 1])

    values = [value for _, value in drawn]
    reach = len(values) // 20
    averages = [float(np.mean(values[max(0, i - reach) : i + reach + 1])) for i in range(len(values))]
    decades = math.log10(high / low)
    digits = (1, 2, 5) if decades < 2 else (1,)
    ticks = [digit * 10.0**power for power in range(-12, 13) for digit in digits]
    return {
        "logged": line(values),
        "average": line(averages),
        "final": averages[-1] if averages else None,
        "held_out": y(held_out) if held_out is not None and _drawable(held_out) else None,
        "y_ticks": [(y(tick), f"{tick:g}") for tick in ticks if low <= tick <= high],
        "x_ticks": [(x(step), f"{step:,}") for step in (0, last // 2, last)],
        "skipped": len(history) - len(drawn),
    }


def _drawable(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
