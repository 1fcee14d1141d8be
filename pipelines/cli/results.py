"""How the verbs show their results to people, and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

from pipelines.console import Printer, say


def show_ingest(report: Any, printer: Printer) -> None:
    counts, filtered = report.episodes, _counted(report.filtered)
    which = f" ({filtered})" if filtered else ""
    printer.show(
        f"ingested {counts['new']} episodes ({counts['already']} already there, {counts['quarantined']} "
        f"quarantined, {counts['filtered']} filtered{which}), {report.frames} frames, {report.seconds:.0f} s"
    )
    if report.without_action:
        printer.show(
            f"{report.without_action} robot log{'s' * (report.without_action != 1)} without actions, to be trained on "
            "as videos; to name the actions: uwm contract infer SOURCE"
        )
    if report.updated:
        printer.show(f"updated {report.updated} of those already there: their contract is new, their latents are not")
    show_repairs(report.repairs, printer)
    show_quality(report.quality, printer)
    printer.show(f"snapshot {report.snapshot}")


def show_repairs(repairs: list[Any], printer: Printer, most: int = 10) -> None:
    """Print what readers guessed, mended, left out or noticed, by the number of episodes."""
    for repair in repairs[:most]:
        count, field = repair["episodes"], repair["field"] or "unknown"
        printer.show(f"noted in {count} episode{'s' * (count != 1)} ({field}): {repair['text']}")
    if len(repairs) > most:
        printer.show(f"{len(repairs) - most} other notes (to list all: --json)")


def show_quality(quality: list[Any], printer: Printer) -> None:
    """Print what is lost of each camera's frames, by encoder, and warn where it is much."""
    from pipelines.ingest.quality import shape_note

    for row in quality:
        unknown = "stored unencoded" if row["encoder"] == "pixels" else "not measured"
        lost = unknown if row["psnr"] is None else f"{row['psnr']:.1f} dB"
        shape = shape_note(row)
        names = f"{row['embodiment']}, {row['camera']}, {row['encoder']}"
        printer.show(f"reconstruction {names}: {lost}{f'; {shape}' if shape else ''}")
    for row in quality:
        if row.get("note"):
            say(f"warning: {row['note']}")
        if row.get("picture"):
            say(f"before and after: {row['picture']}")


def show_dry_run(report: Any, printer: Printer) -> None:
    counts, expected = report.episodes, report.expected or {"pictures": 0, "seconds": 0, "bytes": 0}
    for name, value in (
        ("new", f"{counts['new']:8} episodes, {report.frames} frames"),
        ("already", f"{counts['already']:8}"),
        ("filtered", f"{counts['filtered']:8}  {_counted(report.filtered)}".rstrip()),
        ("quarantined", f"{counts['quarantined']:8}"),
        ("to encode", f"{expected['pictures']:8.0f} frames of all cameras and encoders"),
        ("expected", f"{expected['seconds']:8.0f} s, {expected['bytes'] / 1e6:.1f} MB"),
    ):
        printer.show(f"{name:>12}  {value}")


def _counted(filtered: list[dict[str, Any]]) -> str:
    """Return the number of filtered episodes by filter, the most frequent first."""
    counts = Counter(row["filter"] for row in filtered)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def show_training_plan(settings: Any, recipe: Any, printer: Printer, notes: list[str], **more: Any) -> None:
    """Print the resolved recipe as YAML, and what the training would take."""
    import yaml

    from pipelines.train import held_out
    from pipelines.train.dry_run import estimate
    from pipelines.train.trainable import adapt

    resolved = settings.recipe | {"model": dataclasses.asdict(settings.model)}
    printer.show(yaml.safe_dump(json.loads(json.dumps(resolved)), sort_keys=False).rstrip())
    model = settings.build()
    adapt(model, recipe, settings.fresh)
    found = estimate(settings, recipe, model)
    host = f", {found.host_bytes / 1e9:.2f} GB of host memory" if found.host_bytes else ""
    for name, value in (
        ("snapshot", f"{settings.snapshot}; {', '.join(settings.embodiments)}"),
        ("parameters", f"{found.parameters / 1e6:.1f} M, {found.trained / 1e6:.1f} M trained"),
        ("samples", f"{found.samples} in {found.steps} steps of {recipe.batch_size}, by {found.workers} workers"),
        (
            "memory",
            f"{(found.state_bytes + found.activation_bytes) / 1e9:.2f} GB per worker, "
            f"{found.activation_bytes / 1e9:.2f} GB of it activations{host}",
        ),
        (
            "time",
            f"{found.seconds / 3600:.2f} h, {found.step_seconds:.3g} s per step, if every worker is like this "
            f"{found.device}",
        ),
        (
            "cost",
            f"{found.cost:.2f}" if recipe.worker_price else "unknown; set worker_price, the price of a worker-hour",
        ),
    ):
        printer.show(f"# {name:>10}  {value}")
    counted = held_out.amounts(settings, recipe)
    for line in held_out.lines(settings, recipe, counted):
        printer.show(f"# {'data':>10}  {line}")
    for note in notes:
        say(note)
    more["data"] = counted
    report = {"parameters": found.parameters, "snapshot": settings.snapshot, "recipe": resolved}
    printer.answer(report | {"estimate": dataclasses.asdict(found), **more})


def show_trained_run(run_id: str, folder: Path, printer: Printer, **more: Any) -> None:
    from infra import tracking

    version = f", {more['name']} version {more['version']}" if "version" in more else ""
    printer.show(f"run {run_id}: checkpoint in {folder}{version}")
    say(f"curves and files in MLflow: {tracking.ui()}")
    printer.answer({"run_id": run_id, "checkpoint": str(folder), **more})
