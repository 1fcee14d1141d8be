"""Quality filters: which episodes, and which parts of them, are fit for training.

An :class:`Inspector` sees the frames of one episode as they are decoded, keeps a few bytes per frame, and judges at the
end. Notable:

- **Frozen**: a frame repeats an earlier one. It is compared with the frame of the last change, so slow motion adds up
  and noise does not, and by the part of the frame that differs most, because a distant gripper moves few pixels.
- **One good camera is enough.** An episode is black or frozen if all its cameras are; a single bad camera is noted.
- **Dead cameras.** A camera that is black, or shows the same picture, in every frame is left out beside a good one: a
  policy would learn nothing from it, and then require it.
- **Idle**: many consecutive steps at which nothing is commanded; they teach a policy to stand still (openpi drops such
  runs from DROID, OpenVLA single steps from LIBERO).
- **Shots** are found by PySceneDetect, only in videos without robot data: a robot's camera is not cut.
- **Spans** are the parts left for training; a window stays within one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from preprocessing.contracts.rotations import convert_rotation
from preprocessing.episode import ActionBlock, Episode
from preprocessing.quality.duplicates import fingerprint, frame_hashes
from preprocessing.video.frames import resize

GRID = 16  # frames are compared as GRID x GRID mean grey levels
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
SAME = 3.0  # grey levels: sensor noise and codecs change a grid cell of a still frame by less
DARK = 32.0  # grey levels: no grid cell of a black frame is brighter
STILL = 1e-3  # metres, radians or scaled units per step (openpi's threshold)
STILL_DEGREES = 0.1  # about one tick of a servo's encoder


class Filters(BaseModel):
    """The section ``quality`` of an ingest recipe. A filter that is null or false is off."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_frames: int | None = Field(default=2, ge=1, description="shorter episodes are refused, shorter spans left out")
    black: float | None = Field(default=0.9, ge=0, lt=1, description="refused above this share of black frames")
    frozen: float | None = Field(default=0.9, ge=0, lt=1, description="refused above this share of repeated frames")
    idle: int | None = Field(
        default=None, ge=1, description="runs of at least this many idle steps are left out; 7 is openpi's"
    )
    shots: float | None = Field(
        default=None, gt=0, description="threshold of PySceneDetect's AdaptiveDetector; 3 is usual"
    )
    near_duplicates: float | None = Field(
        default=None,
        ge=0,
        le=64,
        description="refused if at most this many of 64 bits per frame differ; 4 finds re-encoded videos",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        if value is True:
            raise ValueError("give a number, or false to switch it off")
        return None if value is False else value


@dataclass(frozen=True)
class Verdict:
    """The outcome for one episode. ``filter`` and ``reason`` are set if it is refused.

    ``cuts`` are the first frames of new shots. ``idle`` is bool ``[T]``, True in runs of idle steps; None if the filter
    is off or there is no action. ``spans`` are the frames ``[first, stop)`` that training may use. ``dead`` are cameras
    to leave out. ``notes`` are remarks on an episode that is kept.
    """

    filter: str | None
    reason: str | None
    cuts: list[int]
    idle: np.ndarray | None
    spans: list[tuple[int, int]]
    dead: list[str]
    notes: list[str]
    fingerprint: bytes | None


class Inspector:
    """Sees all frames of one episode, each camera's in order, and judges at the end."""

    def __init__(self, filters: Filters, episode: Episode):
        self._filters = filters
        self._episode = episode
        self._is_video = episode.action is None and not episode.proprio
        self._cameras: dict[str, _Camera] = {}

    def frames(self, camera: str, chunk: np.ndarray) -> None:
        """Pass the next frames, uint8 ``[n, H, W, 3]``, of a camera."""
        if camera not in self._cameras:
            threshold = self._filters.shots if self._is_video else None
            shots = _Shots(threshold, self._episode.fps) if threshold else None
            self._cameras[camera] = _Camera(self._filters, shots)
        self._cameras[camera].see(chunk)

    def forget(self, camera: str) -> None:
        """Judge without this camera."""
        self._cameras.pop(camera, None)

    def verdict(self) -> Verdict:
        """Judge the episode, once all frames have been passed."""
        filters, length = self._filters, max((camera.frames for camera in self._cameras.values()), default=0)
        cuts = sorted({cut for camera in self._cameras.values() if camera.shots for cut in camera.shots.cuts()})
        idle = None
        if filters.idle and self._episode.action is not None:
            idle = _long(idle_steps(self._episode.action, self._episode.action_layout), filters.idle)
        parts = _spans(length, cuts, idle)
        spans = [(first, end) for first, end in parts if end - first >= (filters.min_frames or 1)]

        reasons, notes, dead = self._bad_cameras()
        if filters.min_frames and length < filters.min_frames:
            reasons["min_frames"] = f"too short: {_frames(length)}, at least {filters.min_frames} are required"
        elif not spans and idle is not None and idle.any():
            rest = f"; the others are never {filters.min_frames} in a row" if parts else ""
            reasons["idle"] = f"idle: nothing is commanded at {idle.sum()} of {len(idle)} steps{rest}"
        elif not spans and cuts:
            reasons["shots"] = (
                f"cut up: {len(cuts) + 1} shots in {_frames(length)}, each shorter than {filters.min_frames}"
            )
        if idle is not None and idle.any():
            notes.append(f"idle: nothing is commanded at {idle.sum()} of {len(idle)} steps; they are left out")
        if spans and len(spans) < len(parts):
            lost = sum(end - first for first, end in parts) - sum(end - first for first, end in spans)
            which = f"{len(parts) - len(spans)} of {len(parts)} spans are shorter than {filters.min_frames} frames"
            notes.append(f"{which} and left out, {_frames(lost)} in total")

        refused_by = next((name for name in Filters.model_fields if name in reasons), None)
        return Verdict(
            filter=refused_by,
            reason=reasons[refused_by] if refused_by else None,
            cuts=cuts,
            idle=idle,
            spans=[] if refused_by else spans,
            dead=[] if refused_by else dead,
            notes=[] if refused_by else notes,
            fingerprint=self._fingerprint(),
        )

    def _bad_cameras(self) -> tuple[dict[str, str], list[str], list[str]]:
        """Return reasons by filter, if all cameras are black or frozen; notes, if some are; and dead cameras."""
        reasons, notes, dead = {}, dict[str, str](), list[str]()
        for name, limit in (("black", self._filters.black), ("frozen", self._filters.frozen)):
            if limit is None:
                continue
            bad = {camera: seen for camera, seen in sorted(self._cameras.items()) if seen.share(name) > limit}
            said = {camera: f"camera {camera} is {seen.told(name)}" for camera, seen in bad.items()}
            if bad and len(bad) == len(self._cameras):
                reasons[name] = f"{'; '.join(said.values())} (more than {limit:.0%} is refused)"
            for camera, text in said.items():
                is_dead = bad[camera].share(name) == 1 and len(bad) < len(self._cameras)
                dead += [camera] if is_dead and camera not in dead else []
                notes.setdefault(camera, f"{text}; left out (quality.{name}=false keeps it)" if is_dead else text)
        return reasons, list(notes.values()), dead

    def _fingerprint(self) -> bytes | None:
        """Return the fingerprint of the first camera, by name, that has one: a black camera has none."""
        for _, camera in sorted(self._cameras.items()):
            if camera.hashes and (mark := fingerprint(np.concatenate(camera.hashes), self._episode.action)):
                return mark
        return None


def idle_steps(action: np.ndarray, layout: tuple[ActionBlock, ...]) -> np.ndarray:
    """Return bool ``[T]``: the steps of the action ``[T, A]`` at which nothing is commanded.

    There, deltas and velocities are (nearly) zero, and columns that are absolute (most grippers) or of unknown mode are
    unchanged since the previous step.
    """
    change = np.abs(np.diff(action, axis=0, prepend=action[:1]))
    idle, start = np.ones(len(action), bool), 0
    for block in layout:
        columns = slice(start, start + block.size)
        start += block.size
        moved = change[:, columns]
        if block.mode in ("delta", "velocity"):
            moved = np.abs(action[:, columns] - _nothing(block))
        idle &= (moved < (STILL_DEGREES if block.unit == "deg" else STILL)).all(axis=1)
    return idle


def _nothing(block: ActionBlock) -> np.ndarray | float:
    """Return the zero motion of a block: for a rotation as a quaternion or matrix it is not zero."""
    if block.mode == "delta" and block.kind == "rotation" and block.representation:
        return convert_rotation(np.zeros((1, 3)), "axis_angle", block.representation)
    return 0.0


def _long(mask: np.ndarray, least: int) -> np.ndarray:
    """Keep the runs of True that have at least ``least`` entries."""
    kept = np.zeros_like(mask)
    for first, end in _runs(mask):
        kept[first:end] = end - first >= least
    return kept


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]


