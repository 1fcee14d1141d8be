"""``uwm VERB``. Progress and logs go to stderr; with ``--json`` the last line of stdout is one JSON object.

Exit codes: 0 done; 2 wrong usage or configuration; 3 done, but some inputs were quarantined; 4 a promotion gate
refused; 1 anything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipelines.cli.contract import Format, contract_app
from pipelines.cli.options import AsJson, SnapshotId, verbose
from pipelines.cli.store import store_app
from pipelines.console import Lasting, answer, say
from pipelines.errors import Interrupted, Refused
from preprocessing.contracts.contract import DataContract
from preprocessing.errors import UserError

app = typer.Typer(
    help="Raw robot logs and videos to a promoted Unified World Model policy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(store_app, name="store")
app.add_typer(contract_app, name="contract")

MODEL = "Run id, checkpoint folder, models:/NAME@ALIAS, or a published UWM checkpoint."
Store = Annotated[str, typer.Option(help="Folder of the latent store.", metavar="URI")]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster; one is started here if left out.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Set keys of the recipe.")]
Output = Annotated[Path, typer.Option(help="Folder that gets the results, in a folder of their own.")]
Checkpoints = Annotated[
    str | None, typer.Option(help="Where checkpoints go while it trains, s3://... too; beside the results if left out.")
]
New = Annotated[bool, typer.Option("--new", help="Begin anew, even where the same command was cut off.")]
DryRun = Annotated[bool, typer.Option(help="Say what would be done, and do nothing.")]

LISTED = 50  # lines of one kind, before they are counted


@app.callback()
def options(show_all: Annotated[bool, typer.Option("-v", "--verbose", help="Show all logs.")] = False) -> None:
    logging.basicConfig(level=logging.INFO if show_all else logging.ERROR)
    if not show_all:
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")


@app.command()
def ingest(
    source: Annotated[list[str], typer.Argument(help="Folders or files of robot logs and videos (docs/formats.md).")],
    store: Store,
    format: Format = "auto",
    contract: Annotated[
        str | None, typer.Option(help="What the data means: YAML, or a shipped one's name (uwm contract list).")
    ] = None,
    recipe: Annotated[str, typer.Option(help="YAML, with all that follows and more.")] = "ingest",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set keys of the recipe; any number.")
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(help="tiny (if left out), sdxl-vae, taesdxl, a hub id, a folder, pixels; several."),
    ] = None,
    precision: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Of the encoders; bfloat16 is faster on GPUs.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Frames are resized to this many pixels (128 if left out), a multiple of 8.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Thin videos without actions to this rate.")] = None,
    max_bad: Annotated[float | None, typer.Option(help="Stop when more than this share is bad (0.5).")] = None,
    keep_broken: Annotated[
        bool | None, typer.Option("--keep-broken", help="Of a broken video, keep what comes before the break.")
    ] = None,
    retry: Annotated[bool, typer.Option(help="Try again what was quarantined before.")] = False,
    address: Address = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Bring raw logs and videos into a store; what it already holds is not encoded again."""
    from pipelines.ingest.run import ingest as run
    from pipelines.recipe import IngestRecipe, load_recipe

    flags = {"encoder": encoder, "precision": precision, "image_size": image_size, "fps": fps}
    flags |= {"max_bad": max_bad, "keep_broken": keep_broken}
    given = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    report = run(
        source,
        store,
        load_recipe(recipe, [*(settings or []), *given], IngestRecipe),
        format=format,
        contract=DataContract.load(contract) if contract else None,
        retry=retry,
        dry_run=dry_run,
        address=address,
        verbose=verbose(),
    )
    for note in report.notes:
        say(note)
    for what, rows in (("filtered", report.filtered), ("quarantined", report.quarantine)):
        for row in rows[:LISTED]:
            say(f"{what} {row['uri']} #{row['index']}: {row['reason']}")
        if len(rows) > LISTED:
            say(f"{what} {len(rows) - LISTED} more (all of them: --json, or uwm store quarantine)")
    counts = report.episodes
    filtered = Counter(row["filter"] for row in report.filtered)
    if dry_run:
        _would(report, filtered)
    else:
        which = f" ({_counted(filtered)})" if filtered else ""
        say(
            f"ingested {counts['new']} episodes ({counts['already']} already there, {counts['quarantined']} "
            f"quarantined, {counts['filtered']} filtered{which}), {report.frames} frames, {report.seconds:.0f} s"
        )
    if report.bound_by:
        shares = ", ".join(f"{name}rs waited {share:.0%} of the time" for name, share in report.waiting.items())
        say(f"bound by {report.bound_by}: {shares}")
    if report.removed:
        say(f"{report.removed} episodes were removed from this store, and stay out")
    if not dry_run:
        say(f"snapshot {report.snapshot}")
    answer(dataclasses.asdict(report), as_json)
    if report.quarantine:
        raise typer.Exit(3)


