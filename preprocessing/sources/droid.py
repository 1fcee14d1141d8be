"""Raw DROID recordings, not yet converted to RLDS: one folder per episode, ``LAB/success/DATE/TIME/``.

``trajectory.h5`` has a row per step (keys are listed in ``scripts/convert/to_tfrecord.py``): commands under ``action``,
measurements under ``observation/robot_state``, the teleoperator's buttons under ``observation/controller_info``.
``metadata_UUID.json`` maps cameras to serial numbers (``droid/postprocessing/schema.py``), and
``recordings/MP4/SERIAL.mp4`` is a camera's left image; ``SERIAL-stereo.mp4`` and SVO files are not read. One file above
all episodes has the instructions by UUID: ``aggregated-annotations-*.json``, or the later
``droid_language_annotations.json`` with half as many again (https://huggingface.co/KarlP/droid). The layout:
https://droid-dataset.github.io/droid/the-droid-dataset and https://github.com/droid-dataset/droid. Notes:

- Row t is an observation and the command that followed it (``droid/trajectory_utils/misc.py``), at 15 Hz
  (``droid/robot_env.py``). Videos have one frame less than there are rows (DROID's issue 54) and are paired from the
  beginning, as in DROID's own reader; their own rate is the camera's and is ignored.
- Tool velocities are fractions of 0.075 m and 0.15 rad per step (``droid/robot_ik/robot_ik_solver.py``), along and
  about the base's axes (``add_poses`` in ``droid/misc/transformations.py``); a gripper is closed at 1
  (``franka/robot.py``).
- While ``movement_enabled`` is 0 the robot stood still and ``skip_action`` is 1: such steps are kept, both are signals.

Camera poses and clocks are not read. An episode's digest covers the values of its trajectory, its videos, its
instructions and its success, so its folder may have any name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from preprocessing.episode import ActionBlock, Episode, EpisodeRef, Repair
from preprocessing.errors import BadEpisode, UserError
from preprocessing.sources.hdf5.kinds import hdf5_files
from preprocessing.sources.scan_cache import Finding, file_digest, findings
from preprocessing.sources.untrusted.files import within
from preprocessing.sources.untrusted.hdf5 import datasets, digest_of
from preprocessing.sources.untrusted.metadata import read_table
from preprocessing.sources.vectors import as_vectors
from preprocessing.video.decode import open_video, probe_video
from preprocessing.video.frames import first_frames, frames_to_use

FPS = 15.0
TRAJECTORY = "trajectory.h5"
CAMERAS = {"wrist": "wrist_cam_serial", "exterior_1": "ext1_cam_serial", "exterior_2": "ext2_cam_serial"}
ANNOTATIONS = ("aggregated-annotations-*.json", "droid_language_annotations.json")  # the fuller ones last
LEVELS = 4  # DATE, success, LAB, and the data set's folder
ACTION = ("action/cartesian_velocity", "action/gripper_position")
STATE = "observation/robot_state/"
PROPRIO = (
    "cartesian_position",
    "gripper_position",
    "joint_positions",
    "joint_velocities",
)  # what DROID's policies observe
NOT_READ = re.compile(r"observation/(camera_|stereo|timestamp/(?!skip_action))")  # camera poses and clocks
LAYOUT = (
    ActionBlock(name="position", size=3, kind="position", mode="velocity", frame="base", unit="scaled"),
    ActionBlock(
        name="rotation",
        size=3,
        kind="rotation",
        representation="euler_xyz",
        mode="velocity",
        frame="base",
        unit="scaled",
    ),
    ActionBlock(name="gripper", size=1, kind="gripper", mode="absolute", gripper_one_means="closed"),
)
MAX_METADATA = 2**20  # bytes; published files have 2,000
MAX_ANNOTATIONS = 2**26  # bytes; the published file has 12 million


def detect(path: Path) -> bool:
    """An unreadable trajectory next to recordings counts, too: its videos are not episodes of their own."""
    file = path if path.name == TRAJECTORY else path / TRAJECTORY
    return file.is_file() and (any(True for _ in hdf5_files(file, "droid")) or _is_recording(file.parent))


def scan(path: Path) -> Iterator[EpisodeRef]:
    folder = (path.parent if path.is_file() else path).absolute()
    uri = str(folder / TRAJECTORY)
    try:
        recording = _recording(folder)
    except BadEpisode as error:
        nothing = hashlib.sha256(f"{folder.name} {error}".encode()).hexdigest()
        yield EpisodeRef(uri, "droid", 0, nothing, str(error))
        return
    parts = {file: part for file, [part] in findings("droid", recording.files, _read)}
    problem = next((f"{file.name} {part.problem}" for file, part in parts.items() if part.problem), None)
    yield EpisodeRef(uri, "droid", 0, recording.digest([part.digest for part in parts.values()]), problem)


def digest(ref: EpisodeRef) -> str:
    recording = _recording(Path(ref.uri).parent)
    return recording.digest([_digest(file) for file in recording.files])


def load(ref: EpisodeRef) -> Episode:
    recording = _recording(Path(ref.uri).parent)
    with _opened(Path(ref.uri)) as file:
        vectors, left_out = _vectors(file)
    action = np.concatenate([vectors[name] for name in ACTION], axis=1)
    if action.shape[1] != sum(block.size for block in LAYOUT):
        raise BadEpisode(f"{' and '.join(ACTION)} have {action.shape[1]} columns, not 7")
    declared = {camera: probe_video(file).declared_frames for camera, file in recording.videos.items()}
    frames, mismatch = frames_to_use(declared, len(action), "the trajectory")
    cut = [Repair("frames", f"{mismatch}; cut to {frames}")] if mismatch else []
    videos = {camera: open_video(file) for camera, file in recording.videos.items()}
    seen = [f"{STATE}{name}" for name in PROPRIO if f"{STATE}{name}" in vectors]
    return Episode(
        ref=ref,
        fps=FPS,
        cameras={camera: first_frames(video, frames) if cut else video for camera, video in videos.items()},
        proprio={name.removeprefix(STATE): vectors[name][:frames] for name in seen},
        action=action[:frames],
        action_layout=LAYOUT,
        instruction=next((text for name, text in recording.texts.items() if name.startswith("language")), None),
        success=recording.success,
        embodiment="panda",
        repairs=(*recording.repairs, *cut, *left_out),
        signals={name: rows[:frames] for name, rows in vectors.items() if name not in seen},
        texts=recording.texts,
    )


@dataclass(frozen=True)
class Recording:
    """The contents of an episode's folder, and its instructions from outside of it."""

    folder: Path
    videos: dict[str, Path]  # by camera, in the order of CAMERAS
    texts: dict[str, str]
    recorded_success: bool | None
    repairs: list[Repair]

    @property
    def files(self) -> list[Path]:
        return [self.folder / TRAJECTORY, *self.videos.values()]

    @property
    def success(self) -> bool | None:
        if self.recorded_success is not None:
            return self.recorded_success
        return {"success": True, "failure": False}.get(self.folder.parent.parent.name)

    def digest(self, files: list[str]) -> str:
        content = [files, list(self.videos), self.texts, self.recorded_success]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _recording(folder: Path) -> Recording:
    metadata = _metadata(folder)
    videos, repairs = dict[str, Path](), list[Repair]()
    for camera, key in CAMERAS.items():
        serial = str(metadata.get(key) or "")
        file = folder / "recordings" / "MP4" / f"{serial}.mp4"
        if re.fullmatch(r"\w+", serial) and file.is_file():  # a plain name: no path
            videos[camera] = file
        else:
            text = f"camera {camera} has no video for its {key}, {serial or 'which is missing'}; dropped"
            repairs.append(Repair("streams", text))
    if not videos:
        raise BadEpisode("holds no video in recordings/MP4 of a camera in its metadata (SVO files are not read)")
    task, success = metadata.get("current_task"), metadata.get("success")
    texts = _instructions(folder, str(metadata.get("uuid")))
    if isinstance(task, str) and task.strip():
        texts["current_task"] = task.strip()  # a category from a menu, not an instruction
    return Recording(folder, videos, texts, success if isinstance(success, bool) else None, repairs)


