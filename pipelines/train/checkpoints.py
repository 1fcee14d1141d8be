"""The checkpoints of a run, in a folder or on S3: each complete or absent; the last few and the best are kept.

    RUN/step-00001000/model.safetensors    averaged weights, float32, adapters merged
                      settings.json        everything needed to use the weights (checkpoint.Settings)
                      state-0.safetensors  training state of worker 0: KIND/NAME/START -> flat float32 values
                      checkpoint.json      manifest: step, losses, sizes and checksums of the files; written last

A checkpoint is complete if ``checkpoint.json`` exists and every file has the size it gives. In a folder it is built
under a hidden name and renamed; S3 has no rename, so the manifest, written last, completes it. Checksums are compared
when a checkpoint is loaded; a damaged one is passed over for the one before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs

from pipelines.models import manifest
from pipelines.models.manifest import MANIFEST, Sums
from preprocessing.cache import cache_folder
from preprocessing.errors import UserError
from preprocessing.store.storage import Folder, parse

COPIED_AT_ONCE = 8 * 2**20
SUMS = ".sums-"  # beginning of the name of a worker's list of what it wrote, which the manifest absorbs


class RunFolder:
    """The checkpoints of one run at a URI. All workers may use it at once."""

    def __init__(self, uri: str):
        self.uri, self._place = uri, parse(uri)
        self._local = self._place.path if isinstance(self._place, Folder) else None

    def complete(self) -> dict[int, dict[str, Any]]:
        """Return the manifest of each complete checkpoint by step, in ascending order.

        Those that are incomplete, or whose manifest is damaged, are left out.
        """
        return {step: about for step, about in self._listed().items() if not isinstance(about, str)}

    def _listed(self) -> dict[int, dict[str, Any] | str]:
        """Return the manifest of each checkpoint that was once complete, or else what is wrong with it, by step."""
        found: dict[int, dict[str, Any] | str] = {}
        sizes = self._sizes()
        for name in sorted({path.partition("/")[0] for path in sizes if re.match(r"step-\d+/", path)}):
            held = {path.removeprefix(f"{name}/"): size for path, size in sizes.items() if path.startswith(f"{name}/")}
            step = int(name[5:])
            if MANIFEST not in held:
                if self._local is not None:  # where folders are renamed only when they are complete
                    found[step] = f"{MANIFEST} is missing"
                continue
            try:
                about = manifest.parse(self.read(f"{name}/{MANIFEST}"))
                found[step] = manifest.difference(about, held, None) or about
            except ValueError:
                found[step] = f"{MANIFEST} is not as it was written"
        return found

    def _sizes(self) -> dict[str, int]:
        """Return the size of each file by its path in the run."""
        files, root = self._place.filesystem()
        listed = files.get_file_info(pyarrow.fs.FileSelector(root, recursive=True, allow_not_found=True))
        return {info.path[len(root) :].lstrip("/"): info.size for info in listed if info.is_file}

    def damage(self, step: int, about: dict[str, Any]) -> str | None:
        """Read a complete checkpoint, and say how it differs from its manifest; None if it does not."""
        sizes = {path.rpartition("/")[2]: size for path, size in self._sizes().items() if path.startswith(_name(step))}
        return manifest.difference(about, sizes, lambda name: self._open(f"{_name(step)}/{name}"))

    def newest(self) -> int:
        """Return the step of the newest complete checkpoint, 0 if there is none."""
        return max(self.complete(), default=0)

    def write(self, step: int, build: Callable[[Path], None]) -> None:
        """Write some files of the checkpoint of ``step``: ``build`` writes them into the folder it is passed.

        Several workers may write to the same checkpoint. It counts only after ``commit``. Raises OSError if the disk is
        full.
        """
        if self._local is not None:
            hidden = _ensure(self._local / f".{_name(step)}")
            with tempfile.TemporaryDirectory(dir=self._local, prefix=f".{_name(step)}-") as own:
                build(Path(own))
                _note_sums(Path(own))
                for path in Path(own).iterdir():
                    with path.open("rb") as written:
                        os.fsync(written.fileno())
                    path.rename(hidden / path.name)
            return
        with tempfile.TemporaryDirectory() as own:
            build(Path(own))
            _note_sums(Path(own))
            files, root = self._place.filesystem()
            for path in Path(own).iterdir():  # pyarrow.fs.copy_files would ignore an upload that fails
                with (
                    path.open("rb") as made,
                    files.open_output_stream(f"{root}/{_name(step)}/{path.name}") as out,
                ):
                    shutil.copyfileobj(made, out, COPIED_AT_ONCE)

    def commit(self, step: int, about: dict[str, Any]) -> None:
        """Complete the checkpoint once all workers have written: add the manifest, with ``about``."""
        files, root = self._place.filesystem()
        where = f"{root}/{_name(step)}" if self._local is None else str(self._local / f".{_name(step)}")
        noted = [info.path for info in files.get_file_info(pyarrow.fs.FileSelector(where)) if SUMS in info.base_name]
        sums: Sums = {}
        for path in noted:
            with files.open_input_stream(path) as content:
                sums |= json.loads(content.read())
            files.delete_file(path)
        with files.open_output_stream(f"{where}/{MANIFEST}") as out:
            out.write(manifest.dump(sums, about | {"step": step}))
        if self._local is not None:
            Path(where).rename(self._local / _name(step))

    def drop(self, step: int) -> None:
        """Remove the checkpoint, complete or not."""
        if self._local is not None:
            shutil.rmtree(self._local / f".{_name(step)}", ignore_errors=True)
            shutil.rmtree(self._local / _name(step), ignore_errors=True)
            return
        files, root = self._place.filesystem()
        last = f"{root}/{_name(step)}/{MANIFEST}"
        if files.get_file_info(last).is_file:
            files.delete_file(last)  # first, so that a half-deleted checkpoint is incomplete
        files.delete_dir_contents(f"{root}/{_name(step)}", missing_dir_ok=True)

    def prune(self, last: int, judged_by: str) -> None:
        """Keep the ``last`` newest, the one with the lowest ``judged_by``, and step 0, from which finetuning starts."""
        complete = {step: about for step, about in self.complete().items() if step}
        judged = {step: about[judged_by] for step, about in complete.items() if about.get(judged_by) is not None}
        kept = {*list(complete)[-last:], *([min(judged, key=judged.__getitem__)] if judged else [])}
        for step in complete.keys() - kept:
            self.drop(step)

    def sweep(self) -> list[str]:
        """Remove what cannot be loaded: incomplete checkpoints of a run that died, and damaged ones.

        Returns a line for each that was complete once. Checksums are compared from the newest checkpoint on, down to
        the first that is intact. Nobody may be writing. Step 0, from which finetuning starts, is never removed.
        """
        files, root = self._place.filesystem()
        there = files.get_file_info(pyarrow.fs.FileSelector(root, allow_not_found=True))
        steps = sorted(int(info.base_name[5:]) for info in there if re.fullmatch(r"step-\d+", info.base_name))
        listed, said, intact = self._listed(), list[str](), False
        for step in reversed([step for step in steps if step]):
            about = listed.get(step)
            if about is not None and not isinstance(about, str):
                if intact or not (problem := self.damage(step, about)):
                    if not intact and "sha256" not in about:
                        said.append(f"the checkpoint of step {step} has no checksums: an earlier version wrote it")
                    intact = True
                    continue
                about = problem
            if about is not None:
                said.append(f"the checkpoint of step {step} is damaged ({about}) and passed over")
            self.drop(step)
        if self._local is not None:
            for hidden in self._local.glob(".step-*"):
                shutil.rmtree(hidden)
        return said

    @contextlib.contextmanager
    def fetched(self, step: int) -> Iterator[Path]:
        """Make a complete checkpoint available as a local folder inside the ``with`` block.

        Raises UserError if it is damaged.
        """
        about = self._listed().get(step, "it is missing")
        if isinstance(about, str):
            raise self._damaged(step, about)
        if self._local is not None:
            if problem := self.damage(step, about):
                raise self._damaged(step, problem)
            yield self._local / _name(step)
            return
        with tempfile.TemporaryDirectory(dir=_ensure(cache_folder()), prefix=f"{_name(step)}-") as made:
            folder = Path(made)
            for name in [*about["files"], MANIFEST]:
                with self._open(f"{_name(step)}/{name}") as content, (folder / name).open("wb") as copy:
                    shutil.copyfileobj(content, copy, COPIED_AT_ONCE)
            sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
            if problem := manifest.difference(about, sizes, lambda name: (folder / name).open("rb")):
                raise self._damaged(step, problem)
            yield folder

    def _damaged(self, step: int, problem: str) -> UserError:
        hint = "; start anew with --new" if step == 0 else "; run the same command again to go on from the one before"
        return UserError(f"{self.uri}: the checkpoint of step {step} is damaged ({problem}){hint}")

    def read(self, name: str) -> bytes:
        with self._open(name) as content:
            return content.read()

    def _open(self, name: str) -> Any:
        files, root = self._place.filesystem()
        return files.open_input_stream(f"{root}/{name}")

    def put(self, name: str, content: bytes) -> None:
        """Write a small file next to the checkpoints atomically."""
        if self._local is not None:
            _ensure(self._local)
            hidden = self._local / f".{name}.{os.getpid()}"
            hidden.write_bytes(content)
            hidden.replace(self._local / name)
            return
        files, root = self._place.filesystem()
        with files.open_output_stream(f"{root}/{name}") as out:
            out.write(content)


def _note_sums(folder: Path) -> None:
    """Add to the folder a list of its files' sums, as a hidden file."""
    sums = manifest.measure(folder.iterdir())
    (folder / f"{SUMS}{uuid.uuid4().hex}").write_text(json.dumps(sums))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _ensure(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
