"""Normalisation of actions and proprio, from the statistics of the training episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from preprocessing.store.statistics import Statistics, merge

MINIMUM_RANGE = 1e-3  # so that a nearly constant column is not blown up to [-1, 1]
TAIL = 0.01  # share of the data on either side that quantiles leave outside of [-1, 1]
FLOOR = 0.1  # quantiles keep this share of the full range: a gripper that rarely opens has none between its quantiles


@dataclass(frozen=True)
class Normalizer:
    """Maps actions to [-1, 1] by extremes (paper section IV) or quantiles, proprio to zero mean and unit deviation.

    ``scale`` and ``offset`` are float ``[D]``: normalised = (raw - offset) / scale.
    """

    offset: tuple[float, ...]
    scale: tuple[float, ...]

    def apply(self, raw: np.ndarray) -> np.ndarray:
        return ((raw - np.asarray(self.offset)) / np.asarray(self.scale)).astype(np.float32)

    def invert(self, normalised: np.ndarray) -> np.ndarray:
        return (normalised * np.asarray(self.scale) + np.asarray(self.offset)).astype(np.float32)


def normalizers(
    parts: Sequence[Statistics],
    action_dim: int,
    proprio_dim: int,
    actions: Literal["extremes", "quantiles"] = "extremes",
) -> tuple[Normalizer, Normalizer]:
    """Return (action, proprio) normalizers from the statistics of the steps; empty where there are no columns.

    The action's columns come first, then those of proprio; later columns are ignored. An action's ``extremes`` (the
    paper) or ``quantiles`` (robust to rare outliers) map to -1 and 1.
    """
    if not parts or not action_dim + proprio_dim:  # videos; logs in which only other columns were found
        return Normalizer((), ()), Normalizer((), ())
    total = merge(part.first(action_dim + proprio_dim) for part in parts)
    low, high = total.min[:action_dim], total.max[:action_dim]
    least = np.maximum((high - low) / 2 * (FLOOR if actions == "quantiles" else 1), MINIMUM_RANGE)
    if actions == "quantiles":
        low, high = (total.first(action_dim).quantile(rank) for rank in (TAIL, 1 - TAIL))
    action = Normalizer(tuple((low + high) / 2), tuple(np.maximum((high - low) / 2, least)))
    deviation = np.maximum(total.std[action_dim:], MINIMUM_RANGE)
    return action, Normalizer(tuple(total.mean[action_dim:]), tuple(deviation))
