"""Commits an ingest's rows on the driver while the job runs.

Whoever writes puts what it wrote into an inbox. The committer joins these rows into episodes and commits the complete
ones every few minutes, which bounds both the work lost in a crash and the driver's memory.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from icechunk import ForkSession

from pipelines.ingest.episode_reader import EpisodeRecord, Gate, Plan, Refusal, Work, refusal
from pipelines.ingest.quality import Qualities
from pipelines.ingest.stored import Stored
from preprocessing.sources import ACTIONLESS
from preprocessing.store.catalogue import as_table
from preprocessing.store.rows import (
    CameraRow,
    CountedRepairs,
    EpisodeRow,
    LocationRow,
    PictureRow,
    QuarantineRow,
    StatisticsRow,
)
from preprocessing.store.statistics import Statistics, StatisticsColumns, merge
from preprocessing.store.store import LatentStore

COMMIT_MINUTES = 2  # work that a crash may cost
COMMIT_EPISODES = 4096
FAILURES = 3  # failed commits in a row that stop a job


class Committer:
    """Joins rows into episodes and commits complete episodes every COMMIT_MINUTES.

    Stops the job when more than ``max_bad`` episodes are quarantined, or when FAILURES commits in a row fail.
    """

    def __init__(self, store: LatentStore, work: list[Work], plan: Plan, stored: Stored, max_bad: float):
        self.store, self._stored = store, stored
        self.snapshot: str | None = None
        self.episodes = self.already = self.frames = 0
        self.quarantine: list[QuarantineRow] = []
        self.updated = 0  # episodes whose latents were there already: only their rows are new
        self.repairs = CountedRepairs()  # of the episodes that this ingest added
        self.quality = Qualities()
        self.without_action = 0  # robot logs among them in which no action was found
        self.too_bad = False
        self.failure: Exception | None = None  # of the commit that stopped the job
        self._inbox: Any = Inbox()
        self._work = {one.ref.id: one for one in work}
        self._left = {one.ref.id: place for place, one in enumerate(work)}  # episodes not committed yet
        self._plan = plan
        self._gate = Gate(plan, store.snapshot())
        self._max_bad = max_bad
        self._pending: dict[str, _Pending] = {}
        self._forks: list[tuple[ForkSession, list[dict[str, Any]]]] = []  # uncommitted, with their rows
        self._batch: _Batch | None = None
        self._lock = threading.Lock()
        self._last_commit = time.monotonic()
        self._failed = 0  # failed commits in a row

    @contextlib.contextmanager
    def receiving(self, inbox: Any) -> Iterator[None]:
        """Take what is written from this Inbox while the block runs. If it fails, commit all complete episodes."""
        with self._lock:
            self._inbox = inbox
            if self.too_bad or self.failure:
                inbox.stop()
        try:
            yield
        except BaseException:
            self.commit_complete()
            raise
        with self._lock:
            self._receive()
            self._inbox = Inbox()

    def start(self) -> None:
        """Begin the time until the first commit."""
        self._last_commit = time.monotonic()

    def tick(self) -> int:
        """Commit if it is due; return the number of finished episodes. Called by a thread while the job runs."""
        with self._lock:
            self._receive()
            complete = self._complete()
            late = time.monotonic() - self._last_commit > COMMIT_MINUTES * 60
            if complete and (late or len(complete) >= COMMIT_EPISODES):
                try:
                    self._commit(complete)
                except Exception as error:
                    self._failed += 1
                    if self._failed == FAILURES:  # everything encoded from here on would be lost
                        self.failure = error
                        self._inbox.stop()
                    raise
                self._failed, complete = 0, []
            return len(self._work) - len(self._left) + len(complete)

    def commit_complete(self) -> None:
        """Commit all complete episodes."""
        with self._lock:
            self._receive()
            self._commit(self._complete())

    def finish(self) -> None:
        """Commit the remaining episodes. Raises RuntimeError if any of them is incomplete."""
        self.commit_complete()
        if self._left:
            first = self._work[next(iter(self._left))].ref
            raise RuntimeError(f"{len(self._left)} episodes came back incomplete, including {first.uri} #{first.index}")

    def _receive(self) -> None:
        writings, refusals = self._inbox.take()
        for written in writings:
            self._forks.append((written["fork"], written["rows"]))
            for row in written["rows"]:
                if row["episode"] not in self._left:
                    continue
                pending = self._pending.setdefault(row["episode"], _Pending())
                if row["camera"] is not None:
                    [encoder] = row["encoders"]
                    segments = pending.segments.setdefault((encoder, row["camera"]), {})
                    if row["first"] in segments:  # begun by one job and done by the next
                        pending.unused.append(row["place"])
                    else:
                        segments[row["first"]] = row
                else:
                    if pending.steps:  # as above
                        pending.unused.append(pending.steps["place"])
                    pending.record, pending.steps = json.loads(row["record"]), row
        for episode, why in refusals.items():
            if episode in self._left:
                self._pending.setdefault(episode, _Pending()).refusal = why

    def _complete(self) -> list[str]:
        """Return the complete episodes in the order of the sources, whichever tasks ended first."""
        complete = [one for one, pending in self._pending.items() if pending.complete(self._work[one].keys)]
        return sorted(complete, key=self._left.__getitem__)

    def _commit(self, complete: list[str]) -> None:
        self._last_commit = time.monotonic()
        if self._batch:
            self._send(self._batch)
            complete = [one for one in complete if one in self._left]
        if complete:
            self._batch = self._gather(complete)
            self._send(self._batch)

    def _gather(self, complete: list[str]) -> _Batch:
        batch = _Batch(complete)
        for fork, rows in self._forks:
            if not {row["episode"] for row in rows}.isdisjoint(complete):
                batch.forks.append(fork)
                batch.unused += [row["place"] for row in rows if row["episode"] not in self._left]
        for episode in complete:
            one, pending = self._work[episode], self._pending[episode]
            made: list[tuple[EpisodeRow, list[StatisticsRow]]] = []
            if pending.record and not pending.refusal:
                try:  # what this episode cannot have stored must not fail the others' commit
                    made = [self._catalogue_rows(one, pending, name) for name in one.keys]
                    as_table("catalogue", [row for row, _ in made])
                    pending.refusal = self._gate.admit(one.source, pending.record)
                except Exception as error:
                    pending.refusal = refusal(error, one.ref)
            batch.unused += pending.unused
            if pending.refusal:
                batch.quarantine.append(pending.refusal.row(one))
                batch.unused += [row["place"] for found in pending.segments.values() for row in found.values()]
                batch.unused += [pending.steps["place"]] if pending.steps else []
                continue
            shown = pending.record["cameras"] if pending.record else {}  # others were left out when they had been seen
            lost = [found for (_, camera), found in pending.segments.items() if camera not in shown]
            batch.unused += [row["place"] for found in lost for row in found.values()]
            for row, statistics in made:
                batch.rows.append(row)
                batch.statistics += statistics
                if pending.record and row["encoder"] in pending.record["reused"]:
                    batch.bases[row["key"]] = one.bases[row["encoder"]]["key"]
            for (encoder, camera), found in pending.segments.items():
                samples = [segment["sample"] for segment in found.values() if segment["sample"]]
                if samples:
                    batch.samples[one.keys[encoder], camera] = samples[0]
        return batch

    def _catalogue_rows(self, one: Work, pending: _Pending, encoder: str) -> tuple[EpisodeRow, list[StatisticsRow]]:
        """Return the catalogue row of one encoding of an episode, and its statistics rows."""
        assert pending.record is not None and pending.steps is not None
        key, names = one.keys[encoder], pending.record["reused"].get(encoder)
        if names is None:
            cameras, pictures, statistics = _encoded(pending, encoder)
        else:
            cameras, pictures, statistics = self._stored.cameras(one.bases[encoder]["key"], names)
        if "statistics" in pending.steps:
            of_steps: StatisticsColumns = pending.steps["statistics"]
            statistics.append({"key": key, "array": "steps", **of_steps, "psnr": None, "psnr_frames": None})
        columns = {name: value for name, value in pending.record.items() if name != "reused"}
        row = columns | {
            "key": key,
            "encoder": encoder,
            "encoder_digest": self._plan.encoders[encoder],
            "cameras": cameras,
            "pictures": pictures,
            "steps": pending.steps["place"],
        }
        return cast(EpisodeRow, row), [each | {"key": key} for each in statistics]

    def _send(self, batch: _Batch) -> None:
        commit = self.store.commit(
            batch.name, batch.forks, batch.rows, batch.statistics, batch.quarantine, batch.unused, batch.bases
        )
        self._batch = None
        self.snapshot = commit.snapshot
        new = [row for row in batch.rows if row["key"] in commit.keys]
        encoded = [row for row in new if row["key"] not in batch.bases]
        self.repairs.add(new)
        lost = {
            (row["key"], row["array"]): (psnr, row["psnr_frames"] or 0)
            for row in batch.statistics
            if (psnr := row.get("psnr")) is not None
        }
        self.quality.add(encoded, lost, batch.samples)
        logs = {row["id"]: row["action_dim"] for row in new if row["format"] not in ACTIONLESS}
        self.without_action += sum(not width for width in logs.values())
        frames = {row["id"]: row["frames"] for row in encoded}
        self.episodes += len(frames)
        self.frames += sum(frames.values())
        self.updated += len({row["id"] for row in new} - frames.keys())
        self.already += len({row["id"] for row in batch.rows} - frames.keys())
        self.quarantine += batch.quarantine
        for episode in batch.episodes:
            del self._left[episode], self._pending[episode]
        # If another ingest had already committed all of these, nothing was committed: the remaining episodes still need
        # their forks.
        again = not (commit.keys or batch.quarantine)
        self._forks = [
            (fork, rows)
            for fork, rows in self._forks
            if not any(fork is done for done in batch.forks)
            or (again and any(row["episode"] in self._left for row in rows))
        ]
        if sum(not row["filter"] for row in self.quarantine) > self._max_bad:
            self.too_bad = True
            self._inbox.stop()


class JobStopped(Exception):
    """The committer asked the job to stop."""


class Inbox:
    """Collects what was written and which episodes were refused, until the committer takes it."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()
        self._seen: set[int] = set()
        self._written: list[dict[str, Any]] = []
        self._refused: dict[str, Refusal] = {}
        self._stopped = False
        self._lock = threading.Lock()

    def begin(self, episode: str) -> int:
        """Return how often the episode was begun: more than once if a task's process died."""
        self._begun[episode] += 1
        return self._begun[episode]

    def refuse(self, episode: str, refusal: Refusal) -> None:
        with self._lock:
            self._refused[episode] = refusal._replace(reason=" ".join(refusal.reason.split()))

    def put(self, task: int, written: dict[str, Any]) -> bool:
        """Return whether the job should continue. If Ray ran a task twice, its second result is ignored."""
        with self._lock:
            if task not in self._seen:
                self._seen.add(task)
                self._written.append(written)
            return not self._stopped

    def take(self) -> tuple[list[dict[str, Any]], dict[str, Refusal]]:
        with self._lock:
            taken = self._written, self._refused
            self._written, self._refused = [], {}
            return taken

    def stop(self) -> None:
        self._stopped = True


