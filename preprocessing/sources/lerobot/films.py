"""Where the films of a LeRobot data set are: the folders that hold them, by the feature they are named after.

They belong in ``videos/chunk-000/FEATURE`` (v2) or ``videos/FEATURE/chunk-000`` (v3). Converters also write ``video``,
swap the two levels, or name folders after the camera alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from preprocessing.sources.untrusted.files import leads_out

CHUNK = re.compile(r"chunk[-_]?(\d{1,9})")
USUAL = "videos"
NO_FILMS = {"data", "meta", "images"}  # the last may hold a folder of frames for each episode


@dataclass(frozen=True)
class FilmFolders:
    """Folders that hold films, by their name, and the names of cameras by feature."""

    folders: dict[str, list[Path]]
    short: dict[str, str]

    @classmethod
    def of(cls, root: Path, short: dict[str, str]) -> FilmFolders:
        folders: dict[str, list[Path]] = {}
        tops = [path for path in _below(root) if path.name not in NO_FILMS]
        for top in sorted(tops, key=lambda path: path.name != USUAL):
            for name, folder in _named(top):
                if _holds_film(folder):
                    folders.setdefault(name, []).append(folder)
        return cls(folders, short)

    def of_feature(self, key: str) -> list[Path]:
        """The folders of a feature's films, the usual ones first."""
        return self.folders.get(key) or self.folders.get(self.short.get(key, key), [])

    def find(self, key: str, file: str, chunk: int | None = None) -> Path | None:
        """A feature's film of this name; ``chunk`` is the number of the folder it must be in."""
        for folder in self.of_feature(key):
            numbers = [int(match[1]) for part in folder.parts[-2:] if (match := CHUNK.fullmatch(part))]
            if (
                (chunk is None or numbers in ([], [chunk]))
                and (folder / file).is_file()
                and not leads_out(folder / file)
            ):
                return folder / file
        return None

    def why_none(self, key: str, file: str, index: int) -> str:
        """Why a feature's film of this name is not read for an episode, in words that follow its camera's name."""
        outside = (leads_out(folder / file) for folder in self.of_feature(key) if (folder / file).is_file())
        return next((f": {file} {reason}" for reason in outside if reason), f" has no video for episode {index}")

    def unlisted(self, features: Iterable[str]) -> list[str]:
        """Names of folders with films that belong to no feature, depth apart."""
        known = {*features, *self.short.values()}
        return sorted(name for name in self.folders if name not in known and "depth" not in name.lower())


def _named(top: Path) -> Iterator[tuple[str, Path]]:
    """The folders in ``top/chunk-000/NAME``, ``top/NAME/chunk-000`` and ``top/NAME``, by NAME."""
    for one in _below(top):
        if CHUNK.fullmatch(one.name):
            yield from ((folder.name, folder) for folder in _below(one))
        else:
            yield one.name, one
            yield from ((one.name, folder) for folder in _below(one) if CHUNK.fullmatch(folder.name))


def _below(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(entry) for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _holds_film(folder: Path) -> bool:
    with os.scandir(folder) as entries:  # ends at the first one
        return any(entry.name.endswith(".mp4") for entry in entries)
