"""Walk through a source: the data sets in it, and what is there but is not read.

Every byte goes in once. A folder of a data set belongs to it as a whole; of a hub's cache, one snapshot is read and its
blobs only through that. A loose file belongs to the first format that recognises it. What looks like data and cannot be
read is a problem, which an ingest quarantines; other files are counted by kind.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from preprocessing.errors import BadEpisode, UserError
from preprocessing.sources import archive
from preprocessing.sources.reader import BREAKS, Format
from preprocessing.sources.untrusted.files import HEAD, TELLING, leads_out, listing, opened, pointer_of, within

# Files that come with data and hold none.
SIDE_CARS = {".md", ".rst", ".json", ".yaml", ".yml", ".toml", ".xml", ".html", ".css", ".js", ".py", ".sh", ".ipynb"}
SIDE_CARS |= {".pdf", ".bib", ".srt", ".vtt", ".log", ".md5", ".sha256", ".cfg", ".ini", ".lock", ".thm"}
SIDE_CARS |= {".db3-wal", ".db3-shm"}
ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|change|author|contribut|makefile|dockerfile)[^/]*|.*sums"
)
RECORDINGS = {".mcap", ".bag", ".db3", ".tfrecord"}  # which no reader recognises by its name alone
STORE = ("manifests", "transactions", "snapshots", "chunks")  # a latent store is no source
KINDS = 8  # named in a note


@dataclass
class Survey:
    """What a source holds."""

    root: Path
    places: list[tuple[str, Path]] = field(default_factory=list)  # format, and the path for ``scan``
    problems: dict[Path, str] = field(default_factory=dict)  # files and folders that cannot be read, and why
    unread: Counter[str] = field(default_factory=Counter)  # other files that are not read, by suffix
    copies: dict[Path, str] = field(default_factory=dict)  # files that repeat another one, and its name
    snapshots: list[str] = field(default_factory=list)  # what a hub's cache holds besides what is read

    @property
    def paths(self) -> list[Path]:
        """The paths of all data sets and problems."""
        return [*(path for _, path in self.places), *self.problems]

    @property
    def notes(self) -> list[str]:
        """Sentences on what is not read although nothing is wrong with it."""
        notes = list[str]()
        if count := self.unread.total():
            ordered = sorted(self.unread.items(), key=lambda item: (-item[1], item[0]))
            kinds = [f"{number} {kind}" for kind, number in ordered[:KINDS]]
            if len(self.unread) > KINDS:
                kinds.append(f"{len(self.unread) - KINDS} other kinds")
            notes.append(f"{_number(count, 'file')} of kinds that are not read: {', '.join(kinds)}")
        if self.copies:
            copy, whole = next(iter(self.copies.items()))
            example = f"{copy.name} repeats {whole}"
            notes.append(f"{_number(len(self.copies), 'proxy or preview file')} not read: {example}")
        return [*notes, *self.snapshots]


def walk(start: Path, formats: Mapping[str, Format], *, every: bool, looked: Callable[[], object]) -> Survey:
    """Survey a folder or a file. ``every``: these are all formats, so what none of them reads is told."""
    found = Survey(start)
    with within(start):
        _Walk(found, formats, every, looked).visit(start)
    return found


@dataclass
class _Walk:
    found: Survey
    formats: Mapping[str, Format]
    every: bool
    looked: Callable[[], object]
    unpacked: bool = False
    seen: set[Path] = field(default_factory=set)

    def visit(self, path: Path) -> None:
        self.looked()
        if path.is_dir():
            if path.resolve() in self.seen:  # a link that leads back up
                return
            self.seen.add(path.resolve())
        if snapshots := _snapshots(path):
            self._hub(snapshots)
            return
        if path.is_dir() and all((path / name).is_dir() for name in STORE):
            return
        loose = list[Format]()
        try:
            for name, format in self.formats.items():
                if format.reader.detect(path):
                    self.found.places.append((name, path))
                    if format.closed and format.closed(path):
                        return
                    loose.append(format)
            if path.is_dir():
                self._inside(path, loose)
            elif not loose:
                self._unclaimed(path)
        except BREAKS as error:
            self.found.problems[path] = f"cannot be looked into ({error}); check its permissions"

    def _inside(self, folder: Path, loose: list[Format]) -> None:
        """The loose files that no reader reads, and the folders."""
        there = listing(folder)
        self.found.copies |= there.copies
        if self.every:
            self.found.problems |= there.refused
        for file in there.files:
            self.looked()
            told = self.every or archive.is_archive(file)
            if told and not any(format.reader.detect(file) for format in loose):
                self._unclaimed(file)
        owned = {child for format in loose if format.owns for child in format.owns(folder)}
        for child in there.folders:
            if child not in owned:
                self.visit(child)

    def _archive(self, file: Path) -> None:
        """What an archive holds; one that holds nothing to read counts as a file that is not read."""
        if self.unpacked:
            self.found.problems[file] = "an archive in an archive; unpack the outer one yourself and ingest the folder"
            return
        try:
            rows = archive.look(file, " ".join(self.formats), self._unpacked)
        except (BadEpisode, UserError) as error:
            self.found.problems[file] = str(error)
            return
        except BREAKS as error:
            self.found.problems[file] = f"cannot be unpacked: {error}"
            return
        if all(what == "unread" for what, *_ in rows):
            self.found.unread[file.suffix.lower()] += self.every
            return
        for what, text, path in rows:
            if what == "problem":
                self.found.problems[path] = text
            elif what == "unread":
                count, kind = text.split(" ", 1)
                self.found.unread[kind] += int(count)
            else:
                self.found.places.append((text, path))

    def _unpacked(self, tree: Path) -> Iterator[tuple[str, str, Path]]:
        found = Survey(tree)
        _Walk(found, self.formats, self.every, self.looked, unpacked=True).visit(tree)
        yield from (("place", format, path) for format, path in found.places)
        yield from (("problem", problem, path) for path, problem in found.problems.items())
        yield from (("unread", f"{count} {kind}", tree) for kind, count in found.unread.items())

    def _unclaimed(self, file: Path) -> None:
        name, kind = file.name.lower(), file.suffix.lower()
        if archive.is_archive(file):
            self._archive(file)
            return
        if kind == ".dvc":
            if not file.with_suffix("").exists():
                self.found.problems[file] = "its data is in DVC, but not on this machine; fetch it with `dvc pull`"
            return
        if kind in SIDE_CARS or ABOUT.fullmatch(name):
            return
        if problem := None if kind in TELLING else _problem(file, kind in RECORDINGS):
            self.found.problems[file] = problem
        else:
            self.found.unread[kind if re.fullmatch(r"\.\w{1,12}", kind, re.ASCII) else "without a suffix"] += 1

    def _hub(self, snapshots: Path) -> None:
        """One snapshot of a data set in a hub's cache: the current one, or else the newest."""
        every = listing(snapshots).folders
        current = ""
        with suppress(OSError, BadEpisode), opened(snapshots.parent / "refs" / "main") as main:
            current = main.read(HEAD).decode("ascii", "replace").strip()
        chosen = next((one for one in every if one.name == current), None)
        chosen = chosen or max(every, key=lambda one: one.stat().st_mtime, default=None)
        if chosen:
            self.visit(chosen)
        if len(every) > 1 and chosen:
            text = f"{snapshots.parent.name}: of {len(every)} snapshots, {chosen.name} is read"
            self.found.snapshots.append(f"{text}; to read another, give its folder as the source")


def _snapshots(path: Path) -> Path | None:
    """The folder of snapshots, if the path is that or its data set's folder in a hub's cache.

    The layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
    """
    for place in (path, path / "snapshots"):
        if place.name == "snapshots" and place.is_dir() and (place.parent / "blobs").is_dir():
            return None if leads_out(place) else place
    return None


def _problem(file: Path, recording: bool) -> str | None:
    """Why a file is not what its name says, or cannot be read."""
    try:
        with opened(file) as begin:
            head = begin.read(HEAD)
    except (OSError, BadEpisode) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if pointer := pointer_of(head):
        return f"is {pointer}"
    if recording:
        return "does not hold what its name says" if head else "is empty"
    return None


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
