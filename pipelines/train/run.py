"""One training as one MLflow run. The same command goes on with a run that was cut off, wherever it was.

OUTPUT/NAME-TIME-RUN/recipe.yaml     as it was resolved
                     run.json        what the run is: its settings, its snapshot, the command's identity
                     step-.../       checkpoints (run_folder.py), here or under another URI together with run.json
                     checkpoint/     the final weights
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.fs
import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel

from infra import tracking
from pipelines.console import say
from pipelines.errors import Stopped
from pipelines.models.checkpoint import Settings
from pipelines.recipe import Recipe
from pipelines.train.checkpoints import RunFolder
from pipelines.train.driver import train
from preprocessing.errors import UserError
from preprocessing.store.storage import Folder, parse
from preprocessing.store.store import LatentStore

# Of the recipe, what says how the work is done and not what comes out: a run may go on with other values.
HOW = {
    "workers", "micro_batch_size", "zero_stage", "activation_checkpointing", "offload", "compile", "checkpoint_every",
    "keep_last", "worker_price", "log_every",
}  # fmt: skip


class Run(BaseModel):
    """What ``run.json`` holds."""

    identity: str
    name: str
    settings: Settings
    finished: bool = False


def tracked(
    kind: str,
    asked: dict[str, str | None],
    begin: Callable[[], tuple[Settings, Callable[[Path], None] | None]],
    recipe: Recipe,
    output: Path,
    checkpoints: str | None = None,
    new: bool = False,
    address: str | None = None,
    verbose: bool = False,
) -> tuple[str, Path]:
    """Train, and return (MLflow run id, folder of the final weights).

    ``asked`` is what the user named (store, model, snapshot): with the recipe it tells whether a run of ``output`` or
    ``checkpoints`` that was cut off is this one; then it goes on, with the snapshot it began with. Else, or where it is
    to be ``new``, ``begin`` gives the settings of a new one, and what writes the weights that it starts from, if any.
    """
    place = parse(checkpoints or str(output))
    place.content()  # a mistake in it is told before anything is begun
    home = place.uri
    what = {key: value for key, value in recipe.model_dump().items() if key not in HOW}
    identity = hashlib.sha256(json.dumps([kind, asked, what], sort_keys=True).encode()).hexdigest()[:16]
    run = None if new else _cut_off(home, identity)
    if run is None:
        settings, write_start = begin()
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{output}: {error.strerror}; give a folder that can be written to") from None
        tags = {"kind": kind, "store": settings.store, "snapshot": settings.snapshot, "parent": settings.parent or ""}
        run_id = tracking.start_run("unified-world-models", recipe.name, tags | _code())
        settings.run_id = run_id
        # Kept for as long as anybody asks what it saw.
        LatentStore.open(settings.store).tag(f"run-{run_id}", settings.snapshot)
        name = f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}-{run_id[:6]}"
        run = Run(identity=identity, name=name, settings=settings)
        resolved = recipe.model_dump() | {"model": settings.model_dump()["model"]}
        tracking.log_settings(run_id, resolved)
    else:
        write_start = None
        settings, resolved = run.settings, recipe.model_dump() | {"model": run.settings.model_dump()["model"]}
        run_id = str(settings.run_id)
        tracking.connect()
        tracking.resume_run(run_id)
        say(f"going on with run {run_id} ({run.name}), which was cut off; --new begins another")
    settings.recipe = recipe.model_dump()
    folder, kept = output.resolve() / run.name, RunFolder(_below(home, run.name))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(resolved)), sort_keys=False))
    try:
        with _alone(folder):
            if write_start:  # as the checkpoint of step 0, which needs nobody's file any more
                kept.write(0, write_start)
                kept.commit(0, {})
            kept.put("run.json", run.model_dump_json(indent=1).encode())
            final = train(settings, recipe, folder, kept.uri, address, verbose)
        tracking.log_folder(run_id, final, "checkpoint")
    except BaseException as error:
        tracking.end_run(run_id, "KILLED" if isinstance(error, KeyboardInterrupt | Stopped) else "FAILED")
        raise
    kept.put("run.json", run.model_copy(update={"finished": True}).model_dump_json(indent=1).encode())
    kept.drop(0)
    tracking.end_run(run_id)
    return run_id, final


def _cut_off(home: str, identity: str) -> Run | None:
    """The newest run under ``home`` of that identity that has not finished."""
    files, root = parse(home).filesystem()
    there = files.get_file_info(pyarrow.fs.FileSelector(root, allow_not_found=True))
    names = sorted(info.base_name for info in there if info.type == pyarrow.fs.FileType.Directory)
    for name in sorted(names, key=lambda name: name.split("-")[-3:], reverse=True):
        with contextlib.suppress(FileNotFoundError, ValueError):
            run = Run.model_validate_json(RunFolder(_below(home, name)).read("run.json"))
            if run.identity == identity and not run.finished:
                return run
    return None


def _below(home: str, name: str) -> str:
    place = parse(home)
    below = {"path": place.path / name} if isinstance(place, Folder) else {"prefix": f"{place.prefix}/{name}"}
    return dataclasses.replace(place, **below).uri


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else trains this run from this machine."""
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
    """Which code it is: the version, and the commit where it is a checkout."""
    tags: dict[str, Any] = {"version": version("unified-world-models")}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        tags["mlflow.source.git.commit"] = subprocess.run(
            asked, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    return tags
