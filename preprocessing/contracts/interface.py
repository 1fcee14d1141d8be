"""What is the same for all of an embodiment's episodes: in a source, in a store, and between a policy and its robot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypedDict

from pydantic import BaseModel, ConfigDict

from preprocessing.episode import ActionBlock
from preprocessing.errors import UserError

SAME_RATE = 0.05  # rates that differ by less are one: 30 and 29.97
UNTOLD = {None, "unknown", "other"}  # what a block leaves open


class NamedWidth(TypedDict):
    """Some neighbouring columns of an episode's steps: their name, and how many they are."""

    name: str
    width: int


class InterfaceRow(TypedDict):
    """The columns of a catalogue row from which an interface is made."""

    embodiment: str
    fps: float
    cameras: Any  # CameraRow each, or their names alone
    proprio: list[NamedWidth]
    action_dim: int
    action_layout: str  # JSON list of ActionBlock


class Interface(BaseModel):
    """What is the same for all of an embodiment's episodes as they are stored, and for what its policy sees and does.

    ``proprio`` is a width by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fps: float
    cameras: tuple[str, ...]
    proprio: dict[str, int]
    action_dim: int
    action_layout: tuple[ActionBlock, ...]

    @classmethod
    def of(cls, row: InterfaceRow) -> Interface:
        """Of an episode's catalogue row."""
        return cls(
            fps=row["fps"],
            cameras=tuple(camera["name"] if isinstance(camera, dict) else camera for camera in row["cameras"]),
            proprio={part["name"]: part["width"] for part in row["proprio"]},
            action_dim=row["action_dim"],
            action_layout=json.loads(row["action_layout"]),
        )

    def differences(self, other: Interface) -> list[str]:
        """How ``other`` breaks it, a phrase each. What one leaves unknown the other may say, and cameras may differ.

        Videos promise nothing.
        """
        if not (self.action_dim or self.proprio or other.action_dim or other.proprio):
            return []
        found = []
        if other.action_dim != self.action_dim:
            found.append(f"actions have {other.action_dim} columns, not {self.action_dim}")
        else:
            found += _meanings(self.action_layout, other.action_layout)
        for name in dict.fromkeys([*self.proprio, *other.proprio]):
            if (width := other.proprio.get(name)) != (expected := self.proprio.get(name)):
                found.append(f"proprioception {name} has {width or 'no'} columns, not {expected or 'any'}")
        if abs(other.fps - self.fps) > SAME_RATE * self.fps:
            found.append(f"the rate is {other.fps:g} Hz, not {self.fps:g}")
        return found

    def require(self, other: Interface, who: str) -> None:
        """UserError where ``other`` breaks it, or has a camera that is not among these: what a policy asks for."""
        found = self.differences(other)
        found += [f"there is no camera {name}" for name in other.cameras if name not in self.cameras]
        if found:
            raise UserError(f"{who} does not keep the contract that this policy was trained under: {'; '.join(found)}")


class Interfaces:
    """By source and embodiment: what the first of its episodes promised holds for the others."""

    def __init__(self) -> None:
        self._interfaces: dict[tuple[str, str], Interface] = {}

    def add(self, source: str, row: InterfaceRow) -> None:
        if (source, row["embodiment"]) not in self._interfaces:
            self._interfaces[source, row["embodiment"]] = Interface.of(row)

    def broken_by(self, source: str, row: InterfaceRow) -> str | None:
        """Why an episode's catalogue row does not belong with the others, if so."""
        interface = self._interfaces.get((source, row["embodiment"]))
        if not interface or not (differences := interface.differences(Interface.of(row))):
            return None
        return (
            f"is not like the other {row['embodiment']} episodes of {source}: {'; '.join(differences)}; if that is "
            f"right, give it a name of its own (--contract, embodiment: NAME)"
        )


def _meanings(mine: tuple[ActionBlock, ...], theirs: tuple[ActionBlock, ...]) -> Iterator[str]:
    if [block.size for block in mine] != [block.size for block in theirs]:
        if any(block.kind != "other" for block in (*mine, *theirs)):
            yield f"actions are made of {_sizes(theirs)} columns, not of {_sizes(mine)}"
        return
    for a, b in zip(mine, theirs, strict=True):
        for field in ("kind", "representation", "mode", "frame", "unit", "gripper_one_means"):
            expected, found = getattr(a, field), getattr(b, field)
            if expected != found and not {expected, found} & UNTOLD:
                yield f"the action's {a.name} is {found} ({field}), not {expected}"


def _sizes(layout: tuple[ActionBlock, ...]) -> str:
    return " + ".join(str(block.size) for block in layout)
