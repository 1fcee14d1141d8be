"""One training as one MLflow run. Repeating an interrupted command resumes its run, on any machine.

OUTPUT/NAME-TIME-RUN/recipe.yaml     the resolved recipe
                     run.json        the run's settings, snapshot and identity (RunRecord)
                     step-.../       checkpoints (checkpoints.py); with --checkpoints under that URI, as is run.json
                     checkpoint/     the final weights
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.fs
import torch
import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel

from infra import tracking
from infra.cluster import check_address, cluster
from pipelines.console import say
from pipelines.errors import Interrupted
from pipelines.models import manifest
from pipelines.models.checkpoint import Settings, load_settings
from pipelines.outputs import check_writable
from pipelines.recipe import RESULT_KEYS, WORK_KEYS, Recipe
from pipelines.train.checkpoints import RunFolder
from pipelines.train.devices import decide, gpus_of_cluster
from pipelines.train.driver import train
from pipelines.train.held_out import amounts, lines
from preprocessing.errors import UserError
from preprocessing.store.storage import Folder, parse
from preprocessing.store.store import LatentStore


class RunRecord(BaseModel):
    """Content of ``run.json``, with its own digest. ``identity`` is a digest of the command that started the run."""

    identity: str
    name: str
    settings: Settings
    finished: bool = False

    def dump(self) -> bytes:
        return manifest.seal(self.model_dump(mode="json"))

    @classmethod
    def load(cls, content: bytes) -> RunRecord:
        """Raises ValueError if the content is not as it was written."""
        return cls.model_validate(manifest.unseal(content))


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run goes and how it starts. None of it affects what is learned."""

    output: Path  # parent folder of the run's folder
    checkpoints: str | None = None  # URI for checkpoints during training; None: ``output``
    new: bool = False  # start a new run even if the same command was interrupted
    address: str | None = None  # of a Ray cluster
    accept: Callable[[Settings], object] | None = None  # raises UserError if the result would be of no use
    verbose: bool = False


# Returns a new run's settings and, if it starts from given weights, a function that writes them to a folder.
Begin = Callable[[], tuple[Settings, Callable[[Path], None] | None]]


def tracked(
    kind: str, asked: dict[str, str | None], begin: Begin, recipe: Recipe, options: RunOptions
) -> tuple[str, Path]:
    """Train; return (MLflow run id, folder of the final weights).

    ``asked`` is what the user named (store, model, snapshot). An interrupted run with the same ``asked`` and the same
    recipe, except for its WORK_KEYS, is resumed on the snapshot it started with. Otherwise ``begin`` makes a new run.
    """
    place = parse(options.checkpoints or str(options.output))
    if isinstance(place, Folder):
        check_writable(place.path, "--checkpoints" if options.checkpoints else "--output")
    else:
        place.content()  # fails early if the place is wrong
    check_writable(options.output, "--output")
    check_address(options.address)
    home = place.uri
    run = None if options.new else _interrupted_run(home, kind, asked, recipe)
    settings, write_start = begin() if run is None else (run.settings, None)
    if run and options.accept:
        options.accept(settings)
    for line in lines(settings, recipe, amounts(settings, recipe)):
        say(line)
    with cluster(options.address, options.verbose):
        recipe, notes = decide(recipe, gpus_of_cluster(), settings.recipe.get("device", "auto") if run else "auto")
        if run is None:
            run = _new_run(kind, asked, settings, recipe)
        else:
            tracking.connect()
            _log(tracking.resume_run, str(run.settings.run_id))
            say(f"resuming interrupted run {run.settings.run_id} ({run.name}); use --new to start another")
        for note in notes:
            say(note)
        return _trained(adopted(run, kind, asked, recipe), write_start, recipe, home, options)


def _trained(
    run: RunRecord, write_start: Callable[[Path], None] | None, recipe: Recipe, home: str, options: RunOptions
) -> tuple[str, Path]:
    settings, run_id = run.settings, str(run.settings.run_id)
    folder, kept = options.output.resolve() / run.name, RunFolder(_below(home, run.name))
    folder.mkdir(parents=True, exist_ok=True)
    resolved = json.loads(json.dumps(_resolved(recipe, settings)))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
    try:
        with _exclusive(folder):
            if write_start:  # as the checkpoint of step 0, so that the parent's files are no longer needed
                kept.write(0, write_start)
                kept.commit(0, {})
            kept.put("run.json", run.dump())
            final = train(settings, recipe, folder, kept.uri, options.address, options.verbose, run.identity)
        _log(tracking.log_folder, run_id, final, "checkpoint")
    except BaseException as error:
        _log(tracking.end_run, run_id, "KILLED" if isinstance(error, KeyboardInterrupt | Interrupted) else "FAILED")
        raise
    kept.put("run.json", run.model_copy(update={"finished": True}).dump())
    kept.drop(0)
    _log(tracking.end_run, run_id)
    return run_id, final


def _log(log: Callable[..., None], *arguments: Any) -> None:
    """Tell MLflow; if it does not answer, only say so: a training is worth more than its entry there."""
    try:
        log(*arguments)
    except ConnectionError as error:
        say(f"not logged: {error}")


