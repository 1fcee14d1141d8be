"""Confidence intervals of success rates."""

from __future__ import annotations

from scipy import stats


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a success rate. It is valid for few trials and near 0 or 1.

    Raises ValueError unless 0 <= ``successes`` <= ``trials`` and there is at least one trial.
    """
    interval = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
