"""What a run's page shows: curves, pictures, the machine. Sent in a thread, so that no training waits for a server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from infra import tracking

PATIENCE = 10_000  # points that are kept for a server that does not answer
PATIENCE_SECONDS = 20.0


class MlflowLogger:
    """Of one MLflow run, by one worker. What the run shows already, from before it was cut off, is not shown twice."""

    def __init__(self, run_id: str):
        self._run, self._pool = run_id, ThreadPoolExecutor(1)
        self._last = max((step for step, _ in tracking.history(run_id, "loss")), default=0)
        self._unsent: list[tuple[dict[str, float], int]] = []
        self._monitor = tracking.system_metrics(run_id)

    def add(self, metrics: dict[str, float], step: int) -> None:
        if step > self._last:
            self._pool.submit(self._send, metrics, step)

    def picture(self, name: str, draw: Callable[[], np.ndarray], step: int) -> None:
        """``draw`` makes it, uint8 [H, W, 3]."""
        if step > self._last:
            self._pool.submit(self._show, name, draw, step)

    def flush(self) -> None:
        """Wait for a while until all is sent: a run that goes on from a checkpoint shows nothing of before again."""
        with contextlib.suppress(TimeoutError):
            self._pool.submit(lambda: None).result(timeout=PATIENCE_SECONDS)

    def close(self) -> None:
        self._pool.shutdown()
        self._monitor.finish()

    def _send(self, metrics: dict[str, float], step: int) -> None:
        self._unsent = [*self._unsent, (metrics, step)][-PATIENCE:]
        with contextlib.suppress(Exception):  # a server that is down for a while ends no run; it gets them later
            while self._unsent:
                tracking.log_metrics(self._run, *self._unsent[0])
                self._unsent.pop(0)

    def _show(self, name: str, draw: Callable[[], np.ndarray], step: int) -> None:
        with contextlib.suppress(Exception):  # nor does an encoder of a hub that this machine cannot reach
            tracking.log_picture(self._run, draw(), name, step)
