"""Report progress from Ray workers to the driver's terminal."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Return a strategy that places an actor on the driver's node, so that it survives the loss of other nodes."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@ray.remote(num_cpus=0)
class Meter:
    """Sums, latest values and messages that workers and driver send each other.

    The driver's progress line reads them.
    """

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._said: list[str] = []

    def add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self._values[name] = self._values.get(name, 0.0) + amount

    def put(self, **values: float) -> None:
        self._values.update(values)

    def read(self) -> dict[str, float]:
        return self._values

    def say(self, line: str) -> None:
        self._said.append(line)
        self._values["said"] = len(self._said)

    def said(self, since: int) -> list[str]:
        """Return the messages after the first ``since``."""
        return self._said[since:]


@contextlib.contextmanager
def watch(meter: Any, show: Callable[[dict[str, float]], None], every: float = 0.5) -> Iterator[None]:
    """Call ``show`` with the meter's values every ``every`` seconds while the block runs, and once at its end."""
    done = threading.Event()

    def loop() -> None:
        while not done.wait(every):
            with contextlib.suppress(Exception):  # a progress line must not fail the run
                show(ray.get(meter.read.remote(), timeout=10))

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(Exception):
            show(ray.get(meter.read.remote(), timeout=10))
