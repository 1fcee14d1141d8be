"""Cache of scan results, so that unchanged files are not read again.

It works like Git's index: one SQLite file in the cache folder stores, per reader and path, the digests found and the
file's size, times and inode at that moment. The times include ctime, which no tool can set back. Clocks are coarse, so
two changes may share one timestamp: a file is cached only if it was unchanged for longer than a clock tick before it
was read, and is still the same afterwards. Files with a problem are read again by every scan.

The cache only saves time: if it is missing, locked, not writable or damaged, files are read.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from preprocessing.cache import cache_folder
from preprocessing.errors import BadEpisode
from preprocessing.sources.untrusted.files import AT_REST, check, opened

LOOK_AHEAD = 256  # files looked up together, and read ahead
SAVE_EVERY = 5.0  # seconds of work that a crash may lose
PATIENCE = 2.0  # seconds to wait for another process's lock
MONTH = 30 * 86400  # seconds
KEPT_MONTHS = 3  # entries that no scan used for longer are deleted
VERSION = version("unified-world-models")  # read once: each call reads a file


@dataclass(frozen=True)
class Finding:
    """One episode in a file: the digest of its bytes, and why it cannot be read, if it cannot."""

    digest: str
    problem: str | None = None


def findings(
    reader: str | Callable[[Path], str], files: Iterable[Path], read: Callable[[Path], list[Finding]]
) -> Iterator[tuple[Path, list[Finding]]]:
    """Yield each file, in order, with its cached findings, or else with those of ``read``.

    ``reader`` is the cache key: it names everything besides the file that affects the result. It is a function if that
    differs by file.

    ``read`` runs in as many threads as there are processors: reading and hashing release the GIL. (Some libraries have
    their own lock: HDF5 decompresses in one thread at a time.) A file that cannot be opened yields a finding with a
    problem, and so does one that :func:`preprocessing.sources.untrusted.files.check` refuses.
    """
    waiting = iter(files)
    cache = _Cache(reader)
    pool = ThreadPoolExecutor(os.cpu_count())
    ahead: deque[tuple[Path, list[Finding] | Future[tuple[list[Finding], str | None]]]] = deque()

    def first() -> tuple[Path, list[Finding]]:
        file, found = ahead.popleft()
        if isinstance(found, Future):
            found, stamp = found.result()
            if stamp:
                cache.keep(file, stamp, found)
        return file, found

    try:
        while batch := list(islice(waiting, LOOK_AHEAD)):
            known = cache.lookup(batch)
            ahead.extend(
                (file, known.get(file) or pool.submit(copy_context().run, _examine, file, read)) for file in batch
            )
            while len(ahead) > LOOK_AHEAD:
                yield first()
        while ahead:
            yield first()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        cache.close()


def findings_of(reader: str, file: Path, read: Callable[[Path], list[Finding]]) -> list[Finding]:
    """The cached findings of one file, or else those of ``read``, which runs in this thread and may raise anything."""
    cache = _Cache(reader)
    try:
        found = cache.lookup([file]).get(file)
        if found is None:
            found, stamp = _at_rest(file, read)
            if stamp:
                cache.keep(file, stamp, found)
        return found
    finally:
        cache.close()


def stamp_of(files: Iterable[Path]) -> str | None:
    """A stamp of several files that are cached as one, to be part of ``reader``; None if one has changed so recently
    that its next change might go unnoticed."""
    sha, newest = hashlib.sha256(), 0
    for file in files:
        status = check(file)
        newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
        sha.update(_name(file) + f" {_stamp(status)};".encode())
    return sha.hexdigest() if newest + AT_REST < time.time_ns() else None


def overlaps(ranges: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """Yield (number, number of another) for each of the ranges ``(first, stop, number)`` that overlaps another."""
    farthest: tuple[int, int] | None = None  # stop and number of the range that reaches farthest so far
    for first, stop, number in sorted(ranges):
        if farthest and first < farthest[0]:
            yield number, farthest[1]
            yield farthest[1], number
        if not farthest or stop > farthest[0]:
            farthest = stop, number


def file_digest(path: Path) -> str:
    """SHA-256 of a whole file."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _examine(file: Path, read: Callable[[Path], list[Finding]]) -> tuple[list[Finding], str | None]:
    """As ``_at_rest``, with a finding in place of an exception."""
    try:
        return _at_rest(file, read)
    except (OSError, BadEpisode) as error:
        reason = f"cannot be read: {error.strerror or error}" if isinstance(error, OSError) else str(error)
        return [Finding(hashlib.sha256(_name(file) + os.fsencode(reason)).hexdigest(), reason)], None
    except Exception as error:  # foreign bytes break readers in unforeseeable ways
        return [Finding(file_digest(file), f"cannot be read: {type(error).__name__}: {error}")], None


