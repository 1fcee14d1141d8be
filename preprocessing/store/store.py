"""The latent store: zarr v3 arrays under Icechunk transactions, with a catalogue of columns.

Layout of one repository (everything is written once, by one commit, and never changed but by ``remove``):

    data/GROUP/latents_CxHxW   float16 [N, C, h, w]   segments one after the other, chunks of 4 MiB
    data/GROUP/pixels_3xHxW    uint8 [N, 3, H, W]     frames as they are, of the encoder "pixels"
    data/GROUP/steps_D         float32 [N, D]         columns of the action, of proprioception, of signals
    catalogue/PART             uint8 [bytes]          an Arrow table, one row an episode and encoding
    statistics/PART            uint8 [bytes]          one row an array of those: moments and quantiles
    quarantine/PART            uint8 [bytes]          one row a refused input
    removed/PART               uint8 [bytes]          one row an episode taken out for good

A *group* is what one write task wrote, a *part* what one commit added; disjoint groups never conflict, so writers fork,
and whoever commits merges the forks: a reader sees all of a commit or none of it. A *segment* is up to 64 consecutive
frames of one camera. Every location carries a checksum of its bytes, which every read compares. The columns are in
:mod:`preprocessing.store.catalogue`; the commit protocol and its reasons in docs/design/store.md.
"""

from __future__ import annotations

import contextlib
import datetime
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import icechunk
import numpy as np
import zarr

from preprocessing.errors import UserError
from preprocessing.store.catalogue import KINDS, REMOVED, TABLES, parts, write_table
from preprocessing.store.snapshot import Snapshot, checksum
from preprocessing.store.storage import Place, parse

icechunk.set_logs_filter("error")  # it warns of concurrent local commits, which the lock around them rules out
warnings.filterwarnings("ignore", module="zarr")  # its notices on unstabilised dtypes do not concern a user

GC_MARGIN = datetime.timedelta(hours=24)  # younger objects may belong to an ingest that is still writing
LARGEST_SKEW = datetime.timedelta(minutes=10)  # Icechunk accepts no commit whose clock and the storage's differ by more
FIRST_SNAPSHOT = "1CECHNKREP0F1RSTCMT0"  # of every repository, by Icechunk's specification: there is nothing in it
CHUNK_BYTES = 4 * 2**20  # large enough that reading is bound by the disk and not by the number of chunks


@dataclass(frozen=True)
class Commit:
    """What one commit added: fewer episodes than were offered, where another ingest had brought some in meanwhile."""

    snapshot: str
    keys: frozenset[str]  # of the catalogue rows


@dataclass(frozen=True)
class Location:
    """Rows ``[start, start + count)`` of one array, and the CRC-32C of their bytes in hexadecimal."""

    array: str
    start: int
    count: int
    checksum: str


