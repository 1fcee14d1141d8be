"""Statistics that merge, and the normalisation of actions and proprioception that follows from them.

Each episode carries, for each of its arrays, count, mean, M2, minimum, maximum and a quantile sketch of every column,
so the statistics of any subset of any snapshot need no pass over the data and never go stale. Moments merge as in Chan
et al. 1979. The sketch is a t-digest (Dunning and Ertl 2019) with fixed knots: the values at RANKS, which lie closer
together towards both tails, each standing for the share of the data around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

MINIMUM_RANGE = 1e-3  # a column that hardly moves is not blown up to [-1, 1]
TAIL = 0.01  # of the data on either side, which quantiles leave outside of [-1, 1]
FLOOR = 0.1  # of the whole range, which quantiles keep: a gripper that opens in few steps has none of its own
RANKS = (1 - np.cos(np.linspace(0, np.pi, 33))) / 2  # the t-digest's scale k1; 0 is the minimum, 1 the maximum
SHARES = np.diff(np.concatenate([[0], (RANKS[1:] + RANKS[:-1]) / 2, [1]]))  # of the data, for each knot


@dataclass(frozen=True)
class Statistics:
    """Of an array's columns; every field but ``count`` is float ``[D]``, ``quantiles`` is float32 ``[D, 33]``."""

    count: int
    mean: np.ndarray
    m2: np.ndarray  # sum of squared deviations from the mean
    min: np.ndarray
    max: np.ndarray
    quantiles: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Statistics:
        """Of numbers ``[N, D]`` with N > 0."""
        ordered = np.sort(values.astype(np.float32), axis=0)
        mean = ordered.mean(0, dtype=np.float64)
        m2 = np.square(ordered - mean).sum(0)
        place = RANKS * (len(ordered) - 1)  # between two of the ordered values
        below, share = np.floor(place).astype(int), (place % 1)[:, None]
        knots = ordered[below] * (1 - share) + ordered[np.minimum(below + 1, len(ordered) - 1)] * share
        low, high = ordered[0].astype(np.float64), ordered[-1].astype(np.float64)
        return cls(len(ordered), mean, m2, low, high, knots.T.astype(np.float32))

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Statistics:
        """Of a row of the store's ``statistics`` tables."""
        mean, m2, low, high = (np.asarray(row[name], np.float64) for name in ("mean", "m2", "min", "max"))
        knots = np.asarray(row["quantiles"], np.float32).reshape(len(mean), len(RANKS))
        return cls(row["count"], mean, m2, low, high, knots)

    def to_row(self) -> dict[str, Any]:
        lists = {name: getattr(self, name).tolist() for name in ("mean", "m2", "min", "max")}
        return {"count": self.count, **lists, "quantiles": self.quantiles.ravel().tolist()}

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self.m2 / self.count)

    def first(self, columns: int) -> Statistics:
        """Of the first columns alone."""
        every = (self.mean, self.m2, self.min, self.max, self.quantiles)
        return Statistics(self.count, *(values[:columns] for values in every))

    def quantile(self, rank: float) -> np.ndarray:
        """The value ``[D]`` below which this share of the data lies, within about 2 % of rank, closer at the tails."""
        return np.array([np.interp(rank, RANKS, knots) for knots in self.quantiles])


def merge(parts: Iterable[Statistics]) -> Statistics:
    """Of all the data that the parts describe; ValueError where there is no part."""
    rows = list(parts)
    if not rows:
        raise ValueError("no statistics to merge")
    if len(rows) == 1:
        return rows[0]
    counts = np.array([row.count for row in rows], np.float64)
    means = np.stack([row.mean for row in rows])
    mean = counts @ means / counts.sum()
    m2 = np.sum([row.m2 for row in rows], axis=0) + counts @ (means - mean) ** 2
    low = np.min([row.min for row in rows], axis=0)
    high = np.max([row.max for row in rows], axis=0)
    knots = np.concatenate([row.quantiles for row in rows], axis=1)  # [D, parts * knots]
    weights = np.outer(counts, SHARES).ravel()
    order = np.argsort(knots, axis=1)
    ordered, weight = np.take_along_axis(knots, order, axis=1), weights[order]
    rank = (np.cumsum(weight, axis=1) - weight / 2) / counts.sum()
    merged = np.stack([np.interp(RANKS, *column) for column in zip(rank, ordered, strict=True)])
    merged[:, 0], merged[:, -1] = low, high
    return Statistics(int(counts.sum()), mean, m2, low, high, merged.astype(np.float32))


@dataclass(frozen=True)
class Normalizer:
    """Columns to [-1, 1] by their extremes (paper section IV) or quantiles (actions), or to unit deviation (proprio).

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


def normalizers(
    parts: Sequence[Statistics],
    action_dim: int,
    proprio_dim: int,
    actions: Literal["extremes", "quantiles"] = "extremes",
) -> tuple[Normalizer, Normalizer]:
    """(action, proprio) normalisers from the steps' statistics of one embodiment's episodes; empty for video alone.

    The action's columns come first, then those of the proprioception; what is behind them is not normalised. What goes
    to -1 and 1 are an action's ``extremes`` (the paper's), or its ``quantiles``, which a rare outlier does not move.
    """
    if not parts:
        return Normalizer((), ()), Normalizer((), ())
    total = merge(part.first(action_dim + proprio_dim) for part in parts)
    low, high = total.min[:action_dim], total.max[:action_dim]
    least = np.maximum((high - low) / 2 * (FLOOR if actions == "quantiles" else 1), MINIMUM_RANGE)
    if actions == "quantiles":
        low, high = (total.first(action_dim).quantile(rank) for rank in (TAIL, 1 - TAIL))
    action = Normalizer(tuple((low + high) / 2), tuple(np.maximum((high - low) / 2, least)))
    deviation = np.maximum(total.std[action_dim:], MINIMUM_RANGE)
    return action, Normalizer(tuple(total.mean[action_dim:]), tuple(deviation))
