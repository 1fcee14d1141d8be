"""The verbs on a trained model: evaluate it, register it as a policy, promote it, report on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.options import MODEL, AsJson, Output
from pipelines.console import Printer, say
from preprocessing.errors import UserError

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]


def evaluate(
    model: Model,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="URI", help="Evaluate open loop on held-out episodes of this store; needed for a published MODEL."
        ),
    ] = None,
    env: Annotated[
        str | None,
        typer.Option(metavar="SUITE:TASK", help="Evaluate closed loop in this simulator, e.g. metaworld:drawer-close."),
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Number of closed-loop episodes.")] = 10,
    embodiment: Annotated[
        str | None,
        typer.Option(help="Embodiment to use if the model knows several (default: the one it was registered for)."),
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Use faster approximate inference, with fewer denoising steps.")
    ] = False,
    output: Output = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Evaluate a model: action error and frame prediction on held-out episodes, success rate in a simulator."""
    from pipelines.evaluate.run import evaluate as run
    from pipelines.evaluate.run import timestamped

    if not (store or env):
        raise UserError("nothing to evaluate on: give --store URI, --env SUITE:TASK or both")
    folder = timestamped(output)
    report = run(model, store, env, episodes, folder, embodiment, fast=fast)
    printer = Printer(as_json)
    for part in ("open_loop", "closed_loop"):
        for name, value in report.get(part, {}).items():
            if value is None:  # this kind of model has no such mode
                continue
            printer.show(f"{name:>22} {value:.4g}" if isinstance(value, float) else f"{name:>22} {value}")
    say(f"written to {folder}")
    printer.answer(report | {"folder": str(folder)})


def register(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Run id or its first characters, or a trained checkpoint's folder.")
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Registered model that gets a new version.")],
    embodiment: Annotated[
        str | None, typer.Option(help="Embodiment to act as; needed if the model knows several.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Register a trained run as a new version of a policy in MLflow."""
    from pipelines.models.resolve import registered_embodiment, resolve
    from pipelines.registry.register import register as to_registry

    version = to_registry(resolve(run), name, embodiment or registered_embodiment(run))
    printer = Printer(as_json)
    printer.show(f"{name} version {version} is registered; next: uwm evaluate models:/{name}/{version}")
    printer.answer({"name": name, "version": version})


def promote(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Registered model.")],
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Version number.")],
    alias: Annotated[str, typer.Option(help="Alias to move.")] = "champion",
    floor: Annotated[float, typer.Option(min=0, max=1, help="Success rate that the first champion must reach.")] = 0.5,
    as_json: AsJson = False,
) -> None:
    """Promote a model version if it is no worse than the champion. Exit code 4 if it is."""
    from pipelines.registry.promote import promote as run

    result = run(name, version, alias, floor)
    printer = Printer(as_json)
    printer.show(f"{name} version {version} is now {alias} (before: {result.previous or 'none'}); {result.reason}")
    printer.answer(dataclasses.asdict(result))


def report(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="Run id, models:/NAME/VERSION, or a trained checkpoint's folder.")
    ],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    store: Annotated[
        str | None, typer.Option(metavar="URI", help="Where the store is now (default: where the run read it).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page on a model: evaluations, learning curves, data, lineage. Also logged to its MLflow run."""
    from pipelines.report.collect import report as write

    missing = write(model, output, store)
    for sentence in missing:
        say(sentence)
    printer = Printer(as_json)
    printer.show(f"report: {output}")
    printer.answer({"report": str(output), "missing": missing})
