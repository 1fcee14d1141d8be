"""Which samples there are, and of which source and embodiment.

A window at frame t of an episode reads the observed frames up to t, the actions t .. t+L-1, and the future frames
from t+L on (L is the action chunk; paper section III). Every frame starts a window: before the first and after the
last frame the nearest frame stands in, and actions past the end are masked.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from preprocessing.contracts.interface import Promise
from preprocessing.errors import UserError
from preprocessing.store.statistics import MINIMUM_RANGE, Normalizer, normalizers

HELD_OUT = ("val", "test")
FARTHEST = 5.0  # times a column's scale that other data may reach: beyond, it is of another unit


@dataclass(frozen=True)
class Embodiment:
    """How one embodiment's episodes fill the model's slots, and how its numbers are normalised.

    Slot i of the model's cameras is ``cameras[i]``, empty where this robot has none for it; actions and proprioception
    are padded on the right.
    """

    index: int
    cameras: tuple[str, ...]
    action_dim: int
    action_layout: str
    proprio: tuple[tuple[str, int], ...]
    fps: float
    action_normalizer: Normalizer
    proprio_normalizer: Normalizer

    @property
    def proprio_dim(self) -> int:
        return sum(width for _, width in self.proprio)

    @property
    def seen(self) -> tuple[str, ...]:
        """Its cameras, without the slots that have none."""
        return tuple(name for name in self.cameras if name)

    @property
    def promise(self) -> Promise:
        return Promise(
            fps=self.fps,
            cameras=self.seen,
            proprio=dict(self.proprio),
            action_dim=self.action_dim,
            action_layout=json.loads(self.action_layout),
        )

    def misfits(self, data: Embodiment, ranges: bool = True) -> list[str]:
        """Why this one, as a model knows it, is not what the data are of, a phrase each with both values.

        Videos are always. Without ``ranges``, columns may hold other values than they did.
        """
        if not (self.action_dim or self.proprio or data.action_dim or data.proprio):
            return []
        found = self.promise.differences(data.promise)
        if not set(self.cameras) & set(data.cameras):
            found.append(f"cameras are {', '.join(data.cameras)}, not {', '.join(self.seen)}")
        if found or not ranges:  # columns that do not correspond cannot be compared
            return found
        columns = [f"action[{i}]" for i in range(self.action_dim)]
        columns += [f"{part}[{i}]" for part, width in self.proprio for i in range(width)]
        mine, theirs = (
            [*zip(one.offset, one.scale, strict=True), *zip(two.offset, two.scale, strict=True)]
            for one, two in ((e.action_normalizer, e.proprio_normalizer) for e in (self, data))
        )
        for column, (offset, scale), (other, spread) in zip(columns, mine, theirs, strict=True):
            if abs(other - offset) + spread > FARTHEST * scale and spread > MINIMUM_RANGE:
                found.append(f"{column} is {other:.3g} ± {spread:.3g}, not {offset:.3g} ± {scale:.3g}")
        return found


def describe(
    name: str,
    rows: list[dict[str, Any]],
    index: int,
    slots: int | None,
    actions: Literal["extremes", "quantiles"] = "extremes",
) -> Embodiment:
    """The embodiment of these catalogue rows; UserError where its episodes do not agree with one another.

    It has as many cameras as there are ``slots``; None: all. ``actions`` says what of them goes to -1 and 1.
    """
    first = rows[0]
    promise = Promise.of(first)
    for row in rows:
        if broken := promise.differences(Promise.of(row)):
            raise UserError(
                f"embodiment {name}: of {row['uri']} #{row['index']}, {'; '.join(broken)} as of {first['uri']}; "
                f"give one of them its own name with --contract (embodiment: NAME)"
            )
    cameras = list(dict.fromkeys(camera["name"] for row in rows for camera in row["cameras"]))
    statistics = [row["statistics"] for row in rows if row["statistics"] is not None]
    width = sum(part["width"] for part in first["proprio"])
    action, proprio = normalizers(statistics, first["action_dim"], width, actions)
    return Embodiment(
        index=index,
        cameras=tuple(cameras[:slots]),
        action_dim=first["action_dim"],
        action_layout=first["action_layout"],
        proprio=tuple((part["name"], part["width"]) for part in first["proprio"]),
        fps=first["fps"],
        action_normalizer=action,
        proprio_normalizer=proprio,
    )


def by_embodiment(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Catalogue rows by the name of their embodiment."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["embodiment"], []).append(row)
    return groups


def split(
    rows: list[dict[str, Any]], instructions: list[str] | None, share: float, validation: bool
) -> list[dict[str, Any]]:
    """The training or the held-out rows, of the given instructions alone where there are any given.

    What a data set itself holds out (its split is called something like "val" or "test") is never trained on.
    """
    return [
        row
        for row in rows
        if (instructions is None or row["instruction"] in instructions)
        and ((row["split"] or "").startswith(HELD_OUT) or is_validation(row["id"], share)) == validation
    ]


def spans(row: dict[str, Any]) -> list[tuple[int, int]]:
    """The frames ``[first, stop)`` of a catalogue row that windows may use; none reaches over two of them."""
    found = [(span["first"], span["stop"]) for span in row["spans"] or ()]
    return found if row["spans"] is not None else [(0, row["frames"])]


def source_of(row: dict[str, Any], mixture: dict[str, float]) -> str | None:
    """What a catalogue row counts as: the first key of the mixture that is its source, the name of that folder, or its
    embodiment; None where no key is. Without a mixture, its embodiment.
    """
    if not mixture:
        return row["embodiment"]
    names = {row["source"], PurePath(row["source"] or "").name, row["embodiment"]}
    return next((key for key in mixture if key in names), None)


def sources(rows: list[dict[str, Any]], mixture: dict[str, float]) -> list[str]:
    """What each row counts as; UserError where the mixture leaves a row unnamed, or gives a share to nothing."""
    named = [source_of(row, mixture) for row in rows]
    for row, name in zip(rows, named, strict=True):
        if name is None:
            raise UserError(
                f"mixture: names neither {row['source']} nor its embodiment {row['embodiment']}, of which there are "
                f"episodes; give it a share (mixture.{row['embodiment']}=0.5), or 0 to leave it out"
            )
    if unknown := [key for key, share in mixture.items() if share and key not in named]:
        held = sorted({name for row in rows for name in (row["source"], row["embodiment"]) if name})
        raise UserError(f"mixture: {unknown[0]} is no source or embodiment to train on; there are {', '.join(held)}")
    return [name for name in named if name is not None]


def left_out(row: dict[str, Any], mixture: dict[str, float]) -> bool:
    """Whether the mixture gives a row the share 0."""
    name = source_of(row, mixture)
    return name is not None and mixture.get(name) == 0


def is_validation(episode_id: str, share: float) -> bool:
    """Whether an episode is held out: a pure function of its id, so it never moves as data is added."""
    return int(hashlib.sha256(f"split:{episode_id}".encode()).hexdigest()[:8], 16) / 2**32 < share
