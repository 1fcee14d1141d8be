"""A snapshot as plain files, for programs that read zarr and parquet but know neither Icechunk nor this project.

FOLDER/episodes.parquet        one row per episode and encoding: the catalogue's columns, and ``group``
FOLDER/episodes.zarr/GROUP     zarr v3, one group per row; its attributes are the row's columns
    latents/CAMERA               float16 [T, C, h, w]
    action                       float32 [T, A]
    proprio/NAME, signals/NAME   float32 [T, D]
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from preprocessing.errors import UserError
from preprocessing.store.rows import EpisodeRow
from preprocessing.store.snapshot import Snapshot

PLACES = ("cameras", "steps")  # columns that point into the store


def export(snapshot: Snapshot, folder: Path, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> int:
    """Write every episode of the snapshot and return their number. The folder appears when it is complete.

    Raises UserError if the folder already exists.
    """
    if folder.exists():
        raise UserError(f"{folder}: already exists; give a new folder")
    building = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    root = zarr.create_group(building / "episodes.zarr")
    rows: list[EpisodeRow] = snapshot.episodes().to_pylist()
    described = []
    for row in progress(rows):
        name = f"{row['id']}-{row['key'][:8]}"  # an episode can have several encodings
        columns = {key: value for key, value in row.items() if key not in PLACES}
        described.append(columns | {"group": name, "cameras": [camera["name"] for camera in row["cameras"]]})
        group = root.create_group(name, attributes=columns | {"action_layout": json.loads(row["action_layout"])})
        for camera in row["cameras"]:
            _write(group, f"latents/{camera['name']}", snapshot.read(camera["segments"]))
        if row["steps"]["count"]:
            steps, column = snapshot.read([row["steps"]]), row["action_dim"]
            if column:
                _write(group, "action", steps[:, :column])
            for kind, parts in (("proprio", row["proprio"]), ("signals", row["signals"])):
                for part in parts or ():
                    _write(group, f"{kind}/{part['name'].strip('/')}", steps[:, column : column + part["width"]])
                    column += part["width"]
    pq.write_table(pa.Table.from_pylist(described), building / "episodes.parquet")
    building.rename(folder)
    return len(rows)


def _write(group: zarr.Group, name: str, values: Any) -> None:
    group.create_array(name, data=values, chunks=values.shape, compressors=None)
