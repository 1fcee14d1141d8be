"""Write checkpoints while training continues: a thread writes the copied values, and all ranks vote on the outcome."""

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
    """One worker's part. In each step the workers vote on whether their part is written; all receive the sums.

    A checkpoint that cannot be written, for example on a full disk, is dropped; training continues.
    """

    def __init__(self, folder: RunFolder, leads: bool, workers: int):
        self._folder, self._leads, self._workers = folder, leads, workers
        self._pool = ThreadPoolExecutor(1)
        self._draft: _Draft | None = None

    @property
    def busy(self) -> bool:
        return self._draft is not None

    def begin(self, step: int, about: dict[str, Any], build: Callable[[Path], None]) -> None:
        """Start writing the files that ``build`` puts into a folder; ``about`` goes into the manifest."""
        assert self._draft is None
        self._draft = _Draft(step, about, self._pool.submit(self._folder.write, step, build))

    def votes(self) -> tuple[int, int]:
        """Return (written, failed) for this worker's part, as 0 or 1; both 0 while it is being written."""
        if self._draft is None or not self._draft.written.done():
            return 0, 0
        failed = self._draft.written.exception() is not None
        return int(not failed), int(failed)

    def settle(self, written: int, failed: int) -> tuple[int | None, str | None]:
        """Take the sums of the votes; return (step of the new checkpoint, why it failed), usually (None, None).

        The outcome is known once all workers have voted.
        """
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
