"""Read messages from ROS recordings in the order they were written: MCAP, ROS 2 bags, ROS 1 bags.

A recording is one file or one ROS 2 bag: a folder whose ``metadata.yaml`` lists its storage files; a split bag has
several. A recorder that is killed leaves out the last ones, and copies lose some: what is there is read. A storage file
is recognised by its first bytes: MCAP (https://mcap.dev/spec), SQLite with the tables ``topics`` and ``messages``
(https://github.com/ros2/rosbag2, ``rosbag2_storage_sqlite3``), or ROS 1's format 2.0
(https://wiki.ros.org/Bags/Format/2.0).

Sizes that a file claims are not trusted: data is decompressed up to a limit and no further. The message definitions in
a file are not read (:mod:`preprocessing.sources.ros.messages` says why).
"""

from __future__ import annotations

import bz2
import contextlib
import io
import re
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote

import yaml
import zstandard
from lz4.frame import LZ4FrameDecompressor
from mcap import records
from mcap.stream_reader import StreamReader, breakup_chunk
from rosbags.rosbag1.reader import Reader, decompressors

from preprocessing.errors import BadEpisode
from preprocessing.sources.untrusted.files import contents, files_in, magic, opened, pointer_of

METADATA, INFORMATION = "metadata.yaml", "rosbag2_bagfile_information"
MCAP, BAG1, SQLITE = b"\x89MCAP0\r\n", b"#ROSBAG V2.0\n", b"SQLite format 3\0"
MAX_BYTES = 2**27  # of a chunk or a message; recorders' chunks have a few MiB, a raw 4K image 25
MAX_METADATA = 2**22  # bytes
MAX_MESSAGES = 10**7  # of one recording; a day at 100 Hz


class Message(NamedTuple):
    topic: str
    type: str  # in ROS 2's form: sensor_msgs/msg/Image
    encoding: str  # cdr, ros1, json, protobuf, ...
    received: int  # nanoseconds
    data: bytes


def recordings(path: Path) -> Iterator[Path]:
    """The path itself if it is a bag or a recording; otherwise the recordings among a folder's files."""
    if _is_bag(path):
        yield path
        return
    for file in files_in(path):
        kind = _kind_of(magic(file))
        if kind and (kind is not _sqlite or file.suffix.lower() == ".db3"):  # SQLite files can be anything
            yield file


def storage_files(recording: Path) -> list[Path]:
    """The file itself, or a bag's files in order. Raises BadEpisode if its metadata is broken."""
    return _metadata(recording).files if recording.is_dir() else [recording]


def differences(recording: Path) -> list[str]:
    """How a bag's files differ from those that its metadata lists."""
    return _metadata(recording).differences if recording.is_dir() else []


def problem_of(file: Path) -> str | None:
    """Why a storage file cannot be read, judging by its first and last bytes; None if nothing is wrong."""
    kind = _kind(file)
    if kind is None:
        return "is neither MCAP nor SQLite"
    if kind is _mcap:
        with opened(file) as whole:
            whole.seek(max(0, file.stat().st_size - len(MCAP)))
            if whole.read() != MCAP:
                return "is truncated, its recorder may have been killed; run `mcap recover`"
    log = file.with_name(f"{file.name}-wal")
    if kind is _sqlite and log.is_file() and log.stat().st_size:
        return f"was not closed: {log.name} holds messages; run `sqlite3 {file.name} 'PRAGMA wal_checkpoint'`"
    return None


def messages(recording: Path, topic: str | None = None) -> Iterator[Message]:
    """Yield all messages, or those of one topic. Raises BadEpisode where the bytes break."""
    files, compressed, _ = _metadata(recording) if recording.is_dir() else _Bag([recording], False, [])
    number = 0
    try:
        for file in files:
            kind, problem = _kind(file), problem_of(file)
            if kind is None or problem:
                raise BadEpisode(f"{file.name} {problem}")
            for message in kind(file, topic):
                if compressed:
                    message = message._replace(data=_zstd(message.data, MAX_BYTES))
                number += 1
                if number > MAX_MESSAGES:
                    raise BadEpisode(f"holds more than {MAX_MESSAGES} messages")
                if not 0 <= message.received < 2**63:
                    raise BadEpisode(f"a message of {message.topic} has the invalid time {message.received}")
                yield message
    except BadEpisode:
        raise
    except Exception as error:  # on broken bytes the libraries raise errors of every kind
        raise BadEpisode(f"breaks after {number} messages: {type(error).__name__}: {error}") from error


