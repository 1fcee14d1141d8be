"""What a data set promises: which of its fields are what, and what they mean. Stored with the data.

A contract is YAML, one a data set: ``--contract FILE``, or ``--contract NAME`` of one that is shipped
(``preprocessing/contracts``). Each field that is set overrides what a reader found; one that is left out keeps it. A
data set that gives itself a shipped contract's name is read by that contract, unless another is given.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from preprocessing.actions import with_rotations
from preprocessing.episode import ActionBlock, Episode, Representation, UserError, Video
from preprocessing.video import colours_exchanged, upside_down

SAME_RATE = 0.05  # rates that differ by less are one: 30 and 29.97
UNTOLD = {None, "unknown", "other"}  # what a block leaves open
ABOUT = {"name", "datasets", "source"}  # what a contract says about itself
SHIPPED = Path(__file__).parent / "contracts"


class DataContract(BaseModel):
    """The names on the left of a mapping, and those in lists, are the recorded ones.

    ``cameras`` gives recorded cameras their names in the store and drops the others; ``proprio`` does so for what the
    policy sees of the robot (the others are kept as signals). ``flip`` lists cameras that are stored bottom-up, ``bgr``
    those with red and blue exchanged. ``action`` lists the parts that make up the action, in this order, each the name
    of the reader's own action (``action``), of a signal or of proprioception; ``action_layout`` says what its columns
    mean, as recorded, and ``rotations`` what its rotations are turned into. ``instruction`` is one sentence for all
    episodes, ``instruction_field`` the field that holds each one's. ``success_field`` names the signal that is 1 (or
    more) at a step where the task is done. ``splits`` says which recorded splits are held out of training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = None
    datasets: str | None = Field(default=None, description="regular expression: data sets that it is meant for")
    source: str | None = Field(default=None, description="where the facts are from")
    embodiment: str | None = None
    fps: float | None = Field(default=None, gt=0, le=1000)
    cameras: dict[str, str] | None = None
    flip: tuple[str, ...] | None = None
    bgr: tuple[str, ...] | None = None
    proprio: dict[str, str] | None = None
    action: tuple[str, ...] | None = Field(default=None, min_length=1)
    action_layout: tuple[ActionBlock, ...] | None = None
    rotations: Representation | None = None
    instruction: str | None = None
    instruction_field: str | None = None
    success_field: str | None = None
    splits: dict[str, Literal["train", "validation"]] | None = None

    @property
    def digest(self) -> str:
        """Of what it says, whatever it is called and wherever that is known from."""
        said = self.model_dump_json(exclude_none=True, exclude=ABOUT)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    @classmethod
    def load(cls, name: str | Path) -> DataContract:
        """A file, or a shipped contract's name. UserError where there is none, or it is not one."""
        shipped = SHIPPED / f"{name}.yaml"
        path = shipped if re.fullmatch(r"[\w-]+", str(name)) and shipped.is_file() else Path(name)
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()) or {})
        except OSError:
            names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
            raise UserError(f"{path}: no such contract file, and not one of the shipped: {names}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "top level"
            known = f"; known keys: {', '.join(cls.model_fields)}" if first["type"] == "extra_forbidden" else ""
            raise UserError(f"{path}: {where}: {first['msg']}{known}") from None

    def changes(self, other: DataContract) -> list[str]:
        """Which fields say something else than in ``other``."""
        names = [name for name in type(self).model_fields if name not in ABOUT]
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    def to_yaml(self) -> str:
        """Only what it says."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)

    def apply(self, episode: Episode) -> Episode:
        """The episode as this contract has it. Raises UserError where it names what the episode does not have."""
        episode = self._with_cameras(episode)
        episode = self._with_action(episode)
        episode = self._with_proprio(episode)
        instruction, success = self.instruction, episode.success
        if self.instruction_field is not None:
            self._needs("instruction_field", [self.instruction_field], episode.texts, episode)
            instruction = instruction or episode.texts[self.instruction_field]
        if self.success_field is not None:
            self._needs("success_field", [self.success_field], episode.signals, episode)
            success = bool((episode.signals[self.success_field] >= 1).any())
        return replace(
            episode,
            fps=self.fps or episode.fps,
            instruction=instruction or episode.instruction,
            success=success,
            embodiment=self.embodiment or episode.embodiment,
            split=(self.splits or {}).get(episode.split or "", episode.split),
        )

    def _with_cameras(self, episode: Episode) -> Episode:
        cameras = episode.cameras
        for field in ("cameras", "flip", "bgr"):
            self._needs(field, getattr(self, field) or (), cameras, episode)
        if self.flip is not None:
            cameras = {name: _turned(video, name in self.flip) for name, video in cameras.items()}
        for name in self.bgr or ():
            cameras = {**cameras, name: colours_exchanged(cameras[name])}
        if self.cameras is not None:
            _distinct("cameras", self.cameras)
            cameras = {stored: cameras[name] for name, stored in self.cameras.items()}
        return replace(episode, cameras=cameras)

    def _with_action(self, episode: Episode) -> Episode:
        action, layout, signals = episode.action, episode.action_layout, episode.signals
        if self.action is not None:
            own = {} if action is None else {"action": action}
            recorded = own | episode.signals | episode.proprio
            self._needs("action", self.action, recorded, episode)
            if self.action != ("action",):
                parts = {name: recorded[name] for name in self.action}
                action = np.concatenate(list(parts.values()), axis=1)
                layout = tuple(ActionBlock(name=name, size=part.shape[1]) for name, part in parts.items())
                # What was the reader's choice stays with the episode, beside what else is recorded.
                signals = {**own, **signals} if "action" not in self.action else signals
                signals = {name: values for name, values in signals.items() if name not in self.action}
        if action is None:
            return episode
        if self.action_layout is not None:
            layout = self.action_layout
            if (total := sum(block.size for block in layout)) != action.shape[1]:
                where = f"the actions of {episode.ref.uri} have {action.shape[1]}"
                raise UserError(f"contract: action_layout has {total} columns, {where}")
        if self.rotations is not None:
            action, layout = with_rotations(action, layout, self.rotations)
        return replace(episode, action=action, action_layout=layout, signals=signals)

    def _with_proprio(self, episode: Episode) -> Episode:
        if self.proprio is None:
            return episode
        recorded = episode.signals | episode.proprio
        self._needs("proprio", self.proprio, recorded, episode)
        _distinct("proprio", self.proprio)
        proprio = {stored: recorded[name] for name, stored in self.proprio.items()}
        rest = {name: values for name, values in recorded.items() if name not in self.proprio}
        return replace(episode, proprio=proprio, signals=rest)

    def _needs(self, field: str, names: Iterable[str], recorded: Iterable[str], episode: Episode) -> None:
        for name in names:
            if name not in recorded:
                known = ", ".join(sorted(recorded)) or "none"
                raise UserError(f"contract: {field}: {name!r} is not in {episode.ref.uri}; recorded are: {known}")


class Promise(BaseModel):
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
    def of(cls, row: dict[str, Any]) -> Promise:
        """Of an episode's catalogue row."""
        return cls(
            fps=row["fps"],
            cameras=tuple(camera["name"] if isinstance(camera, dict) else camera for camera in row["cameras"]),
            proprio={part["name"]: part["width"] for part in row["proprio"]},
            action_dim=row["action_dim"],
            action_layout=json.loads(row["action_layout"]),
        )

    def differences(self, other: Promise) -> list[str]:
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

    def require(self, other: Promise, who: str) -> None:
        """UserError where ``other`` breaks it, or has a camera that is not among these: what a policy asks for."""
        found = self.differences(other)
        found += [f"there is no camera {name}" for name in other.cameras if name not in self.cameras]
        if found:
            raise UserError(f"{who} does not keep the contract that this policy was trained under: {'; '.join(found)}")


class Promises:
    """By source and embodiment: what the first of its episodes promised holds for the others."""

    def __init__(self) -> None:
        self._promises: dict[tuple[str, str], Promise] = {}

    def add(self, source: str, row: dict[str, Any]) -> None:
        if (source, row["embodiment"]) not in self._promises:
            self._promises[source, row["embodiment"]] = Promise.of(row)

    def broken_by(self, source: str, row: dict[str, Any]) -> str | None:
        """Why an episode's catalogue row does not belong with the others, if so."""
        promise = self._promises.get((source, row["embodiment"]))
        if not promise or not (differences := promise.differences(Promise.of(row))):
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


def shipped_for(dataset: str | None) -> DataContract | None:
    """The shipped contract for a data set of this name, if there is one."""
    return next((c for c in _shipped() if dataset and re.fullmatch(c.datasets or "", dataset)), None)


@cache
def _shipped() -> list[DataContract]:
    return [DataContract.load(path) for path in sorted(SHIPPED.glob("*.yaml"))]


def _turned(video: Video, turned: bool) -> Video:
    return video if video.turned == turned else upside_down(video)


def _distinct(field: str, names: dict[str, Any]) -> None:
    stored = list(names.values())
    if len(set(stored)) < len(stored):
        raise UserError(f"contract: {field}: two get one name: {', '.join(sorted(stored))}")
