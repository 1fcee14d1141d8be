"""What is in a zip or tar file, read as if it had been unpacked there: ``set.zip!/data/x.hdf5``.

An archive is unpacked once on each node, into the bounded cache (preprocessing/cache.py), and named there by the digest
of its bytes, so that a changed archive is another one. Readers see a folder with the archive's name; what they tell of
it is told with the archive's path. An episode keeps its archive in the cache for as long as it is used.

What an unchanged archive holds is remembered (scan_cache.py): to list it again, it is neither read nor unpacked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, unquote

import numpy as np
from tqdm import tqdm

from preprocessing.cache import GB, Item, Shelf
from preprocessing.episode import Episode, EpisodeRef, Video
from preprocessing.errors import BadEpisode, UserError
from preprocessing.sources.scan_cache import Finding, findings_of
from preprocessing.sources.untrusted.archives import BY_HAND, PIECE, SUFFIX, contents, read_aloud, unpack
from preprocessing.sources.untrusted.files import within
from preprocessing.video.frames import thinned

LAYOUT = 1  # of the unpacked folder; a change of it or of what is left out has another number
TREE = "tree"
INSIDE = re.compile(rf"^(.+?{SUFFIX.pattern.removesuffix('$')})!(?:/(.*))?$", re.IGNORECASE | re.DOTALL)


def is_archive(path: Path) -> bool:
    return bool(SUFFIX.search(path.name)) and not path.name.startswith(".") and path.is_file()


def split(path: str | Path) -> tuple[Path, str] | None:
    """The archive and the name within it, of a path as this module gives them; None for other paths."""
    match = INSIDE.match(str(path))
    return (Path(match[1]), match[2] or "") if match and not Path(path).exists() else None


def look(
    file: Path, formats: str, walk: Callable[[Path], Iterator[tuple[str, str, Path]]]
) -> list[tuple[str, str, Path]]:
    """What ``walk`` finds in an archive's unpacked folder when it looks for these formats: what, text, path.

    A "problem" is looked for again each time. Raises BadEpisode where the archive cannot be read.
    """

    def read(file: Path) -> list[Finding]:
        with _opened(file) as unpacked:
            return [
                Finding(
                    _packed(what, unpacked.told(text), unpacked.name(path)),
                    "not to be cached" if what == "problem" else None,
                )
                for what, text, path in walk(unpacked.tree)
            ]

    found = map(_values, findings_of(f"archive {formats}", file, read))
    return [(what, text, _inside(file, name)) for what, text, name in found]


def scan(
    list_folder: Callable[[Path], Iterator[EpisodeRef]], format: str, file: Path, name: str
) -> Iterator[EpisodeRef]:
    """The episodes of a data set in an archive, as the format's ``list_folder`` finds them in its unpacked folder."""

    def read(file: Path) -> list[Finding]:
        with _opened(file) as unpacked:
            refs = list_folder(unpacked.path(name))
            return [
                Finding(
                    _packed(unpacked.name(Path(ref.uri)), ref.index, ref.digest),
                    ref.problem and unpacked.told(ref.problem),
                )
                for ref in tqdm(refs, f"scan {file.name}", unit=" episodes", leave=False, delay=2)
            ]

    for finding in findings_of(f"archive {format} {quote(name)}", file, read):
        within, index, digest = _values(finding)
        yield EpisodeRef(str(_inside(file, within)), format, index, digest, finding.problem)


def load(read: Callable[[EpisodeRef], Episode], ref: EpisodeRef) -> Episode:
    """The episode as its format's ``read`` returns it, unpacked first if it is in an archive."""
    if (place := split(ref.uri)) is None:
        return read(ref)
    with _opened(place[0]) as unpacked:
        episode = read(unpacked.ref(ref, place[1]))
        cameras = {name: unpacked.kept_for(video) for name, video in episode.cameras.items()}
        return replace(episode, ref=ref, cameras=cameras)


