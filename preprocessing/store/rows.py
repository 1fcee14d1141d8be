"""Rows of a store's tables as types. No library is imported, so that a policy may name them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NotRequired, TypedDict

from preprocessing.contracts.interface import NamedWidth
from preprocessing.episode import Fit
from preprocessing.store.statistics import Statistics, StatisticsColumns


def printable(text: str) -> str:
    """Return the text with everything escaped that is not Unicode: it can be stored and shown anywhere.

    A file name's bytes need not be UTF-8, and JSON may hold half a surrogate pair; Python keeps both as surrogates.
    """
    return text.encode("utf-8", "backslashreplace").decode()


class CountedRepair(TypedDict):
    """How many episodes have a repair (preprocessing.episode.Repair). ``field`` is None before version 0.2."""

    field: str | None
    text: str
    episodes: int


class CountedRepairs:
    """Counts the repairs of catalogue rows. An episode with several encoders counts once."""

    def __init__(self) -> None:
        self._episodes: Counter[tuple[str | None, str]] = Counter()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Count rows; all those of an episode at once."""
        for row in {row["id"]: row for row in rows}.values():
            texts = row["repairs"] or []
            fields = row["repair_fields"] or [None] * len(texts)
            self._episodes.update(set(zip(fields, texts, strict=True)))

    def counted(self) -> list[CountedRepair]:
        """Return the repairs, the most frequent first."""
        return [
            {"field": field, "text": text, "episodes": count} for (field, text), count in self._episodes.most_common()
        ]


class LocationRow(TypedDict):
    """Rows ``[start, start + count)`` of one array, and the CRC-32C of their bytes in hexadecimal."""

    array: str
    start: int
    count: int
    checksum: str


class CameraRow(TypedDict):
    """One camera of an episode: its segments of up to 64 frames, in order."""

    name: str
    segments: list[LocationRow]


class PictureRow(TypedDict):
    """A camera's frames as recorded: upright, in square pixels."""

    camera: str
    height: int
    width: int


class Span(TypedDict):
    """Frames ``[first, stop)`` of an episode."""

    first: int
    stop: int


class NamedText(TypedDict):
    """A recorded text and the field that holds it."""

    name: str
    text: str


class EpisodeColumns(TypedDict):
    """The columns of CATALOGUE that are the same for every encoding of an episode."""

    id: str
    uri: str
    index: int
    format: str
    frames: int
    fps: float
    embodiment: str
    instruction: str | None
    success: bool | None
    action_dim: int
    action_layout: str
    proprio: list[NamedWidth]
    contract: str | None
    repairs: list[str]
    repair_fields: list[str] | None
    source: str | None
    split: str | None
    signals: list[NamedWidth] | None
    texts: list[NamedText] | None
    spans: list[Span] | None
    fingerprint: str | None
    image_size: int | None
    fit: Fit | None
    pictures: list[PictureRow] | None


class EpisodeRow(EpisodeColumns):
    """A row of CATALOGUE: one episode in one encoding."""

    key: str
    encoder: str
    encoder_digest: str
    cameras: list[CameraRow]
    steps: LocationRow


class TrainingRow(EpisodeRow):
    """A row of CATALOGUE with the statistics of its steps; None if it has no steps."""

    statistics: Statistics | None


class BriefRow(TypedDict):
    """The columns of CATALOGUE by which a person recognises an episode."""

    key: str
    id: str
    uri: str
    index: int
    frames: int
    encoder: str
    encoder_digest: str


class StatisticsRow(StatisticsColumns):
    """A row of STATISTICS. Few cameras' frames are reconstructed to measure their PSNR."""

    key: str
    array: str
    psnr: NotRequired[float | None]
    psnr_frames: NotRequired[int | None]


class QuarantineRow(TypedDict):
    """A row of QUARANTINE."""

    key: str
    id: str
    uri: str
    index: int
    reason: str
    reader: str | None
    filter: str | None


class RemovedRow(TypedDict):
    """A row of REMOVED."""

    id: str
    uri: str
    index: int


class InstructionRow(TypedDict):
    """A row of INSTRUCTIONS."""

    text: str
    encoder: str
    encoder_digest: str
    vector: list[float]
