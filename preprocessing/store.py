"""The latent store: zarr v3 arrays under Icechunk transactions, with a catalogue of columns.

Layout of one repository (every group is written once and never changed):

    data/PART/TASK/latents_CxHxW   float16 [N, C, h, w]   chunks of 64 frames, each segment starts on a chunk
    data/PART/TASK/steps_D         float32 [N, D]         action columns, then proprio columns
    catalogue/PART                 uint8 [bytes]          an Arrow table, one row an episode (CATALOGUE below)
    quarantine/PART                uint8 [bytes]          an Arrow table, one row a refused input
    removed/PART                   uint8 [bytes]          an Arrow table, one row an episode taken out for good

A *part* is one ingest, a *task* one writer in it; disjoint groups never conflict, so the driver merges the
writers' forks and commits once: a reader sees all of an ingest or none of it. A *segment* is up to 64
consecutive frames of one camera. Every location carries a digest of its bytes, which ``verify`` compares.
Why Icechunk: docs/design/store.md.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import uuid
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import icechunk
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import zarr
from filelock import FileLock

from preprocessing.episode import FRAMES_PER_CHUNK, UserError

icechunk.set_logs_filter("error")  # it warns of concurrent local commits, which the lock below rules out
warnings.filterwarnings("ignore", module="zarr")  # its notices on unstabilised dtypes do not concern a user

LOCATION = pa.struct([("array", pa.string()), ("start", pa.int64()), ("count", pa.int64()), ("digest", pa.string())])
CATALOGUE = pa.schema(
    [
        ("key", pa.string()),  # what makes it this work and no other: episode, contract, encoder, image size
        ("id", pa.string()),
        ("uri", pa.string()),
        ("index", pa.int64()),
        ("format", pa.string()),
        ("frames", pa.int64()),
        ("fps", pa.float64()),
        ("embodiment", pa.string()),
        ("instruction", pa.string()),
        ("success", pa.bool_()),
        ("encoder", pa.string()),  # as it was named to uwm ingest
        ("encoder_digest", pa.string()),  # its weights, settings and precision
        ("cameras", pa.list_(pa.struct([("name", pa.string()), ("segments", pa.list_(LOCATION))]))),
        ("steps", LOCATION),
        ("action_dim", pa.int64()),
        ("action_layout", pa.string()),  # JSON list of ActionBlock
        ("proprio", pa.list_(pa.struct([("name", pa.string()), ("width", pa.int64())]))),
        ("mean", pa.list_(pa.float64())),  # over the episode's steps, one number a column; mergeable
        ("m2", pa.list_(pa.float64())),
        ("min", pa.list_(pa.float64())),
        ("max", pa.list_(pa.float64())),
        ("contract", pa.string()),  # JSON of the DataContract that was given; null where none was
        ("repairs", pa.list_(pa.string())),
    ]
)
QUARANTINE = pa.schema(
    [
        ("key", pa.string()),
        ("id", pa.string()),
        ("uri", pa.string()),
        ("index", pa.int64()),
        ("reason", pa.string()),
        ("reader", pa.string()),  # version that refused these bytes for good; null where trying again may help
    ]
)
REMOVED = pa.schema([("id", pa.string()), ("uri", pa.string()), ("index", pa.int64())])
GC_MARGIN = datetime.timedelta(hours=24)  # younger objects may belong to an ingest that is still writing


class LatentStore:
    """A store at a folder (``/path`` or ``file://``).

    ``create`` makes an empty one where nothing is; ``open`` raises UserError where there is none.
    """

    def __init__(self, uri: str, repository: icechunk.Repository):
        self.uri = uri
        self.repository = repository

    @classmethod
    def open(cls, uri: str) -> LatentStore:
        folder = local_folder(uri)
        if not folder.is_dir():
            raise UserError(f"{uri}: no store here; make one with: uwm ingest SOURCE --store {uri}")
        try:
            return cls(str(folder), icechunk.Repository.open(icechunk.local_filesystem_storage(str(folder))))
        except icechunk.IcechunkError:
            raise UserError(f"{uri}: not a latent store; give a folder that uwm ingest made") from None

    @classmethod
    def create(cls, uri: str) -> LatentStore:
        """Open the store at ``uri``, or make an empty one there if the folder is missing or empty."""
        folder = local_folder(uri)
        if folder.is_file():
            return cls.open(uri)
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            if any(folder.iterdir()):
                return cls.open(uri)
            repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(folder)))
            session = repository.writable_session("main")
            # Made now, for two ingests that each made one would conflict.
            for group in ("data", "catalogue", "quarantine", "removed"):
                zarr.create_group(session.store, path=group)
            session.commit("new store")
        return cls(str(folder), repository)

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
                "counts": dict(info.metadata),
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
        with _lock(Path(self.uri)):
            if returning := self.snapshot().removed() - target.removed():
                raise UserError(f"{self.uri}: {len(returning)} episodes were removed since {snapshot_id}; not undone")
            self.repository.reset_branch("main", target.id)

    def tag(self, name: str, snapshot_id: str | None = None) -> str:
        """Give a snapshot (the head if None) a name that never moves; returns its id. UserError where it is taken."""
        target = self.snapshot(snapshot_id).id
        try:
            self.repository.create_tag(name, target)
        except (icechunk.IcechunkError, ValueError) as error:
            why = "names a snapshot already" if name in self.repository.list_tags() else f"is no tag ({error})"
            raise UserError(f"{self.uri}: {name} {' '.join(why.split())}; choose another name") from None
        return target

    def remove(self, ids: list[str], sources: list[str]) -> list[dict[str, Any]]:
        """Take episodes out for good, by id (or the beginning of one) and by source (a URI, or a folder of them).

        Returns a row (REMOVED) for each. Later ingests pass them by. Their latents and steps are blanked in the new
        head; what earlier snapshots hold is theirs until they are collected. UserError where a name fits nothing.
        """
        head = self.snapshot()
        gone = head.removed()
        rows = [row for row in head.catalogue().to_pylist() if row["id"] not in gone]
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
        session = self.repository.writable_session("main")
        for row in rows:
            if row["id"] in chosen:
                for at in [*(at for camera in row["cameras"] for at in camera["segments"]), row["steps"]]:
                    if at["count"]:
                        zarr.open_array(session.store, path=at["array"])[at["start"] : at["start"] + at["count"]] = 0
        _write_table(session, f"removed/{_new_part()}", pa.Table.from_pylist(removed, schema=REMOVED))
        with _lock(Path(self.uri)):
            counts = {"removed": len(removed)}
            session.commit(f"remove {len(removed)} episodes", metadata=counts, rebase_with=icechunk.ConflictDetector())
        return removed

    def collect_garbage(self) -> int:
        """Delete what no snapshot reaches and is older than a day; returns the bytes freed."""
        before = datetime.datetime.now(datetime.UTC) - GC_MARGIN
        return self.repository.garbage_collect(before).bytes_deleted

    def begin(self) -> Transaction:
        return Transaction(self)


@dataclass(frozen=True)
class Location:
    """Rows ``[start, start + count)`` of one array, and the digest of their bytes."""

    array: str
    start: int
    count: int
    digest: str


class Transaction:
    """One ingest: forks go out to writers, come back, and become visible in one commit or not at all."""

    def __init__(self, store: LatentStore):
        self.part = _new_part()
        self._store = store
        self._session = store.repository.writable_session("main")

    def fork(self) -> icechunk.ForkSession:
        """A picklable session for one writer; merged by ``commit``."""
        return self._session.fork()

    def commit(
        self, forks: Iterable[Any], episodes: list[dict[str, Any]], quarantine: list[dict[str, Any]], message: str
    ) -> str:
        """Make the writers' arrays and these rows (CATALOGUE, QUARANTINE) visible; returns the snapshot id."""
        self._session.merge(*forks)
        _write_table(self._session, f"catalogue/{self.part}", pa.Table.from_pylist(episodes, schema=CATALOGUE))
        if quarantine:
            _write_table(self._session, f"quarantine/{self.part}", pa.Table.from_pylist(quarantine, schema=QUARANTINE))
        counts = {
            "episodes": len(episodes),
            "frames": sum(row["frames"] for row in episodes),
            "quarantined": len(quarantine),
        }
        with _lock(Path(self._store.uri)):
            return self._session.commit(message, metadata=counts, rebase_with=icechunk.ConflictDetector())


def write_segments(fork: icechunk.ForkSession, part: str, arrays: list[np.ndarray]) -> list[Location]:
    """Write latents (float16 ``[n, C, h, w]``) and steps (float32 ``[n, D]``) of one task; where each went.

    Arrays of one shape share a zarr array; segments of latents start on a chunk boundary.
    """
    group = f"data/{part}/{uuid.uuid4().hex[:8]}"
    locations = [Location("", 0, 0, "")] * len(arrays)  # where an array is empty, nothing is written
    for shape in dict.fromkeys(array.shape[1:] for array in arrays if array.size):
        is_latents = len(shape) == 3
        align = FRAMES_PER_CHUNK if is_latents else 1
        name = f"{'latents' if is_latents else 'steps'}_{'x'.join(map(str, shape))}"
        members = [i for i, array in enumerate(arrays) if array.shape[1:] == shape]
        starts, end = [], 0
        for i in members:
            starts.append(end)
            end += -(-len(arrays[i]) // align) * align
        buffer = np.zeros((end, *shape), np.float16 if is_latents else np.float32)
        for i, start in zip(members, starts, strict=True):
            rows = buffer[start : start + len(arrays[i])]
            rows[:] = arrays[i]
            locations[i] = Location(f"{group}/{name}", start, len(rows), _digest(rows))
        chunk = min(FRAMES_PER_CHUNK if is_latents else 4096, max(end, 1))
        array = zarr.create_array(
            fork.store,
            name=f"{group}/{name}",
            shape=buffer.shape,
            chunks=(chunk, *shape),
            dtype=buffer.dtype,
            compressors=None,  # float16 latents do not compress
        )
        array[:] = buffer
    return locations


class Snapshot:
    """A pinned, read-only state of a store. Cheap to pickle: a uri and an id."""

    def __init__(self, uri: str, snapshot_id: str):
        self.uri = uri
        self.id = snapshot_id

    def episodes(self) -> pa.Table:
        """The catalogue, one row an episode and encoding, in the order in which they were ingested.

        Two ingests of the same data at the same time each leave a part; the first part's row counts.
        """
        table, gone = self.catalogue(), self.removed()
        seen: set[str] = set()
        keep = []
        for key, episode in zip(table["key"].to_pylist(), table["id"].to_pylist(), strict=True):
            keep.append(key not in seen and episode not in gone)
            seen.add(key)
        return table if all(keep) else table.filter(pa.array(keep))

    def catalogue(self) -> pa.Table:
        """Every row that an ingest wrote, those of removed episodes and doubles included."""
        return self._tables("catalogue", CATALOGUE)

    def removed(self) -> set[str]:
        """Ids of the episodes that were taken out for good."""
        return set(self._tables("removed", REMOVED)["id"].to_pylist())

    def diff(self, older: Snapshot) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Catalogue rows that are here and not in ``older``, and those that are there and not here."""
        mine, theirs = ({row["key"]: row for row in at.episodes().to_pylist()} for at in (self, older))
        return (
            [row for key, row in mine.items() if key not in theirs],
            [row for key, row in theirs.items() if key not in mine],
        )

    def rows(self, encoder_digest: str) -> list[dict[str, Any]]:
        """Catalogue rows of one encoder; of an episode ingested under several contracts, the newest."""
        table = self.episodes()
        encoded = table.filter(pc.equal(table["encoder_digest"], encoder_digest))
        return list({row["id"]: row for row in encoded.to_pylist()}.values())

    def quarantine(self) -> list[dict[str, Any]]:
        """Inputs refused so far and not ingested since, one row (QUARANTINE) each."""
        ingested = set(self.episodes()["id"].to_pylist())
        latest = {row["key"]: row for row in self._tables("quarantine", QUARANTINE).to_pylist()}
        return [row for row in latest.values() if row["id"] not in ingested]

    def read(self, locations: list[dict[str, Any]]) -> np.ndarray:
        """The rows of consecutive locations as one array, e.g. a camera's segments -> float16 ``[T, C, h, w]``."""
        return np.concatenate([self._array(at["array"])[at["start"] : at["start"] + at["count"]] for at in locations])

    def verify(self) -> Iterator[str]:
        """Read everything the catalogue names and yield one line for each place whose bytes are not as written."""
        for row in self.episodes().to_pylist():
            places = [(camera["name"], at) for camera in row["cameras"] for at in camera["segments"]]
            if row["steps"]["count"]:
                places.append(("steps", row["steps"]))
            for what, at in places:
                with contextlib.suppress(Exception):  # unreadable is as bad as different
                    if _digest(self.read([at])) == at["digest"]:
                        continue
                rows = f"rows {at['start']} to {at['start'] + at['count']} of {at['array']}"
                yield f"episode {row['id']} ({row['uri']} #{row['index']}): {what}, {rows}"

    def __getstate__(self) -> dict[str, str]:
        return {"uri": self.uri, "id": self.id}

    @property
    def _session(self) -> icechunk.Session:
        if "_opened" not in self.__dict__:
            self._arrays: dict[str, zarr.Array] = {}
            self._opened = LatentStore.open(self.uri).repository.readonly_session(snapshot_id=self.id)
        return self._opened

    def _array(self, path: str) -> zarr.Array:
        session = self._session
        if path not in self._arrays:
            self._arrays[path] = zarr.open_array(session.store, path=path, mode="r")
        return self._arrays[path]

    def _tables(self, group: str, schema: pa.Schema) -> pa.Table:
        parts = sorted(zarr.open_group(self._session.store, path=group, mode="r").array_keys())
        return pa.concat_tables([schema.empty_table(), *(_read_table(self._session, f"{group}/{p}") for p in parts)])


def local_folder(uri: str) -> Path:
    """The folder that ``/path`` or ``file:///path`` names; UserError for any other scheme."""
    parsed = urlparse(uri)
    if parsed.scheme not in ("", "file"):
        raise UserError(f"{uri}: stores live in a folder for now; give /path or file:///path")
    return Path(parsed.path if parsed.scheme else uri).expanduser().resolve()


def _new_part() -> str:
    """Sorts by time; never the same twice."""
    return f"{datetime.datetime.now(datetime.UTC).strftime('%Y%m%dT%H%M%S%f')}-{uuid.uuid4().hex[:8]}"


def _lock(folder: Path) -> FileLock:
    # Icechunk's commit on a local file system is not safe against concurrent committers (on S3 it is). Beside the
    # store, not in it: Icechunk only makes a repository in an empty folder.
    return FileLock(folder.parent / f".{folder.name}.lock")


def _digest(rows: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(rows).data, digest_size=8).hexdigest()


def _write_table(session: icechunk.Session, path: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    data = np.frombuffer(sink.getvalue(), np.uint8)
    zarr.create_array(session.store, name=path, shape=data.shape, chunks=data.shape, dtype="uint8", compressors=None)[
        :
    ] = data


def _read_table(session: icechunk.Session, path: str) -> pa.Table:
    data = np.asarray(zarr.open_array(session.store, path=path, mode="r")[:])
    return pa.ipc.open_stream(pa.py_buffer(data.tobytes())).read_all()
