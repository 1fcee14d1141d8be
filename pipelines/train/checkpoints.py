"""The checkpoints of a run, in a folder or on S3: each complete or absent; the last few and the best are kept.

    RUN/step-00001000/model.safetensors    averaged weights, float32, adapters merged
                      settings.json        everything needed to use the weights (checkpoint.Settings)
                      state-0.safetensors  training state of worker 0: KIND/NAME/START -> flat float32 values
                      checkpoint.json      manifest: step, losses, and the size of every other file; written last

A checkpoint is complete if ``checkpoint.json`` exists and every file has the size it gives. In a folder it is built
under a hidden name and renamed; S3 has no rename, so the manifest, written last, completes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs

from preprocessing.cache import cache_folder
from preprocessing.store.storage import Folder, parse

MANIFEST = "checkpoint.json"


class RunFolder:
    """The checkpoints of one run at a URI. All workers may use it at once."""

    def __init__(self, uri: str):
        self.uri, self._place = uri, parse(uri)
        self._local = self._place.path if isinstance(self._place, Folder) else None

    def complete(self) -> dict[int, dict[str, Any]]:
        """Return the manifest of each complete checkpoint by step, in ascending order. Incomplete ones are ignored."""
        files, root = self._place.filesystem()
        listed = files.get_file_info(pyarrow.fs.FileSelector(root, recursive=True, allow_not_found=True))
        sizes = {info.path[len(root) :].lstrip("/"): info.size for info in listed if info.is_file}
        found = {}
        for path in sorted(path for path in sizes if path.startswith("step-") and path.endswith(f"/{MANIFEST}")):
            folder = path.removesuffix(MANIFEST)
            with contextlib.suppress(ValueError):  # truncated when a machine went down
                manifest = json.loads(self.read(path))
                if all(sizes.get(folder + name) == size for name, size in manifest["files"].items()):
                    found[manifest["step"]] = manifest
        return found

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
                for path in Path(own).iterdir():
                    with path.open("rb") as written:
                        os.fsync(written.fileno())
                    path.rename(hidden / path.name)
            return
        with tempfile.TemporaryDirectory() as own:
            build(Path(own))
            files, root = self._place.filesystem()
            pyarrow.fs.copy_files(own, f"{root}/{_name(step)}", destination_filesystem=files)

    def commit(self, step: int, about: dict[str, Any]) -> None:
        """Complete the checkpoint once all workers have written: add the manifest, with ``about``."""
        files, root = self._place.filesystem()
        where = f"{root}/{_name(step)}" if self._local is None else str(self._local / f".{_name(step)}")
        listed = files.get_file_info(pyarrow.fs.FileSelector(where))
        manifest = about | {"step": step, "files": {info.base_name: info.size for info in listed}}
        with files.open_output_stream(f"{where}/{MANIFEST}") as out:
            out.write(json.dumps(manifest, indent=1).encode())
        if self._local is not None:
            Path(where).rename(self._local / _name(step))

    def drop(self, step: int) -> None:
        """Remove the checkpoint, complete or not."""
        if self._local is not None:
            shutil.rmtree(self._local / f".{_name(step)}", ignore_errors=True)
            shutil.rmtree(self._local / _name(step), ignore_errors=True)
            return
        files, root = self._place.filesystem()
        manifest = f"{root}/{_name(step)}/{MANIFEST}"
        if files.get_file_info(manifest).is_file:
            files.delete_file(manifest)  # first, so that a half-deleted checkpoint is incomplete
        files.delete_dir_contents(f"{root}/{_name(step)}", missing_dir_ok=True)

    def prune(self, last: int, judged_by: str) -> None:
        """Keep the ``last`` newest, the one with the lowest ``judged_by``, and step 0, from which finetuning starts."""
        complete = {step: about for step, about in self.complete().items() if step}
        judged = {step: about[judged_by] for step, about in complete.items() if about.get(judged_by) is not None}
        kept = {*list(complete)[-last:], *([min(judged, key=judged.__getitem__)] if judged else [])}
        for step in complete.keys() - kept:
            self.drop(step)

    def sweep(self) -> None:
        """Remove incomplete checkpoints of a run that died. Nobody may be writing."""
        files, root = self._place.filesystem()
        there = files.get_file_info(pyarrow.fs.FileSelector(root, allow_not_found=True))
        complete = self.complete()
        for info in there:
            if re.fullmatch(r"step-\d+", info.base_name) and (step := int(info.base_name[5:])) not in complete:
                self.drop(step)
        if self._local is not None:
            for hidden in self._local.glob(".step-*"):
                shutil.rmtree(hidden)

    @contextlib.contextmanager
    def fetched(self, step: int) -> Iterator[Path]:
        """Make a complete checkpoint available as a local folder inside the ``with`` block."""
        if self._local is not None:
            yield self._local / _name(step)
            return
        files, root = self._place.filesystem()
        with tempfile.TemporaryDirectory(dir=_ensure(cache_folder()), prefix=f"{_name(step)}-") as made:
            pyarrow.fs.copy_files(f"{root}/{_name(step)}", made, source_filesystem=files)
            yield Path(made)

    def read(self, name: str) -> bytes:
        files, root = self._place.filesystem()
        with files.open_input_stream(f"{root}/{name}") as content:
            return content.read()

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


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _ensure(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
