"""The checkpoints of a run, in a folder or on S3: complete or absent, the last few and the best.

    RUN/step-00001000/model.safetensors    averaged weights, float32, of the plain model
                      settings.json        all that is needed to use them (checkpoint.Settings)
                      state-0.safetensors  what worker 0 kept: KIND/NAME/START -> float32 values of a parameter, flat
                      checkpoint.json      step, losses so far, and the size of every other file; written last

A checkpoint is there when its ``checkpoint.json`` is, and all files have their sizes. In a folder it is built beside,
under a hidden name, and renamed; on S3, which knows no renaming, the last file makes it one.
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
    """One run's, at a URI. Every worker may have one open."""

    def __init__(self, uri: str):
        self.uri, self._place = uri, parse(uri)
        self._local = self._place.path if isinstance(self._place, Folder) else None

    def complete(self) -> dict[int, dict[str, Any]]:
        """What each checkpoint that is there says of itself, by its step, in order. What is not whole is not there."""
        files, root = self._place.filesystem()
        listed = files.get_file_info(pyarrow.fs.FileSelector(root, recursive=True, allow_not_found=True))
        sizes = {info.path[len(root) :].lstrip("/"): info.size for info in listed if info.is_file}
        found = {}
        for path in sorted(path for path in sizes if path.startswith("step-") and path.endswith(f"/{MANIFEST}")):
            folder = path.removesuffix(MANIFEST)
            with contextlib.suppress(ValueError):  # of a machine that went down before all was on its disk
                manifest = json.loads(self.read(path))
                if all(sizes.get(folder + name) == size for name, size in manifest["files"].items()):
                    found[manifest["step"]] = manifest
        return found

    def newest(self) -> int:
        """The step of the newest checkpoint; 0 where there is none."""
        return max(self.complete(), default=0)

    def write(self, step: int, build: Callable[[Path], None]) -> None:
        """Some files of the checkpoint of that step: ``build`` is given a folder for them.

        OSError where there is no room. Workers that share the folder build beside each
        other. It is no checkpoint before ``commit``.
        """
        if self._local is not None:
            hidden = _made(self._local / f".{_name(step)}")
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
        """Make what all workers have written a checkpoint."""
        files, root = self._place.filesystem()
        where = f"{root}/{_name(step)}" if self._local is None else str(self._local / f".{_name(step)}")
        listed = files.get_file_info(pyarrow.fs.FileSelector(where))
        manifest = about | {"step": step, "files": {info.base_name: info.size for info in listed}}
        with files.open_output_stream(f"{where}/{MANIFEST}") as out:
            out.write(json.dumps(manifest, indent=1).encode())
        if self._local is not None:
            Path(where).rename(self._local / _name(step))

    def drop(self, step: int) -> None:
        """Remove that checkpoint, or what was written of it."""
        if self._local is not None:
            shutil.rmtree(self._local / f".{_name(step)}", ignore_errors=True)
            shutil.rmtree(self._local / _name(step), ignore_errors=True)
            return
        files, root = self._place.filesystem()
        with_manifest = f"{root}/{_name(step)}/{MANIFEST}"
        if files.get_file_info(with_manifest).is_file:
            files.delete_file(with_manifest)  # first: a half-deleted checkpoint is none
        files.delete_dir_contents(f"{root}/{_name(step)}", missing_dir_ok=True)

    def prune(self, last: int, judged_by: str) -> None:
        """Keep the last few, the one of the least ``judged_by``, and that of step 0, of which a finetuning begins."""
        complete = {step: about for step, about in self.complete().items() if step}
        judged = {step: about[judged_by] for step, about in complete.items() if about.get(judged_by) is not None}
        kept = {*list(complete)[-last:], *([min(judged, key=judged.__getitem__)] if judged else [])}
        for step in complete.keys() - kept:
            self.drop(step)

    def sweep(self) -> None:
        """Remove what a run that died left half-written. Nobody may be writing."""
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
        """The folder of a complete checkpoint on this machine, for as long as the block runs."""
        if self._local is not None:
            yield self._local / _name(step)
            return
        files, root = self._place.filesystem()
        with tempfile.TemporaryDirectory(dir=_made(cache_folder()), prefix=f"{_name(step)}-") as made:
            pyarrow.fs.copy_files(f"{root}/{_name(step)}", made, source_filesystem=files)
            yield Path(made)

    def read(self, name: str) -> bytes:
        files, root = self._place.filesystem()
        with files.open_input_stream(f"{root}/{name}") as content:
            return content.read()

    def put(self, name: str, content: bytes) -> None:
        """A small file beside the checkpoints, complete or absent."""
        if self._local is not None:
            _made(self._local)
            beside = self._local / f".{name}.{os.getpid()}"
            beside.write_bytes(content)
            beside.replace(self._local / name)
            return
        files, root = self._place.filesystem()
        with files.open_output_stream(f"{root}/{name}") as out:
            out.write(content)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