@dataclass
class _Pending:
    """What has arrived of one episode so far."""

    refusal: Refusal | None = None
    record: EpisodeRecord | None = None
    steps: dict[str, Any] | None = None
    segments: dict[tuple[str, str], dict[int, dict[str, Any]]] = field(default_factory=dict)  # by (encoder, camera)
    unused: list[LocationRow] = field(default_factory=list)

    def complete(self, encoders: Iterable[str]) -> bool:
        if self.refusal or self.record is None:
            return bool(self.refusal)
        return all(
            sum(row["place"]["count"] for row in self.segments.get((encoder, camera), {}).values()) == count
            for encoder in encoders
            if encoder not in self.record["reused"]
            for camera, count in self.record["cameras"].items()
        )


@dataclass
class _Batch:
    """The content of one commit. A failed commit is retried unchanged, since it may have succeeded."""

    episodes: list[str]  # ids, including those of bad episodes
    forks: list[ForkSession] = field(default_factory=list)
    rows: list[EpisodeRow] = field(default_factory=list)
    statistics: list[StatisticsRow] = field(default_factory=list)
    quarantine: list[QuarantineRow] = field(default_factory=list)
    unused: list[LocationRow] = field(default_factory=list)
    bases: dict[str, str] = field(default_factory=dict)  # keys of rows, and of those whose latents they use again
    samples: dict[tuple[str, str], bytes] = field(default_factory=dict)  # PNGs by key and camera
    name: str = field(default_factory=lambda: uuid.uuid4().hex)


def _encoded(pending: _Pending, encoder: str) -> tuple[list[CameraRow], list[PictureRow], list[StatisticsRow]]:
    """Return an episode's cameras as this ingest encoded them. The statistics have no key yet."""
    assert pending.record is not None
    cameras: list[CameraRow] = []
    statistics: list[StatisticsRow] = []
    for camera in pending.record["cameras"]:
        found = [segment for _, segment in sorted(pending.segments[encoder, camera].items())]
        cameras.append({"name": camera, "segments": [segment["place"] for segment in found]})
        measured = [Statistics.from_row(segment["statistics"]) for segment in found if "statistics" in segment]
        if measured:
            values = [value for segment in found for value in segment["psnr"] or ()]
            moments = merge(measured).to_row()
            row: StatisticsRow = {"key": "", "array": camera, **moments, "psnr": None, "psnr_frames": None}
            if values:
                row |= {"psnr": float(np.mean(values)), "psnr_frames": len(values)}
            statistics.append(row)
    return cameras, pending.record["pictures"] or [], statistics