def _spans(length: int, cuts: list[int], idle: np.ndarray | None) -> list[tuple[int, int]]:
    usable = np.ones(length, bool)
    if idle is not None:
        usable[: len(idle)] &= ~idle[:length]
    return [(a + first, a + end) for a, b in pairwise([0, *cuts, length]) for first, end in _runs(usable[a:b])]


def _frames(count: int) -> str:
    return f"{count} frame{'' if count == 1 else 's'}"


class _Camera:
    """Running statistics of one camera's frames."""

    def __init__(self, filters: Filters, shots: _Shots | None):
        self.shots = shots
        self.frames = 0
        self.black = 0  # frames
        self.same = 0  # frames that repeat an earlier one
        self.longest = 0  # longest run of them
        self.hashes: list[np.ndarray] = []
        self._compare = filters.frozen is not None
        self._hash = filters.near_duplicates is not None
        self._grids = self._compare or self._hash or filters.black is not None
        self._changed: np.ndarray | None = None  # grid of the last frame that differed
        self._run = 0

    def share(self, filter: str) -> float:
        """Return the share of its frames that are black, or of those after the first that repeat an earlier one."""
        return self.black / max(self.frames, 1) if filter == "black" else self.same / max(self.frames - 1, 1)

    def told(self, filter: str) -> str:
        share = self.share(filter)
        where = "in every frame" if share == 1 else f"in {share:.0%} of its frames"
        return f"black {where}" if filter == "black" else f"frozen {where}, {self.longest} in a row"

    def see(self, chunk: np.ndarray) -> None:
        self.frames += len(chunk)
        if self.shots:
            self.shots.see(chunk)
        if not self._grids:
            return
        grids = _grids(chunk)
        self.black += int((grids.max(axis=(1, 2)) < DARK).sum())
        if self._hash:
            self.hashes.append(frame_hashes(grids))
        for grid in grids if self._compare else ():
            if self._changed is not None and np.abs(grid - self._changed).max() < SAME:
                self.same += 1
                self._run += 1
                self.longest = max(self.longest, self._run)
            else:
                self._changed, self._run = grid, 0


