from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from preprocessing.dataset.prefetch import Prefetch
from preprocessing.errors import UserError


def test_batches_are_prepared_ahead_and_errors_reach_the_consumer() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number
        raise UserError("no more")

    with Prefetch(numbers()) as ahead:
        deadline = time.monotonic() + 10
        while len(made) < 3 and time.monotonic() < deadline:  # two are queued, and the thread holds one
            time.sleep(0.001)
        time.sleep(0.05)
        assert made == [0, 1, 2]
        assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
        for _ in range(2):
            with pytest.raises(UserError, match="no more"):
                next(ahead)
    threads = threading.active_count()
    with Prefetch(iter(range(10**9))) as endless:
        assert next(endless) == 0 and threading.active_count() == threads + 1
    assert threading.active_count() == threads
    assert [*Prefetch(iter(range(7)))] == [*range(7)]
