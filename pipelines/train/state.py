"""The training state in a checkpoint: each worker's slices of named parameters, as safetensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from infra.engine import ParameterSlice
from pipelines.models import manifest
from pipelines.models.manifest import MANIFEST


def save_state(path: Path, kept: list[ParameterSlice]) -> None:
    """Write one worker's slices to a file."""
    tensors = {}
    for part in kept:
        for kind, values in {"weight": part.weight, **part.state}.items():
            tensors[f"{kind}/{part.name}/{part.start}"] = values
    save_file(tensors, path)


class SavedState:
    """The state of a checkpoint, reassembled from the files of any number of workers."""

    def __init__(self, folder: Path):
        self._open = contextlib.ExitStack()
        self._where: dict[tuple[str, str], dict[int, Any]] = {}
        # What the manifest does not list was not written with the rest.
        listed = manifest.parse((folder / MANIFEST).read_bytes())["files"] if (folder / MANIFEST).exists() else None
        for path in sorted(folder.glob("state-*.safetensors")):
            if listed is not None and path.name not in listed:
                continue
            file = self._open.enter_context(safe_open(path, "pt"))
            for key in file.keys():  # noqa: SIM118  not a dict
                kind, _, rest = key.partition("/")
                name, _, start = rest.rpartition("/")
                self._where.setdefault((kind, name), {})[int(start)] = file

    def read(self, kind: str, name: str) -> Tensor:
        """Return all values of a parameter, float32, flat."""
        places = self._where[kind, name]
        return torch.cat([places[start].get_tensor(f"{kind}/{name}/{start}") for start in sorted(places)])

    def names(self) -> Iterator[str]:
        return (name for kind, name in self._where if kind == "weight")

    def __enter__(self) -> SavedState:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