def digest(read: Callable[[EpisodeRef], str], ref: EpisodeRef) -> str:
    """The digest of the episode's bytes, in the archive as it is now."""
    if (place := split(ref.uri)) is None:
        return read(ref)
    with _opened(place[0]) as unpacked:
        return read(unpacked.ref(ref, place[1]))


@dataclass(frozen=True)
class _Unpacked:
    """An archive's folder in the cache, which stays there as long as this object."""

    file: Path
    tree: Path
    item: Item

    def path(self, name: str) -> Path:
        return self.tree / name

    def ref(self, ref: EpisodeRef, name: str) -> EpisodeRef:
        return replace(ref, uri=str(self.path(name)), root=str(self.tree))

    def name(self, path: Path) -> str:
        name = path.relative_to(self.tree).as_posix()
        return "" if name == "." else name

    def told(self, text: str) -> str:
        """A message with the archive's path in place of the cache's."""
        return text.replace(f"{self.tree}/", f"{self.file}!/").replace(str(self.tree), str(self.file))

    def kept_for(self, video: Video) -> Video:
        def frames(size: int | None) -> Iterator[np.ndarray]:
            with self.renaming():
                yield from video.frames(size)

        return Video(frames, video.turned, video.thin and (lambda share: self.kept_for(thinned(video, share))))

    @contextmanager
    def renaming(self) -> Iterator[None]:
        try:
            yield
        except (BadEpisode, UserError) as error:
            raise type(error)(self.told(str(error))) from error
        except OSError as error:
            if isinstance(error.filename, str):
                error.filename = self.told(error.filename)
            raise


@contextmanager
def _opened(file: Path) -> Iterator[_Unpacked]:
    digest, stem = _digest(file), SUFFIX.sub("", file.name)
    name = "archive-" + hashlib.sha256(f"{LAYOUT} {digest} ".encode() + os.fsencode(stem)).hexdigest()[:40]
    shelf = Shelf()
    item = shelf.find(name) or _unpack(file, digest, shelf, name, f"{TREE}/{stem}")
    unpacked = _Unpacked(file, item.path.absolute() / TREE / stem, item)
    with unpacked.renaming(), within(unpacked.tree):
        yield unpacked


def _unpack(file: Path, digest: str, shelf: Shelf, name: str, folder: str) -> Item:
    def fill(building: Path) -> None:
        unpack(file, listed, building / folder)
        if _digest(file) != digest:
            raise BadEpisode("changed while it was unpacked; ingest it again when it is complete")

    try:
        listed = contents(file)
        if listed.size > (limit := shelf.limit()):
            raise BadEpisode(
                f"unpacks to {listed.size / GB:.2f} GB, and {shelf.root} may take {limit / GB:.2f} GB; "
                f"raise UWM_CACHE_GB, or {BY_HAND}"
            )
        sizes = {f"{folder}/{member}": size for member, size in listed.files.items()}
        return cast(Item, shelf.hold(name, sizes, fill))
    except BadEpisode as error:
        raise BadEpisode(f"{file.name} {error}") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        remedy = "free some space there, or let UWM_CACHE name another folder"
        raise BadEpisode(f"{file.name} cannot be unpacked in {shelf.root}: {error.strerror}; {remedy}") from None


def _digest(file: Path) -> str:
    def read(file: Path) -> list[Finding]:
        sha = hashlib.sha256()
        with read_aloud(file, "read") as opened:
            while piece := opened.read(PIECE):
                sha.update(piece)
        return [Finding(sha.hexdigest())]

    return findings_of("archive", file, read)[0].digest


def _inside(file: Path, name: str) -> Path:
    return Path(f"{file}!/{name}" if name else f"{file}!")


def _packed(*values: str | int) -> str:
    """One word, as the cache stores them."""
    return quote(json.dumps(values))


def _values(finding: Finding) -> list[Any]:
    return list(json.loads(unquote(finding.digest)))