@app.command()
def pretrain(
    store: Store,
    overrides: Overrides = None,
    recipe: Annotated[str, typer.Option(help="A shipped recipe's name or a YAML file.")] = "small",
    snapshot: SnapshotId = None,
    output: Output = Path("runs"),
    checkpoints: Checkpoints = None,
    new: New = False,
    address: Address = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train a world model on everything in a store."""
    from pipelines.recipe import load_recipe
    from pipelines.train import pretrain as verb
    from pipelines.train.run import RunOptions

    chosen = load_recipe(recipe, overrides or [])
    if dry_run:
        _plan(verb.plan(store, chosen, snapshot), chosen, as_json)
        return
    options = RunOptions(output=output, checkpoints=checkpoints, new=new, address=address, verbose=verbose())
    run_id, folder = verb.pretrain(store, chosen, options, snapshot_id=snapshot)
    _trained(run_id, folder, as_json)


@app.command()
def finetune(
    model: Annotated[str, typer.Option("--from", help=MODEL)],
    store: Store,
    overrides: Overrides = None,
    recipe: Annotated[str, typer.Option(help="A shipped recipe's name or a YAML file.")] = "finetune",
    snapshot: SnapshotId = None,
    output: Output = Path("runs"),
    register: Annotated[str | None, typer.Option(help="Register the result under this name.")] = None,
    embodiment: Annotated[str | None, typer.Option(help="Whose actions, where there are several.")] = None,
    checkpoints: Checkpoints = None,
    new: New = False,
    address: Address = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train on from a model, on part of a store or on new data."""
    from pipelines.models.checkpoint import load_settings
    from pipelines.models.resolve import resolve
    from pipelines.recipe import load_recipe
    from pipelines.registry.register import register as to_registry
    from pipelines.train import finetune as verb
    from pipelines.train.run import RunOptions

    chosen = load_recipe(recipe, overrides or [])
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            initial = resolve(model, store, embodiment, snapshot, extend=True, cache=Path(scratch))
            settings = verb.plan(initial, store, chosen, snapshot).settings
            for line in verb.lines(settings):
                say(line)
            _plan(settings, chosen, as_json, transplant=verb.table(settings))
        return
    options = RunOptions(output=output, checkpoints=checkpoints, new=new, address=address, verbose=verbose())
    run_id, folder = verb.finetune(model, store, chosen, options, snapshot_id=snapshot, embodiment=embodiment)
    version = to_registry(folder, register, embodiment) if register else None
    named = {"name": register, "version": version} if register else {}
    _trained(run_id, folder, as_json, transplant=verb.table(load_settings(folder)), **named)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    store: Annotated[str | None, typer.Option(help="Held-out episodes of this store, open loop.")] = None,
    env: Annotated[str | None, typer.Option(help="SUITE:TASK, closed loop, e.g. metaworld:drawer-close.")] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Rollouts, closed loop.")] = 10,
    embodiment: Annotated[str | None, typer.Option(help="Whose actions, where the model knows several.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Answer sooner, almost the same: fewer steps.")] = False,
    output: Output = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Action error and frame prediction on held-out episodes; success rate in a simulator."""
    from pipelines.evaluate.run import evaluate as run
    from pipelines.evaluate.run import timestamped

    if not (store or env):
        raise UserError("nothing to evaluate on: give --store URI, --env SUITE:TASK or both")
    folder = timestamped(output)
    report = run(model, store, env, episodes, folder, embodiment, fast=fast)
    for part in ("open_loop", "closed_loop"):
        for name, value in report.get(part, {}).items():
            if value is None:  # not something that this kind of model does
                continue
            say(f"{name:>22} {value:.4g}" if isinstance(value, float) else f"{name:>22} {value}")
    say(f"written to {folder}")
    answer(report | {"folder": str(folder)}, as_json)


@app.command()
def promote(
    name: Annotated[str, typer.Argument(help="Registered model.")],
    version: Annotated[str, typer.Argument(help="Version number.")],
    alias: Annotated[str, typer.Option()] = "champion",
    floor: Annotated[float, typer.Option(min=0, max=1, help="Success rate that a first champion must reach.")] = 0.5,
    as_json: AsJson = False,
) -> None:
    """Judge a version against the champion; move the alias if it passes (exit code 4 if not)."""
    from pipelines.registry.promote import promote as run

    result = run(name, version, alias, floor)
    say(f"{name} version {version} is now {alias} (before: {result.previous or 'none'}); {result.reason}")
    answer(dataclasses.asdict(result), as_json)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder that gets everything.")] = Path("demo-output"),
) -> None:
    """Raw logs and videos to a promoted policy, on this machine, in minutes."""
    from pipelines.demo import demo as run

    run(output, verbose())


@app.command()
def record(
    output: Annotated[Path, typer.Argument(help="Folder that gets hdf5/, lerobot/ and videos/.")],
    task: Annotated[list[str] | None, typer.Option(help="Meta-World task, once for each; all if left out.")] = None,
    episodes: Annotated[int, typer.Option(min=2, help="Demonstrations of each task.")] = 2,
    videos: Annotated[int, typer.Option(min=0, help="Further ones of each task, as video without actions.")] = 0,
    image_size: Annotated[int, typer.Option(min=16)] = 128,
    seed: int = 0,
) -> None:
    """Make raw robot logs and videos with a simulator's scripted experts."""
    from infra.simulators.metaworld import INSTRUCTIONS
    from pipelines.record import record as run

    if unknown := sorted(set(task or []) - set(INSTRUCTIONS)):
        raise UserError(f"--task {unknown[0]}: no such task; one of {', '.join(INSTRUCTIONS)}")
    say(run(output, task or list(INSTRUCTIONS), episodes, videos, image_size, seed))


@app.command("train-vae")
def train_vae(
    source: Annotated[list[Path], typer.Argument(help="Videos, images or folders of them.")],
    output: Annotated[Path, typer.Option(help="Folder that gets the weights; use it as --encoder.")] = Path("tiny_vae"),
    steps: Annotated[int, typer.Option(min=1)] = 3000,
    initial: Annotated[Path | None, typer.Option("--from", help="Weights to go on from.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a small VAE of your own on frames you have; prints held-out PSNR in dB by place and camera."""
    from pipelines.train_vae import train_vae as run

    quality = run(source, output, steps, initial)
    for kind, value in quality.items():
        say(f"{kind:>30} {value:.1f} dB")
    answer(quality, as_json)


def _would(report: Any, filtered: Counter[str]) -> None:
    """The table of a dry run."""
    counts, expected = report.episodes, report.expected or {"pictures": 0, "seconds": 0, "bytes": 0}
    say(f"{'new':>12}  {counts['new']:8} episodes, {report.frames} frames")
    say(f"{'already':>12}  {counts['already']:8}")
    say(f"{'filtered':>12}  {counts['filtered']:8}  {_counted(filtered)}".rstrip())
    say(f"{'quarantined':>12}  {counts['quarantined']:8}")
    say(f"{'to encode':>12}  {expected['pictures']:8.0f} pictures")
    say(f"{'expected':>12}  {expected['seconds']:8.0f} s, {expected['bytes'] / 1e6:.1f} MB")
    say("nothing was written")


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in reasons.most_common())


def _plan(settings: Any, recipe: Any, as_json: bool, **more: Any) -> None:
    import yaml

    from pipelines.train.dry_run import estimate
    from pipelines.train.trainable import adapt

    resolved = settings.recipe | {"model": dataclasses.asdict(settings.model)}
    say(yaml.safe_dump(json.loads(json.dumps(resolved)), sort_keys=False).rstrip())
    model = settings.build()
    adapt(model, recipe, settings.fresh)
    found = estimate(settings, recipe, model)
    host = f", {found.host_bytes / 1e9:.2f} GB of its host" if found.host_bytes else ""
    for name, value in (
        ("snapshot", f"{settings.snapshot}; {', '.join(settings.embodiments)}"),
        ("parameters", f"{found.parameters / 1e6:.1f} M, {found.trained / 1e6:.1f} M of them trained"),
        ("samples", f"{found.samples} in {found.steps} steps of {recipe.batch_size}, by {found.workers} workers"),
        (
            "memory",
            f"{(found.state_bytes + found.activation_bytes) / 1e9:.2f} GB a worker, "
            f"{found.activation_bytes / 1e9:.2f} of it activations{host}",
        ),
        (
            "time",
            f"{found.seconds / 3600:.2f} h, {found.step_seconds:.3g} s a step, on workers like this {found.device}",
        ),
        ("cost", f"{found.cost:.2f}" if recipe.worker_price else "give worker_price, of a worker's hour"),
    ):
        say(f"# {name:>10}  {value}")
    report = {"parameters": found.parameters, "snapshot": settings.snapshot, "recipe": resolved}
    answer(report | {"estimate": dataclasses.asdict(found), **more}, as_json)


def _trained(run_id: str, folder: Path, as_json: bool, **more: Any) -> None:
    version = f", {more['name']} version {more['version']}" if "version" in more else ""
    say(f"run {run_id}: checkpoint in {folder}{version}")
    answer({"run_id": run_id, "checkpoint": str(folder), **more}, as_json)


def main() -> None:
    with contextlib.redirect_stderr(Lasting(sys.stderr)):
        _main()


def _main() -> None:
    try:
        app(standalone_mode=True)
    except (UserError, ConnectionError, ModuleNotFoundError) as error:
        _fail(f"error: {error}", 2)
    except Refused as error:
        _fail(f"refused: {error}", 4)
    except Interrupted as stopped:
        _fail(f"interrupted; {stopped}", 130)
    except SystemExit as end:
        if end.code == 130:  # Typer's own answer to Ctrl-C says nothing
            say("interrupted; nothing half-written was kept")
        raise
    except Exception as error:
        if verbose():
            raise
        lines = str(error).strip().splitlines() or [""]
        cause = lines[-1] if type(error).__module__.startswith("ray") else lines[0]  # Ray's begin with a traceback
        _fail(f"failed: {type(error).__name__}: {cause.strip('` |->')} (-v shows more)", 1)


def _fail(line: str, code: int) -> None:
    say(line)
    sys.exit(code)
