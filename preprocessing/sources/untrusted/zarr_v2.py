"""Untrusted Zarr v2 arrays, in a folder or a zip file: read as data, in bounded memory.

The format: https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html. A conforming library builds any codec that the
metadata names, one that unpickles among them, and allocates any shape. This reader knows a few compressors and no
filters, and decompresses each chunk into memory for exactly one chunk. Checksums of a zip file are verified.
"""

from __future__ import annotations

import bz2
import itertools
import lzma
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import imagecodecs
import numpy as np
import pyarrow as pa
from numcodecs import blosc, lz4
from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError

from preprocessing.errors import BadEpisode
from preprocessing.limits import limits
from preprocessing.sources.untrusted.files import contents

MAX_ROW = 2**26  # bytes
MAX_METADATA = 2**16  # bytes
MAX_DIMENSIONS = 6
MAX_PIECES = 1024  # chunks that one row is split into
FILLS = (None, "NaN", "Infinity", "-Infinity")  # besides numbers
NUMBERS = re.compile(r"\|[biu]1|[<>]([iu][248]|f[248])")


class NotNumericError(BadEpisode):
    """An array of text, objects or times."""


class _Metadata(BaseModel):
    zarr_format: Literal[2]
    shape: tuple[NonNegativeInt, ...]
    chunks: tuple[PositiveInt, ...]
    dtype: Any
    compressor: dict[str, Any] | None
    filters: list[Any] | None = None
    fill_value: Any = None
    order: Literal["C", "F"]
    dimension_separator: Literal[".", "/"] = "."