def _at_rest(file: Path, read: Callable[[Path], list[Finding]]) -> tuple[list[Finding], str | None]:
    """The file's findings, and the stamp to cache them under; None if they must not be cached."""
    began = time.time_ns()
    before = check(file)
    found = read(file)
    after = file.stat()
    at_rest = max(before.st_mtime_ns, before.st_ctime_ns) + AT_REST < began
    if at_rest and _stamp(before) == _stamp(after) and all(finding.problem is None for finding in found):
        return found, _stamp(before)
    return found, None


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


class _Cache:
    """The cached rows of one reader. Each version of the code has its own: another may find something else."""

    def __init__(self, reader: str | Callable[[Path], str]):
        self._name = reader
        self._month = int(time.time() / MONTH)
        self._new: list[tuple[bytes, str, str, str, int]] = []
        self._saved = time.monotonic()
        self._database = _open()

    def lookup(self, files: list[Path]) -> dict[Path, list[Finding]]:
        """The findings of those files that are unchanged."""
        query = "SELECT stamp, digests, seen FROM findings WHERE path = ? AND reader = ?"
        try:
            with self._database:
                self._database.execute("BEGIN")  # one lock for all: on a network disk each takes milliseconds
                rows = [self._database.execute(query, (_name(file), self._reader(file))).fetchone() for file in files]
        except sqlite3.Error as error:
            self._database = _after(error)
            return {}
        known = {}
        for file, row in zip(files, rows, strict=True):
            with suppress(OSError):  # reading it reports the problem
                if row and row[0] == _stamp(file.stat()):
                    stamp, digests, seen = row
                    known[file] = [Finding(digest) for digest in digests.split()]
                    if seen < self._month:
                        self.keep(file, stamp, known[file])
        return known

    def keep(self, file: Path, stamp: str, found: list[Finding]) -> None:
        digests = " ".join(finding.digest for finding in found)
        self._new.append((_name(file), self._reader(file), stamp, digests, self._month))
        if time.monotonic() - self._saved > SAVE_EVERY:
            self._save()

    def _reader(self, file: Path) -> str:
        name = self._name if isinstance(self._name, str) else self._name(file)
        return f"{name} {VERSION}"

    def close(self) -> None:
        self._save()
        self._database.close()

    def _save(self) -> None:
        try:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO findings VALUES (?, ?, ?, ?, ?)", self._new)
                self._database.execute("DELETE FROM findings WHERE seen < ?", (self._month - KEPT_MONTHS,))
        except sqlite3.Error as error:
            self._database = _after(error)
        self._new.clear()
        self._saved = time.monotonic()


def _name(file: Path) -> bytes:
    return os.fsencode(file.absolute())  # a file name need not be valid text


def _open() -> sqlite3.Connection:
    try:
        _path().parent.mkdir(parents=True, exist_ok=True)
        return _connect(_path())
    except (OSError, RuntimeError, sqlite3.Error) as error:  # RuntimeError: no home directory
        return _after(error)


def _after(error: Exception) -> sqlite3.Connection:
    """Open a new database in place of a damaged one, and an empty one in memory if it cannot be reached."""
    if type(error) is sqlite3.DatabaseError:  # damage; locks, permissions and full disks raise subclasses
        with suppress(OSError, sqlite3.Error):
            _path().unlink(missing_ok=True)
            return _connect(_path())
    return _connect(":memory:")


def _connect(place: Path | str) -> sqlite3.Connection:
    database = sqlite3.connect(place, timeout=PATIENCE)
    database.execute(
        "CREATE TABLE IF NOT EXISTS findings "
        "(path BLOB, reader TEXT, stamp TEXT, digests TEXT, seen INTEGER, PRIMARY KEY (path, reader))"
    )
    database.execute("CREATE INDEX IF NOT EXISTS findings_by_age ON findings (seen)")
    return database


def _path() -> Path:
    return cache_folder() / "scans.sqlite"
