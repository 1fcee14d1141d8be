"""Log curves, images and system metrics to MLflow in a thread, so that training never waits for the server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from infra import tracking

MAX_UNSENT = 10_000  # points to keep while the server does not answer
FLUSH_SECONDS = 20.0


class MlflowLogger:
    """Logs to one MLflow run from one worker. Steps that the run logged before an interruption are not logged twice."""

    def __init__(self, run_id: str):
        self._run, self._pool = run_id, ThreadPoolExecutor(1)
        self._last = max((step for step, _ in tracking.history(run_id, "loss")), default=0)
        self._unsent: list[tuple[dict[str, float], int]] = []
        self._monitor = tracking.system_metrics(run_id)

    def add(self, metrics: dict[str, float], step: int) -> None:
        if step > self._last:
            self._pool.submit(self._send, metrics, step)

    def add_image(self, name: str, draw: Callable[[], np.ndarray], step: int) -> None:
        """Log the image uint8 [H, W, 3] that ``draw`` returns. ``draw`` runs in the thread."""
        if step > self._last:
            self._pool.submit(self._send_image, name, draw, step)

    def flush(self) -> None:
        """Wait up to FLUSH_SECONDS until everything is sent: a resumed run does not log earlier steps again."""
        with contextlib.suppress(TimeoutError):
            self._pool.submit(lambda: None).result(timeout=FLUSH_SECONDS)

    def close(self) -> None:
        self._pool.shutdown()
        self._monitor.finish()

    def _send(self, metrics: dict[str, float], step: int) -> None:
        self._unsent = [*self._unsent, (metrics, step)][-MAX_UNSENT:]
        with contextlib.suppress(Exception):  # a server that is down must not end a run; the points are sent later
            while self._unsent:
                tracking.log_metrics(self._run, *self._unsent[0])
                self._unsent.pop(0)

    def _send_image(self, name: str, draw: Callable[[], np.ndarray], step: int) -> None:
        with contextlib.suppress(Exception):  # nor may an encoder that cannot be downloaded here
            tracking.log_image(self._run, draw(), name, step)
