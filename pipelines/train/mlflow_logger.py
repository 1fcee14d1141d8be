"""Log curves, images and system metrics to MLflow in a thread, so that training never waits for the server."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from infra import tracking

MAX_UNSENT = 10_000  # points and images to keep while the server does not answer
FLUSH_SECONDS = 20.0
PAUSE_SECONDS = 10.0  # before a server that did not answer is asked again


class MlflowLogger:
    """Logs to one MLflow run from one worker. What the run logged before an interruption is not logged twice.

    Nothing here fails: while MLflow does not answer, points wait. ``tell`` receives a line when that begins, and when
    some are lost.
    """

    def __init__(self, run_id: str, tell: Callable[[str], None]):
        self._run, self._tell = run_id, tell
        self._last: dict[str, int] | None = None  # step of each metric's last point before the interruption
        self._waiting: deque[Callable[[dict[str, int]], None]] = deque(maxlen=MAX_UNSENT)
        self._change, self._closing, self._complained = threading.Condition(), False, False
        self._monitor: Any = None
        threading.Thread(target=self._work, daemon=True).start()

    def add(self, metrics: dict[str, float], step: int) -> None:
        def log(last: dict[str, int]) -> None:
            if new := {name: value for name, value in metrics.items() if step > last.get(name, -1)}:
                tracking.log_metrics(self._run, new, step)

        self._add(log)

    def add_image(self, name: str, draw: Callable[[], np.ndarray], step: int) -> None:
        """Log the image uint8 [H, W, 3] that ``draw`` returns. ``draw`` runs in the thread."""

        def log(last: dict[str, int]) -> None:
            if step > last.get("loss", -1):
                with contextlib.suppress(Exception):  # an encoder may be missing here; no image is worth a second try
                    tracking.log_image(self._run, draw(), name, step)

        self._add(log)

    def flush(self) -> None:
        """Wait up to FLUSH_SECONDS until everything is sent: a resumed run does not log earlier steps again."""
        with self._change:
            self._change.wait_for(lambda: not self._waiting, timeout=FLUSH_SECONDS)

    def close(self) -> None:
        self.flush()
        with self._change:
            self._closing = True
            self._change.notify_all()
        if self._waiting:
            self._tell(f"the last {len(self._waiting)} points of the curves were not logged")
        if self._monitor:
            self._monitor.finish()

    def _add(self, log: Callable[[dict[str, int]], None]) -> None:
        with self._change:
            self._waiting.append(log)
            self._change.notify_all()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return
                first = self._waiting[0]
            try:
                if self._last is None:
                    self._last = tracking.last_steps(self._run)
                    self._monitor = tracking.system_metrics(self._run)
                first(self._last)
                self._complained = False
            except Exception as error:
                if not self._complained:
                    self._tell(f"{error}; training goes on, and its curves are logged once MLflow answers")
                    self._complained = True
                with self._change:
                    self._change.wait_for(lambda: self._closing, timeout=PAUSE_SECONDS)
                continue
            with self._change:
                if self._waiting[0] is first:  # otherwise newer points have pushed it out
                    self._waiting.popleft()
                self._change.notify_all()