@dataclass(frozen=True)
class ZarrArray:
    """``[rows, ...]``. A slab is all chunks with one index along the first dimension; it is read as a whole."""

    store: ZarrFolder | ZarrZip
    path: str
    metadata: _Metadata
    needed: bool = False  # whether a chunk that is not stored is an error, or holds the fill value

    @property
    def shape(self) -> tuple[int, ...]:
        return self.metadata.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.metadata.dtype)

    @property
    def rows_per_slab(self) -> int:
        return self.metadata.chunks[0]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """The slabs with rows ``[start, stop)``: each one's number, and which of its rows."""
        for number in range(start // self.rows_per_slab, -(-stop // self.rows_per_slab)):
            before = number * self.rows_per_slab
            yield number, slice(max(start - before, 0), min(stop - before, self.rows_per_slab))

    def slab(self, number: int) -> np.ndarray:
        """``[rows_per_slab, ...]``; rows past the end of the array are undefined."""
        rows = np.empty((self.rows_per_slab, *self.shape[1:]), self.dtype)
        for place in self._places():
            corner = [at * size for at, size in zip(place, self.metadata.chunks[1:], strict=True)]
            ends = [at + size for at, size in zip(corner, self.metadata.chunks[1:], strict=True)]
            inside = [slice(at, min(*both)) for at, *both in zip(corner, ends, self.shape[1:], strict=True)]
            chunk = self._chunk((number, *place))
            rows[(slice(None), *inside)] = chunk[(slice(None), *(slice(part.stop - part.start) for part in inside))]
        return rows

    def packed(self, number: int) -> list[bytes | None]:
        """The chunks of a slab as stored, None for those that are not."""
        return [self._read((number, *place)) for place in self._places()]

    def not_stored(self, start: int, stop: int) -> int:
        """How many of the slabs that hold these rows lack a chunk."""
        return sum(any(data is None for data in self.packed(number)) for number, _ in self.parts(start, stop))

    def _places(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*map(range, _pieces(self.metadata)))

    def _read(self, place: Sequence[int]) -> bytes | None:
        key = self.path + "/" + self.metadata.dimension_separator.join(map(str, place))
        limit = 2 * self._chunk_bytes + 2**16  # incompressible data may grow a little
        data = self.store.read(key, limit)
        if data is None and self.needed:
            raise BadEpisode(f"chunk {key} is missing")
        return data

    @property
    def _chunk_bytes(self) -> int:
        return math.prod(self.metadata.chunks) * self.dtype.itemsize

    def _chunk(self, place: Sequence[int]) -> np.ndarray:
        data, shape = self._read(place), self.metadata.chunks
        try:
            if data is None:
                return np.full(shape, float(self.metadata.fill_value or 0), self.dtype)
            name = self.metadata.compressor["id"] if self.metadata.compressor else None
            if name == "imagecodecs_jpegxl":
                image = np.empty(shape, self.dtype)
                imagecodecs.jpegxl_decode(data, numthreads=1, out=image)  # compares the shapes before it decodes
                return image
            decoded = COMPRESSORS[name](data, self._chunk_bytes)
            if len(decoded) != self._chunk_bytes:
                raise ValueError(f"does not decompress to {self._chunk_bytes} bytes")
            return np.frombuffer(decoded, self.dtype).reshape(shape, order=self.metadata.order)
        except (ValueError, RuntimeError, OverflowError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            where = f"chunk {'.'.join(map(str, place))} of {self.path}"
            raise BadEpisode(f"{where} cannot be decompressed: {' '.join(str(error).split())}") from None


def open_array(store: ZarrFolder | ZarrZip, path: str) -> ZarrArray:
    """Open an array. Raises BadEpisode if its metadata is invalid or demands more than a recording needs."""
    data = store.read(f"{path}/.zarray", MAX_METADATA)
    if data is None:
        raise BadEpisode(f"there is no array {path}")
    try:
        metadata = _Metadata.model_validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": ")
        raise BadEpisode(f"{path}/.zarray is not Zarr v2 metadata ({what})") from None
    if not (isinstance(metadata.dtype, str) and NUMBERS.fullmatch(metadata.dtype)):
        raise NotNumericError(f"{path} holds {str(metadata.dtype)[:40]}, not numbers")
    if not (isinstance(metadata.fill_value, int | float) or metadata.fill_value in FILLS):
        raise BadEpisode(f"{path} has a fill value that is not a number")
    if metadata.filters:
        raise BadEpisode(f"{path} has filters, which are not supported")
    compressor = (metadata.compressor or {"id": None}).get("id")
    if compressor not in (*COMPRESSORS, "imagecodecs_jpegxl"):
        raise BadEpisode(f"{path} is compressed with {str(compressor)[:40]}, which is not supported")
    if not 1 <= len(metadata.shape) <= MAX_DIMENSIONS or len(metadata.chunks) != len(metadata.shape):
        raise BadEpisode(f"{path} has {len(metadata.shape)} dimensions, its chunks {len(metadata.chunks)}")
    array = ZarrArray(store, path, metadata)
    if not 0 < array.row_bytes <= MAX_ROW:
        raise BadEpisode(f"a row of {path} has {array.row_bytes} bytes; at most {MAX_ROW} are read")
    if max(array._chunk_bytes, array.row_bytes * array.rows_per_slab) > limits().array_bytes:
        raise BadEpisode(f"a chunk of {path} decompresses to more than limits.array_bytes")
    if math.prod(_pieces(metadata)) > MAX_PIECES:
        raise BadEpisode(f"{path} has more than {MAX_PIECES} chunks per row")
    return array


def _pieces(metadata: _Metadata) -> list[int]:
    return [-(-size // chunk) for size, chunk in zip(metadata.shape[1:], metadata.chunks[1:], strict=True)]


@dataclass(frozen=True)
class ZarrFolder:
    root: Path

    def names(self, group: str, mark: str = ".zarray") -> list[str]:
        """The members of a group: arrays, or groups if ``mark`` is ``.zgroup``."""
        return sorted(file.parent.name for file in (self.root / group).glob(f"*/{mark}"))

    def read(self, key: str, limit: int) -> bytes | None:
        """The file's bytes, None if it does not exist. Raises BadEpisode if it is longer than ``limit``."""
        try:
            return contents(self.root / key, limit)
        except FileNotFoundError:
            return None


@dataclass(frozen=True)
class ZarrZip:
    """``root`` is the prefix of all members that belong to the store."""

    path: Path
    root: str = ""

    def names(self, group: str, mark: str = ".zarray") -> list[str]:
        form = re.compile(rf"{re.escape(self.root + group)}/([^/]+)/{re.escape(mark)}")
        return sorted(found[1] for found in map(form.fullmatch, self._members[0]) if found)

    def roots(self, member: str) -> list[str]:
        """The prefix of each member with this name."""
        names = (name for name in self._members[0] if name == member or name.endswith("/" + member))
        return sorted(name.removesuffix(member) for name in names)

    def read(self, key: str, limit: int) -> bytes | None:
        """As a folder's. Opens the file each time: an open handle would outlive its consumer and cannot be pickled."""
        names, table = self._members
        at = names.get(self.root + key)
        if at is None:
            return None
        offset, packed_size, size, checksum, method = map(int, table[at])
        if max(size, packed_size) > limit:
            raise BadEpisode(f"{key} is longer than {limit} bytes")
        with self.path.open("rb") as file:
            file.seek(offset)
            header = file.read(30)
            beyond = offset + packed_size > os.fstat(file.fileno()).st_size
            if beyond or len(header) < 30 or header[:4] != b"PK\x03\x04":
                raise BadEpisode(f"{key} is not at the offset that the zip file lists")
            file.seek(sum(struct.unpack("<HH", header[26:])), 1)
            data = file.read(packed_size)
        try:
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        except zlib.error as error:
            raise BadEpisode(f"{key} cannot be decompressed: {error}") from None
        if len(data) != size or zlib.crc32(data) != checksum:
            raise BadEpisode(f"{key} does not match its checksum")
        return data

    @property
    def _members(self) -> tuple[dict[str, int], np.ndarray]:
        status = self.path.stat()
        return _listed(self.path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)  # the largest published files have a few hundred thousand members
def _listed(path: Path, _size: int, _changed: int) -> tuple[dict[str, int], np.ndarray]:
    """The row of each name, in a table of offset, compressed size, size, checksum and method."""
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
            if any(
                m.flag_bits & 1 or m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for m in members
            ):
                raise BadEpisode("a zip file that is encrypted or not compressed with deflate")
            rows = [(m.header_offset, m.compress_size, m.file_size, m.CRC, m.compress_type) for m in members]
            return {m.filename: at for at, m in enumerate(members)}, np.array(rows, np.int64).reshape(-1, 5)
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError, EOFError) as error:
        raise BadEpisode(f"cannot be read as a zip file: {error}") from None


def _blosc(data: bytes, size: int) -> memoryview:
    """Decompress. The library trusts the header's sizes, so they are checked first."""
    if len(data) < 16 or struct.unpack("<I4xI", data[4:16]) != (size, len(data)):
        raise ValueError("its header declares another size")
    return memoryview(blosc.decompress(data, np.empty(size, np.uint8)))


def _lz4(data: bytes, size: int) -> memoryview:
    if data[:4] != struct.pack("<I", size):
        raise ValueError("its header declares another size")
    return memoryview(lz4.decompress(data, np.empty(size, np.uint8)))


# Each decompresses data of an expected size, and stops one byte past it.
COMPRESSORS: dict[str | None, Callable[[bytes, int], bytes | memoryview]] = {
    None: lambda data, size: data,
    "blosc": _blosc,
    "lz4": _lz4,
    "zstd": lambda data, size: pa.decompress(data, size, codec="zstd"),
    "zlib": lambda data, size: zlib.decompressobj().decompress(data, size + 1),
    "gzip": lambda data, size: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS).decompress(data, size + 1),
    "bz2": lambda data, size: bz2.BZ2Decompressor().decompress(data, size + 1),
    "lzma": lambda data, size: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2**28).decompress(data, size + 1),
}
