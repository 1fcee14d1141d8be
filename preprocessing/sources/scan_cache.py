"""What earlier scans found in files, so that a file that has not changed is not read again.

Kept like Git's index: one SQLite file in the cache folder holds, for each reader and path, the digests found there and
the size, times and inode that the file then had. Among the times is that of the last change of any kind (ctime), which
no tool can set back. Clocks tick coarsely, so two changes may carry one time: a file is remembered only if it had been
at rest for longer than a tick before it was read, and was still the same afterwards. What has a problem is read again
by every scan.

The memory saves time and does nothing else. Where it is missing, locked, unwritable or damaged, files are read.
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
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from preprocessing.cache import cache_folder

AT_REST = 2 * 10**9  # nanoseconds: the coarsest clock of a file system, FAT's, ticks every two seconds
LOOK_AHEAD = 256  # files that are asked for together, and read before their turn
SAVE_EVERY = 5.0  # seconds of reading that a crash may cost
PATIENCE = 2.0  # seconds to wait for another process's lock
MONTH = 30 * 86400  # seconds
KEPT_MONTHS = 3  # what no scan has seen for longer is forgotten
VERSION = version("unified-world-models")  # asked for once: each answer reads a file


@dataclass(frozen=True)
class Finding:
    """One episode in a file: the digest of its bytes, and why it cannot be read, if so."""

    digest: str
    problem: str | None = None


def findings(
    reader: str | Callable[[Path], str], files: Iterable[Path], read: Callable[[Path], list[Finding]]
) -> Iterator[tuple[Path, list[Finding]]]:
    """Each file, in order, with what ``reader`` once found in it, or what ``read`` finds now.

    ``reader`` names all that decides what is found beside the file; a function, where that differs by file.

    ``read`` is called in as many threads as there are processors: reading and hashing leave Python's lock. (Libraries
    may have a lock of their own, as HDF5 has, whose unpacking runs in one thread at a time.) A file that cannot be
    opened is a finding with a problem.
    """
    waiting = iter(files)
    memory = _Memory(reader)
    pool = ThreadPoolExecutor(os.cpu_count())
    ahead: deque[tuple[Path, list[Finding] | Future[tuple[list[Finding], str | None]]]] = deque()

    def first() -> tuple[Path, list[Finding]]:
        file, found = ahead.popleft()
        if isinstance(found, Future):
            found, stamp = found.result()
            if stamp:
                memory.keep(file, stamp, found)
        return file, found

    try:
        while batch := list(islice(waiting, LOOK_AHEAD)):
            known = memory.recall(batch)
            ahead.extend((file, known.get(file) or pool.submit(_examine, file, read)) for file in batch)
            while len(ahead) > LOOK_AHEAD:
                yield first()
        while ahead:
            yield first()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        memory.close()


def stamp_of(files: Iterable[Path]) -> str | None:
    """Of files whose findings are kept as those of one, to name the reader by; None where one is too new to tell its
    next change by."""
    sha, newest = hashlib.sha256(), 0
    for file in files:
        status = file.stat()
        newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
        sha.update(_name(file) + f" {_stamp(status)};".encode())
    return sha.hexdigest() if newest + AT_REST < time.time_ns() else None


def file_digest(path: Path) -> str:
    """SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _examine(file: Path, read: Callable[[Path], list[Finding]]) -> tuple[list[Finding], str | None]:
    """What is in the file, and the stamp to remember it under; None where it must not be remembered."""
    began = time.time_ns()
    try:
        before = file.stat()
        found = read(file)
        after = file.stat()
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        return [Finding(hashlib.sha256(_name(file) + reason.encode()).hexdigest(), reason)], None
    except Exception as error:  # bytes from outside break a reader in more ways than it foresees
        return [Finding(file_digest(file), f"cannot be read: {type(error).__name__}: {error}")], None
    at_rest = max(before.st_mtime_ns, before.st_ctime_ns) + AT_REST < began
    if at_rest and _stamp(before) == _stamp(after) and all(finding.problem is None for finding in found):
        return found, _stamp(before)
    return found, None


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


class _Memory:
    """The rows of one reader. Another version of it may find something else, and has rows of its own."""

    def __init__(self, reader: str | Callable[[Path], str]):
        self._name = reader
        self._month = int(time.time() / MONTH)
        self._new: list[tuple[bytes, str, str, str, int]] = []
        self._saved = time.monotonic()
        self._database = _open()

    def recall(self, files: list[Path]) -> dict[Path, list[Finding]]:
        """What was found in those of the files that are as they were."""
        query = "SELECT stamp, digests, seen FROM findings WHERE path = ? AND reader = ?"
        try:
            with self._database:
                self._database.execute("BEGIN")  # one lock for all: on a network's disk each one takes milliseconds
                rows = [self._database.execute(query, (_name(file), self._reader(file))).fetchone() for file in files]
        except sqlite3.Error as error:
            self._database = _after(error)
            return {}
        known = {}
        for file, row in zip(files, rows, strict=True):
            with suppress(OSError):  # who reads it will say so
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
    return os.fsencode(file.absolute())  # a file's name need not be text


def _open() -> sqlite3.Connection:
    try:
        _path().parent.mkdir(parents=True, exist_ok=True)
        return _connect(_path())
    except (OSError, RuntimeError, sqlite3.Error) as error:  # RuntimeError: "~" without a home
        return _after(error)


def _after(error: Exception) -> sqlite3.Connection:
    """What to go on with: a damaged database is begun anew, and in place of one out of reach serves an empty one."""
    if type(error) is sqlite3.DatabaseError:  # damage; locks, permissions and full disks are its subclasses
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
