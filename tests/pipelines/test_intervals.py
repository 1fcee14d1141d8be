"""Intervals against known values."""

from __future__ import annotations

import pytest

from pipelines.evaluate.intervals import wilson_interval


def test_wilson_interval() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611252), abs=1e-6)
    assert wilson_interval(20, 20)[1] == 1
    for successes, trials in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError):
            wilson_interval(successes, trials)
