"""The one record type that every format becomes.

A reader in :mod:`preprocessing.sources` lists :class:`EpisodeRef` cheaply (``scan``), and turns one of
them into an :class:`Episode` (``load``). Nothing is decoded before someone iterates over ``Video.frames``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

FRAMES_PER_CHUNK = 64


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
    (:func:`preprocessing.video.frames.thinned` asks it, and does without).
    """

    frames: Callable[[int | None], Iterator[np.ndarray]]
    turned: bool = False
    thin: Callable[[float], Video] | None = None


# Of a rotation: angles about the fixed axes x, y, z in turn (what SciPy calls "xyz"), in radians; quaternions by where
# their real part stands; a matrix by rows; its first two rows (arXiv 1812.07035, whose authors take columns: rows are
# what PyTorch3D made common, and DROID's and Diffusion Policy's own code store).
Representation = Literal["euler_xyz", "quaternion_xyzw", "quaternion_wxyz", "axis_angle", "matrix", "rotation_6d"]


class ActionBlock(BaseModel):
    """A named run of columns of the action vector."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    size: int = Field(gt=0)
    kind: Literal["position", "rotation", "gripper", "joint", "other"] = "other"
    representation: Representation | None = None  # of a rotation
    mode: Literal["absolute", "delta", "velocity", "unknown"] = "unknown"
    frame: Literal["base", "tool", "unknown"] = "unknown"
    unit: Literal["m", "rad", "deg", "m/s", "rad/s", "scaled", "unknown"] = "unknown"  # scaled: to a range, often +-1
    gripper_one_means: Literal["open", "closed"] | None = None  # the larger of its two ends


@dataclass(frozen=True)
class Episode:
    """One trajectory or one video.

    ``proprio`` holds float32 ``[T, D]`` arrays by name, ``action`` float32 ``[T, A]`` or None for video
    alone; row t of the action is what was commanded at frame t. T is the number of frames. ``signals`` is whatever
    else is recorded at each step, float32 ``[T, D]`` by its recorded name: other actions, rewards, a simulator's state.
    ``texts`` holds every sentence by its field's name, ``instruction`` is one of them. ``dataset`` is the name that the
    data set gives itself, ``split`` the part of it that this episode is in. ``repairs`` lists what the reader had to
    mend or guess, one short sentence each.
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
    signals: dict[str, np.ndarray] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    dataset: str | None = None
    split: str | None = None

    @property
    def id(self) -> str:
        return self.ref.id
