"""A snapshot's episodes as flat, memory-mapped files on this node, in shards, from which windows are gathered.

zarr-python is far too slow to read sample by sample (docs/design/store.md), so each node copies episodes once, in
shards: some hundred megabytes of episodes that are neighbours in the store. Each episode alone decides whether a shard
ends with it (content-defined cuts), so a snapshot with more episodes keeps the old shards, and only new ones are
copied. A shard is an item of the bounded cache (preprocessing/cache.py): it stays while it is used, and afterwards for
as long as there is room.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
import threading
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from preprocessing.cache import GB, Item, Shelf
from preprocessing.errors import UserError
from preprocessing.store.rows import LocationRow, TrainingRow
from preprocessing.store.snapshot import Snapshot, row_shape

SHARD_BYTES = 256 * 2**20  # of a shard, on average; changing it changes the order of samples
FAULT_BYTES = 64 * 2**10  # that Linux maps around a page fault
RESIDENT_BYTES = 64 * 2**20  # of mapped pages that a process keeps at most


class LocalCopy:
    """Shards of these catalogue rows, and of the pixels of the same episodes if given.

    ``shard`` maps a row's key to its index in ``shards``. Waiting for copies shows a progress bar, or calls
    ``tell(bytes_done, bytes_total)``.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        rows: list[TrainingRow],
        pixels: list[TrainingRow] | None = None,
        tell: Callable[[int, int], None] | None = None,
    ):
        self._snapshot, self._shelf = snapshot, Shelf()
        self.has_pixels = pixels is not None
        self.shards = cut(rows, pixels)
        self.shard = {key: number for number, shard in enumerate(self.shards) for key in shard.frame}
        self._wanted: set[int] = set()
        self._mapped: dict[int, _Mapped] = {}
        self._changing = threading.Lock()
        self._touched, self._tell = 0, tell

    def want(self, now: Collection[int], soon: Collection[int]) -> None:
        """Hold these shards until the next call: ``now`` before returning, ``soon`` in a background thread.

        Raises UserError if they exceed the cache's limit.
        """
        self._wanted = {*now, *soon}
        needed, limit = sum(self.shards[number].bytes for number in self._wanted), self._shelf.limit()
        if needed > limit:
            raise UserError(
                f"{self._shelf.root}: samples are drawn from {needed / GB:.2f} GB at a time, and the cache may take "
                f"{limit / GB:.2f} GB; raise UWM_CACHE_GB, or lower shuffle_windows"
            )
        self._let_go()
        self._have(now)
        if any(number not in self._mapped for number in soon):
            threading.Thread(target=self._have_later, args=(soon,), daemon=True).start()

    @contextlib.contextmanager
    def opened(self, numbers: Collection[int]) -> Iterator[dict[int, dict[str, np.ndarray]]]:
        """Yield these shards' arrays by number: latents float16 [N, C, h, w], steps float32 [N] and, if any, pixels
        uint8 [N, 3, H, W]. Shards outside the last ``want`` are released afterwards.
        """
        self._have(numbers)
        mapped = {number: self._mapped[number] for number in numbers}
        yield {number: each.arrays for number, each in mapped.items()}
        if not self._wanted.issuperset(numbers):
            self._let_go()

    def touched(self, places: int, size: int) -> None:
        """Record that ``size`` bytes were read at ``places`` places. Mapped pages count as this process's memory, so
        they are dropped from time to time; they stay in the page cache.
        """
        self._touched += size + places * FAULT_BYTES
        if self._touched > RESIDENT_BYTES:
            for mapped in [*self._mapped.values()]:
                mapped.drop_pages()
            self._touched = 0

    def _have(self, numbers: Collection[int], shown: bool = True) -> None:
        """Map these shards, copying those that are absent; shards that another process is copying come last."""
        left = [number for number in numbers if number not in self._mapped]
        if not left:
            return
        total = sum(self.shards[number].bytes for number in left)
        hidden = True if self._tell or not shown else None
        with tqdm(total=total, desc="cache", unit="B", unit_scale=True, leave=False, delay=2, disable=hidden) as bar:
            done = 0
            while left:
                waiting = []
                for number in left:
                    if not self._map(number):
                        waiting.append(number)
                        continue
                    done += self.shards[number].bytes
                    bar.update(self.shards[number].bytes)
                    if self._tell and shown:
                        self._tell(done, total)
                if len(waiting) == len(left):
                    time.sleep(0.02)
                left = waiting

    def _have_later(self, numbers: Collection[int]) -> None:
        for number in numbers:
            if number in self._wanted:
                with contextlib.suppress(Exception):  # whoever needs the shard gets the same error
                    self._have([number], shown=False)

    def _map(self, number: int) -> bool:
        shard = self.shards[number]
        item = self._shelf.hold(shard.name, shard.sizes, partial(shard.fill, self._snapshot), wait=False)
        if item is None:
            return False
        with self._changing:
            if number in self._mapped:  # by the background thread
                item.release()
            else:
                self._mapped[number] = _Mapped(shard, item)
        return True

    def _let_go(self) -> None:
        with self._changing:
            for number in self._mapped.keys() - self._wanted:
                self._mapped.pop(number).item.release()