def _new_run(kind: str, asked: dict[str, str | None], settings: Settings, recipe: Recipe) -> RunRecord:
    tags = {"kind": kind, "store": settings.store, "snapshot": settings.snapshot, "parent": settings.parent or ""}
    run_id = tracking.start_run("unified-world-models", run_title(recipe, settings), tags | _code())
    settings.run_id = run_id
    # A tag keeps the snapshot from being collected, so that the run's data stays readable.
    LatentStore.open(settings.store).tag(f"run-{run_id}", settings.snapshot)
    name = f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}-{run_id[:6]}"
    tracking.log_settings(run_id, _resolved(recipe, settings))
    return RunRecord(identity=_identity(kind, asked, recipe.model_dump()), name=name, settings=settings)


def run_title(recipe: Recipe, settings: Settings) -> str:
    """Return the run's name in MLflow: recipe, task or robots, number of parameters."""
    tasks = recipe.instructions or [*settings.embodiments]
    with torch.device("meta"):
        millions = sum(weight.numel() for weight in settings.build().parameters()) / 1e6
    shown = ", ".join(tasks[:3]) + (f" and {len(tasks) - 3} more" if len(tasks) > 3 else "")
    return f"{recipe.name}: {shown}, {millions:.1f} M"[:250]


def _resolved(recipe: Recipe, settings: Settings) -> dict[str, Any]:
    return recipe.model_dump() | {"model": settings.model_dump()["model"]}


def _interrupted_run(home: str, kind: str, asked: dict[str, str | None], recipe: Recipe) -> RunRecord | None:
    """Return the newest unfinished run under ``home`` that this command would repeat."""
    files, root = parse(home).filesystem()
    there = files.get_file_info(pyarrow.fs.FileSelector(root, allow_not_found=True))
    names = sorted(info.base_name for info in there if info.type == pyarrow.fs.FileType.Directory)
    for name in sorted(names, key=lambda name: name.split("-")[-3:], reverse=True):
        kept = RunFolder(_below(home, name))
        try:
            run: RunRecord | None = RunRecord.load(kept.read("run.json"))
        except (FileNotFoundError, ValueError) as error:
            run = _healed(kept, name, isinstance(error, ValueError), kind, asked, recipe)
        if run and not run.finished and is_same(run, kind, asked, recipe):
            return run
    return None


def _healed(
    kept: RunFolder, name: str, is_there: bool, kind: str, asked: dict[str, str | None], recipe: Recipe
) -> RunRecord | None:
    """Return what a damaged or missing ``run.json`` said, from the newest intact checkpoint beside it.

    None if there is no checkpoint. Raises UserError if that does not say which command started the run.
    """
    what = f"{kept.uri}/run.json is {'damaged' if is_there else 'missing'}"
    for step, about in sorted(kept.complete().items(), reverse=True):
        if step == 0 or kept.damage(step, about):
            continue
        if "identity" not in about:
            raise UserError(f"{what}, and its checkpoints are of an earlier version; restore it, or use --new")
        with kept.fetched(step) as folder:
            settings = load_settings(folder).model_copy(update={"step": 0})
        run = RunRecord(identity=about["identity"], name=name, settings=settings)
        if is_same(run, kind, asked, recipe):
            say(f"{what}; its checkpoint of step {step} says what was in it")
        return run
    if is_there:
        say(f"{what}, and there is no checkpoint that says what was in it; it is passed over")
    return None


def is_same(run: RunRecord, kind: str, asked: dict[str, str | None], recipe: Recipe) -> bool:
    """Whether this command started ``run``, possibly in an earlier version whose recipes had fewer keys."""
    recorded = run.settings.recipe
    then = Recipe.model_validate(recorded)  # with today's defaults for keys that did not exist
    same_result = all(getattr(then, key) == getattr(recipe, key) for key in RESULT_KEYS)
    return same_result and run.identity == _identity(kind, asked, recorded)


def adopted(run: RunRecord, kind: str, asked: dict[str, str | None], recipe: Recipe) -> RunRecord:
    """Return the record with this recipe in it, and the identity that goes with that."""
    values = recipe.model_dump()
    settings = run.settings.model_copy(update={"recipe": values})
    return run.model_copy(update={"settings": settings, "identity": _identity(kind, asked, values)})


def _identity(kind: str, asked: dict[str, str | None], recipe: dict[str, Any]) -> str:
    what = {key: value for key, value in recipe.items() if key not in WORK_KEYS}
    return hashlib.sha256(json.dumps([kind, asked, what], sort_keys=True).encode()).hexdigest()[:16]


def _below(home: str, name: str) -> str:
    place = parse(home)
    below = {"path": place.path / name} if isinstance(place, Folder) else {"prefix": f"{place.prefix}/{name}"}
    return dataclasses.replace(place, **below).uri


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Lock the run against other processes on this machine."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: this run is being trained by another process; wait for it, or use --new") from None
    try:
        yield
    finally:
        lock.release()


def _code() -> dict[str, str]:
    """Return the tags of this code: its version, and the commit if it is a git checkout."""
    tags: dict[str, Any] = {"version": version("unified-world-models"), "hardware": _hardware()}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        tags["mlflow.source.git.commit"] = subprocess.run(
            asked, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    return tags


def _hardware() -> str:
    """Return what this machine, which starts the run, computes with."""
    gpus = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    listed = ", ".join(f"{count} x {name}" for name, count in gpus.items()) or "no GPU"
    return f"{os.cpu_count()} cores, {memory:.0f} GB, {listed}"