def _grids(chunk: np.ndarray) -> np.ndarray:
    """Return the mean grey levels, float32 ``[n, GRID, GRID]``, of frames uint8 ``[n, H, W, 3]``."""
    if chunk.shape[1] % GRID or chunk.shape[2] % GRID:
        chunk = resize(chunk, GRID)
    count, height, width, _ = chunk.shape
    rows, columns = height // GRID, width // GRID
    sums = chunk.reshape(count, GRID, rows, width * 3).sum(axis=2, dtype=np.uint32)
    return sums.reshape(count, GRID, GRID, columns, 3).sum(axis=3, dtype=np.uint32) @ (GREY / (rows * columns))


class _Shots:
    """PySceneDetect, fed frame by frame."""

    def __init__(self, threshold: float, fps: float):
        import cv2  # these three are imported lazily: half a second
        from scenedetect.common import FrameTimecode
        from scenedetect.detectors import AdaptiveDetector

        cv2.setNumThreads(1)  # an ingest is parallel by episode
        # Luma only: the hue of a grey frame changes with every key frame of a codec. A shot may be a single frame: a
        # short shot is dropped, while training would cross a missed cut.
        self._detector = AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=1, luma_only=True)
        self._bgr = lambda frame: cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        self._time = lambda number: FrameTimecode(number, float(fps))
        self._fed = 0
        self._last: np.ndarray | None = None
        self._found: list[int] = []

    def see(self, chunk: np.ndarray) -> None:
        for frame in chunk:
            if self._last is None:
                self._feed(frame, self._detector.window_width)
            self._feed(frame, 1)
            self._last = frame

    def cuts(self) -> list[int]:
        """Return the first frames of new shots, once all frames have been passed."""
        if self._last is not None:
            self._feed(self._last, self._detector.window_width)
            self._last = None
        return [number - self._detector.window_width for number in self._found]

    def _feed(self, frame: np.ndarray, times: int) -> None:
        """Feed a frame; the first and last are repeated, without which the detector is blind at both ends."""
        for _ in range(times):
            self._found += [
                cut.frame_num for cut in self._detector.process_frame(self._time(self._fed), self._bgr(frame))
            ]
            self._fed += 1
