"""Regenerable on-disk cache: copies of shards, unpacked archives, and the findings of scans.

Copies can fill a disk, so :class:`Shelf` bounds them to ``UWM_CACHE_GB`` (10^9 bytes; by default 80 % of the free space
plus its own contents) and evicts the least recently used. Any number of processes share it, and any of them may be
killed at any moment: they coordinate only through flock, which the kernel releases. Users of an item hold its file
``lock`` shared; whoever makes or deletes the item holds it exclusively.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from preprocessing.errors import UserError

FEW = 256  # files that are flushed one by one; more of them, together with everything else
FREE_SHARE = 0.8  # default limit: this share of the free space plus the shelf's own contents
PATIENCE = 60.0  # seconds to wait for other processes to release what fills the shelf
GB = 1e9


def cache_folder() -> Path:
    """Return ``UWM_CACHE``, or ~/.cache/uwm. It may not exist yet."""
    return Path(os.environ.get("UWM_CACHE", "~/.cache/uwm")).expanduser()


class Item:
    """A complete folder that is not evicted while it is held. Files that are mapped stay readable after release."""

    def __init__(self, path: Path, lock: BinaryIO):
        self.path, self._lock = path, lock

    def release(self) -> None:
        self._lock.close()


class Shelf:
    """Items, folders of files, in the folder ``root``: each is complete or absent, and their total size is bounded.

    By default ``root`` is the one that everything shares: the limit is that of all items together.
    """

    def __init__(self, root: Path | None = None):
        self.root = root or cache_folder() / "shards"

    def limit(self) -> int:
        """Return the bytes that all items together may take. Raises UserError if ``UWM_CACHE_GB`` is not a number."""
        if (given := os.environ.get("UWM_CACHE_GB")) is None:
            self.root.mkdir(parents=True, exist_ok=True)
            return int(FREE_SHARE * (shutil.disk_usage(self.root).free + sum(self._sizes().values())))
        with contextlib.suppress(ValueError):
            if (limit := float(given)) > 0:
                return int(min(limit, 1e9) * GB)
        raise UserError(f"UWM_CACHE_GB={given}: give a number above 0: the GB that the cache may take")

    def find(self, name: str) -> Item | None:
        """Hold the item of that name if it is there."""
        if (lock := _lock(self.root / name, fcntl.LOCK_SH)) is None:
            return None
        os.utime(lock.fileno())
        return Item(self.root / name, lock)

    def hold(self, name: str, sizes: dict[str, int], fill: Callable[[Path], None], wait: bool = True) -> Item | None:
        """Hold the item of that name, whose files have these sizes in bytes; make it first if it is absent.

        ``fill`` writes into the files, which are preallocated. Without ``wait``, return None while another process
        makes the item. Raises UserError if items that others hold leave no room, and OSError (with the path) if the
        disk is full; nothing incomplete is left behind.
        """
        deadline = float("inf")
        while True:
            if item := self._find(name, sizes):
                return item
            building = self.root / f"{name}.building"
            if (lock := _lock(building, fcntl.LOCK_EX | fcntl.LOCK_NB, make=True)) is None:
                if not wait:
                    return None
                time.sleep(0.02)
                continue
            try:
                if item := self._find(name, sizes):  # another process was faster
                    _delete(building)
                    return item
                if (self.root / name).exists():  # but its lock file is missing
                    _delete(self.root / name)
                if not self._reserve(building, sizes):
                    deadline = min(deadline, time.monotonic() + PATIENCE)
                    if time.monotonic() > deadline:
                        raise UserError(self._full(sum(sizes.values())))
                    time.sleep(0.2)
                    continue
                fill(building)
                _sync([building / file for file in sizes])
                with self._counting():
                    building.rename(self.root / name)
            except BaseException as error:
                if os.fstat(lock.fileno()).st_nlink == 0 and isinstance(error, OSError):
                    continue  # another process deleted it meanwhile
                with contextlib.suppress(OSError):
                    _delete(building)
                raise
            finally:
                lock.close()

    def _find(self, name: str, sizes: dict[str, int]) -> Item | None:
        """Return the item, held, or None. An item with wrong file sizes is deleted."""
        path = self.root / name
        if (lock := _lock(path, fcntl.LOCK_SH)) is None:
            return None
        if all(_size(path / file) == size for file, size in sizes.items()):
            os.utime(lock.fileno())
            return Item(path, lock)
        with contextlib.suppress(OSError):
            _delete(path)
        lock.close()
        return None

    def _reserve(self, building: Path, sizes: dict[str, int]) -> bool:
        """Make room and allocate it. Returns False if items in use leave too little."""
        needed, limit = sum(sizes.values()), self.limit()
        with self._counting():
            held = self._sizes()
            held.pop(building, None)
            oldest = sorted(held, key=_last_used)
            while sum(held.values()) + needed > limit:
                if not oldest:
                    return False
                victim = oldest.pop(0)
                if (lock := _lock(victim, fcntl.LOCK_EX | fcntl.LOCK_NB)) is not None or not (victim / "lock").exists():
                    with contextlib.suppress(OSError):
                        _delete(victim)
                    held.pop(victim)
                    if lock is not None:
                        lock.close()
            (building / "lock").write_text(str(needed))
            for file, size in sizes.items():
                _allocate(building / file, size)
        return True

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """Lock out other allocations and renames, so that the sizes add up."""
        with (self.root / "room.lock").open("w") as room:
            fcntl.flock(room, fcntl.LOCK_EX)
            yield

    def _sizes(self) -> dict[Path, int]:
        """Return the bytes of each item, incomplete ones included."""
        return {path: _taken(path) for path in self.root.iterdir() if path.is_dir()}

    def _full(self, needed: int) -> str:
        held = sum(self._sizes().values())
        return (
            f"{self.root}: no room for {needed / GB:.2f} GB more: this and other runs use {held / GB:.2f} of "
            f"{self.limit() / GB:.2f} GB; raise UWM_CACHE_GB, or wait for them"
        )


def _lock(path: Path, how: int, make: bool = False) -> BinaryIO | None:
    """Return an open file that holds the lock of the item at ``path``; None if the item is absent or locked."""
    try:
        if make:
            path.mkdir(parents=True, exist_ok=True)
        lock = (path / "lock").open("ab" if make else "r+b")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, how)
        if os.path.samestat(os.fstat(lock.fileno()), (path / "lock").stat()):  # else it was renamed or deleted
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    lock.close()
    return None


def _delete(path: Path) -> None:
    """Delete atomically. Processes that have its files mapped keep their bytes."""
    gone = path.with_name(f"{uuid.uuid4().hex}.gone")
    path.rename(gone)
    shutil.rmtree(gone)


def _taken(item: Path) -> int:
    """The bytes of an item: its lock file says so, unless an earlier version made it."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int((item / "lock").read_bytes())
    with contextlib.suppress(FileNotFoundError):
        return sum(entry.stat().st_size for entry in os.scandir(item))
    return 0


def _size(path: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return None


def _last_used(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return (path / "lock").stat().st_mtime
    return 0.0


def _allocate(path: Path, size: int) -> None:
    """Create a file with all its blocks allocated, so that writing into it cannot fill the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        try:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None


def _sync(paths: list[Path]) -> None:
    """Flush to disk, so that a power failure cannot leave a file of zeros."""
    if len(paths) > FEW:
        os.sync()
        return
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
