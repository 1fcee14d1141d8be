from __future__ import annotations

import json

import numpy as np
import pytest

from preprocessing.dataset.normalizer import normalizers
from preprocessing.store.statistics import Statistics, merge


def test_statistics_merge_to_those_of_all_data() -> None:
    random = np.random.default_rng(0)
    parts = [(random.standard_normal((n, 3)) * 5 + 2).astype(np.float32) for n in (4, 50, 1)]
    total, whole = merge(Statistics.of(part) for part in parts), np.concatenate(parts).astype(np.float64)
    assert total.count == 55
    np.testing.assert_allclose(total.mean, whole.mean(0))
    np.testing.assert_allclose(total.std, whole.std(0))
    np.testing.assert_array_equal(total.min, whole.min(0))
    np.testing.assert_array_equal(total.max, whole.max(0))
    with pytest.raises(ValueError, match="no statistics"):
        merge([])


def test_merging_in_any_grouping_gives_the_same_moments() -> None:
    parts = [Statistics.of(np.random.default_rng(n).normal(n, 1 + n, (30, 2))) for n in range(6)]
    one, other = merge(parts), merge([merge(parts[:2]), merge([parts[2], merge(parts[3:])])])
    np.testing.assert_allclose(one.mean, other.mean)
    np.testing.assert_allclose(one.m2, other.m2)


@pytest.mark.parametrize("kind", ["normal", "lognormal", "two clusters", "drifting", "constant"])
def test_quantiles_of_merged_sketches_are_near_the_true_ones(kind: str) -> None:
    random = np.random.default_rng(1)
    episodes = []
    for number in range(200):
        size = int(random.integers(5, 300))
        episodes.append(
            {
                "normal": random.normal(size=size),
                "lognormal": random.lognormal(size=size),
                "two clusters": random.choice([-1.0, 1.0], size) + random.normal(0, 0.01, size),
                "drifting": random.normal(number / 50, 0.1, size),
                "constant": np.full(size, 3.0),
            }[kind]
        )
    total = merge(Statistics.of(values[:, None]) for values in episodes)
    whole = np.sort(np.concatenate(episodes).astype(np.float32))
    for rank in (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999):
        [value] = total.quantile(rank)
        allowed = 0.025 if 0.1 < rank < 0.9 else 0.01
        low, high = np.searchsorted(whole, value, "left"), np.searchsorted(whole, value, "right")
        assert low / len(whole) - allowed <= rank <= high / len(whole) + allowed, (rank, value)


def test_statistics_survive_a_round_trip_through_a_row() -> None:
    before = Statistics.of(np.random.default_rng(0).standard_normal((40, 3)))
    after = Statistics.from_row(json.loads(json.dumps(before.to_row())))
    for name in ("mean", "m2", "min", "max", "quantiles"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_a_nearly_constant_column_is_not_blown_up() -> None:
    values = np.array([[0.0, 5.0, 1.0], [2.0, 5.0, 3.0]])
    action, proprio = normalizers([Statistics.of(values)], 2, values.shape[1] - 2)
    np.testing.assert_allclose(action.apply(values[:, :2]), [[-1, 0], [1, 0]])
    np.testing.assert_allclose(proprio.apply(values[:, 2:]), [[-1], [1]])
    np.testing.assert_allclose(proprio.invert(proprio.apply(values[:, 2:])), values[:, 2:])
    assert normalizers([], 0, 0)[0].apply(np.zeros((4, 0))).shape == (4, 0)


def test_quantiles_leave_outliers_outside_and_keep_a_floor() -> None:
    values = np.random.default_rng(0).uniform(-2, 4, (5000, 3))
    values[7, 0] = 15  # an outlier
    values[:, 1] = np.where(np.arange(5000) % 500, 1, 0)  # a gripper that is almost always closed
    values[:, 2] = 5
    action, _ = normalizers([Statistics.of(values)], 3, 0, "quantiles")
    inside = action.apply(values)
    assert 0.9 < np.abs(np.delete(inside[:, 0], 7)).max() < 1.15 and inside[7, 0] > 4
    assert np.quantile(np.abs(inside[:, 0]), 0.98) == pytest.approx(1, abs=0.05)
    assert set(np.round(inside[:, 1], 6)) == {-20, 0}  # a tenth of its range is 1
    assert not inside[:, 2].any()
    np.testing.assert_allclose(action.invert(inside), values, rtol=1e-4, atol=1e-5)
    extremes, _ = normalizers([Statistics.of(values)], 3, 0)
    assert np.abs(extremes.apply(values)).max() <= 1.0001
