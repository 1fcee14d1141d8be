"""Progress of workers, as the driver's terminal shows it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class Meter:
    """Sums, latest values and messages that workers and driver send each other; an actor where Ray runs the workers.

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
def watch(
    read: Callable[[], dict[str, float]], show: Callable[[dict[str, float]], None], every: float = 0.5
) -> Iterator[None]:
    """Call ``show`` with what ``read`` returns every ``every`` seconds while the block runs, and once at its end."""
    done = threading.Event()

    def loop() -> None:
        while not done.wait(every):
            with contextlib.suppress(Exception):  # a progress line must not fail the run
                show(read())

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(Exception):
            show(read())
