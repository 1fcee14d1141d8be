"""Catalogue rows and small stores, for tests that need data but no ingest."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from preprocessing.statistics import column_statistics
from preprocessing.store import LatentStore, Transaction, write_segments


def write_episode(
    fork: Any,
    part: str,
    name: str,
    latents: dict[str, np.ndarray],
    steps: np.ndarray,
    action_dim: int,
    embodiment: str = "arm",
    **columns: Any,
) -> dict[str, Any]:
    """Writes float16 latents [T, C, h, w] by camera and float32 steps [T, D]; returns the catalogue row."""
    pieces = [(camera, values[at : at + 64]) for camera, values in latents.items() for at in range(0, len(values), 64)]
    *where, steps_at = write_segments(fork, part, [piece for _, piece in pieces] + [steps])
    segments: dict[str, list[dict[str, Any]]] = {}
    for (camera, _), location in zip(pieces, where, strict=True):
        segments.setdefault(camera, []).append(vars(location))
    return {
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
        **column_statistics(steps),
        **columns,
    }


def fill(store: LatentStore, names: list[str], frames: int = 70, cameras: tuple[str, ...] = ("front",)) -> str:
    """Episodes of random numbers, each its own; returns the snapshot id."""
    transaction = store.begin()
    return commit(transaction, [random_episode(transaction, name, frames, cameras) for name in names])


def random_episode(
    transaction: Transaction, name: str, frames: int, cameras: tuple[str, ...]
) -> tuple[Any, dict[str, Any]]:
    random = np.random.default_rng(sum(name.encode()))
    latents = {camera: random.standard_normal((frames, 4, 8, 8)).astype(np.float16) for camera in cameras}
    steps = random.standard_normal((frames, 5)).astype(np.float32)
    fork = transaction.fork()
    return fork, write_episode(fork, transaction.part, name, latents, steps, action_dim=3)


def commit(transaction: Transaction, written: list[tuple[Any, dict[str, Any]]]) -> str:
    return transaction.commit([fork for fork, _ in written], [row for _, row in written], [], "test")
