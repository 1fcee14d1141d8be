"""What the store holds of an episode already: latents that a new contract does not change are used again.

A contract mostly says what numbers mean. Frames are encoded again only if it turns a camera or its colours, adds one,
or changes the rate that a video is thinned from. All other changes make new catalogue rows, with new steps, that point
to the latents of the old ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import pyarrow as pa

from preprocessing import sources
from preprocessing.contracts.contract import DataContract
from preprocessing.episode import EpisodeRef, Fit
from preprocessing.store.keys import work_key
from preprocessing.store.rows import CameraRow, PictureRow, Span, StatisticsRow
from preprocessing.store.snapshot import Snapshot


class Base(TypedDict):
    """An episode's row under another contract, as far as the process that reads the episode needs it."""

    key: str
    contract: str | None  # JSON
    frames: int
    cameras: list[str]
    repairs: list[tuple[str, str]]  # (field, text)
    spans: list[Span] | None
    fingerprint: str | None


class Stored:
    """The current rows of a snapshot, by episode and encoder, and the statistics of their cameras."""

    def __init__(self, head: Snapshot):
        self._head = head
        self._ids: set[str] | None = None
        self._table: pa.Table | None = None  # read when the first known episode is asked for
        self._places: dict[tuple[str, str], int] = {}
        self._of_key: dict[str, int] = {}
        self._statistics: dict[tuple[str, str], int] = {}
        self._statistics_table: pa.Table | None = None

    def base(self, ref: EpisodeRef, encoder: str, image_size: int, fps: float | None, fit: Fit) -> Base | None:
        """Return the row of the episode with this encoder's digest, if it was made of frames of this size."""
        if self._ids is None:
            self._ids = set(self._head.episodes(["id"])["id"].to_pylist())
        if ref.id not in self._ids:
            return None
        table = self._read()
        place = self._places.get((ref.id, encoder))
        if place is None:
            return None
        [row] = table.slice(place, 1).to_pylist()
        contract = DataContract.model_validate_json(row["contract"]) if row["contract"] else None
        if row["key"] != work_key(ref.id, contract, encoder, image_size, fps, fit):
            return None  # another size, rate or fit
        texts = row["repairs"] or []
        return {
            "key": row["key"],
            "contract": row["contract"],
            "frames": row["frames"],
            "cameras": [camera["name"] for camera in row["cameras"]],
            "repairs": [*zip(row["repair_fields"] or [""] * len(texts), texts, strict=True)],
            "spans": row["spans"],
            "fingerprint": row["fingerprint"],
        }

    def cameras(self, key: str, names: dict[str, str]) -> tuple[list[CameraRow], list[PictureRow], list[StatisticsRow]]:
        """Return a row's cameras under other names, as ``names`` maps them to its own."""
        [row] = self._read().slice(self._of_key[key], 1).to_pylist()
        segments = {camera["name"]: camera["segments"] for camera in row["cameras"]}
        pictures = {picture["camera"]: picture for picture in row["pictures"] or ()}
        if self._statistics_table is None:
            self._statistics_table = self._head.all_statistics()
            columns = (self._statistics_table[name].to_pylist() for name in ("key", "array"))
            self._statistics = {pair: place for place, pair in enumerate(zip(*columns, strict=True))}
        places = {new: self._statistics.get((key, old)) for new, old in names.items()}
        rows = {new: self._statistics_table.slice(at, 1).to_pylist()[0] for new, at in places.items() if at is not None}
        return (
            [{"name": new, "segments": segments[old]} for new, old in names.items()],
            [pictures[old] | {"camera": new} for new, old in names.items() if old in pictures],
            [row | {"array": new} for new, row in rows.items()],
        )

    def _read(self) -> pa.Table:
        if self._table is None:
            columns = ("id", "encoder_digest", "key", "contract", "frames", "cameras", "repairs", "repair_fields")
            self._table = self._head.episodes([*columns, "spans", "fingerprint", "pictures"])
            pairs = (self._table[name].to_pylist() for name in ("id", "encoder_digest"))
            self._places = {pair: place for place, pair in enumerate(zip(*pairs, strict=True))}
            self._of_key = {key: place for place, key in enumerate(self._table["key"].to_pylist())}
        return self._table


def reusable(
    ref: EpisodeRef, bases: Mapping[str, Base], contract: DataContract | None, fps: float | None
) -> dict[str, dict[str, str]]:
    """Return, for each encoder whose latents can be used again, the episode's cameras with their names in the base."""
    if not bases:
        return {}
    before = [DataContract.model_validate_json(b["contract"]) if b["contract"] else None for b in bases.values()]
    now, *then = sources.pictures(ref, [contract, *before], fps)
    found = {}
    for (encoder, base), shown in zip(bases.items(), then, strict=True):
        old = {picture: name for name, picture in shown.items() if name in base["cameras"]}
        # A camera that was dead or broken then is so still, under whatever name.
        names = {name: old[picture] for name, picture in now.items() if picture in old}
        if names and all(picture in shown.values() for picture in now.values()):
            found[encoder] = names
    return found
