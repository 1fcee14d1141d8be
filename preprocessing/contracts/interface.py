"""The interface of an embodiment: what all its episodes share, and what its policy requires of a robot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypedDict

from pydantic import BaseModel, ConfigDict, ValidationError

from preprocessing.episode import ActionBlock
from preprocessing.errors import UserError

SAME_RATE = 0.05  # relative difference below which rates are equal: 30 and 29.97
UNSPECIFIED = {None, "unknown", "other"}  # values of a block's fields that are compatible with any other


class NamedWidth(TypedDict):
    """A named block of consecutive columns of the steps."""

    name: str
    width: int


class InterfaceRow(TypedDict):
    """The columns of a catalogue row that make up an interface."""

    embodiment: str
    fps: float
    cameras: Any  # list of CameraRow, or the names alone
    proprio: list[NamedWidth]
    action_dim: int
    action_layout: str  # JSON list of ActionBlock


class Interface(BaseModel):
    """What all stored episodes of an embodiment share, and what its policy observes and commands.

    ``proprio`` maps names to widths.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fps: float
    cameras: tuple[str, ...]
    proprio: dict[str, int]
    action_dim: int
    action_layout: tuple[ActionBlock, ...]

    @classmethod
    def of(cls, row: InterfaceRow) -> Interface:
        """Return the interface of an episode's catalogue row."""
        return cls(
            fps=row["fps"],
            cameras=tuple(camera["name"] if isinstance(camera, dict) else camera for camera in row["cameras"]),
            proprio={part["name"]: part["width"] for part in row["proprio"]},
            action_dim=row["action_dim"],
            action_layout=json.loads(row["action_layout"]),
        )

    @classmethod
    def parse(cls, text: str, where: str) -> Interface:
        """Return the interface in a JSON text. Raises UserError, in one line, if it holds none."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            known = f"; it has the fields {', '.join(cls.model_fields)}" if first["type"] != "json_invalid" else ""
            raise UserError(f"{where}: {field and f'{field}: '}{first['msg']}{known}") from None

    def differences(self, other: Interface) -> list[str]:
        """Return how ``other`` breaks this interface, as phrases.

        An unknown value fits any other, and cameras may differ. Videos without actions and proprio never differ.
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
                found.append(f"proprio {name} has {width or 'no'} columns, not {expected or 'any'}")
        if abs(other.fps - self.fps) > SAME_RATE * self.fps:
            found.append(f"the rate is {other.fps:g} Hz, not {self.fps:g}")
        return found

    def require(self, other: Interface, who: str) -> None:
        """Raise UserError if ``other``, which ``who`` offers a policy, differs or has unknown cameras."""
        found = self.differences(other)
        found += [f"there is no camera {name}" for name in other.cameras if name not in self.cameras]
        if found:
            raise UserError(f"{who} does not fit the interface that this policy was trained on: {'; '.join(found)}")


class Interfaces:
    """The interface of each source and embodiment: that of its first episode, which the others must fit."""

    def __init__(self) -> None:
        self._interfaces: dict[tuple[str, str], Interface] = {}

    def add(self, source: str, row: InterfaceRow) -> None:
        """Take an episode's interface as that of its source and embodiment, if it is the first."""
        if (source, row["embodiment"]) not in self._interfaces:
            self._interfaces[source, row["embodiment"]] = Interface.of(row)

    def broken_by(self, source: str, row: InterfaceRow) -> str | None:
        """Return why an episode's catalogue row does not fit the others of its source, or None."""
        interface = self._interfaces.get((source, row["embodiment"]))
        if not interface or not (differences := interface.differences(Interface.of(row))):
            return None
        return (
            f"differs from the other {row['embodiment']} episodes of {source}: {'; '.join(differences)}; if that is "
            f"intended, give it its own embodiment name (--contract, embodiment: NAME)"
        )


def _meanings(mine: tuple[ActionBlock, ...], theirs: tuple[ActionBlock, ...]) -> Iterator[str]:
    if [block.size for block in mine] != [block.size for block in theirs]:
        if any(block.kind != "other" for block in (*mine, *theirs)):
            yield f"actions consist of {_sizes(theirs)} columns, not {_sizes(mine)}"
        return
    for a, b in zip(mine, theirs, strict=True):
        for field in ("kind", "representation", "mode", "frame", "unit", "gripper_one_means"):
            expected, found = getattr(a, field), getattr(b, field)
            if expected != found and not {expected, found} & UNSPECIFIED:
                yield f"the action's {a.name} is {found} ({field}), not {expected}"


def _sizes(layout: tuple[ActionBlock, ...]) -> str:
    return " + ".join(str(block.size) for block in layout)
