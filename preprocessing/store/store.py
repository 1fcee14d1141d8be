"""The latent store: zarr v3 arrays under Icechunk transactions, with a columnar catalogue.

Layout of one repository (everything is written once, by one commit, and only ``remove`` changes it afterwards):

    data/GROUP/latents_CxHxW   float16 [N, C, h, w]   concatenated segments, chunks of 4 MiB
    data/GROUP/pixels_3xHxW    uint8 [N, 3, H, W]     unencoded frames, of the encoder "pixels"
    data/GROUP/steps_D         float32 [N, D]         columns of the action, of proprio, of signals
    catalogue/PART             uint8 [bytes]          an Arrow table, one row per episode and encoding
    statistics/PART            uint8 [bytes]          one row per array of those: moments and quantiles
    quarantine/PART            uint8 [bytes]          one row per refused input
    removed/PART               uint8 [bytes]          one row per removed episode
    sentences/PART             uint8 [bytes]          one row per instruction and text encoder: its vector

A *group* is the output of one write task, a *part* what one commit added. Disjoint groups never conflict, so writers
fork and the committer merges the forks: a reader sees all of a commit or none of it. A *segment* is up to 64
consecutive frames of one camera. Every location carries a checksum of its bytes, which every read verifies. The columns
are in :mod:`preprocessing.store.catalogue`; the commit protocol and its reasons in docs/design/store.md.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict, TypeVar

import icechunk
import numpy as np
import pyarrow.fs
import zarr

from preprocessing.errors import UserError, only
from preprocessing.store.catalogue import KINDS, TABLES, parts, write_table
from preprocessing.store.rows import EpisodeRow, InstructionRow, LocationRow, QuarantineRow, RemovedRow, StatisticsRow
from preprocessing.store.snapshot import Snapshot, checksum
from preprocessing.store.storage import Place, answered, parse, served

icechunk.set_logs_filter("error")  # it warns of concurrent local commits, which our lock prevents
warnings.filterwarnings("ignore", module="zarr")  # its notices about unstable dtypes do not concern a user

T = TypeVar("T")

GC_MARGIN = datetime.timedelta(hours=24)  # younger objects may belong to a running ingest
LARGEST_SKEW = datetime.timedelta(minutes=10)  # Icechunk refuses commits if the clock and the storage's differ by more
FIRST_SNAPSHOT = "1CECHNKREP0F1RSTCMT0"  # of every repository, by Icechunk's specification; it is empty
TAG = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
TAG_RULE = "use up to 100 letters, digits, dots, hyphens and underscores, the first a letter or digit"
CHUNK_BYTES = 4 * 2**20  # large enough that the disk bounds reading, not the number of chunks


@dataclass(frozen=True)
class Commit:
    """What one commit added: less than was passed if another ingest added some of the episodes first."""

    snapshot: str
    keys: frozenset[str]  # of the catalogue rows


class LogEntry(TypedDict):
    """One snapshot in the history of a store."""

    snapshot: str
    parent: str
    time: str  # ISO 8601
    message: str
    counts: dict[str, Any]
    tags: list[str]


class LatentStore:
    """A store at a URI (``/path``, ``file:///path``, ``s3://bucket/prefix``).

    ``create`` makes one if there is nothing yet; ``open`` raises UserError if there is none.
    """

    def __init__(self, place: Place, repository: icechunk.Repository):
        self.place = place
        self.uri = place.uri
        self.repository = repository
        self._keys: dict[str, dict[str, str]] = {}  # by catalogue part, which never changes

    @classmethod
    def open(cls, uri: str) -> LatentStore:
        place = parse(uri)
        match place.content():
            case "nothing":
                raise UserError(f"{uri}: no store here; create one with: uwm ingest SOURCE --store {uri}")
            case "something else":
                raise _not_a_store(uri)
        store = cls(place, answered(lambda: icechunk.Repository.open(place.storage()), uri))
        if store.repository.lookup_branch("main") == FIRST_SNAPSHOT:
            raise UserError(f"{uri}: this store is being created, or was left half-made; uwm ingest completes it")
        return store

    @classmethod
    def create(cls, uri: str) -> LatentStore:
        """Open the store at ``uri``; make an empty one if there is nothing yet."""
        place = parse(uri)
        with place.commit_lock():
            match place.content():
                case "something else":
                    raise _not_a_store(uri)
                case "nothing":
                    try:
                        icechunk.Repository.create(place.storage())
                    except icechunk.IcechunkError:  # another process was faster, or the answer was lost
                        if place.content() != "store":
                            raise
            store = cls(place, icechunk.Repository.open(place.storage()))
            # Created now: two ingests that each created them later would conflict.
            session = store.repository.writable_session("main")
            root = zarr.open_group(session.store, mode="a")
            for group in ("data", *TABLES):
                root.require_group(group)
            if session.has_uncommitted_changes:
                with contextlib.suppress(icechunk.ConflictError):  # another process was faster
                    session.commit("new store")
        return store

    def snapshot(self, snapshot_id: str | None = None) -> Snapshot:
        """Return the head of the store, or the snapshot of that tag or id, which may be shortened.

        Raises UserError if there is none, or if several ids begin so.
        """
        if snapshot_id is None:
            return Snapshot(self.uri, self._ask(lambda: self.repository.lookup_branch("main")))
        if snapshot_id in self._ask(self.repository.list_tags):
            return Snapshot(self.uri, self._ask(lambda: self.repository.lookup_tag(snapshot_id)))
        try:
            self._ask(lambda: self.repository.readonly_session(snapshot_id=snapshot_id))
        except (icechunk.IcechunkError, ValueError):
            try:
                return Snapshot(self.uri, only(snapshot_id.upper(), self._snapshot_ids(), "snapshots"))
            except UserError as error:
                hint = f"list snapshots and tags with: uwm store log {self.uri}"
                raise UserError(f"{self.uri}: {snapshot_id}: {error}; {hint}") from None
        return Snapshot(self.uri, snapshot_id)

    def _snapshot_ids(self) -> list[str]:
        """Return the ids of all snapshots, also of those that a rollback removed from the history."""
        files, root = self.place.filesystem()
        found = files.get_file_info(pyarrow.fs.FileSelector(f"{root}/snapshots", allow_not_found=True))
        return [info.base_name for info in found if info.base_name != FIRST_SNAPSHOT]

    def log(self) -> list[LogEntry]:
        """Return the snapshots from the newest to the first."""
        return self._ask(self._history)

    def _history(self) -> list[LogEntry]:
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
            if info.parent_id is not None  # the first is Icechunk's own: the empty repository
        ]

    def rollback(self, snapshot_id: str) -> str:
        """Move the head to an earlier snapshot; return its id. Later ones stay readable by id until garbage collection.

        Raises UserError if that would bring back removed episodes.
        """
        target = self.snapshot(snapshot_id)
        with self.place.commit_lock():
            head = self.snapshot()
            if returning := head.removed() - target.removed():
                raise UserError(
                    f"{self.uri}: {len(returning)} episodes were removed since {snapshot_id}; choose a later one"
                )
            try:
                self._ask(lambda: self.repository.reset_branch("main", target.id, from_snapshot_id=head.id))
            except icechunk.IcechunkError:  # it may have succeeded with the answer lost
                if self.snapshot().id != target.id:
                    raise
        return target.id

    def tag(self, name: str, snapshot_id: str | None = None) -> str:
        """Give a snapshot (the head if None) a name that never moves; return its id. UserError if the name is taken."""
        if not TAG.fullmatch(name):
            raise UserError(f"{self.uri}: {name!r} is no name for a tag; {TAG_RULE}")
        target = self.snapshot(snapshot_id).id
        try:
            self._ask(lambda: self.repository.create_tag(name, target))
        except (icechunk.IcechunkError, ValueError) as error:
            taken = name in self.repository.list_tags()
            if taken and self.repository.lookup_tag(name) == target:  # by us, with the answer lost
                return target
            if not taken and "already exists" not in str(error):
                raise
            why = "already names a snapshot" if taken else "was the name of a tag that is deleted"
            raise UserError(f"{self.uri}: {name} {why}; choose another name") from None
        return target

    def untag(self, name: str) -> None:
        """Delete a tag, so that its snapshot may be garbage collected. The name cannot be used again."""
        if name not in self._ask(self.repository.list_tags):
            raise UserError(f"{self.uri}: no tag {name}; list them with: uwm store log {self.uri}")
        self._ask(lambda: self.repository.delete_tag(name))

    def fork(self) -> icechunk.ForkSession:
        """Return a picklable session for one writer. Its writes are invisible until it is passed to ``commit``."""
        return self._ask(lambda: self.repository.writable_session("main").fork())

    def commit(
        self,
        name: str,
        forks: Sequence[icechunk.ForkSession],
        episodes: Sequence[EpisodeRow],
        statistics: Sequence[StatisticsRow],
        quarantine: Sequence[QuarantineRow],
        unused: Sequence[LocationRow] = (),
        bases: Mapping[str, str] | None = None,
    ) -> Commit:
        """Make the writers' arrays and these rows (CATALOGUE, STATISTICS, QUARANTINE) visible in one transaction.

        Episodes that were added or removed meanwhile by others are left out, and blanked like ``unused`` locations.
        ``bases`` maps the keys of rows that point to latents of another row to that row's key: they are left out where
        the head has no such row, and nothing but their steps is ever blanked.
        ``name`` is unique to this commit: repeating it after an error with an unknown outcome commits only once.
        """

        def change(store: Any, head: Snapshot) -> tuple[str, dict[str, int]] | None:
            known, removed = self._known(head), head.removed()
            stored = {*known.values()}
            new: list[EpisodeRow] = []
            blank = list(unused)
            for row in episodes:
                base = (bases or {}).get(row["key"])
                if row["key"] in known or row["id"] in removed or (base and base not in known):
                    blank += [row["steps"]] if base else _places(row)
                else:
                    known[row["key"]] = row["id"]
                    new.append(row)
            if not (new or quarantine):
                return None
            _blank(store, blank)
            keys = {row["key"] for row in new}
            part = _part(store, name)
            write_table(store, "catalogue", part, new)
            write_table(store, "statistics", part, [row for row in statistics if row["key"] in keys])
            write_table(store, "quarantine", part, quarantine)
            frames = {row["id"]: row["frames"] for row in new if row["id"] not in stored}
            filtered = sum(bool(row.get("filter")) for row in quarantine)
            counts = {"episodes": len(frames), "frames": sum(frames.values())}
            counts |= {"quarantined": len(quarantine) - filtered, "filtered": filtered}
            message = f"ingest {len(frames)} episodes"
            if updated := len({row["id"] for row in new} & stored):  # other contract, encoder or size
                counts["updated"] = updated
                message = f"{message}, update {updated}" if frames else f"update {updated} episodes"
            return message, counts

        head = self._commit(name, change, forks)
        keys = (head.ids_by_key(part) for part in head.parts("catalogue", name))
        return Commit(head.id, frozenset().union(*keys))

    def add_instruction_vectors(self, rows: Sequence[InstructionRow]) -> Snapshot:
        """Add the instructions' vectors (INSTRUCTIONS) that are missing. Returns the snapshot that has them."""

        def change(store: Any, head: Snapshot) -> tuple[str, dict[str, int]] | None:
            known = {(row["text"], row["encoder_digest"]) for row in head.instruction_rows()}
            new = [row for row in rows if (row["text"], row["encoder_digest"]) not in known]
            if not new:
                return None
            write_table(store, "sentences", _part(store, name), new)
            return f"{len(new)} instruction vectors", {"sentences": len(new)}

        name = uuid.uuid4().hex
        return self._commit(name, change)

    def find(self, ids: list[str], sources: list[str]) -> list[RemovedRow]:
        """Return the episodes of the head, by id (or a unique prefix of it) and by source (a URI, or a folder of them).

        Raises UserError if a name matches nothing, or if several ids begin so.
        """
        rows: list[EpisodeRow] = self.snapshot().all_rows().to_pylist()
        hint = f"list them with: uwm store episodes {self.uri}"
        chosen: dict[str, EpisodeRow] = {}
        for start in ids:
            try:
                full = only(start, [row["id"] for row in rows], "episode ids")
            except UserError as error:
                raise UserError(f"{self.uri}: {error}; {hint}") from None
            chosen |= {row["id"]: row for row in rows if row["id"] == full}
        for source in sources:
            inside = tuple(f"{source.rstrip('/')}{mark}" for mark in ("/", "!/"))  # of a folder, of an archive
            found = {row["id"]: row for row in rows if f"{row['uri']}/".startswith(inside)}
            if not found:
                raise UserError(f"{self.uri}: no episode comes from {source}; {hint}")
            chosen |= found
        return [{"id": row["id"], "uri": row["uri"], "index": row["index"]} for row in chosen.values()]

    def remove(self, ids: list[str], sources: list[str]) -> list[RemovedRow]:
        """Remove the episodes that ``find`` finds, for good, and return them.

        Later ingests skip them. Their latents and steps are blanked in the new head; earlier snapshots keep them until
        they are garbage collected.
        """
        removed = self.find(ids, sources)
        gone = {row["id"] for row in removed}
        name = uuid.uuid4().hex

        def change(store: Any, head: Snapshot) -> tuple[str, dict[str, int]]:
            rows = [row for row in head.all_rows().to_pylist() if row["id"] in gone]
            _blank(store, [at for row in rows for at in _places(row)])
            write_table(store, "removed", _part(store, name), removed)
            return f"remove {len(removed)} episodes", {"removed": len(removed)}

        self._commit(name, change)
        return removed

    def expiring(self, keep: datetime.timedelta) -> list[LogEntry]:
        """Return the snapshots of the head's history that ``collect_garbage`` would delete."""
        limit = self.place.now() - max(keep, GC_MARGIN)
        return [
            entry
            for entry in self.log()[1:]
            if not entry["tags"] and datetime.datetime.fromisoformat(entry["time"]) < limit
        ]

    def collect_garbage(self, keep: datetime.timedelta) -> tuple[int, int]:
        """Expire snapshots older than ``keep`` (at least a day), except the head and tagged ones; then delete
        unreachable objects older than a day. Returns the number of snapshots expired and of bytes freed.
        """
        now = self.place.now()
        with self.place.commit_lock():
            forgotten = self.repository.expire_snapshots(now - max(keep, GC_MARGIN))
            freed = self.repository.garbage_collect(now - GC_MARGIN).bytes_deleted
        return len(forgotten), freed

    def _ask(self, step: Callable[[], T]) -> T:
        with served(self.uri):
            return answered(step, self.uri)

    def _known(self, head: Snapshot) -> dict[str, str]:
        """Return the episode of every catalogue row by its key, reading only the parts added since the last call."""
        self._keys = {part: self._keys.get(part) or head.ids_by_key(part) for part in head.parts("catalogue")}
        return {key: id for part in self._keys.values() for key, id in part.items()}

    def _commit(
        self,
        name: str,
        change: Callable[[Any, Snapshot], tuple[str, dict[str, int]] | None],
        forks: Sequence[icechunk.ForkSession] = (),
    ) -> Snapshot:
        """Apply ``change`` (which returns message and counts, or None if there is nothing to do) to the head.

        If another commit comes first, start over on top of it: the known and removed episodes may have changed. The
        conflicting commit may also be this one, if its answer was lost: the parts named ``name`` tell.
        """
        with self.place.commit_lock():
            while True:
                session = self._ask(lambda: self.repository.writable_session("main"))
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
                    return Snapshot(self.uri, self._ask(partial(session.commit, message, metadata=counts)))
                except icechunk.ConflictError:
                    continue
                except icechunk.IcechunkError:
                    self._compare_clocks()
                    raise

    def _wait_for(self, head: Snapshot) -> None:
        """Wait until our clock passes the head's time: Icechunk refuses a commit older than its parent."""
        info = self._ask(lambda: next(iter(self.repository.ancestry(snapshot_id=head.id))))
        ahead = info.written_at - datetime.datetime.now(datetime.UTC)
        if ahead > LARGEST_SKEW:
            self._compare_clocks()
            date = f"{info.written_at:%Y-%m-%d %H:%M}"
            raise UserError(f"{self.uri}: its newest snapshot is from the future, {date} UTC; roll back to another")
        time.sleep(max(ahead.total_seconds(), 0))

    def _compare_clocks(self) -> None:
        drift = datetime.datetime.now(datetime.UTC) - self.place.now()
        if abs(drift) > LARGEST_SKEW:
            minutes, where = drift.total_seconds() / 60, "fast" if drift > LARGEST_SKEW else "slow"
            message = f"{self.uri}: this machine's clock is {abs(minutes):.0f} minutes {where}; set it, then try again"
            raise UserError(message) from None


def write_segments(fork: icechunk.ForkSession, arrays: list[np.ndarray]) -> list[LocationRow]:
    """Write latents (float16 ``[n, C, h, w]``), pixels (uint8) and steps (float32 ``[n, D]``) as one group.

    Returns their locations. Arrays of the same kind and shape are concatenated in one zarr array, without gaps.
    """
    group = f"data/{uuid.uuid4().hex}"
    # Empty arrays are not written.
    locations: list[LocationRow] = [{"array": "", "start": 0, "count": 0, "checksum": ""} for _ in arrays]
    for dtype, shape in dict.fromkeys((array.dtype, array.shape[1:]) for array in arrays if array.size):
        kind = next(name for name, values in KINDS.items() if dtype == values)
        path = f"{group}/{kind}_{'x'.join(map(str, shape))}"
        members = [i for i, array in enumerate(arrays) if (array.dtype, array.shape[1:]) == (dtype, shape)]
        joined = np.concatenate([arrays[i] for i in members])
        start = 0
        for i in members:
            stop = start + len(arrays[i])
            crc = checksum(joined[start:stop])
            locations[i] = {"array": path, "start": start, "count": stop - start, "checksum": crc}
            start = stop
        answered(partial(_write, fork.store, path, joined), size=joined.nbytes)
    return locations


def _write(store: Any, path: str, rows: np.ndarray) -> None:
    chunks = -(-rows.nbytes // CHUNK_BYTES)
    array = zarr.create_array(
        store,
        name=path,
        shape=rows.shape,
        chunks=(-(-len(rows) // chunks), *rows.shape[1:]),  # of equal size, so that the last is not half empty
        dtype=rows.dtype,
        compressors=None,  # float16 latents do not compress
    )
    array[:] = rows


def _not_a_store(uri: str) -> UserError:
    return UserError(f"{uri}: not a latent store; give one that uwm ingest created, or an empty place")


def _places(row: EpisodeRow) -> list[LocationRow]:
    """Return every location in a catalogue row."""
    return [*(at for camera in row["cameras"] for at in camera["segments"]), row["steps"]]


def _blank(store: Any, locations: Sequence[LocationRow]) -> None:
    """Overwrite these rows with zeros. zarr deletes chunks that become all zeros."""

    def blank(at: LocationRow) -> None:
        zarr.open_array(store, path=at["array"])[at["start"] : at["start"] + at["count"]] = 0

    for at in locations:
        if at["count"]:
            answered(partial(blank, at))


def _part(store: Any, name: str) -> str:
    """Return the part name of this commit. It sorts after every existing part, whatever the clocks say."""
    last = max((names[-1] for names in (parts(store, group) for group in TABLES) if names), default="0")
    return f"{int(last.partition('-')[0]) + 1:08d}-{name}"
