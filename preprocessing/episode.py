"""The one record type that every format becomes, and what a data set promises about it.

A reader in :mod:`preprocessing.sources` lists :class:`EpisodeRef` cheaply (``scan``), and turns one of
them into an :class:`Episode` (``load``). Nothing is decoded before someone iterates over ``Video.frames``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

FRAMES_PER_CHUNK = 64


class UserError(Exception):
    """A mistake that its maker can mend: one line that says what, where, and how. Exit code 2."""


class BadEpisode(Exception):
    """This episode cannot be read, and why, in words a person understands. It is quarantined."""


@dataclass(frozen=True)
class EpisodeRef:
    """Where an episode is, and what its bytes are, before anything of it is decoded.

    ``digest`` covers exactly the bytes of this episode (its TFRecord record, its HDF5 group, its parquet and
    mp4 files), so that a renamed, copied or reordered file holds the same episodes.
    """

    uri: str
    format: str
    index: int
    digest: str
    problem: str | None = None  # known at scan time already: load would raise BadEpisode

    @property
    def id(self) -> str:
        return hashlib.sha256(f"{self.format}:{self.digest}".encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Video:
    """One camera's frames, decoded only while iterated.

    ``frames(size)`` yields uint8 ``[n, size, size, 3]`` RGB, upright, with n <= FRAMES_PER_CHUNK; the whole
    frame is resized, nothing is cropped. ``size=None`` keeps the recorded height and width.
    It raises :class:`BadEpisode` where the bytes break. ``turned`` says that the camera is recorded upside down
    and ``frames`` turns it, so that a contract can overrule that finding. ``thin(share)``, where there is one, is
    the same camera with that share of its frames, for less work than dropping the others afterwards
    (:func:`preprocessing.video.thinned` asks it, and does without).
    """

    frames: Callable[[int | None], Iterator[np.ndarray]]
    turned: bool = False
    thin: Callable[[float], Video] | None = None


class ActionBlock(BaseModel):
    """A named run of columns of the action vector."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    size: int = Field(gt=0)
    kind: Literal["position", "rotation", "gripper", "joint", "other"] = "other"
    representation: str | None = None  # of a rotation: euler_xyz, quaternion_xyzw, axis_angle, rotation_6d
    mode: Literal["absolute", "delta", "velocity", "unknown"] = "unknown"
    frame: Literal["base", "tool", "unknown"] = "unknown"
    gripper_one_means: Literal["open", "closed"] | None = None


class DataContract(BaseModel):
    """What a data set promises; given as YAML (``--contract``), each field set overrides what the reader found.

    ``cameras`` maps the recorded name to the name in the store (a camera left out is dropped) and ``flip``
    lists recorded names that are stored bottom-up. None leaves the reader's own finding.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    embodiment: str | None = None
    fps: float | None = Field(default=None, gt=0, le=1000)
    cameras: dict[str, str] | None = None
    flip: tuple[str, ...] | None = None
    action_layout: tuple[ActionBlock, ...] | None = None
    instruction: str | None = None

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    @classmethod
    def from_yaml(cls, path: Path) -> DataContract:
        """Raises UserError where the file is missing, not YAML, or has an unknown key."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()) or {})
        except FileNotFoundError:
            raise UserError(f"{path}: no such contract file") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "top level"
            raise UserError(f"{path}: {where}: {first['msg']}") from None


@dataclass(frozen=True)
class Episode:
    """One trajectory or one video.

    ``proprio`` holds float32 ``[T, D]`` arrays by name, ``action`` float32 ``[T, A]`` or None for video
    alone; row t of the action is what was commanded at frame t. T is the number of frames.
    ``repairs`` lists what the reader had to mend or guess, one short sentence each.
    """

    ref: EpisodeRef
    fps: float
    cameras: dict[str, Video]
    proprio: dict[str, np.ndarray]
    action: np.ndarray | None
    action_layout: tuple[ActionBlock, ...]
    instruction: str | None
    success: bool | None
    embodiment: str
    repairs: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return self.ref.id
