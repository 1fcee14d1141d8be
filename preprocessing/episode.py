"""The one record type that every format is converted to.

A reader in :mod:`preprocessing.sources` lists :class:`EpisodeRef` cheaply (``scan``) and turns one into an
:class:`Episode` (``load``). Frames are decoded only while ``Video.frames`` is iterated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

FRAMES_PER_CHUNK = 64
# How a frame becomes a square: resized whole, its sides by different factors; its centre; whole, between black bars.
Fit = Literal["stretch", "crop", "pad"]


class Square(int):
    """The side in pixels of the square that a camera's frames become, and how. A plain int stretches.

    ``recorded`` is the (height, width) of the frames as recorded, upright and in square pixels, once one was read.
    """

    fit: Fit
    recorded: tuple[int, int] | None

    def __new__(cls, side: int, fit: Fit = "stretch") -> Square:
        square = super().__new__(cls, side)
        square.fit, square.recorded = fit, None
        return square


@dataclass(frozen=True)
class EpisodeRef:
    """Location and content digest of an episode that is not decoded yet.

    ``digest`` covers exactly the bytes of this episode (its TFRecord record, its HDF5 group, its parquet and
    mp4 files), so renaming, copying or reordering files does not change episodes.
    """

    uri: str
    format: str
    index: int
    digest: str
    problem: str | None = None  # known at scan time: load will raise BadEpisode
    root: str = field(default="", compare=False)  # the source that it was found in: nothing outside of it is read

    @property
    def id(self) -> str:
        return hashlib.sha256(f"{self.format}:{self.digest}".encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Video:
    """One camera's frames, decoded only while iterated.

    ``frames(size)`` yields uint8 ``[n, size, size, 3]`` RGB, upright, with n <= FRAMES_PER_CHUNK; an int resizes the
    whole frame, a :class:`Square` says whether to crop or pad instead. ``size=None`` keeps the recorded height and
    width. It raises :class:`BadEpisode` at broken bytes. ``turned`` means that the camera is recorded upside down and
    ``frames`` turns it; a contract can override that. ``thin(share)``, if present, returns the same camera with that
    share of its frames, for less work than dropping frames afterwards (used by
    :func:`preprocessing.video.frames.thinned`).
    """

    frames: Callable[[int | None], Iterator[np.ndarray]]
    turned: bool = False
    thin: Callable[[float], Video] | None = None


# Rotations. euler_xyz: angles about the fixed axes x, y, z in turn (SciPy's "xyz"), in radians. Quaternions: real part
# last or first. matrix: row by row. rotation_6d: the first two rows of the matrix (arXiv 1812.07035, whose authors use
# columns; rows are PyTorch3D's convention, and what DROID's and Diffusion Policy's own code store).
Representation = Literal["euler_xyz", "quaternion_xyzw", "quaternion_wxyz", "axis_angle", "matrix", "rotation_6d"]


class ActionBlock(BaseModel):
    """A named block of consecutive columns of the action vector."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    size: int = Field(gt=0)
    kind: Literal["position", "rotation", "gripper", "joint", "other"] = "other"
    representation: Representation | None = None  # rotations only
    mode: Literal["absolute", "delta", "velocity", "unknown"] = "unknown"
    frame: Literal["base", "tool", "unknown"] = "unknown"
    unit: Literal["m", "rad", "deg", "m/s", "rad/s", "scaled", "unknown"] = "unknown"  # scaled: to a range, often +-1
    gripper_one_means: Literal["open", "closed"] | None = None  # the larger of the two values


# What a repair is about. The first row holds fields of a contract: setting the field resolves the repair. No contract
# resolves the others: frames that were invented, moved or lost; rows of numbers; recorded streams that were dropped;
# findings of the quality filters; a shipped contract that does not fit.
RepairField = Literal[
    "fps", "embodiment", "cameras", "flip", "bgr", "proprio", "action", "action_layout", "instruction", "success_field",
    "frames", "steps", "streams", "quality", "contract",
]  # fmt: skip


class Repair(NamedTuple):
    """Something a reader had to guess, mend or leave out.

    A contract that sets ``field`` resolves the repair, which is then dropped. ``text`` is a short sentence for people;
    no code depends on its wording.
    """

    field: RepairField
    text: str


@dataclass(frozen=True)
class Episode:
    """One trajectory or one video of T frames.

    ``proprio`` holds float32 ``[T, D]`` arrays by name; ``action`` is float32 ``[T, A]``, or None for a video without
    actions. Row t of the action is the command at frame t. ``signals`` holds everything else recorded at each step,
    float32 ``[T, D]`` by its recorded name: other actions, rewards, a simulator's state. ``texts`` holds every text by
    its field's name; ``instruction`` is one of them. ``dataset`` is the name that the data set gives itself, ``split``
    the part of it that holds this episode.
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
    repairs: tuple[Repair, ...] = ()
    signals: dict[str, np.ndarray] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    dataset: str | None = None
    split: str | None = None

    @property
    def id(self) -> str:
        return self.ref.id
