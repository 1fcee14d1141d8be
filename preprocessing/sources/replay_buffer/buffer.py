"""Find replay buffers, the rows of their arrays that make up each episode, and digests of those.

A folder may hold one chunk file per frame. Its scan results are cached under the names, sizes, times and inodes of all
its files: as safe as for a single file, and no file has to be read, only stat-ed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from preprocessing.episode import Repair
from preprocessing.errors import BadEpisode
from preprocessing.limits import limits
from preprocessing.sources.scan_cache import Finding, file_digest, findings, stamp_of
from preprocessing.sources.untrusted.files import contents, files_in, listing, magic
from preprocessing.sources.untrusted.zarr_v2 import (
    MAX_METADATA,
    NotNumericError,
    ZarrArray,
    ZarrFolder,
    ZarrZip,
    open_array,
)

ENDS = "meta/episode_ends"
ACTIONS = ("action", "actions")
MARK = f"{ENDS}/.zarray"
MAX_ARRAYS = 256
MAX_EPISODES = 10**6


def buffers(path: Path) -> Iterator[Path]:
    """The path itself; or, in a folder, its zip files, and its subfolders if ``videos`` is next to them."""
    if path.is_file():
        if path.name.endswith(".zarr.zip") or _is_zip(path):
            yield path
    elif is_buffer(path):
        yield path
    else:
        for file in files_in(path):
            yield from buffers(file)
        if (path / "videos").is_dir():
            yield from filter(is_buffer, listing(path).folders)


def is_buffer(folder: Path) -> bool:
    """Whether a folder is a buffer, readable or not."""
    try:
        return b"zarr_format" in contents(folder / MARK, MAX_METADATA)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, BadEpisode):
        return True


@dataclass(frozen=True)
class Buffer:
    """The arrays by name, sorted; the end of each episode; and repairs for arrays that are not read."""

    arrays: dict[str, ZarrArray]
    ends: list[int]
    dropped: tuple[Repair, ...]

    @classmethod
    def open(cls, path: Path) -> Buffer:
        store: ZarrFolder | ZarrZip = ZarrFolder(path) if path.is_dir() else _zip(path)
        names, arrays = store.names("data"), dict[str, ZarrArray]()
        groups = store.names("data", ".zgroup")
        dropped = [Repair("streams", f"data/{name} is a group, not an array; dropped") for name in groups]
        if not 0 < len(names) <= MAX_ARRAYS:
            raise BadEpisode(f"data/ holds {len(names)} arrays")
        for name in names:
            try:
                array = open_array(store, f"data/{name}")
                arrays[name] = replace(array, needed=is_image(array) or name in ACTIONS)
            except NotNumericError as error:
                dropped.append(Repair("streams", f"{error}; dropped"))
        ends = replace(open_array(store, ENDS), needed=True)
        if len(ends.shape) != 1 or not 0 < ends.shape[0] <= MAX_EPISODES or ends.dtype.kind not in "iu":
            raise BadEpisode(f"{ENDS} is not a list of steps, but {ends.dtype} of shape {ends.shape}")
        listed = vectors(ends, 0, ends.shape[0])[:, 0].tolist()
        if not all(0 <= after - before <= limits().episode_steps for before, after in pairwise([0, *listed])):
            raise BadEpisode(f"{ENDS} does not ascend from 0, or an episode is longer than limits.episode_steps")
        return cls(arrays, listed, tuple(dropped))

    def rows(self, index: int) -> tuple[int, int]:
        """The first row of an episode, and the row after its last."""
        if index >= len(self.ends):
            raise BadEpisode(f"the buffer now has only {len(self.ends)} episodes, fewer than when it was listed")
        start, stop = ([0, *self.ends])[index : index + 2]
        if start == stop:
            raise BadEpisode("holds no step")
        for name in self.short(stop):
            if self.needs(name):
                raise BadEpisode(f"{name} has {self.arrays[name].shape[0]} rows, but the episode ends at {stop}")
        return start, stop

    def short(self, stop: int) -> list[str]:
        """The arrays that end before this row."""
        return [name for name, array in self.arrays.items() if array.shape[0] < stop]

    def needs(self, name: str) -> bool:
        """Whether an episode cannot be read without this array: its action, or its only camera."""
        cameras = [other for other, array in self.arrays.items() if is_image(array)]
        return name in ACTIONS or cameras == [name]


def vectors(array: ZarrArray, start: int, stop: int) -> np.ndarray:
    """Rows ``[start, stop)`` as ``[T, D]``."""
    rows = np.concatenate([array.slab(number)[part] for number, part in array.parts(start, stop)])
    return rows.reshape(stop - start, -1)


def is_image(array: ZarrArray) -> bool:
    """Whether rows are images: three channels, last or first, of at least 16 by 16; a table of vectors is smaller."""
    if len(array.shape) != 4:
        return False
    _, *sides = array.shape
    return (sides[2] == 3 and min(sides[:2]) >= 16) or (sides[0] == 3 and min(sides[1:]) >= 16)


def digests(buffer: Buffer, indices: Iterable[int]) -> list[Finding]:
    """Digest these episodes, array by array: a chunk with rows of several episodes is decompressed once."""
    hashes = {index: hashlib.sha256() for index in indices}
    problems, places = dict[int, str](), dict[int, tuple[int, int]]()
    for index in hashes:
        try:
            places[index] = buffer.rows(index)
        except BadEpisode as error:
            problems[index] = str(error)
    for name, array in buffer.arrays.items():
        slab, stored = lru_cache(maxsize=1)(array.slab), array.metadata
        head = f"{name} {stored.dtype} {stored.shape[1:]};"
        if array.rows_per_slab == 1:  # which determines what the stored bytes mean
            compressor = (stored.compressor or {}).get("id")
            head += f"{stored.chunks} {stored.order} {stored.fill_value} {compressor};"
        for index, sha in hashes.items():
            sha.update(head.encode())
            start, stop = places.get(index, (0, array.shape[0] + 1))
            if array.shape[0] < stop:
                sha.update(problems.get(index, "too short").encode())
                continue
            try:
                for number, part in array.parts(start, stop):
                    if array.rows_per_slab == 1:
                        for data in array.packed(number):
                            sha.update(b"-" if data is None else b"%d:%b" % (len(data), data))
                    else:
                        sha.update(np.ascontiguousarray(slab(number)[part]).data)
            except (BadEpisode, OSError) as error:
                if buffer.needs(name):
                    problems.setdefault(index, str(error))
                sha.update(str(error).encode())
    return [Finding(sha.hexdigest(), problems.get(index)) for index, sha in hashes.items()]


def found_in(paths: list[Path]) -> Iterator[tuple[Path, list[Finding]]]:
    """Yield each buffer with the findings of its episodes, in order: files first, then folders."""
    yield from findings("replay_buffer", [path for path in paths if path.is_file()], _read)
    for folder in (path for path in paths if path.is_dir()):
        if stamp := _stamp(folder):
            [(_, found)] = findings(f"replay_buffer {stamp}", [folder / MARK], lambda mark: _read(mark.parents[2]))
            yield folder, found
        else:
            yield folder, _read(folder)


def _read(path: Path) -> list[Finding]:
    try:
        buffer = Buffer.open(path)
    except (BadEpisode, OSError) as error:
        whole = file_digest(path) if path.is_file() else path.name
        return [Finding(hashlib.sha256(f"{whole} {error}".encode(errors="replace")).hexdigest(), str(error))]
    return digests(buffer, range(len(buffer.ends)))


def _stamp(folder: Path) -> str | None:
    """A stamp of all files that the digests depend on; None if a linked folder hides some."""
    files = []
    for array in [folder / ENDS, *sorted(folder.glob("data/*"))]:
        for root, below, names in os.walk(array):
            below.sort()
            if any((Path(root) / name).is_symlink() for name in below):
                return None
            files += [Path(root) / name for name in sorted(names)]
    return stamp_of(files)


def _is_zip(file: Path) -> bool:
    if not magic(file).startswith(b"PK\x03\x04"):
        return False
    try:
        return bool(ZarrZip(file).roots(MARK))
    except BadEpisode:
        return False


def _zip(path: Path) -> ZarrZip:
    """Open the zip file; its members may start with the folder's name, as PushT's do, or not."""
    roots = ZarrZip(path).roots(MARK)
    if len(roots) != 1:
        raise BadEpisode(f"a zip file with {len(roots)} {MARK} instead of one")
    return ZarrZip(path, roots[0])
