"""The order of samples: every window once per epoch, exact shares, block by block, random access to any step."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from preprocessing.dataset.order import WindowOrder

WINDOWS = np.random.default_rng(0).integers(1, 40, 60)
SOURCE = np.arange(60) % 3 // 2  # the first source has twice as many
SHARD = np.arange(60) // 7  # all of them hold both sources


def order(weights: list[float], shuffle: int = 10**9, seed: int = 0) -> WindowOrder:
    return WindowOrder(WINDOWS, SOURCE, SHARD, weights, shuffle, seed)


def drawn(one: WindowOrder, steps: range, size: int) -> list[tuple[int, int]]:
    """(episode, frame), sorted within each step, where sources are mixed at random."""
    batches = [sorted(zip(*map(np.ndarray.tolist, one.draw(step, size)), strict=True)) for step in steps]
    return [sample for batch in batches for sample in batch]


ALL = {s: {(e, t) for e in np.flatnonzero(s == SOURCE).tolist() for t in range(WINDOWS[e])} for s in (0, 1)}
COUNT = [int(WINDOWS[s == SOURCE].sum()) for s in (0, 1)]


@pytest.mark.parametrize("shuffle", [1, 150, 10**9])
def test_every_window_comes_once_per_epoch_of_its_source(shuffle: int) -> None:
    total = sum(COUNT)
    by_windows = order(COUNT, shuffle)
    for epoch in range(2):
        samples = drawn(by_windows, range(epoch * total, (epoch + 1) * total), 1)
        assert len(set(samples)) == total and set(samples) == ALL[0] | ALL[1]
    halves = Counter(drawn(order([1, 1], shuffle), range(0, 2 * COUNT[0]), 1))
    assert {halves[sample] for sample in ALL[0]} == {1}
    least, extra = divmod(COUNT[0], COUNT[1])
    assert Counter(halves[sample] for sample in ALL[1]) == {least: COUNT[1] - extra, least + 1: extra}


def test_shares_are_exact_at_any_step() -> None:
    windows, source = np.full(4, 10), np.arange(4)
    one = WindowOrder(windows, source, source, [0.5, 0.3, 0, 0.2], 10**9, 0)
    of = np.concatenate([np.sort(one.draw(step, 1)[0]) for step in range(1000)])
    for count in (1, 7, 10, 333, 1000):
        found = np.bincount(of[:count], minlength=4)
        assert np.abs(found - count * np.array([0.5, 0.3, 0, 0.2])).max() < 2 and found[2] == 0
    assert np.bincount(of).tolist() == [500, 300, 0, 200]
    late = np.concatenate([one.draw(10**10 + step, 1)[0] for step in range(1000)])  # the product would overflow
    assert np.bincount(late, minlength=4).tolist() == [500, 300, 0, 200]


def test_an_order_starts_at_any_step_and_depends_on_seed_and_epoch() -> None:
    total = sum(COUNT)
    begun = drawn(order(COUNT, 150), range(3 * total), 1)
    assert drawn(order(COUNT, 150), range(2 * total + 5, 3 * total), 1) == begun[2 * total + 5 :]
    assert begun[:total] != begun[total : 2 * total] and begun[:50] != drawn(order(COUNT, 150, seed=1), range(50), 1)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_any_number_of_workers_share_the_same_global_batch(world: int) -> None:
    for step in range(5):
        parts = [order([3, 1], 150).draw(step, 50, rank, world) for rank in range(world)]
        whole = order([3, 1], 150).draw(step, 50)
        for place in range(50):
            episode, frame = parts[place % world]
            assert (episode[place // world], frame[place // world]) == (whole[0][place], whole[1][place])
    sources = [SOURCE[order([1, 1]).draw(step, 50, 0, 2)[0]].sum() for step in range(40)]
    assert len(set(sources)) > 5  # no worker gets only one source


def test_windows_come_block_by_block() -> None:
    one = order([1, 0], 150)
    total, seen, largest, then = COUNT[0], list[tuple[int, ...]](), 0, (0, 0, 0)
    for step in range(total):
        [now], [soon] = one.blocks(step)
        if not seen or now != seen[-1]:
            assert now == then
            seen.append(now)
            mine = np.isin(SHARD, one.shards(now)) & (SOURCE == 0)
            block = int(WINDOWS[mine].sum())
            largest = max(largest, block)
            samples = drawn(one, range(step, step + block), 1)
            assert set(samples) == {(e, t) for e in np.flatnonzero(mine).tolist() for t in range(WINDOWS[e])}
        then = soon
    assert [number for _, _, number in seen] == [*range(len(seen))] and len(seen) > 3
    assert 100 < largest <= 150
    assert one.blocks(total)[0] == [(0, 1, 0)] == one.blocks(total - 1)[1]


def test_consecutive_samples_are_rarely_neighbouring_frames() -> None:
    samples = drawn(order(COUNT), range(sum(COUNT)), 1)
    near = [a[0] == b[0] and abs(a[1] - b[1]) == 1 for a, b in pairwise(samples)]
    assert np.mean(near) < 0.02
