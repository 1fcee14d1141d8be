"""Zip and tar files, read defensively: listed and bounded first, then unpacked.

An archive is read as a whole or refused with a reason. In a part of a data set, a missing file could not be told from
one that was never recorded, and what is read of it would be ingested again when the archive is complete.

Compressed tar files have no index: they are decompressed twice, once to list what they hold.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from tqdm import tqdm

from preprocessing.errors import BadEpisode
from preprocessing.sources.untrusted.files import HEAD, pointer_of

SUFFIX = re.compile(r"\.(?:zip|tar|tgz|tbz2?|txz|tzst|tar\.(?:gz|bz2|xz|zst))$", re.IGNORECASE)
MAX_MEMBERS = 2**22  # CALVIN's archives have 2.4 million
MAX_RATIO = 200  # unpacked bytes per packed byte, of archives that unpack to more than
SMALL = 2**30  # bytes
MAX_HEADER = 2**20  # bytes
MAX_LINK = 4096  # bytes of a link's target
MAX_PADDING = 2**26  # zero bytes after the end mark of a tar file
XZ_MEMORY = 2**28  # bytes; `xz -9` needs a quarter of them
PIECE = 2**20
PATIENCE = 64  # reads at the end of a file that one header may cause
BREAKS = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError,
    LookupError, MemoryError, OverflowError,
)  # fmt: skip
BY_HAND = "unpack it yourself and ingest the folder"


@dataclass
class Contents:
    """What an archive holds: the size of each file in bytes, and the target of each link, by relative name."""

    packed: int  # bytes of the archive
    files: dict[str, int] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    size: int = 0  # bytes of all files

    def add(self, member: _Member) -> None:
        """Raises BadEpisode where the archive as a whole must not be unpacked."""
        if not (name := member.path) or member.kind == "other":
            return
        if name in self.files or name in self.links:
            raise BadEpisode(f"holds {_short(name)} twice; {BY_HAND}")
        if len(self.files) + len(self.links) >= MAX_MEMBERS:
            raise BadEpisode(f"holds more than {MAX_MEMBERS} files; {BY_HAND}")
        if member.kind == "link":
            self.links[name] = member.target
            return
        self.files[name] = member.size
        self.size += member.size
        if self.size > max(SMALL, MAX_RATIO * self.packed):
            size = f"{self.size / 1e9:.0f} GB, more than {MAX_RATIO} times its own size"
            raise BadEpisode(f"would unpack to {size}; if it is no zip bomb, {BY_HAND}")


class _Member(NamedTuple):
    """One entry of an archive. ``target`` is a link's, relative to the folder that holds the link."""

    name: str
    kind: str  # "file", "link" or "other"
    size: int
    target: str
    open: Callable[[], IO[bytes] | None]  # None of what is no file

    @property
    def path(self) -> str | None:
        """Its name relative to the archive's top, without the slash of absolute names; None for what macOS adds."""
        parts = [part for part in self.name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise BadEpisode(f"holds {_short(self.name)}, a name that leads out of it; {BY_HAND}")
        added = not parts or parts[0] == "__MACOSX" or parts[-1].startswith("._")
        return None if added else "/".join(parts)


def contents(file: Path) -> Contents:
    """List an archive. Raises BadEpisode where it cannot or must not be unpacked."""
    found = Contents(file.stat().st_size)
    with _told(), _members(file, "list") as members:
        for member in members:
            found.add(member)
    names = found.files.keys() | found.links.keys()
    folders = {name[: match.start()] for name in names for match in re.finditer("/", name)}
    if both := names & folders:
        raise BadEpisode(f"holds {_short(min(both))} as a file and as a folder; {BY_HAND}")
    return found


def unpack(file: Path, listed: Contents, folder: Path) -> None:
    """Unpack into files of ``folder`` that exist, with the listed sizes.

    Links that lead out of the archive, or to nothing in it, are left out, like devices. Raises BadEpisode.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _told(), _members(file, "unpack") as members:
        for member in members:
            if member.kind == "file" and (name := member.path):
                with cast(IO[bytes], member.open()) as source, (folder / name).open("r+b") as copy:
                    written = 0
                    while piece := source.read(PIECE):
                        written += copy.write(piece)
                if written != listed.files[name]:
                    raise ValueError(f"{_short(name)} has {written} of its {listed.files[name]} bytes")
    for name, target in listed.links.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)
    for name in listed.links:  # only now, for links may lead to links
        leads_to = Path(os.path.realpath(folder / name))
        if not (leads_to.exists() and leads_to.is_relative_to(os.path.realpath(folder))):
            (folder / name).unlink()


class TarStream(io.RawIOBase):
    """The bytes of a tar file. Its headers can request neither unbounded memory nor endless reads past its end.

    ``last`` is what was read last: as many bytes as were asked for, or fewer at the end.
    """

    def __init__(self, stream: IO[bytes], seekable: bool = True):
        self._stream, self._seekable, self._at, self._ends = stream, seekable, 0, 0
        self.last = b""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        data = self._stream.read(size)
        while len(data) < size and (more := self._stream.read(size - len(data))):
            data += more
        self.last, self._at = data, self._at + len(data)
        self._ends += not data and size > 0
        if self._ends > PATIENCE:
            raise tarfile.ReadError("a header that continues past the end")
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if self._seekable:
            self._at = self._stream.seek(offset, whence)
        if self._at > offset and whence == os.SEEK_SET:
            raise tarfile.StreamError(f"a header that leads back to byte {offset}")
        while self._at < offset and self.read(min(PIECE, offset - self._at)):
            pass
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._stream.close()
        super().close()


@contextmanager
def read_aloud(file: Path, what: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, with progress on stderr if that takes seconds."""
    bar: dict[str, Any] = {"desc": f"{what} {file.name}", "unit": "B", "unit_scale": True, "leave": False, "delay": 2}
    with file.open("rb") as opened, tqdm.wrapattr(opened, "read", total=file.stat().st_size, **bar) as counted:
        yield cast(IO[bytes], counted)


@contextmanager
def _members(file: Path, what: str) -> Iterator[Iterator[_Member]]:
    with read_aloud(file, what) as opened:
        head = opened.read(HEAD)
        opened.seek(0)
        if not head:
            raise BadEpisode("is empty; copy or download it again")
        if pointer := pointer_of(head):
            raise BadEpisode(f"is {pointer}")
        zipped = head[:4] in (b"PK\3\4", b"PK\5\6") or file.suffix.lower() == ".zip"
        with closing(_zipped(opened) if zipped else _tarred(opened, head)) as members:
            yield members


def _zipped(file: IO[bytes]) -> Generator[_Member, None, None]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            # Some programs on Windows write its separator.
            name = info.filename.replace("\\", "/") if info.create_system == 0 else info.filename
            mode = info.external_attr >> 16
            if info.flag_bits & 1:
                raise BadEpisode(f"is encrypted; {BY_HAND}")
            kind = "other" if name.endswith("/") else "link" if stat.S_ISLNK(mode) else "file"
            if kind == "link" and info.file_size > MAX_LINK:
                raise BadEpisode(f"holds a link, {_short(name)}, of {info.file_size} bytes; {BY_HAND}")
            target = os.fsdecode(archive.read(info)) if kind == "link" else ""
            yield _Member(name, kind, info.file_size, target, partial(archive.open, info))


def _tarred(file: IO[bytes], head: bytes) -> Generator[_Member, None, None]:
    stream = _decompressed(file, head)
    with (
        TarStream(stream, seekable=stream is file) as bounded,
        tarfile.open(fileobj=bounded, mode="r:") as archive,
    ):
        while info := archive.next():
            yield _member(archive, info)
            archive.members = []  # type: ignore[attr-defined]  # it would keep all of them
        _check_end(bounded, compressed=stream is not file)


def _member(archive: tarfile.TarFile, info: tarfile.TarInfo) -> _Member:
    kind = "file" if info.isreg() else "link" if info.issym() or info.islnk() else "other"
    target = info.linkname
    if info.islnk():  # named from the top
        target = os.path.relpath(target.lstrip("/"), Path(info.name.lstrip("/")).parent)
    return _Member(info.name, kind, info.size, target, partial(archive.extractfile, info))


def _check_end(stream: TarStream, compressed: bool) -> None:
    """Read on to the end: tarfile takes any block that is no header for it, and decompressors check what they read."""
    if stream.last.strip(b"\0"):
        raise tarfile.ReadError(f"no valid header at byte {stream.tell() - len(stream.last)}")
    if not stream.last and not compressed:
        raise tarfile.ReadError("the end mark is missing")
    read = 0
    while block := stream.read(PIECE):
        if block.strip(b"\0"):
            raise BadEpisode(f"continues after its end mark, like joined tar files; {BY_HAND} (`tar --ignore-zeros`)")
        read += len(block)
        if read > MAX_PADDING:
            raise BadEpisode(f"is padded with more than {MAX_PADDING} zero bytes; {BY_HAND}")


def _decompressed(file: IO[bytes], head: bytes) -> IO[bytes]:
    """The tar file in a file that begins with ``head``."""
    if head.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if head.startswith(b"BZh"):
        return cast(IO[bytes], bz2.BZ2File(file))
    if head.startswith(b"\xfd7zXZ\0"):
        return cast(IO[bytes], _Xz(file))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow as pa  # the standard library reads Zstandard from Python 3.14 on

        return cast(IO[bytes], pa.CompressedInputStream(pa.PythonFile(file), "zstd"))
    return file


class _Xz(io.RawIOBase):
    """An xz file. lzma.LZMAFile has no bound on its memory."""

    def __init__(self, file: IO[bytes]):
        self._file, self._decoder = file, lzma.LZMADecompressor(memlimit=XZ_MEMORY)

    def read(self, size: int = -1, /) -> bytes:
        data = b""
        while not data:
            packed = b""
            if self._decoder.eof:  # another stream may follow, after a padding of zeros
                packed = self._decoder.unused_data.lstrip(b"\0") or self._file.read(PIECE).lstrip(b"\0")
                if not packed:
                    break
                self._decoder = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
            elif self._decoder.needs_input and not (packed := self._file.read(PIECE)):
                raise EOFError("it ends too early")
            data = self._decoder.decompress(packed, size)
        return data


@contextmanager
def _told() -> Iterator[None]:
    """Give the reason in words."""
    try:
        yield
    except NotImplementedError as error:
        raise BadEpisode(f"is compressed in a way that cannot be read ({error}); {BY_HAND}") from None
    except FileNotFoundError:
        raise
    except BREAKS as error:
        if isinstance(error, OSError) and error.errno:
            raise BadEpisode(f"cannot be unpacked: {error.strerror}") from None
        raise BadEpisode(f"is damaged or cut ({error}); copy or download it again") from None


def _short(name: str) -> str:
    return repr(name if len(name) <= 100 else f"...{name[-97:]}")
