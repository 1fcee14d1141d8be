"""A pinned, read-only state of a latent store: its catalogue, its arrays, and the check of their checksums."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import google_crc32c
import icechunk
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import zarr

from preprocessing.errors import UserError
from preprocessing.store.catalogue import KINDS, TABLES, DamagedError, one_line, parts, read_table, read_tables
from preprocessing.store.rows import BriefRow, InstructionRow, LocationRow, QuarantineRow, StatisticsRow, TrainingRow
from preprocessing.store.statistics import Statistics, merge
from preprocessing.store.storage import answered, parse, read_again, served

BYTES_AT_ONCE = 32 * 2**20


class Snapshot:
    """One commit of the store at ``uri``. Cheap to pickle: a URI and an id."""

    def __init__(self, uri: str, snapshot_id: str):
        self.uri = uri
        self.id = snapshot_id

    def episodes(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the catalogue's current rows (CATALOGUE), in commit order: the newest of each episode and encoder.

        Everything that counts, lists, exports or trains goes by these. ``columns`` limits what is read: with a few
        columns, 100,000 episodes are listed in a moment.
        """
        table = self.all_rows(None if columns is None else [*{*columns, "id", "encoder_digest"}])
        pairs = zip(table["id"].to_pylist(), table["encoder_digest"].to_pylist(), strict=True)
        newest = {pair: index for index, pair in enumerate(pairs)}
        if len(newest) < len(table):
            table = table.take(pa.array([*newest.values()], pa.int64()))
        return table if columns is None else table.select([*columns])

    def all_rows(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows of the catalogue in commit order, with those that a later ingest superseded."""
        table = self._table("catalogue", None if columns is None else [*columns, "id"])
        if gone := self.removed():
            table = table.filter(pc.invert(pc.is_in(table["id"], pa.array(sorted(gone)))))
        return table if columns is None else table.select([*columns])

    def parts(self, group: str, commit: str = "") -> list[str]:
        """Return the names of a group's tables in commit order, of one commit if it is named."""
        with served(self.uri):
            names = parts(self._store, group)
        return [part for part in names if part.endswith(f"-{commit}" if commit else "")]

    def keys(self) -> set[str]:
        """Return the keys of all catalogue rows, removed episodes included."""
        return set(self._table("catalogue", ["key"])["key"].to_pylist())

    def ids_by_key(self, part: str) -> dict[str, str]:
        """Return the episode of each catalogue row of one part, by the row's key."""
        with served(self.uri):
            table = read_table(self._store, "catalogue", part, ["key", "id"])
        return dict(zip(table["key"].to_pylist(), table["id"].to_pylist(), strict=True))

    def removed(self) -> set[str]:
        """Return the ids of the removed episodes."""
        return set(self._table("removed", ["id"])["id"].to_pylist())

    def quarantine(self) -> list[QuarantineRow]:
        """Return the inputs that were refused and not ingested since, one row (QUARANTINE) each."""
        ingested = set(self.episodes(["id"])["id"].to_pylist())
        latest: dict[str, QuarantineRow] = {row["key"]: row for row in self._table("quarantine").to_pylist()}
        return [row for row in latest.values() if row["id"] not in ingested]

    def diff(self, older: Snapshot) -> tuple[list[BriefRow], list[BriefRow]]:
        """Return the current rows that only this snapshot has, and those that only ``older`` has.

        A row that an ingest replaced, under another contract for instance, is in the second list, the new one in the
        first.
        """
        columns = [*BriefRow.__annotations__]
        mine: dict[str, BriefRow]
        theirs: dict[str, BriefRow]
        mine, theirs = ({row["key"]: row for row in at.episodes(columns).to_pylist()} for at in (self, older))
        return (
            [row for key, row in mine.items() if key not in theirs],
            [row for key, row in theirs.items() if key not in mine],
        )

    def rows(self, encoder_digest: str | None = None) -> list[TrainingRow]:
        """Return the current rows (``episodes``) of one encoder, or of all, with the statistics of their steps."""
        table = self.episodes()
        if encoder_digest is not None:
            table = table.filter(pc.equal(table["encoder_digest"], encoder_digest))
        statistics = self.all_statistics()
        of_steps: list[StatisticsRow] = statistics.filter(pc.equal(statistics["array"], "steps")).to_pylist()
        steps = {row["key"]: Statistics.from_row(row) for row in of_steps}
        return [row | {"statistics": steps.get(row["key"])} for row in table.to_pylist()]

    def instruction_rows(self) -> list[InstructionRow]:
        """Return the instructions' vectors (INSTRUCTIONS) of every text encoder."""
        return self._table("sentences").to_pylist()

    def instruction_vectors(self, encoder_digest: str) -> dict[str, np.ndarray]:
        """Return one text encoder's vectors, float32 ``[E]``, by instruction."""
        rows = self.instruction_rows()
        return {r["text"]: np.array(r["vector"], np.float32) for r in rows if r["encoder_digest"] == encoder_digest}

    def statistics(self, keys: Iterable[str], array: str) -> Statistics | None:
        """Return the statistics of one array ("steps" or a camera) over these catalogue rows; None if none has it."""
        table, chosen = self._table("statistics"), set(keys)
        rows = table.filter(pc.equal(table["array"], array)).to_pylist()
        found = [Statistics.from_row(row) for row in rows if row["key"] in chosen]
        return merge(found) if found else None

    def all_statistics(self) -> pa.Table:
        """Return the statistics (STATISTICS) of all catalogue rows."""
        return self._table("statistics")

    def psnr(self) -> dict[tuple[str, str], tuple[float, int]]:
        """Return the measured PSNR in dB and the number of frames, by catalogue row and camera."""
        columns = ("key", "array", "psnr", "psnr_frames")
        table = self._table("statistics", columns)
        rows = table.filter(pc.is_valid(table["psnr"])).to_pylist()
        return {(row["key"], row["array"]): (row["psnr"], row["psnr_frames"]) for row in rows}

    def read(self, locations: Sequence[LocationRow]) -> np.ndarray:
        """Return the rows of these locations as one array, e.g. a camera's segments -> float16 ``[T, C, h, w]``.

        Raises DamagedError if they are not as they were written.
        """
        pieces = dict(self.read_each(locations))
        return np.concatenate([pieces[i] for i in range(len(locations))])

    def read_each(self, locations: Sequence[LocationRow]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index into ``locations``, rows) in storage order, the fast way to read much.

        No chunk is read twice, and several are read at once. Raises DamagedError like ``read``.
        """
        order = sorted(range(len(locations)), key=lambda i: (locations[i]["array"], locations[i]["start"]))
        batches = [[order[i] for i in batch] for batch in _batches([locations[i] for i in order])]
        with ThreadPoolExecutor(1) as pool:  # reads the next batch while the caller uses this one
            ahead = deque([pool.submit(self._rows, locations, batch) for batch in batches[:1]])
            for number, batch in enumerate(batches):
                data = ahead.popleft().result()
                if number + 1 < len(batches):
                    ahead.append(pool.submit(self._rows, locations, batches[number + 1]))
                for i in batch:
                    start = locations[i]["start"] - locations[batch[0]]["start"]
                    rows = data[start : start + locations[i]["count"]]
                    if checksum(rows) != locations[i]["checksum"]:
                        raise DamagedError(f"{self.uri}: {self._where(locations[i])} are not as they were written")
                    yield i, rows

    def shape(self, location: LocationRow) -> tuple[int, ...]:
        """Return the shape of a location's rows, without reading the store."""
        return (location["count"], *row_shape(location["array"]))

    def verify(self, progress: Callable[[list[Any]], Iterable[Any]] = iter) -> Iterator[str]:
        """Read everything back and yield one line for each location whose bytes are not as written.

        A line names the episode, the camera (or "steps"), the array, its rows and its chunks. ``progress`` wraps the
        list of batches that are read.
        """
        tables: dict[str, list[dict[str, Any]]] = {group: [] for group in TABLES}
        listed = 0
        for group, schema in TABLES.items():
            try:
                names = self.parts(group)
            except UserError:  # a server that fails is no damage
                raise
            except Exception as error:
                yield f"tables of {group} cannot be listed: {one_line(error)}"
                continue
            listed += len(names)
            for part in names:
                try:
                    with served(self.uri):
                        tables[group] += read_table(self._store, group, part, schema.names).to_pylist()
                except DamagedError as error:
                    yield str(error)
        try:
            if (written := self._table_count()) != listed:  # a damaged listing can be too short
                yield f"{listed} tables are listed, but {written} were written"
        except UserError:
            raise
        except Exception as error:
            yield f"snapshot {self.id} cannot be read: {one_line(error)}"
        gone = {row["id"] for row in tables["removed"]}
        places: list[tuple[LocationRow, str]] = []
        for row in tables["catalogue"]:
            if row["id"] not in gone:
                segments = [(camera["name"], at) for camera in row["cameras"] for at in camera["segments"]]
                segments += [("steps", row["steps"])] if row["steps"]["count"] else []
                episode = f"episode {row['id']} ({row['uri']} #{row['index']})"
                places += [(at, f"{episode}: {what}") for what, at in segments]
        places.sort(key=lambda place: (place[0]["array"], place[0]["start"]))
        locations = [at for at, _ in places]
        for batch in progress([*_batches(locations)]):
            try:
                data = self._rows(locations, batch)
            except UserError:
                raise
            except Exception:  # the loop below finds the broken chunk
                data = None
            for i in batch:
                at, what = places[i]
                try:
                    start = at["start"] - locations[batch[0]]["start"]
                    rows = self._rows(locations, [i]) if data is None else data[start : start + at["count"]]
                    if checksum(rows) == at["checksum"]:
                        continue
                except UserError:
                    raise
                except Exception:  # unreadable counts as different
                    pass
                yield f"{what}, {self._where(at)}"

    def _table(self, group: str, columns: Sequence[str] | None = None) -> pa.Table:
        with served(self.uri):
            return read_tables(self._store, group, columns)

    def _table_count(self) -> int:
        """Return the number of tables according to the commit's metadata."""
        storage = parse(self.uri).storage()
        with served(self.uri):
            history = answered(lambda: icechunk.Repository.open(storage).ancestry(snapshot_id=self.id), self.uri)
            return answered(lambda: next(iter(history)), self.uri).metadata.get("tables", 0)

    def _rows(self, locations: Sequence[LocationRow], batch: list[int]) -> np.ndarray:
        """Return the rows of one array from the first of these locations to the last."""
        start = locations[batch[0]]["start"]
        stop = max(locations[i]["start"] + locations[i]["count"] for i in batch)
        with served(self.uri):
            return read_again(lambda: np.asarray(self._array(locations[batch[0]]["array"])[start:stop]))

    def _where(self, at: LocationRow) -> str:
        stop = at["start"] + at["count"]
        try:
            length = self._array(at["array"]).chunks[0]
            first, last = at["start"] // length, (stop - 1) // length
            chunks = f"chunk {first}" if first == last else f"chunks {first} to {last}"
        except Exception:
            chunks = "cannot be opened"
        return f"rows {at['start']} to {stop} of {at['array']} ({chunks})"

    def __getstate__(self) -> dict[str, str]:
        return {"uri": self.uri, "id": self.id}

    @property
    def _store(self) -> Any:
        if "_opened" not in self.__dict__:
            self._arrays: dict[str, zarr.Array[Any]] = {}
            storage = parse(self.uri).storage()

            def open_session() -> Any:
                return icechunk.Repository.open(storage).readonly_session(snapshot_id=self.id).store

            with served(self.uri):
                self._opened = read_again(open_session)
        return self._opened

    def _array(self, path: str) -> zarr.Array[Any]:
        store = self._store
        if path not in self._arrays:
            self._arrays[path] = zarr.open_array(store, path=path, mode="r")
        return self._arrays[path]


def _batches(locations: Sequence[LocationRow]) -> Iterator[list[int]]:
    """Yield the indices of neighbours in one array that are read together; ``locations`` are in storage order."""
    batch: list[int] = []
    for i, at in enumerate(locations):
        if batch:
            first = locations[batch[0]]
            size = (at["start"] + at["count"] - first["start"]) * _row_bytes(at["array"])
            if at["array"] != first["array"] or size > BYTES_AT_ONCE:
                yield batch
                batch = []
        batch.append(i)
    if batch:
        yield batch


def row_shape(path: str) -> tuple[int, ...]:
    """Return the shape of an array's rows, from the array's name: ``data/GROUP/latents_4x16x16``."""
    return tuple(map(int, path.rpartition("_")[2].split("x")))


def _row_bytes(path: str) -> int:
    kind = path.rpartition("/")[2].partition("_")[0]
    return np.dtype(KINDS[kind]).itemsize * math.prod(row_shape(path))


def checksum(rows: np.ndarray) -> str:
    """Return the CRC-32C of an array's bytes in hexadecimal, as in LocationRow."""
    return f"{google_crc32c.value(np.ascontiguousarray(rows).reshape(-1).view(np.uint8)):08x}"
