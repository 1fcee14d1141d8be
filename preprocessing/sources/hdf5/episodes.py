"""Episodes that share an HDF5 file, each a group in it: their names in order, and what a scan finds of each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import h5py

from preprocessing.episode import EpisodeRef
from preprocessing.errors import BadEpisode
from preprocessing.sources.scan_cache import Finding, file_digest

Names = Callable[[h5py.File], list[str]]  # the groups' names, in order; raises BadEpisode if there are none


def find_each(file: Path, names: Names, digest: Callable[[h5py.File, str], str]) -> list[Finding]:
    """The digest of each episode, or why it cannot be read; one finding if that is true of the whole file."""
    try:
        with h5py.File(file, "r") as opened:
            return [_finding(file, opened, name, digest) for name in names(opened)]
    except (BadEpisode, OSError, RuntimeError) as error:
        return [Finding(file_digest(file), f"not a readable file of demonstrations: {error}")]


def name_of(ref: EpisodeRef, names: Names) -> str:
    """The episode's group. Raises BadEpisode if the file has fewer than when it was listed."""
    found = names_in(Path(ref.uri), names)
    if ref.index >= len(found):
        raise BadEpisode(f"the file now has only {len(found)} demonstrations, fewer than when it was listed")
    return found[ref.index]


def names_in(file: Path, names: Names) -> list[str]:
    """All its groups' names."""
    return _remembered(file, file.stat().st_mtime_ns, names)


@lru_cache(maxsize=4)  # the episodes of a file are read one after the other, and there may be 60,000
def _remembered(file: Path, _modified: int, names: Names) -> list[str]:
    with h5py.File(file, "r") as opened:
        return names(opened)


def _finding(file: Path, opened: h5py.File, name: str, digest: Callable[[h5py.File, str], str]) -> Finding:
    try:
        return Finding(digest(opened, name))
    except (BadEpisode, OSError, RuntimeError) as error:
        broken = hashlib.sha256(f"{_whole(file, file.stat().st_mtime_ns)} {name}".encode()).hexdigest()
        return Finding(broken, f"{name} cannot be read: {error}")


@lru_cache(maxsize=4)
def _whole(file: Path, _modified: int) -> str:
    return file_digest(file)
