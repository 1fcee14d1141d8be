"""Normalisation of actions and proprioception, from statistics that merge.

Each episode carries count, mean, M2, minimum and maximum of its columns (Chan et al. 1979 for the merge), so the
statistics of any subset of any snapshot need no pass over the data and never go stale.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

MINIMUM_RANGE = 1e-3  # a column that hardly moves is not blown up to [-1, 1]


def column_statistics(steps: np.ndarray) -> dict[str, list[float]]:
    """mean, m2 (sum of squared deviations), min and max of each column of float ``[T, D]``, T > 0."""
    wide = steps.astype(np.float64)
    mean = wide.mean(0)
    columns = {"mean": mean, "m2": ((wide - mean) ** 2).sum(0), "min": wide.min(0), "max": wide.max(0)}
    return {name: values.tolist() for name, values in columns.items()}


@dataclass(frozen=True)
class Normalizer:
    """Columns to [-1, 1] by minimum and maximum (paper section IV, actions) or to unit deviation (proprioception).

    ``scale`` and ``offset`` are float ``[D]``: normalised = (raw - offset) / scale.
    """

    offset: tuple[float, ...]
    scale: tuple[float, ...]

    def apply(self, raw: np.ndarray) -> np.ndarray:
        return ((raw - np.asarray(self.offset)) / np.asarray(self.scale)).astype(np.float32)

    def invert(self, normalised: np.ndarray) -> np.ndarray:
        return (normalised * np.asarray(self.scale) + np.asarray(self.offset)).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def merge(rows: Iterable[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Statistics of all episodes of ``rows`` (catalogue rows of one step width) together."""
    count, mean, m2 = 0, np.zeros(()), np.zeros(())
    low, high = np.full((), np.inf), np.full((), -np.inf)
    for row in rows:
        added, other = row["frames"], np.asarray(row["mean"])
        delta = other - mean
        total = count + added
        mean = mean + delta * added / total
        m2 = m2 + np.asarray(row["m2"]) + delta**2 * count * added / total
        low, high = np.minimum(low, row["min"]), np.maximum(high, row["max"])
        count = total
    if not count:
        raise ValueError("no episode to take statistics of")
    return {"mean": mean, "std": np.sqrt(m2 / count), "min": low, "max": high}


def normalizers(rows: list[dict[str, Any]]) -> tuple[Normalizer, Normalizer]:
    """(action, proprio) normalisers of one embodiment's catalogue rows."""
    total, split = merge(rows), rows[0]["action_dim"]
    low, high = total["min"][:split], total["max"][:split]
    half = np.maximum((high - low) / 2, MINIMUM_RANGE)
    action = Normalizer(tuple((low + high) / 2), tuple(half))
    proprio = Normalizer(tuple(total["mean"][split:]), tuple(np.maximum(total["std"][split:], MINIMUM_RANGE)))
    return action, proprio
