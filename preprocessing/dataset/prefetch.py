"""Prefetching: a thread prepares the next batches, in pinned memory if there is a GPU."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np
import torch

T = TypeVar("T")
AHEAD = 2


class Prefetch(Iterator[T], Generic[T]):
    """Iterates over ``source``, AHEAD items of which a thread prepares; raises the source's errors.

    The thread ends on ``close`` or on leaving the context.
    """

    def __init__(self, source: Iterator[T]):
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(source,), daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        if self._failed is None:
            item, self._failed = self._ready.get()
        if self._failed is not None:
            raise self._failed
        return item  # type: ignore[return-value]

    def close(self) -> None:
        self._closed.set()
        self._failed = self._failed or StopIteration()
        while self._thread.is_alive():  # it may be blocked on the full queue
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.01)

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, source: Iterator[T]) -> None:
        try:
            for item in source:
                self._ready.put((item, None))
                if self._closed.is_set():
                    return
            self._ready.put((None, StopIteration()))
        except BaseException as error:
            self._ready.put((None, error))


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return the arrays as tensors, in pinned memory if there is CUDA."""
    found = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return {name: each.pin_memory() for name, each in found.items()} if torch.cuda.is_available() else found