class LatentStore:
    """A store at a URI (``/path``, ``file:///path``, ``s3://bucket/prefix``).

    ``create`` makes an empty one where nothing is; ``open`` raises UserError where there is none.
    """

    def __init__(self, place: Place, repository: icechunk.Repository):
        self.place = place
        self.uri = place.uri
        self.repository = repository
        self._keys: dict[str, set[str]] = {}  # of catalogue parts, which never change

    @classmethod
    def open(cls, uri: str) -> LatentStore:
        place = parse(uri)
        match place.content():
            case "nothing":
                raise UserError(f"{uri}: no store here; make one with: uwm ingest SOURCE --store {uri}")
            case "something else":
                raise _not_a_store(uri)
        store = cls(place, icechunk.Repository.open(place.storage()))
        if store.repository.lookup_branch("main") == FIRST_SNAPSHOT:
            raise UserError(f"{uri}: a store is being made here, or was left half-made; uwm ingest goes on with it")
        return store

    @classmethod
    def create(cls, uri: str) -> LatentStore:
        """Open the store at ``uri``, or make an empty one there if nothing is there yet."""
        place = parse(uri)
        with place.commit_lock():
            match place.content():
                case "something else":
                    raise _not_a_store(uri)
                case "nothing":
                    try:
                        icechunk.Repository.create(place.storage())
                    except icechunk.IcechunkError:  # somebody else was quicker, or the answer was lost
                        if place.content() != "store":
                            raise
            store = cls(place, icechunk.Repository.open(place.storage()))
            # Made now, for two ingests that each made one would conflict.
            session = store.repository.writable_session("main")
            root = zarr.open_group(session.store, mode="a")
            for group in ("data", *TABLES):
                root.require_group(group)
            if session.has_uncommitted_changes:
                with contextlib.suppress(icechunk.ConflictError):  # likewise
                    session.commit("new store")
        return store

    def snapshot(self, snapshot_id: str | None = None) -> Snapshot:
        """The head of the store, or the pinned state of an id or a tag; UserError where there is neither."""
        if snapshot_id is None:
            return Snapshot(self.uri, self.repository.lookup_branch("main"))
        if snapshot_id in self.repository.list_tags():
            return Snapshot(self.uri, self.repository.lookup_tag(snapshot_id))
        try:
            self.repository.readonly_session(snapshot_id=snapshot_id)
        except (icechunk.IcechunkError, ValueError):
            message = f"{self.uri}: no snapshot {snapshot_id}; list them with: uwm store log {self.uri}"
            raise UserError(message) from None
        return Snapshot(self.uri, snapshot_id)

    def log(self) -> list[dict[str, Any]]:
        """Snapshots from the newest to the first: id, parent, time (ISO 8601), message, counts, tags."""
        tags: dict[str, list[str]] = {}
        for tag in sorted(self.repository.list_tags()):
            tags.setdefault(self.repository.lookup_tag(tag), []).append(tag)
        return [
            {
                "snapshot": info.id,
                "parent": info.parent_id,
                "time": info.written_at.isoformat(timespec="seconds"),
                "message": info.message,
                "counts": {key: value for key, value in info.metadata.items() if key != "tables"},
                "tags": tags.get(info.id, []),
            }
            for info in self.repository.ancestry(branch="main")
            if info.parent_id is not None  # the first is Icechunk's own, of the empty repository
        ]

    def rollback(self, snapshot_id: str) -> None:
        """Move the head to an earlier snapshot. Later ones stay readable by id until collected.

        Raises UserError where that would bring removed episodes back.
        """
        target = self.snapshot(snapshot_id)
        with self.place.commit_lock():
            head = self.snapshot()
            if returning := head.removed() - target.removed():
                raise UserError(f"{self.uri}: {len(returning)} episodes were removed since {snapshot_id}; not undone")
            try:
                self.repository.reset_branch("main", target.id, from_snapshot_id=head.id)
            except icechunk.IcechunkError:  # it may have been done, and the answer lost
                if self.snapshot().id != target.id:
                    raise

    def tag(self, name: str, snapshot_id: str | None = None) -> str:
        """Give a snapshot (the head if None) a name that never moves; returns its id. UserError where it is taken."""
        target = self.snapshot(snapshot_id).id
        try:
            self.repository.create_tag(name, target)
        except (icechunk.IcechunkError, ValueError) as error:
            taken = name in self.repository.list_tags()
            if taken and self.repository.lookup_tag(name) == target:  # as asked for: by us, where the answer was lost
                return target
            why = "names a snapshot already" if taken else f"is no tag ({error})"
            raise UserError(f"{self.uri}: {name} {' '.join(why.split())}; choose another name") from None
        return target

    def untag(self, name: str) -> None:
        """Take a name away, so that its snapshot may be collected; the name cannot be given again."""
        if name not in self.repository.list_tags():
            raise UserError(f"{self.uri}: no tag {name}; list them with: uwm store log {self.uri}")
        self.repository.delete_tag(name)

    def fork(self) -> icechunk.ForkSession:
        """A picklable session for one writer. What it writes is seen by nobody until ``commit`` gets it back."""
        return self.repository.writable_session("main").fork()

    def commit(
        self,
        name: str,
        forks: Sequence[icechunk.ForkSession],
        episodes: list[dict[str, Any]],
        statistics: list[dict[str, Any]],
        quarantine: list[dict[str, Any]],
        unused: Sequence[dict[str, Any]] = (),
    ) -> Commit:
        """Make the writers' arrays and these rows (CATALOGUE, STATISTICS, QUARANTINE) visible at once.

        Episodes that somebody else brought in or took out since are left out, and blanked like ``unused`` locations.
        ``name`` is unique to this commit: asked for again after an error that left its end unknown, it is made once.
        """

        def change(store: Any, head: Snapshot) -> tuple[str, dict[str, int]] | None:
            known, removed = self._known(head), head.removed()
            new, blank = [], list(unused)
            for row in episodes:
                if row["key"] in known or row["id"] in removed:
                    blank += _places(row)
                else:
                    known.add(row["key"])
                    new.append(row)
            if not (new or quarantine):
                return None
            _blank(store, blank)
            keys = {row["key"] for row in new}
            part = _part(store, name)
            write_table(store, "catalogue", part, new)
            write_table(store, "statistics", part, [row for row in statistics if row["key"] in keys])
            write_table(store, "quarantine", part, quarantine)
            frames = sum(row["frames"] for row in new)
            filtered = sum(bool(row.get("filter")) for row in quarantine)
            counts = {"episodes": len(new), "frames": frames}
            counts |= {"quarantined": len(quarantine) - filtered, "filtered": filtered}
            return f"ingest {len(new)} episodes", counts

        head = self._commit(name, change, forks)
        return Commit(head.id, frozenset(key for part in head.parts("catalogue", name) for key in head.keys(part)))

    def add_sentences(self, rows: list[dict[str, Any]]) -> Snapshot:
        """Keep instructions' vectors (SENTENCES) that are not there yet. Returns the snapshot that has them."""

        def change(store: Any, head: Snapshot) -> tuple[str, dict[str, int]] | None:
            known = {(row["text"], row["encoder_digest"]) for row in head.sentence_rows()}
            new = [row for row in rows if (row["text"], row["encoder_digest"]) not in known]
            if not new:
                return None
            write_table(store, "sentences", _part(store, name), new)
            return f"{len(new)} sentences", {"sentences": len(new)}

        name = uuid.uuid4().hex
        return self._commit(name, change)

    def remove(self, ids: list[str], sources: list[str]) -> list[dict[str, Any]]:
        """Take episodes out for good, by id (or the beginning of one) and by source (a URI, or a folder of them).

        Returns a row (REMOVED) for each. Later ingests pass them by. Their latents and steps are blanked in the new
        head; what earlier snapshots hold is theirs until they are collected. UserError where a name fits nothing.
        """
        rows = self.snapshot().episodes().to_pylist()
        hint = f"list them with: uwm store episodes {self.uri}"
        chosen: dict[str, dict[str, Any]] = {}
        for start in ids:
            found = {row["id"]: row for row in rows if row["id"].startswith(start)}
            if len(found) != 1:
                raise UserError(f"{self.uri}: {len(found)} episodes have an id that begins with {start}; {hint}")
            chosen |= found
        for source in sources:
            found = {row["id"]: row for row in rows if f"{row['uri']}/".startswith(f"{source.rstrip('/')}/")}
            if not found:
                raise UserError(f"{self.uri}: no episode comes from {source}; {hint}")
            chosen |= found
        removed = [{key: row[key] for key in REMOVED.names} for row in chosen.values()]

        name = uuid.uuid4().hex

        def change(store: Any, head: Snapshot) -> tuple[str, dict[str, int]]:
            rows = [row for row in head.episodes().to_pylist() if row["id"] in chosen]
            _blank(store, [at for row in rows for at in _places(row)])
            write_table(store, "removed", _part(store, name), removed)
            return f"remove {len(removed)} episodes", {"removed": len(removed)}

        self._commit(name, change)
        return removed

    def collect_garbage(self, keep: datetime.timedelta) -> tuple[int, int]:
        """Forget snapshots older than ``keep`` (a day at least) that are neither the head nor tagged, then delete what
        nothing reaches and is older than a day. Returns the snapshots forgotten and the bytes freed.
        """
        now = self.place.now()
        with self.place.commit_lock():
            forgotten = self.repository.expire_snapshots(now - max(keep, GC_MARGIN))
            freed = self.repository.garbage_collect(now - GC_MARGIN).bytes_deleted
        return len(forgotten), freed

    def _known(self, head: Snapshot) -> set[str]:
        """``head.keys()``, of which only those are read that came since the last time."""
        self._keys = {part: self._keys.get(part) or head.keys(part) for part in head.parts("catalogue")}
        return set().union(*self._keys.values())

    def _commit(
        self,
        name: str,
        change: Callable[[Any, Snapshot], tuple[str, dict[str, int]] | None],
        forks: Sequence[icechunk.ForkSession] = (),
    ) -> Snapshot:
        """Apply ``change`` (which gives message and counts, or None for nothing to do) to the head, whole or not.

        Where another commit comes first, all is done again on top of it: what is known and removed may have changed. A
        conflict may also be this commit itself, if the answer to it was lost on the way: its name tells.
        """
        with self.place.commit_lock():
            while True:
                session = self.repository.writable_session("main")
                head = Snapshot(self.uri, session.snapshot_id)
                if any(head.parts(group, name) for group in TABLES):
                    return head
                if forks:
                    session.merge(*forks)
                done = change(session.store, head)
                if done is None:
                    return head
                message, counts = done
                counts["tables"] = sum(len(parts(session.store, group)) for group in TABLES)
                self._wait_for(head)
                try:
                    return Snapshot(self.uri, session.commit(message, metadata=counts))
                except icechunk.ConflictError:
                    continue
                except icechunk.IcechunkError:
                    self._compare_clocks()
                    raise

    def _wait_for(self, head: Snapshot) -> None:
        """Icechunk refuses a commit older than its parent: where that one's clock is ahead, ours has to get there."""
        info = next(iter(self.repository.ancestry(snapshot_id=head.id)))
        ahead = info.written_at - datetime.datetime.now(datetime.UTC)
        if ahead > LARGEST_SKEW:
            self._compare_clocks()
            date = f"{info.written_at:%Y-%m-%d %H:%M}"
            raise UserError(f"{self.uri}: its newest snapshot is of {date} UTC, which is to come; roll back to another")
        time.sleep(max(ahead.total_seconds(), 0))

    def _compare_clocks(self) -> None:
        drift = datetime.datetime.now(datetime.UTC) - self.place.now()
        if abs(drift) > LARGEST_SKEW:
            minutes, where = drift.total_seconds() / 60, "ahead" if drift > LARGEST_SKEW else "late"
            message = f"{self.uri}: this machine's clock is {abs(minutes):.0f} minutes {where}; set it, then try again"
            raise UserError(message) from None