def _is_recording(folder: Path) -> bool:
    return bool(_metadata_files(folder)) and (folder / "recordings").is_dir()


def _metadata_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("metadata_*.json"))


def _metadata(folder: Path) -> dict[str, Any]:
    file = next(iter(_metadata_files(folder)), None)
    if file is None:
        raise BadEpisode("has no metadata_*.json, which maps cameras to their videos")
    try:
        return _table(file, MAX_METADATA)
    except (OSError, BadEpisode, ValueError, RecursionError) as error:
        raise BadEpisode(f"{file.name} cannot be read: {error}") from None


def _instructions(folder: Path, uuid: str) -> dict[str, str]:
    """An episode's annotations, from the nearest list above its folder."""
    for above in islice(folder.parents, LEVELS):
        for file in [file for name in ANNOTATIONS for file in sorted(above.glob(name))][-1:]:
            instructions = _annotations(file, file.stat().st_mtime_ns).get(uuid)
            found = instructions.items() if isinstance(instructions, dict) else []
            return {name: text.strip() for name, text in sorted(found) if isinstance(text, str) and text.strip()}
    return {}


@lru_cache(maxsize=1)  # one list for 76,000 episodes
def _annotations(file: Path, _changed: int) -> dict[str, Any]:
    try:
        with within(None):  # the user may name a part of the data set, and the list is above all of it
            return _table(file, MAX_ANNOTATIONS)
    except (OSError, BadEpisode, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a table of annotations ({error}); restore the file or move it away") from None


def _table(file: Path, limit: int) -> dict[str, Any]:
    return read_table(file, limit)


def _vectors(file: h5py.File) -> tuple[dict[str, np.ndarray], list[Repair]]:
    """All numbers recorded per step, by path, and repairs for optional ones that do not fit."""
    every = {name: dataset for name, dataset in datasets(file) if not NOT_READ.match(name)}
    if missing := [name for name in ACTION if name not in every]:
        raise BadEpisode(f"{TRAJECTORY} has no {' and no '.join(missing)}")
    needed = (*ACTION, *(f"{STATE}{name}" for name in PROPRIO))
    steps = (every[ACTION[0]].shape or (0,))[0]
    found, left_out = dict[str, np.ndarray](), list[Repair]()
    for name, dataset in every.items():
        misfit = f"{name} is {dataset.shape} of {dataset.dtype}, not a number or a vector for each of {steps} steps"
        if dataset.ndim in (1, 2) and len(dataset) == steps and dataset.size and dataset.dtype.kind in "fiub":
            found[name], mended = as_vectors(dataset[()], name)
            left_out += mended
        elif name in needed:
            raise BadEpisode(misfit)
        else:
            left_out.append(Repair("streams", f"{misfit}; left out"))
    return found, left_out


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadEpisode(f"cannot be read: {' '.join(str(error).split())}") from None


def _digest(file: Path) -> str:
    if file.name != TRAJECTORY:
        return file_digest(file)
    with _opened(file) as opened:
        return digest_of(opened, {})


def _read(file: Path) -> list[Finding]:
    try:
        if file.name != TRAJECTORY:
            probe_video(file)
        return [Finding(_digest(file))]
    except BadEpisode as error:
        return [Finding(file_digest(file), str(error))]
