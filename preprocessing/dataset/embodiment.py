"""What a model knows of an embodiment: its cameras, its action and proprio columns, and their normalisation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from preprocessing.contracts.interface import Interface, InterfaceRow
from preprocessing.dataset.normalizer import MINIMUM_RANGE, Normalizer, normalizers
from preprocessing.errors import UserError
from preprocessing.store.rows import TrainingRow

FARTHEST = 5.0  # data beyond this many times a column's scale must have another unit
ROUNDING = 1e-5  # of a reach


@dataclass(frozen=True)
class Embodiment:
    """How one embodiment's episodes fill the model's slots, and how its numbers are normalised.

    Camera slot i of the model shows ``cameras[i]``; "" means that this embodiment has no camera for the slot. Actions
    and proprio are padded on the right. ``action_reach`` is the largest magnitude of each normalised action column in
    the data, at least 1: samplers clip there, so that what was trained on can be acted. Empty: 1 (older checkpoints).
    """

    index: int
    cameras: tuple[str, ...]
    action_dim: int
    action_layout: str
    proprio: tuple[tuple[str, int], ...]
    fps: float
    action_normalizer: Normalizer
    proprio_normalizer: Normalizer
    action_reach: tuple[float, ...] = ()

    def reaching(self, rows: Sequence[TrainingRow]) -> Embodiment:
        """Return this embodiment with an ``action_reach`` that covers the actions of these rows, too."""
        steps = [row["statistics"] for row in rows if row["statistics"] is not None]
        if not steps or not self.action_dim:
            return self
        low = np.min([each.min[: self.action_dim] for each in steps], axis=0)
        high = np.max([each.max[: self.action_dim] for each in steps], axis=0)
        offset, scale = np.asarray(self.action_normalizer.offset), np.asarray(self.action_normalizer.scale)
        reach = np.abs([(low - offset) / scale, (high - offset) / scale]).max(0)
        reach = np.maximum(reach, self.action_reach or 1)
        return replace(self, action_reach=tuple(np.where(reach < 1 + ROUNDING, 1.0, reach).tolist()))

    @property
    def proprio_dim(self) -> int:
        return sum(width for _, width in self.proprio)

    @property
    def seen(self) -> tuple[str, ...]:
        """The cameras without the empty slots."""
        return tuple(name for name in self.cameras if name)

    @property
    def interface(self) -> Interface:
        return Interface(
            fps=self.fps,
            cameras=self.seen,
            proprio=dict(self.proprio),
            action_dim=self.action_dim,
            action_layout=json.loads(self.action_layout),
        )

    def misfits(self, data: Embodiment, ranges: bool = True) -> list[str]:
        """Return how ``data`` differ from this embodiment as a model knows it: phrases with both values.

        Videos without actions and proprio always fit. Without ``ranges``, the columns' values are not compared.
        """
        if not (self.action_dim or self.proprio or data.action_dim or data.proprio):
            return []
        found = self.interface.differences(data.interface)
        if not set(self.cameras) & set(data.cameras):
            found.append(f"cameras are {', '.join(data.cameras)}, not {', '.join(self.seen)}")
        if found or not ranges:  # only corresponding columns can be compared
            return found
        columns = [f"action[{i}]" for i in range(self.action_dim)]
        columns += [f"{part}[{i}]" for part, width in self.proprio for i in range(width)]
        mine, theirs = (
            [*zip(one.offset, one.scale, strict=True), *zip(two.offset, two.scale, strict=True)]
            for one, two in ((e.action_normalizer, e.proprio_normalizer) for e in (self, data))
        )
        for column, (offset, scale), (other, spread) in zip(columns, mine, theirs, strict=True):
            if abs(other - offset) + spread > FARTHEST * max(scale, MINIMUM_RANGE):
                found.append(f"{column} is {other:.3g} ± {spread:.3g}, not {offset:.3g} ± {scale:.3g}")
        return found


def column_names(row: InterfaceRow) -> list[str]:
    """Return the names of the steps' columns, action then proprio: the layout's block, or the part, and a number."""
    layout = Interface.of(row).action_layout
    names = [f"{block.name}[{i}]" for block in layout for i in range(block.size)]
    if len(names) != row["action_dim"] or len(set(names)) < len(names):  # the layout tells nothing
        names = [f"action[{i}]" for i in range(row["action_dim"])]
    return names + [f"{part['name']}[{i}]" for part in row["proprio"] for i in range(part["width"])]


def describe(
    name: str,
    rows: Sequence[TrainingRow],
    index: int,
    slots: int | None,
    actions: Literal["extremes", "quantiles"] = "extremes",
) -> Embodiment:
    """Return the embodiment of these catalogue rows. Raises UserError if the episodes disagree.

    It has at most ``slots`` cameras; None: all. ``actions`` selects which of their values map to -1 and 1.
    """
    first = rows[0]
    interface = Interface.of(first)
    for row in rows:
        if broken := interface.differences(Interface.of(row)):
            raise UserError(
                f"embodiment {name}: in {row['uri']} #{row['index']} {'; '.join(broken)} as in {first['uri']}; "
                f"give one of them its own name with --contract (embodiment: NAME)"
            )
    cameras = list(dict.fromkeys(camera["name"] for row in rows for camera in row["cameras"]))
    statistics = [row["statistics"] for row in rows if row["statistics"] is not None]
    width = sum(part["width"] for part in first["proprio"])
    action, proprio = normalizers(statistics, first["action_dim"], width, actions)
    embodiment = Embodiment(
        index=index,
        cameras=tuple(cameras[:slots]),
        action_dim=first["action_dim"],
        action_layout=first["action_layout"],
        proprio=tuple((part["name"], part["width"]) for part in first["proprio"]),
        fps=first["fps"],
        action_normalizer=action,
        proprio_normalizer=proprio,
    )
    return embodiment.reaching(rows)