def write_segments(fork: icechunk.ForkSession, arrays: list[np.ndarray]) -> list[Location]:
    """Write latents (float16 ``[n, C, h, w]``), pixels (uint8) and steps (float32 ``[n, D]``) as one group; where each
    went.

    Arrays of one kind and shape lie one after the other in one zarr array, without gaps.
    """
    group = f"data/{uuid.uuid4().hex}"
    locations = [Location("", 0, 0, "")] * len(arrays)  # where an array is empty, nothing is written
    for dtype, shape in dict.fromkeys((array.dtype, array.shape[1:]) for array in arrays if array.size):
        kind = next(name for name, values in KINDS.items() if dtype == values)
        path = f"{group}/{kind}_{'x'.join(map(str, shape))}"
        members = [i for i, array in enumerate(arrays) if (array.dtype, array.shape[1:]) == (dtype, shape)]
        joined = np.concatenate([arrays[i] for i in members])
        start = 0
        for i in members:
            stop = start + len(arrays[i])
            locations[i] = Location(path, start, stop - start, checksum(joined[start:stop]))
            start = stop
        chunks = -(-joined.nbytes // CHUNK_BYTES)
        array = zarr.create_array(
            fork.store,
            name=path,
            shape=joined.shape,
            chunks=(-(-len(joined) // chunks), *shape),  # of one size, so that the last is not half empty
            dtype=joined.dtype,
            compressors=None,  # float16 latents do not compress
        )
        array[:] = joined
    return locations


def _not_a_store(uri: str) -> UserError:
    return UserError(f"{uri}: not a latent store; give a place that uwm ingest made")


def _places(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Every location that a catalogue row names."""
    return [*(at for camera in row["cameras"] for at in camera["segments"]), row["steps"]]


def _blank(store: Any, locations: list[dict[str, Any]]) -> None:
    """Overwrite these rows with zeros: a chunk that holds nothing else is gone with that."""
    for at in locations:
        if at["count"]:
            zarr.open_array(store, path=at["array"])[at["start"] : at["start"] + at["count"]] = 0


def _part(store: Any, name: str) -> str:
    """The part of this commit. It sorts behind every part that is there, whatever anybody's clock says."""
    last = max((names[-1] for names in (parts(store, group) for group in TABLES) if names), default="0")
    return f"{int(last.partition('-')[0]) + 1:08d}-{name}"
