"""What a reader is, and what is known of its format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from preprocessing.episode import Episode, EpisodeRef

# Foreign bytes break readers in unforeseeable ways; one bad file must not end an ingest.
BREAKS = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


class Reader(Protocol):
    """The functions of a reader module. Apart from ``detect``, they may raise anything in ``BREAKS``."""

    def detect(self, path: Path) -> bool:
        """Whether a file or folder holds this format; a folder's subfolders are asked about separately.

        Looks at names and first bytes only. Raises OSError where files cannot be read, PermissionError among them.
        """

    def scan(self, path: Path) -> Iterator[EpisodeRef]:
        """List the episodes at a path that ``detect`` accepted: bytes are hashed, nothing is decoded.

        An episode that cannot be read is listed with its ``problem``. Raises UserError or BadEpisode where the data set
        as a whole cannot be listed.
        """

    def load(self, ref: EpisodeRef) -> Episode:
        """Return the episode, in any process that sees the files. Frames are decoded only while iterated.

        Raises BadEpisode, or UserError where the data set as a whole cannot be read.
        """

    def digest(self, ref: EpisodeRef) -> str:
        """Hash the episode's bytes as they are on disk now, never from the cache.

        Raises BadEpisode where they no longer are such an episode, FileNotFoundError where they are gone.
        """


@dataclass(frozen=True)
class Format:
    """A reader, and what ``find`` and ``load`` have to know about its format."""

    reader: Reader
    looks_like: str  # the files to expect, for messages
    actionless: bool = False  # video without a robot's log
    # Whether everything below a folder belongs to its data set: LeRobot's MP4 files are not episodes of their own.
    closed: Callable[[Path], bool] | None = None
    # The folders next to its loose files that belong to a data set.
    owns: Callable[[Path], list[Path]] | None = None
