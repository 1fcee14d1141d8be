"""The files of a source: what is there, and whether it may be opened.

A source is the folder or file that the user named. Links in it, and paths in its metadata, may lead anywhere on this
machine, a file may be a pipe that never ends, or a few lines of text where the real file was not downloaded. Every file
that a reader opens was looked at here first: by :func:`check`, or by :func:`files_in`, which leaves such files out.

Looking at many files takes time, so a folder is listed, and the beginning of a file read, once for all readers:
:func:`forget` starts anew.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from preprocessing.errors import BadEpisode
from preprocessing.sources.untrusted.copies import copies

AT_REST = 2 * 10**9  # nanoseconds: the tick of the coarsest file system clock, FAT's
REMEMBERED = 2**17  # files
HEAD = 1024  # bytes; the longest beginning that tells a format, or a pointer

FILMS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".gif", ".mxf"}
FILMS |= {".m2ts", ".mts", ".ogv", ".asf", ".vob", ".3g2", ".mjpeg", ".h264", ".h265", ".hevc", ".apng"}
# Files with these suffixes are what their name says, and are not opened to find out.
TELLING = FILMS | {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".npy", ".npz", ".parquet", ".txt"}
TELLING |= {".json", ".jsonl", ".csv", ".md", ".yaml", ".yml", ".xml", ".html", ".py", ".srt", ".vtt", ".log"}

# How a file begins that stands for another one: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md,
# https://git-annex.branchable.com/internals/pointer_file/
POINTERS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer; fetch the file with `git lfs pull`",
    b"version https://hawser.github.com/spec/": "a Git LFS pointer; fetch the file with `git lfs pull`",
    b"/annex/objects/": "a git-annex pointer; fetch the file with `git annex get`",
    b"# xet version": "a Xet pointer; fetch the file with `git xet checkout`",
}
ANNEX = "annex/objects"
STORES = (f".git/{ANNEX}", ".dvc/cache")  # a working tree may link to these folders of its repository


class _Source:
    """The folders that belong to a source, all links resolved."""

    def __init__(self, root: Path):
        real = Path(os.path.realpath(root))
        self.file = str(real)  # the user may name a link to anywhere
        folder = root.resolve() if root.is_dir() else Path(os.path.realpath(root.parent))
        inside = [folder]
        for above in (folder, *folder.parents):
            inside += [above / store for store in STORES if (above / store).is_dir()]
            if above.name == "snapshots":  # a hub's cache links from here to its blobs
                inside.append(above.parent / "blobs")
        self._prefixes = tuple(f"{place}{os.sep}".replace("//", "/") for place in inside)
        self._folders: dict[Path, str] = {}  # resolved

    def place_of(self, path: Path) -> str:
        if (folder := self._folders.get(path.parent)) is None:
            folder = self._folders[path.parent] = os.path.realpath(path.parent)
        linked = path.name == ".." or path.is_symlink()
        return os.path.realpath(path) if linked else os.path.normpath(f"{folder}/{path.name}")

    def holds(self, place: str) -> bool:
        return place == self.file or f"{place}{os.sep}".startswith(self._prefixes)


_source: ContextVar[_Source | None] = ContextVar("source", default=None)
_sources: dict[Path, _Source] = {}


@contextlib.contextmanager
def within(root: Path | None) -> Iterator[None]:
    """Confine what is opened in this context to a source; None confines nothing. Threads need a copy of the context."""
    if root and root not in _sources:
        _sources[root] = _Source(root)
    token = _source.set(_sources[root] if root else None)
    try:
        yield
    finally:
        _source.reset(token)


def check(file: Path) -> os.stat_result:
    """The status of a file that may be opened.

    Raises BadEpisode if it is no regular file, lies outside of the source, or stands for a file that is elsewhere;
    OSError if it cannot be reached.
    """
    try:
        status = file.stat()
    except FileNotFoundError:
        if reason := _dangling(file):
            raise BadEpisode(f"{file.name} {reason}") from None
        raise
    if reason := _special(status.st_mode) or leads_out(file):
        raise BadEpisode(f"{file.name} {reason}")
    if status.st_size <= HEAD:
        with opened(file) as small:
            if pointer := pointer_of(small.read(HEAD)):
                raise BadEpisode(f"{file.name} is {pointer}")
    return status


def own(file: Path) -> Path:
    """The file, after :func:`check`."""
    check(file)
    return file


def contents(file: Path, limit: int) -> bytes:
    """All bytes of a file, after :func:`check`. Raises BadEpisode if there are more than ``limit``."""
    if (size := check(file).st_size) > limit:
        raise BadEpisode(f"{file.name} has {size} bytes, more than {limit}")
    with opened(file) as whole:
        return whole.read(size)


def opened(file: Path) -> io.BufferedReader:
    """Open a file for reading; a pipe or a device raises BadEpisode instead of waiting for ever."""
    handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    if reason := _special(os.fstat(handle).st_mode):
        os.close(handle)
        raise BadEpisode(f"{file.name} {reason}")
    return os.fdopen(handle, "rb")


def leads_out(path: Path) -> str | None:
    """Why a file or folder does not belong to the source, if it does not."""
    source = _source.get()
    place = source.place_of(path) if source else ""
    if not source or source.holds(place):
        return None
    return f"lies outside of the source, in {place}; copy it into the source, or give that as a source of its own"


def pointer_of(head: bytes) -> str | None:
    """What a file is that begins like this and only stands for another; None for any other file."""
    return next((what for begin, what in POINTERS.items() if head.startswith(begin)), None)


@dataclass(frozen=True)
class Listing:
    """What a folder holds, without what is hidden, sorted by name."""

    files: dict[Path, bytes | None] = field(default_factory=dict)  # and how they begin, if that was read
    folders: list[Path] = field(default_factory=list)
    copies: dict[Path, str] = field(default_factory=dict)  # files that repeat another one, and its name
    refused: dict[Path, str] = field(default_factory=dict)  # what must not be opened, and why


_listings: dict[Path, Listing] = {}


def forget() -> None:
    """Look at every file again, from now on."""
    _listings.clear()
    _sources.clear()


def listing(folder: Path) -> Listing:
    """What a folder holds. Raises OSError."""
    if known := _listings.get(folder):
        return known
    now, changed = time.time_ns(), folder.stat().st_mtime_ns
    found = Listing()
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.name.startswith("."):
                _sort_in(folder / entry.name, entry, found)
    found.copies.update(copies(folder, found.files, found.folders))
    for file in found.copies:
        del found.files[file]
    if changed + AT_REST < now:  # a folder in which files may just now appear is listed each time
        if len(found.files) + sum(len(known.files) for known in _listings.values()) > REMEMBERED:
            _listings.clear()
        _listings[folder] = found
    return found


def files_in(path: Path) -> list[Path]:
    """The regular files of a folder that belong to the source and are not hidden, sorted; a file itself."""
    if (above := _listings.get(path.parent)) and path in above.files:
        return [path]
    return [*listing(path).files] if path.is_dir() else [path]


def magic(file: Path) -> bytes:
    """The first bytes of a file, to find out what it is; none if its suffix tells, or if it cannot be read."""
    if file.suffix.lower() in TELLING:
        return b""
    above = _listings.get(file.parent)
    if above and (known := above.files.get(file)) is not None:
        return known
    head = b""
    with contextlib.suppress(OSError, BadEpisode), opened(file) as begin:
        head = begin.read(HEAD)
    if above and file in above.files:
        above.files[file] = head
    return head


def _sort_in(path: Path, entry: os.DirEntry[str], found: Listing) -> None:
    linked = entry.is_symlink()
    if linked and (reason := _dangling(path) or leads_out(path)):
        found.refused[path] = reason
    elif entry.is_dir():
        found.folders.append(path)
    elif entry.is_file():
        found.files[path] = None
    else:
        found.refused[path] = _special(entry.stat().st_mode) or "cannot be looked at"


def _dangling(path: Path) -> str | None:
    if not path.is_symlink() or path.exists():
        return None
    target = str(path.readlink())
    if ANNEX in target:
        return "is in git-annex, but not on this machine; fetch it with `git annex get`"
    return f"is a link to {target}, which does not exist; finish the download or restore it"


def _special(mode: int) -> str | None:
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    kinds[stat.S_IFDIR] = "a folder"
    kind = kinds.get(stat.S_IFMT(mode))
    return f"is {kind}, not a file" if kind else None
