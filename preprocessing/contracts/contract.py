"""Data contracts: which fields of a data set are what, and what they mean. Stored with the data.

A contract is YAML, one per data set: ``--contract FILE``, or ``--contract NAME`` for a shipped one
(``preprocessing/contracts``). A field that is set overrides the reader; the reader decides the others. A data set whose
own name matches a shipped contract is read under that contract, unless another is given.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from preprocessing.contracts.rotations import WIDTHS, with_rotations
from preprocessing.episode import ActionBlock, Episode, Representation, Video
from preprocessing.errors import UserError
from preprocessing.video.frames import colours_exchanged, upside_down

ABOUT = {"name", "datasets", "source"}  # fields that describe the contract, not the data
SHIPPED = Path(__file__).parent


class DataContract(BaseModel):
    """The contract of a data set. Keys of mappings, and names in lists, are names as recorded.

    - ``cameras`` maps recorded cameras to names in the store and drops the others; ``proprio`` does the same for the
      robot state that the policy observes (the rest is kept as signals).
    - ``flip`` lists cameras that are stored bottom-up, ``bgr`` those with red and blue exchanged.
    - ``action`` lists the parts of the action, in order: the reader's own (``action``), signals or proprio.
      ``action_layout`` gives the meaning of its columns, as recorded; ``rotations`` the representation to convert its
      rotations to.
    - ``instruction`` is the instruction of all episodes; ``instruction_field`` the field that holds each episode's own
      (if that is empty, the reader's choice stands).
    - ``success_field`` names the signal that is at least 1 at a step where the task is done.
    - ``splits`` says which recorded splits are held out of training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = None
    datasets: str | None = Field(default=None, description="regular expression for the names of its data sets")
    source: str | None = Field(default=None, description="references for its facts")
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

    @field_validator("action_layout")
    @classmethod
    def _rotations_are_whole(cls, layout: tuple[ActionBlock, ...] | None) -> tuple[ActionBlock, ...] | None:
        for block in layout or ():
            if block.representation and block.kind != "rotation":
                raise ValueError(f"{block.name}: has a representation, but is of kind {block.kind}, not rotation")
            if block.representation and block.size != WIDTHS[block.representation]:
                width = WIDTHS[block.representation]
                raise ValueError(f"{block.name}: a rotation as {block.representation} has {width} columns")
        return layout

    @property
    def digest(self) -> str:
        """Return the digest of its content, without name, data sets and references."""
        said = self.model_dump_json(exclude_none=True, exclude=ABOUT)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    @classmethod
    def load(cls, name: str | Path) -> DataContract:
        """Load a file, or a shipped contract by name. Raises UserError if there is none or it is invalid."""
        shipped = SHIPPED / f"{name}.yaml"
        path = shipped if re.fullmatch(r"[\w-]+", str(name)) and shipped.is_file() else Path(name)
        try:
            contract = cls.model_validate(yaml.safe_load(path.read_text()) or {})
            return contract.model_copy(update={"name": contract.name or path.stem})
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
        """Return the names of the fields that differ from ``other``."""
        names = [name for name in type(self).model_fields if name not in ABOUT]
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    def to_yaml(self) -> str:
        """Return the fields that are set, as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)

    def apply(self, episode: Episode) -> Episode:
        """Return the episode under this contract. Raises UserError if the contract names fields that it lacks."""
        own = {} if episode.action is None else {"action": episode.action}
        recorded = own | episode.signals | episode.proprio
        action, layout = self._action(episode, recorded)
        proprio = episode.proprio
        if self.proprio is not None:
            self._needs("proprio", self.proprio, recorded, episode)
            _distinct("proprio", self.proprio)
            proprio = {stored: recorded[name] for name, stored in self.proprio.items()}
        # Whatever is used neither for the action nor as proprio is kept as a signal, the reader's own action included.
        used = {*(self.action or ("action",)), *(self.proprio if self.proprio is not None else episode.proprio)}
        return replace(
            episode,
            fps=self.fps or episode.fps,
            cameras=self._cameras(episode),
            proprio=proprio,
            action=action,
            action_layout=layout,
            instruction=self.instruction or self._text(episode) or episode.instruction,
            success=self._success(episode, recorded),
            embodiment=self.embodiment or episode.embodiment,
            repairs=tuple(repair for repair in episode.repairs if getattr(self, repair.field, None) is None),
            signals={name: values for name, values in recorded.items() if name not in used},
            split=(self.splits or {}).get(episode.split or "", episode.split),
        )

    def pictures(self, episode: Episode) -> dict[str, tuple[str, bool, bool]]:
        """Return what each camera shows, by its name in the store, of an episode as its reader returns it: the recorded
        name, whether the rows are reversed, and whether red and blue are exchanged.
        """
        names = {name: name for name in episode.cameras} if self.cameras is None else self.cameras
        turned = {name for name, video in episode.cameras.items() if video.turned} if self.flip is None else self.flip
        return {stored: (name, name in turned, name in (self.bgr or ())) for name, stored in names.items()}

    def _cameras(self, episode: Episode) -> dict[str, Video]:
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
        return cameras

    def _action(
        self, episode: Episode, recorded: dict[str, np.ndarray]
    ) -> tuple[np.ndarray | None, tuple[ActionBlock, ...]]:
        action, layout = episode.action, episode.action_layout
        if self.action is not None:
            self._needs("action", self.action, recorded, episode)
            action = np.concatenate([recorded[name] for name in self.action], axis=1)
            layout = tuple(
                block
                for name in self.action
                for block in (
                    episode.action_layout
                    if name == "action"
                    else [ActionBlock(name=name, size=recorded[name].shape[1])]
                )
            )
        if action is None:
            return None, ()
        if self.action_layout is not None:
            layout = self.action_layout
            if (total := sum(block.size for block in layout)) != action.shape[1]:
                where = f"the actions of {episode.ref.uri} have {action.shape[1]}"
                raise UserError(f"contract: action_layout has {total} columns, {where}")
        return (action, layout) if self.rotations is None else with_rotations(action, layout, self.rotations)

    def _text(self, episode: Episode) -> str | None:
        if self.instruction_field is None:
            return None
        self._needs("instruction_field", [self.instruction_field], episode.texts, episode)
        return episode.texts[self.instruction_field]

    def _success(self, episode: Episode, recorded: dict[str, np.ndarray]) -> bool | None:
        if self.success_field is None:
            return episode.success
        self._needs("success_field", [self.success_field], recorded, episode)
        return bool((recorded[self.success_field] >= 1).any())

    def _needs(self, field: str, names: Iterable[str], recorded: Iterable[str], episode: Episode) -> None:
        for name in names:
            if name not in recorded:
                known = ", ".join(sorted(recorded)) or "none"
                raise UserError(f"contract: {field}: {name!r} is not in {episode.ref.uri}; recorded are: {known}")


def shipped_for(dataset: str | None) -> list[DataContract]:
    """Return the shipped contracts for data sets of this name: several if its versions differ."""
    return [known for known in _shipped() if dataset and re.fullmatch(known.datasets or "", dataset)]


@cache
def _shipped() -> list[DataContract]:
    return [DataContract.load(path) for path in sorted(SHIPPED.glob("*.yaml"))]


def _turned(video: Video, turned: bool) -> Video:
    return video if video.turned == turned else upside_down(video)


def _distinct(field: str, names: dict[str, Any]) -> None:
    stored = list(names.values())
    if len(set(stored)) < len(stored):
        raise UserError(f"contract: {field}: two entries map to the same name: {', '.join(sorted(stored))}")