def _is_bag(path: Path) -> bool:
    metadata = path / METADATA
    if not metadata.is_file():
        return False
    try:
        with opened(metadata) as file:
            head = file.read(2**12)
    except OSError:
        return True  # which is then reported
    return INFORMATION.encode() in head or pointer_of(head) is not None


class _Bag(NamedTuple):
    files: list[Path]
    compressed: bool  # each message by itself
    differences: list[str]  # between its files and those that its metadata lists


def _metadata(bag: Path) -> _Bag:
    """The storage files of a bag, and how to read them. Raises BadEpisode if its metadata is broken, or no file there.

    Before version 4, file names include the folder. Only their last part is used, so none leads out of the bag.
    """
    try:
        information = yaml.safe_load(contents(bag / METADATA, MAX_METADATA))[INFORMATION]
        listed = [bag / PurePosixPath(name).name for name in dict.fromkeys(information["relative_file_paths"])]
        mode = str(information.get("compression_mode") or "none").lower()
    except Exception as error:  # damaged text may be any YAML
        reason = " ".join(str(error).split())
        raise BadEpisode(f"{METADATA} cannot be read: {type(error).__name__}: {reason}") from None
    if mode == "file":
        raise BadEpisode("its files are compressed as a whole; decompress them (`ros2 bag convert`)")
    if mode not in ("none", "message"):
        raise BadEpisode(f"compression_mode {mode} is unknown")
    whole = [file for file in listed if file.is_file()]
    missing = [file.name for file in listed if file not in whole]
    told = [f"{METADATA} lists {name}, which is missing: its messages are lost" for name in missing]
    parts = {_recording_of(file) for file in listed}
    for there in sorted(files_in(bag), key=_place):
        if there in listed or _kind(there) not in (_mcap, _sqlite):
            continue
        is_part = _recording_of(there) in parts or not any(one in listed for one in whole)
        told.append(f"{METADATA} does not list {there.name}; {'read, as a part of the bag' if is_part else 'not read'}")
        whole += [there] if is_part else []
    if not whole:
        raise BadEpisode(told[0].partition(":")[0] if told else f"{METADATA} lists no file")
    ordered = whole if all(file in listed for file in whole) else sorted(whole, key=_place)
    return _Bag(ordered, mode == "message", told)


def _recording_of(file: Path) -> str:
    """What the files of a split bag have in common: ``run`` of ``run_0.mcap`` and ``run_1.mcap``."""
    return re.sub(r"_\d+$", "", file.stem)


def _place(file: Path) -> tuple[int, str]:
    number = re.search(r"_(\d{1,9})$", file.stem)
    return int(number[1]) if number else -1, file.name


def _kind(file: Path) -> Callable[[Path, str | None], Iterator[Message]] | None:
    with opened(file) as begin:
        return _kind_of(begin.read(16))


def _kind_of(head: bytes) -> Callable[[Path, str | None], Iterator[Message]] | None:
    kinds = {MCAP: _mcap, BAG1: _bag1, SQLITE: _sqlite}
    return next((kind for magic, kind in kinds.items() if head.startswith(magic)), None)


