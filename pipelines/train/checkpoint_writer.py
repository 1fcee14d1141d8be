"""Checkpoints beside the training: values are copied at once, written in a thread, and count when all have written."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.train.checkpoints import RunFolder


@dataclass
class _Draft:
    step: int
    about: dict[str, Any]
    written: Future[None]


class CheckpointWriter:
    """One worker's part. The workers vote in each step whether theirs is written, and all learn the sums of the votes.

    A checkpoint that could not be written, on a full disk for example, is dropped; the training goes on, and the next
    one is tried.
    """

    def __init__(self, folder: RunFolder, leads: bool, workers: int):
        self._folder, self._leads, self._workers = folder, leads, workers
        self._pool = ThreadPoolExecutor(1)
        self._draft: _Draft | None = None

    @property
    def busy(self) -> bool:
        return self._draft is not None

    def begin(self, step: int, about: dict[str, Any], build: Callable[[Path], None]) -> None:
        """Write what ``build`` puts into a folder; ``about`` is what the checkpoint says of itself."""
        assert self._draft is None
        self._draft = _Draft(step, about, self._pool.submit(self._folder.write, step, build))

    def votes(self) -> tuple[int, int]:
        """Whether this worker's part is written, and whether that failed; neither while it is being written."""
        if self._draft is None or not self._draft.written.done():
            return 0, 0
        failed = self._draft.written.exception() is not None
        return int(not failed), int(failed)

    def settle(self, written: int, failed: int) -> tuple[int | None, str | None]:
        """What becomes of the sums of the votes: (step of the new checkpoint, why there is none); often neither."""
        if self._draft is None or written + failed < self._workers:
            return None, None
        draft, self._draft = self._draft, None
        if failed:
            cause = draft.written.exception() or "another worker could not write its part"
            if self._leads:
                self._folder.drop(draft.step)
            return None, f"no checkpoint of step {draft.step}: {cause}"
        if self._leads:
            try:
                self._folder.commit(draft.step, draft.about)
            except OSError as error:
                self._folder.drop(draft.step)
                return None, f"no checkpoint of step {draft.step}: {error}"
        return draft.step, None
