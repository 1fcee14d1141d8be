"""The verbs of ``uwm``, and how those that work on data and train are asked for.

Results go to stdout, progress and logs to stderr; with ``--json`` stdout ends with one line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipelines.cli import policies
from pipelines.cli.contract import Format, contract_app
from pipelines.cli.options import MODEL, AsJson, Output, Settings, SnapshotId, SomeSettings, overridden, verbose
from pipelines.cli.results import show_dry_run, show_ingest, show_trained_run, show_training_plan
from pipelines.cli.store import store_app
from pipelines.console import Printer, say
from preprocessing.errors import UserError

app = typer.Typer(
    help="Turn raw robot logs and videos into a promoted Unified World Model policy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(store_app, name="store")
app.add_typer(contract_app, name="contract")

Store = Annotated[str, typer.Option(help="Latent store: a folder or s3://... URI.", metavar="URI")]
Address = Annotated[
    str | None, typer.Option(help="Address of a Ray cluster (default: RAY_ADDRESS, or start one on this machine).")
]
Checkpoints = Annotated[
    str | None,
    typer.Option(help="Folder or s3://... URI for checkpoints during training (default: --output).", metavar="URI"),
]
New = Annotated[bool, typer.Option("--new", help="Start a new run instead of resuming an interrupted one.")]
DryRun = Annotated[bool, typer.Option(help="Print what would be done; write nothing.")]

LISTED = 50  # lines of one kind that are printed; the rest are counted


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"uwm {version('unified-world-models')}")
        raise typer.Exit


@app.callback()
def set_verbosity(
    show_all: Annotated[bool, typer.Option("-v", "--verbose", help="Show all logs and full tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if show_all else logging.ERROR)
    if not show_all:
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")


@app.command()
def ingest(
    source: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE", help="Files, folders, archives of robot logs and videos (docs/formats.md)."),
    ],
    store: Store,
    format: Format = "auto",
    contract: Annotated[
        str | None,
        typer.Option(help="Data contract: a YAML file, or a shipped contract's name (see uwm contract list)."),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="Shipped recipe's name or YAML file; options below override it.")
    ] = "ingest",
    settings: Settings = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            help="Frame encoder: tiny, sdxl-vae, taesdxl, pixels, a Hugging Face id or a folder (default: tiny). "
            "Repeatable."
        ),
    ] = None,
    precision: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Precision of the encoders (default: float32); bfloat16 is faster on GPUs."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the resized frames in pixels, a multiple of 8 (default: 128).")
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(help="Maximum frame rate of videos without actions, in Hz (default: keep all frames)."),
    ] = None,
    max_bad: Annotated[
        float | None, typer.Option(help="Stop if more than this share of the new episodes is bad (default: 0.5).")
    ] = None,
    keep_broken: Annotated[
        bool | None, typer.Option("--keep-broken", help="Keep the readable beginning of a broken video.")
    ] = None,
    retry: Annotated[bool, typer.Option(help="Try quarantined and filtered episodes again.")] = False,
    address: Address = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Ingest robot logs and videos into a latent store. Episodes it already holds are not encoded again."""
    from pipelines.ingest.run import ingest as run
    from pipelines.recipe import IngestRecipe, load_recipe
    from preprocessing.contracts.contract import DataContract

    sources, bare = overridden(source)
    if not sources:
        raise UserError("nothing to ingest: give files or folders before KEY=VALUE")
    flags = {"encoder": encoder, "precision": precision, "image_size": image_size, "fps": fps}
    flags |= {"max_bad": max_bad, "keep_broken": keep_broken}
    given = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    report = run(
        sources,
        store,
        load_recipe(recipe, [*bare, *(settings or []), *given], IngestRecipe),
        format=format,
        contract=DataContract.load(contract) if contract else None,
        retry=retry,
        dry_run=dry_run,
        address=address,
        verbose=verbose(),
    )
    printer = Printer(as_json)
    for note in report.notes:
        say(note)
    for what, rows in (("filtered", report.filtered), ("quarantined", report.quarantine)):
        for row in rows[:LISTED]:
            say(f"{what} {row['uri']} #{row['index']}: {row['reason']}")
        if len(rows) > LISTED:
            say(f"{what} {len(rows) - LISTED} more (to list all: --json, or uwm store quarantine)")
    if report.removed:
        say(f"skipped {report.removed} episodes that were removed from this store earlier")
    if report.bound_by:
        shares = ", ".join(f"{name}rs waited {share:.0%} of the time" for name, share in report.waiting.items())
        say(f"bound by {report.bound_by}: {shares}")
    if dry_run:
        show_dry_run(report, printer)
        say("nothing was written")
    else:
        show_ingest(report, printer)
    printer.answer(dataclasses.asdict(report))
    if report.quarantine:
        raise typer.Exit(3)