def cut(rows: list[TrainingRow], pixels: list[TrainingRow] | None = None) -> list[Shard]:
    """Return the rows, and those of ``pixels`` in the same order, as shards of SHARD_BYTES on average.

    Rows are sorted by embodiment and source. Raises UserError if frames have several sizes.
    """
    for kind in (rows, pixels or []):
        if len(shapes := {row_shape(at["array"]): row["uri"] for row in kind for at in segments(row)}) > 1:
            (one, here), (two, there), *_ = shapes.items()
            raise UserError(f"{here}: frames have size {one}, those of {there} {two}; ingest both at one image size")
    shards, held = [], list[int]()
    for i in sorted(range(len(rows)), key=lambda i: (rows[i]["embodiment"], rows[i]["source"] or "")):
        held.append(i)
        size = Shard([rows[i]], pixels and [pixels[i]]).bytes
        chance = int(hashlib.sha256(rows[i]["key"].encode()).hexdigest()[:8], 16) / 2**32
        if chance < size / SHARD_BYTES:
            shards.append(held)
            held = []
    return [Shard([rows[i] for i in s], pixels and [pixels[i] for i in s]) for s in [*shards, held] if s]


class Shard:
    """Some episodes, their offsets in the shard's files, and the sizes of these files.

    ``frame`` and ``number`` map a row's key to the index of its first frame in ``latents`` and ``pixels`` (its cameras
    follow one another), and of its first number in ``steps`` (``width`` numbers per frame).
    """

    def __init__(self, rows: list[TrainingRow], pixels: list[TrainingRow] | None = None):
        self.frame, self.number, frames, numbers = dict[str, int](), dict[str, int](), 0, 0
        for row in rows:
            self.frame[row["key"]], self.number[row["key"]] = frames, numbers
            frames += row["frames"] * len(row["cameras"])
            numbers += row["frames"] * width(row)
        steps = [(row["steps"], width(row)) for row in rows if width(row)]
        self.files = {"latents": _File(np.float16, _whole(rows)), "steps": _File(np.float32, steps, flat=True)}
        if pixels is not None:
            self.files["pixels"] = _File(np.uint8, _whole(pixels))
        self.sizes = {name: file.bytes for name, file in self.files.items()}
        self.bytes = sum(self.sizes.values())
        keys = "".join(row["key"] for row in [*rows, *(pixels or ())])
        self.name = hashlib.sha256(keys.encode()).hexdigest()[:24]

    def fill(self, snapshot: Snapshot, folder: Path) -> None:
        """Copy the episodes into the files in ``folder``, reading them in storage order."""
        for name, file in self.files.items():
            starts = np.cumsum([0, *(file.bytes_of(*each) for each in file.pieces)])
            with (folder / name).open("r+b") as out:
                for i, rows in snapshot.read_each([location for location, _ in file.pieces]):
                    out.seek(starts[i])
                    out.write(np.ascontiguousarray(rows[:, : file.pieces[i][1]]).data)


class _File:
    """A file of concatenated pieces: the first columns (of latents: channels) of each location's rows."""

    def __init__(self, dtype: type, pieces: list[tuple[LocationRow, int]], flat: bool = False):
        self.dtype, self.pieces = dtype, pieces
        self.shape = () if flat else row_shape(pieces[0][0]["array"])
        self.bytes = sum(self.bytes_of(*each) for each in pieces)

    def bytes_of(self, location: LocationRow, columns: int) -> int:
        _, *rest = row_shape(location["array"])
        return location["count"] * columns * math.prod(rest) * np.dtype(self.dtype).itemsize


class _Mapped:
    """A shard's files, memory-mapped as arrays."""

    def __init__(self, shard: Shard, item: Item):
        self.item, self.arrays, self._maps = item, dict[str, np.ndarray](), list[mmap.mmap]()
        for name, file in shard.files.items():
            content: mmap.mmap | bytes = b""  # an empty file cannot be mapped
            if file.bytes:
                with (item.path / name).open("rb") as opened:
                    content = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
                content.madvise(mmap.MADV_RANDOM)  # no read-ahead: samples are not sequential
                self._maps.append(content)
            self.arrays[name] = np.frombuffer(content, file.dtype).reshape(-1, *file.shape)

    def drop_pages(self) -> None:
        for each in self._maps:
            each.madvise(mmap.MADV_DONTNEED)


def width(row: TrainingRow) -> int:
    """Return the number of columns of the steps that a model reads: actions and proprio."""
    return row["action_dim"] + sum(part["width"] for part in row["proprio"])


def segments(row: TrainingRow) -> list[LocationRow]:
    """Return the locations of all cameras' frames, camera by camera."""
    return [at for camera in row["cameras"] for at in camera["segments"]]


def _whole(rows: list[TrainingRow]) -> list[tuple[LocationRow, int]]:
    return [(at, row_shape(at["array"])[0]) for row in rows for at in segments(row)]