class _Bounded(io.BufferedReader):
    """A file that allocates no more than MAX_BYTES per read, whatever length a record claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(MAX_BYTES if size is None or size < 0 else min(size, MAX_BYTES))


def _mcap(file: Path, topic: str | None) -> Iterator[Message]:
    schemas: dict[int, str] = {0: ""}
    channels: dict[int, records.Channel] = {}
    with _Bounded(io.FileIO(file)) as recording:
        reader = StreamReader(recording, emit_chunks=True, validate_crcs=True, record_size_limit=MAX_BYTES)
        for outer in reader.records:
            if isinstance(outer, records.DataEnd):  # only a summary follows
                return
            chunk = _decompressed(outer) if isinstance(outer, records.Chunk) else None
            for record in breakup_chunk(chunk, validate_crc=True) if chunk else [outer]:
                if isinstance(record, records.Schema):
                    schemas[record.id] = re.sub(r"^(\w+)/(\w+)$", r"\1/msg/\2", record.name)
                elif isinstance(record, records.Channel):
                    channels[record.id] = record
                elif isinstance(record, records.Message):
                    channel = channels[record.channel_id]
                    if topic in (None, channel.topic):
                        kind, encoding = schemas[channel.schema_id], channel.message_encoding
                        yield Message(channel.topic, kind, encoding, record.log_time, record.data)


def _decompressed(chunk: records.Chunk) -> records.Chunk:
    """Decompress a chunk in bounded memory, which the library would not."""
    size = chunk.uncompressed_size
    if size > MAX_BYTES:
        raise BadEpisode(f"a chunk decompresses to {size} bytes")
    match chunk.compression:
        case "zstd":
            data = _zstd(chunk.data, size)
        case "lz4":
            data = _lz4(chunk.data, size)
        case "":
            data = chunk.data
        case other:
            raise BadEpisode(f"a chunk is compressed with {other!r}; zstd and lz4 are supported")
    if len(data) != size:
        raise BadEpisode(f"a chunk has {len(data)} bytes, not {size}")
    return replace(chunk, compression="", data=data)


def _sqlite(file: Path, topic: str | None) -> Iterator[Message]:
    with contextlib.closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro&immutable=1", uri=True)) as database:
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_BYTES)
        database.execute("PRAGMA trusted_schema = OFF")
        millions = count()  # of steps: pages may link in a cycle
        database.set_progress_handler(lambda: int(next(millions) > 100 * MAX_MESSAGES // 10**6), 10**6)
        own = "SELECT count(*) FROM sqlite_master WHERE name IN ('topics', 'messages') AND type = 'table' AND rootpage"
        if database.execute(own).fetchone() != (2,):  # a view or virtual table would run code from the file
            raise BadEpisode("has no tables topics and messages")
        rows = database.execute("SELECT id, name, type, serialization_format FROM topics").fetchall()
        topics = {number: row for number, *row in rows if topic in (None, row[0])}
        wanted = ",".join(str(int(number)) for number in topics)
        query = f"SELECT topic_id, timestamp, data FROM messages WHERE topic_id IN ({wanted}) ORDER BY rowid"
        for number, received, data in database.execute(query):
            if not isinstance(received, int) or not isinstance(data, bytes):
                raise BadEpisode("a message is not bytes, or its time is not a number")
            name, kind, encoding = map(str, topics[number])
            yield Message(name, kind, encoding, received, data)


def _bag1(file: Path, topic: str | None) -> Iterator[Message]:
    with Reader(file) as reader:
        for place, chunk in reader.chunks.items():
            if chunk.datasize > MAX_BYTES:
                raise BadEpisode(f"a chunk has {chunk.datasize} bytes")
            decompress = BOUNDED[chunk.decompressor]
            reader.chunks[place] = chunk._replace(decompressor=partial(decompress, limit=MAX_BYTES))
        if wanted := [connection for connection in reader.connections if topic in (None, connection.topic)]:
            for connection, received, data in reader.messages(wanted):
                yield Message(connection.topic, connection.msgtype, "ros1", received, data)


def _zstd(data: bytes, limit: int) -> bytes:
    decompressed = zstandard.ZstdDecompressor().stream_reader(data).read(limit + 1)
    return _checked(decompressed, limit)


def _lz4(data: bytes, limit: int) -> bytes:
    return _checked(LZ4FrameDecompressor().decompress(data, max_length=limit + 1), limit)


def _bz2(data: bytes, limit: int) -> bytes:
    return _checked(bz2.BZ2Decompressor().decompress(data, max_length=limit + 1), limit)


def _checked(decompressed: bytes, limit: int) -> bytes:
    if len(decompressed) > limit:
        raise BadEpisode(f"data decompresses to more than {limit} bytes")
    return decompressed


# Bounded replacements for the library's decompressors.
BOUNDED: dict[Any, Callable[..., bytes]] = {
    decompressors["none"]: _checked,
    decompressors["bz2"]: _bz2,
    decompressors["lz4"]: _lz4,
}