@app.command()
def pretrain(
    store: Store,
    overrides: SomeSettings = None,
    settings: Settings = None,
    recipe: Annotated[str, typer.Option(help="Shipped recipe's name or YAML file.")] = "small",
    snapshot: SnapshotId = None,
    output: Output = Path("runs"),
    checkpoints: Checkpoints = None,
    new: New = False,
    address: Address = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Pretrain a world model on all episodes of a store."""
    from pipelines.recipe import load_recipe
    from pipelines.train import pretrain as verb
    from pipelines.train.devices import decide_here
    from pipelines.train.run import RunOptions

    chosen = load_recipe(recipe, [*(overrides or []), *(settings or [])])
    printer = Printer(as_json)
    if dry_run:
        chosen, notes = decide_here(chosen, address)
        show_training_plan(verb.plan(store, chosen, snapshot), chosen, printer, notes)
        return
    options = RunOptions(output=output, checkpoints=checkpoints, new=new, address=address, verbose=verbose())
    run_id, folder = verb.pretrain(store, chosen, options, snapshot_id=snapshot)
    show_trained_run(run_id, folder, printer)


@app.command()
def finetune(
    model: Annotated[str, typer.Option("--from", metavar="MODEL", help=MODEL)],
    store: Store,
    overrides: SomeSettings = None,
    settings: Settings = None,
    recipe: Annotated[str, typer.Option(help="Shipped recipe's name or YAML file.")] = "finetune",
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE_OR_EMBODIMENT",
            help="Train only on this data set (its folder, or that folder's name) or embodiment. Repeatable.",
        ),
    ] = None,
    snapshot: SnapshotId = None,
    output: Output = Path("runs"),
    register: Annotated[
        str | None, typer.Option(metavar="NAME", help="Register the result as a version of this model.")
    ] = None,
    embodiment: Annotated[
        str | None,
        typer.Option(help="Embodiment to register; for a published MODEL, the one to use if the store has several."),
    ] = None,
    checkpoints: Checkpoints = None,
    new: New = False,
    address: Address = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Finetune a model on a store: some of its training data, or new data of any embodiment."""
    from pipelines.models import checkpoint
    from pipelines.models.resolve import resolve
    from pipelines.recipe import load_recipe
    from pipelines.registry.register import check_name
    from pipelines.registry.register import register as to_registry
    from pipelines.train import finetune as verb
    from pipelines.train.devices import decide_here
    from pipelines.train.run import RunOptions

    def accept(result: checkpoint.Settings) -> None:
        if register:
            check_name(register)
            result.acting(embodiment, f"--register {register}")

    restricted = [f"data={json.dumps(data)}"] if data else []
    chosen = load_recipe(recipe, [*(overrides or []), *(settings or []), *restricted])
    printer = Printer(as_json)
    if dry_run:
        chosen, notes = decide_here(chosen, address)
        with tempfile.TemporaryDirectory() as scratch:
            initial = resolve(model, store, embodiment, snapshot, extend=True, cache=Path(scratch))
            planned = verb.plan(initial, store, chosen, snapshot).settings
            accept(planned)
            for line in verb.lines(planned):
                printer.show(line)
            show_training_plan(planned, chosen, printer, notes, transplant=verb.table(planned))
        return
    options = RunOptions(
        output=output, checkpoints=checkpoints, new=new, address=address, verbose=verbose(), accept=accept
    )
    run_id, folder = verb.finetune(model, store, chosen, options, snapshot_id=snapshot, embodiment=embodiment)
    version = to_registry(folder, register, embodiment) if register else None
    named = {"name": register, "version": version} if register else {}
    show_trained_run(run_id, folder, printer, transplant=verb.table(checkpoint.load_settings(folder)), **named)


for verb in (policies.evaluate, policies.register, policies.promote, policies.report):
    app.command()(verb)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path("demo-output"),
) -> None:
    """Run every stage on this machine, from simulated logs to a promoted policy and a report, in minutes."""
    from pipelines.demo import demo as run

    run(output, verbose())


@app.command()
def record(
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Folder to create, with hdf5/, lerobot/ and videos/.")
    ],
    task: Annotated[list[str] | None, typer.Option(help="Meta-World task (default: all). Repeatable.")] = None,
    episodes: Annotated[int, typer.Option(min=2, help="Demonstrations per task.")] = 2,
    videos: Annotated[int, typer.Option(min=0, help="Additional videos without actions per task.")] = 0,
    image_size: Annotated[int, typer.Option(min=16, help="Side of the frames in pixels.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the initial states and of the noise on the actions.")] = 0,
) -> None:
    """Record raw robot logs and videos of a simulator's scripted experts."""
    from infra.simulators.metaworld import INSTRUCTIONS
    from pipelines.record import record as run

    if unknown := sorted(set(task or []) - set(INSTRUCTIONS)):
        raise UserError(f"--task {unknown[0]}: no such task; choose from {', '.join(INSTRUCTIONS)}")
    Printer().show(run(output, task or list(INSTRUCTIONS), episodes, videos, image_size, seed))


@app.command("train-vae")
def train_vae(
    source: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE", help="Files or folders that uwm ingest can read; frames are enough."),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the weights; pass it to --encoder.")] = Path("tiny_vae"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 3000,
    initial: Annotated[
        Path | None, typer.Option("--from", metavar="FOLDER", help="Folder of the weights to start from.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a small VAE on your own frames and print its held-out PSNR in dB by source and camera."""
    from pipelines.train_vae import train_vae as run

    quality = run(source, output, steps, initial)
    printer = Printer(as_json)
    for kind, value in quality.items():
        printer.show(f"{kind:>30} {value:.1f} dB")
    printer.answer(quality)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look at this machine: packages, GPU, rendering, Ray, MLflow, S3, disk. Exit code 1 if any is wrong."""
    from pipelines.doctor import examine

    printer, findings = Printer(as_json), examine()
    signs = {"ok": "ok", "missing": "-", "wrong": "WRONG"}
    for finding in findings:
        printer.show(f"{signs[finding.state]:>5}  {finding.what:<13} {finding.found}")
        if finding.mend:
            printer.show(f"{'':>5}  {'':<13} -> {finding.mend}")
    wrong = sum(finding.state == "wrong" for finding in findings)
    missing = sum(finding.state == "missing" for finding in findings)
    printer.show(f"{wrong} wrong, {missing} missing that only some verbs need" if wrong or missing else "all is right")
    printer.answer({"right": not wrong, "findings": [dataclasses.asdict(finding) for finding in findings]})
    if wrong:
        raise typer.Exit(1)
