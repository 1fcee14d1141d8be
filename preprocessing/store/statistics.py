"""Mergeable statistics of actions, proprioception and latents.

For each of its arrays an episode stores count, mean, M2, minimum, maximum and a quantile sketch of every column, so the
statistics of any subset of any snapshot need no pass over the data and never go stale. Moments merge as in Chan et al.
1979. The sketch is a t-digest (Dunning and Ertl 2019) with fixed knots: the values at RANKS, which are denser towards
both tails; each knot stands for the share of the data around it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

RANKS = (1 - np.cos(np.linspace(0, np.pi, 33))) / 2  # the t-digest's scale k1; 0 is the minimum, 1 the maximum
SHARES = np.diff(np.concatenate([[0], (RANKS[1:] + RANKS[:-1]) / 2, [1]]))  # of the data at each knot


class StatisticsColumns(TypedDict):
    """Statistics as plain numbers and lists: the columns of a StatisticsRow that do not identify it."""

    count: int
    mean: list[float]
    m2: list[float]
    min: list[float]
    max: list[float]
    quantiles: list[float]


@dataclass(frozen=True)
class Statistics:
    """Of each column of an array ``[N, D]``: float ``[D]``; ``count`` is N, ``quantiles`` float32 ``[D, 33]``."""

    count: int
    mean: np.ndarray
    m2: np.ndarray  # sum of squared deviations from the mean
    min: np.ndarray
    max: np.ndarray
    quantiles: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Statistics:
        """Return the statistics of numbers ``[N, D]`` with N > 0."""
        ordered = np.sort(values.astype(np.float32), axis=0)
        mean = ordered.mean(0, dtype=np.float64)
        m2 = np.square(ordered - mean).sum(0)
        place = RANKS * (len(ordered) - 1)  # fractional index into the sorted values
        below, share = np.floor(place).astype(int), (place % 1)[:, None]
        knots = ordered[below] * (1 - share) + ordered[np.minimum(below + 1, len(ordered) - 1)] * share
        low, high = ordered[0].astype(np.float64), ordered[-1].astype(np.float64)
        return cls(len(ordered), mean, m2, low, high, knots.T.astype(np.float32))

    @classmethod
    def from_row(cls, row: StatisticsColumns) -> Statistics:
        """Convert a row of the store's ``statistics`` tables."""
        moments = row["mean"], row["m2"], row["min"], row["max"]
        mean, m2, low, high = (np.asarray(values, np.float64) for values in moments)
        knots = np.asarray(row["quantiles"], np.float32).reshape(len(mean), len(RANKS))
        return cls(row["count"], mean, m2, low, high, knots)

    def to_row(self) -> StatisticsColumns:
        """Convert to the columns of a row of the store's ``statistics`` tables."""
        return {
            "count": self.count,
            "mean": self.mean.tolist(),
            "m2": self.m2.tolist(),
            "min": self.min.tolist(),
            "max": self.max.tolist(),
            "quantiles": self.quantiles.ravel().tolist(),
        }

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self.m2 / self.count)

    def first(self, columns: int) -> Statistics:
        """Return the statistics of the first ``columns`` columns."""
        every = (self.mean, self.m2, self.min, self.max, self.quantiles)
        return Statistics(self.count, *(values[:columns] for values in every))

    def quantile(self, rank: float) -> np.ndarray:
        """Return the value ``[D]`` below which this share of the data lies: to about 2 % of rank, less at the tails."""
        return np.array([np.interp(rank, RANKS, knots) for knots in self.quantiles])


def merge(parts: Iterable[Statistics]) -> Statistics:
    """Return the statistics of all the data that the parts describe. Raises ValueError without parts."""
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
