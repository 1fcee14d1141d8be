"""Catalogue rows and small stores for tests that need data without an ingest."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import zarr

from preprocessing.store.rows import CameraRow, EpisodeRow, LocationRow, StatisticsRow
from preprocessing.store.statistics import Statistics
from preprocessing.store.store import LatentStore, write_segments


@dataclass
class Made:
    """An episode: latents float16 [T, C, h, w] by camera, steps float32 [T, D]. ``columns`` overrides its row."""

    name: str
    latents: dict[str, np.ndarray]
    steps: np.ndarray
    action_dim: int
    columns: dict[str, Any] = field(default_factory=dict)


Written = tuple[EpisodeRow, list[StatisticsRow]]


def write_episode(
    fork: Any, name: str, latents: dict[str, np.ndarray], steps: np.ndarray, action_dim: int, **columns: Any
) -> Written:
    return write_episodes(fork, [Made(name, latents, steps, action_dim, columns)])[0]


def write_episodes(fork: Any, episodes: list[Made]) -> list[Written]:
    """Write all episodes as one group, like a write task."""
    arrays: list[np.ndarray] = []
    for one in episodes:
        arrays += [values[at : at + 64] for values in one.latents.values() for at in range(0, len(values), 64)]
        arrays.append(one.steps)
    places = iter(write_segments(fork, arrays))
    return [_described(one, places) for one in episodes]


def _described(one: Made, places: Iterator[LocationRow]) -> Written:
    proprio_dim = one.steps.shape[1] - one.action_dim
    cameras: list[CameraRow] = [
        {"name": camera, "segments": [next(places) for _ in range(0, len(values), 64)]}
        for camera, values in one.latents.items()
    ]
    row = {
        "key": f"key-{one.name}",
        "id": one.name,
        "uri": f"/raw/{one.name}",
        "index": 0,
        "format": "hdf5",
        "frames": len(one.steps),
        "fps": 10.0,
        "embodiment": "arm",
        "instruction": "close the drawer",
        "success": True,
        "encoder": "tiny",
        "encoder_digest": "e" * 16,
        "cameras": cameras,
        "steps": next(places),
        "action_dim": one.action_dim,
        "action_layout": json.dumps([]),
        "proprio": [{"name": "state", "width": proprio_dim}] if proprio_dim else [],
        "contract": None,
        "repairs": [],
        "repair_fields": [],
        "source": None,
        "split": None,
        "signals": None,
        "texts": None,
        "spans": None,
        "fingerprint": None,
        **one.columns,
    }
    columns = {name: values.transpose(0, 2, 3, 1).reshape(-1, values.shape[1]) for name, values in one.latents.items()}
    columns |= {"steps": one.steps} if one.steps.size else {}
    statistics: list[StatisticsRow] = [
        {"key": row["key"], "array": name, **Statistics.of(v).to_row()} for name, v in columns.items()
    ]
    return cast(EpisodeRow, row), statistics


def fill(store: LatentStore, names: list[str], frames: int = 70, cameras: tuple[str, ...] = ("front",)) -> str:
    """Commit episodes of random numbers, seeded by name; return the snapshot id."""
    return commit(store, [random_episode(store, name, frames, cameras) for name in names])


def random_episode(store: LatentStore, name: str, frames: int, cameras: tuple[str, ...]) -> Any:
    """Return an episode as ``commit`` takes it: the fork that holds it, its catalogue row and its statistics."""
    random = np.random.default_rng(sum(name.encode()))
    latents = {camera: random.standard_normal((frames, 4, 8, 8)).astype(np.float16) for camera in cameras}
    steps = random.standard_normal((frames, 5)).astype(np.float32)
    fork = store.fork()
    return fork, *write_episode(fork, name, latents, steps, action_dim=3)


def commit(store: LatentStore, written: list[Any]) -> str:
    forks, rows, statistics = zip(*written, strict=True)
    return store.commit(uuid.uuid4().hex, forks, [*rows], [one for found in statistics for one in found], []).snapshot


def is_blank(store: LatentStore, snapshot_id: str, locations: list[LocationRow]) -> bool:
    """Return whether these locations hold only zeros."""
    session = store.repository.readonly_session(snapshot_id=snapshot_id)
    arrays = [(zarr.open_array(session.store, path=at["array"], mode="r"), at) for at in locations]
    return not any(np.any(array[at["start"] : at["start"] + at["count"]]) for array, at in arrays)


def differences(uri: str, other: str) -> list[str]:
    """Read everything in two stores and return how their episodes differ."""
    one, two = (LatentStore.open(place).snapshot() for place in (uri, other))
    found = [*one.verify(), *two.verify()]
    rows, expected = ({row["key"]: row for row in snapshot.episodes().to_pylist()} for snapshot in (one, two))
    if len(one.episodes(["key"])) != len(rows):
        found.append("an episode occurs twice")
    found += [f"{key} is in only one of them" for key in rows.keys() ^ expected.keys()]
    for key in rows.keys() & expected.keys():
        mine, theirs = rows[key], expected[key]
        for name in mine.keys() - {"cameras", "steps"}:
            if mine[name] != theirs[name]:
                found.append(f"{key}: {name} is {mine[name]}, not {theirs[name]}")
        places = {"steps": [mine["steps"]]} if mine["steps"]["count"] else {}
        places |= {camera["name"]: camera["segments"] for camera in mine["cameras"]}
        others = {"steps": [theirs["steps"]], **{camera["name"]: camera["segments"] for camera in theirs["cameras"]}}
        for name, where in places.items():
            if not np.array_equal(one.read(where), two.read(others[name])):
                found.append(f"{key}: {name} differs")
            if str(one.statistics([key], name)) != str(two.statistics([key], name)):
                found.append(f"{key}: statistics of {name} differ")
    return found
