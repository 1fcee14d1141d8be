"""Read TFRecord files and the ``tf.train.Example`` in each record, without TensorFlow.

A file is a sequence of records, each framed as ``length (uint64) | masked CRC-32C of length | data | masked CRC-32C of
data``, little endian (tensorflow/core/lib/io/record_writer.h). The data is a protobuf message, a map of names to flat
lists (tensorflow/core/example/{example,feature}.proto), parsed here from the wire format
(https://protobuf.dev/programming-guides/encoding/): three message types do not justify a dependency.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from preprocessing.errors import BadEpisode
from preprocessing.limits import limits
from preprocessing.sources.scan_cache import Finding
from preprocessing.sources.untrusted.files import opened, own

PIECE = 2**20

Feature = np.ndarray | list[bytes]


def records(shard: Path) -> Iterator[Finding]:
    """Hash and check every record of a shard, in order.

    A bad checksum of the data costs that record only. After a bad length the start of the next record is unknown, so
    the rest of the shard becomes one problem.
    """
    with opened(shard) as file:
        index = start = 0
        size = shard.stat().st_size
        if size == 0:
            yield Finding(hashlib.sha256(b"").hexdigest(), "the shard is empty")
        while start < size:
            length = _length(file)
            if length is None:
                digest = _rest(file, start, size)
                what = "its header is truncated" if size - start < 12 else "its length has a wrong checksum"
                yield Finding(digest, f"record {index} at byte {start} of {shard.name}: {what}")
                return
            if start + length + 16 > size:
                digest = _rest(file, start, size)
                cut = f"truncated: {size - start} of {length + 16} bytes"
                yield Finding(digest, f"record {index} at byte {start} of {shard.name} is {cut}")
                return
            too_long = length > limits().array_bytes
            digest, crc = (_rest(file, start, size), 0) if too_long else _hash(file, start + 12, length)
            problem = None
            if too_long:
                problem = f"is {length} bytes long, more than limits.array_bytes"
            elif _masked(crc) != struct.unpack("<I", file.read(4))[0]:
                problem = "has a wrong checksum: its bytes are damaged"
            where = f"record {index} at byte {start} of {shard.name}"
            yield Finding(digest, problem and f"{where} {problem}")
            start += length + 16
            file.seek(start)
            index += 1


def read_record(shard: Path, index: int) -> bytes:
    """Return the data of one record. Raises BadEpisode if it cannot be reached."""
    with shard.open("rb") as file:
        for _ in range(index):
            length = _length(file)
            if length is None:
                break
            file.seek(length + 4, 1)
        length = _length(file)
        if length is None or length > limits().array_bytes:
            raise BadEpisode(f"{shard.name} has no readable record {index}")
        return file.read(length)


def is_tfrecord(shard: Path) -> bool:
    """Whether a file begins with the header of a record, or cannot be opened to find out."""
    try:
        with opened(own(shard)) as file:
            return _length(file) is not None
    except (OSError, BadEpisode):
        return True


def _rest(file: BinaryIO, start: int, size: int) -> str:
    """A digest of what is lost: of how it begins and how long it is, as it may be long and need not be read."""
    begin, _ = _hash(file, start, min(PIECE, size - start))
    return hashlib.sha256(f"{begin} {size - start}".encode()).hexdigest()


def _length(file: BinaryIO) -> int | None:
    """The length of the record whose header comes next, None if the header is truncated or damaged."""
    header = file.read(12)
    if len(header) < 12:
        return None
    length, crc = struct.unpack("<QI", header)
    return length if _masked(google_crc32c.value(header[:8])) == crc else None


def _hash(file: BinaryIO, start: int, length: int) -> tuple[str, int]:
    file.seek(start)
    sha, crc = hashlib.sha256(), 0
    while length > 0 and (piece := file.read(min(PIECE, length))):
        sha.update(piece)
        crc = google_crc32c.extend(crc, piece)
        length -= len(piece)
    return sha.hexdigest(), crc


def _masked(crc: int) -> int:
    """Mask a checksum as TFRecord does: rotated, plus a constant."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def parse_example(data: bytes) -> dict[str, Feature]:
    """Parse Example { Features features = 1 { map<string, Feature> feature = 1 } }. Raises ValueError.

    Feature is one of BytesList = 1, FloatList = 2, Int64List = 3, each ``repeated value = 1``; numbers come packed or
    one by one, in any mixture. Unknown fields are skipped, as protobuf requires.
    """
    parsed: dict[str, Feature] = {}
    for _, features in _messages(memoryview(data), (1,)):
        for _, entry in _messages(features, (1,)):
            key, value = b"", memoryview(b"")
            for number, part in _messages(entry, (1, 2)):
                if number == 1:
                    key = bytes(part)
                else:
                    value = part
            parsed[key.decode()] = _parse_feature(value)
    return parsed


def _parse_feature(data: memoryview) -> Feature:
    kind, strings, numbers = 0, list[bytes](), list[np.ndarray]()
    for number, body in _messages(data, (1, 2, 3)):
        if number != kind:  # a oneof: the last kind wins, and its repeats are merged
            kind, strings, numbers = number, [], []
        for field, wire, value in _fields(body):
            if field != 1:
                continue
            if kind == 1 and isinstance(value, memoryview) and wire == 2:
                strings.append(bytes(value))
            elif kind == 2 and isinstance(value, memoryview) and wire in (2, 5):
                if len(value) % 4:
                    raise ValueError(f"a packed list of floats of {len(value)} bytes")
                numbers.append(np.frombuffer(value, "<f4"))
            elif kind == 3 and isinstance(value, memoryview) and wire == 2:
                numbers.append(_unpack_varints(value))
            elif kind == 3 and isinstance(value, int):
                numbers.append(np.array([value], np.uint64).view(np.int64))
            else:
                raise ValueError(f"wire type {wire} in a list of kind {kind}")
    if kind in (0, 1):
        return strings
    return np.concatenate(numbers) if numbers else np.zeros(0, np.float32 if kind == 2 else np.int64)


def _messages(data: memoryview, numbers: tuple[int, ...]) -> Iterator[tuple[int, memoryview]]:
    for number, wire, value in _fields(data):
        if number in numbers:
            if wire != 2 or not isinstance(value, memoryview):
                raise ValueError(f"field {number} has wire type {wire}, not a message")
            yield number, value


def _fields(data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Yield (field number, wire type, value) of a message; the value is an int for varints, else bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, wire, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + length > len(data):
            raise ValueError(f"a field of {length} bytes at byte {at} runs past the end")
        yield tag >> 3, wire, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    result = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("a varint runs past the end")
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result & 0xFFFFFFFFFFFFFFFF, at
    raise ValueError(f"a varint of more than ten bytes ends at byte {at}")


def _unpack_varints(data: memoryview) -> np.ndarray:
    """Decode a packed list of varints, vectorized: seven bits per byte; a byte without the high bit ends a number."""
    raw = np.frombuffer(data, np.uint8)
    if raw.size == 0:
        return np.zeros(0, np.int64)
    if raw[-1] >= 0x80:
        raise ValueError("a packed varint runs past the end")
    starts = np.flatnonzero(np.concatenate(([True], raw[:-1] < 0x80)))
    lengths = np.diff(np.append(starts, raw.size))
    if lengths.max() > 10:
        raise ValueError("a packed varint of more than ten bytes")
    shifts = (np.arange(raw.size) - np.repeat(starts, lengths)).astype(np.uint64) * np.uint64(7)
    return np.add.reduceat((raw & 0x7F).astype(np.uint64) << shifts, starts).view(np.int64)
