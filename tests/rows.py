"""Catalogue rows and small stores, for tests that need data but no ingest."""

from __future__ import annotations

import json
import uuid
from typing import Any

import numpy as np
import zarr

from preprocessing.statistics import Statistics
from preprocessing.store import LatentStore, write_segments


def write_episode(
    fork: Any,
    name: str,
    latents: dict[str, np.ndarray],
    steps: np.ndarray,
    action_dim: int,
    embodiment: str = "arm",
    **columns: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Writes float16 latents [T, C, h, w] by camera and float32 steps [T, D]; returns catalogue row and statistics."""
    pieces = [(camera, values[at : at + 64]) for camera, values in latents.items() for at in range(0, len(values), 64)]
    *where, steps_at = write_segments(fork, [piece for _, piece in pieces] + [steps])
    segments: dict[str, list[dict[str, Any]]] = {}
    for (camera, _), location in zip(pieces, where, strict=True):
        segments.setdefault(camera, []).append(vars(location))
    row = {
        "key": f"key-{name}",
        "id": name,
        "uri": f"/raw/{name}",
        "index": 0,
        "format": "hdf5",
        "frames": len(steps),
        "fps": 10.0,
        "embodiment": embodiment,
        "instruction": "close the drawer",
        "success": True,
        "encoder": "tiny",
        "encoder_digest": "e" * 16,
        "cameras": [{"name": camera, "segments": found} for camera, found in segments.items()],
        "steps": vars(steps_at),
        "action_dim": action_dim,
        "action_layout": json.dumps([]),
        "proprio": [{"name": "state", "width": steps.shape[1] - action_dim}] if steps.shape[1] > action_dim else [],
        "contract": None,
        "repairs": [],
        **columns,
    }
    arrays = {camera: values.transpose(0, 2, 3, 1).reshape(-1, values.shape[1]) for camera, values in latents.items()}
    arrays |= {"steps": steps} if steps.size else {}
    return row, [{"key": row["key"], "array": name, **Statistics.of(v).to_row()} for name, v in arrays.items()]


def fill(store: LatentStore, names: list[str], frames: int = 70, cameras: tuple[str, ...] = ("front",)) -> str:
    """Episodes of random numbers, each its own; returns the snapshot id."""
    return commit(store, [random_episode(store, name, frames, cameras) for name in names])


def random_episode(store: LatentStore, name: str, frames: int, cameras: tuple[str, ...]) -> Any:
    """What ``commit`` takes: the fork that holds the episode, its catalogue row and its statistics."""
    random = np.random.default_rng(sum(name.encode()))
    latents = {camera: random.standard_normal((frames, 4, 8, 8)).astype(np.float16) for camera in cameras}
    steps = random.standard_normal((frames, 5)).astype(np.float32)
    fork = store.fork()
    return fork, *write_episode(fork, name, latents, steps, action_dim=3)


def commit(store: LatentStore, written: list[Any]) -> str:
    forks, rows, statistics = zip(*written, strict=True)
    return store.commit(uuid.uuid4().hex, forks, [*rows], [one for found in statistics for one in found], []).snapshot


def is_blank(store: LatentStore, snapshot_id: str, locations: list[dict[str, Any]]) -> bool:
    """Whether nothing but zeros is where the catalogue once placed something."""
    session = store.repository.readonly_session(snapshot_id=snapshot_id)
    arrays = [(zarr.open_array(session.store, path=at["array"], mode="r"), at) for at in locations]
    return not any(np.any(array[at["start"] : at["start"] + at["count"]]) for array, at in arrays)


def differences(uri: str, other: str) -> list[str]:
    """In what two stores that ought to hold the same episodes differ, everything read; nothing where they agree."""
    one, two = (LatentStore.open(place).snapshot() for place in (uri, other))
    found = [*one.verify(), *two.verify()]
    rows, expected = ({row["key"]: row for row in snapshot.episodes().to_pylist()} for snapshot in (one, two))
    if len(one.episodes(["key"])) != len(rows):
        found.append("an episode is there twice")
    found += [f"{key} is in one of them only" for key in rows.keys() ^ expected.keys()]
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
