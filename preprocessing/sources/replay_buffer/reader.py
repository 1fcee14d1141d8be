"""Replay buffers of Diffusion Policy and UMI: all episodes concatenated in the arrays of a Zarr group.

``data/NAME`` has a row per step, ``meta/episode_ends`` the step after the last one of each episode, in a folder or in a
zip file. The layout: https://github.com/real-stanford/diffusion_policy (``replay_buffer.py``). PushT stores images as
float32. UMI (https://github.com/real-stanford/universal_manipulation_interface) stores each as JPEG XL, and no actions.
Diffusion Policy's real robot stores videos next to the buffer, ``videos/EPISODE/CAMERA.mp4``, which start with their
episode and have their own rate.

An episode's digest covers its rows of all arrays, sorted by name, and its videos: the stored chunks if a chunk holds
one row, else the values. It is the same in a folder and in a zip file, and does not change when episodes are added.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from preprocessing.episode import ActionBlock, Episode, EpisodeRef, Repair, Video
from preprocessing.errors import BadEpisode
from preprocessing.limits import limits
from preprocessing.sources.replay_buffer.buffer import (
    ACTIONS,
    Buffer,
    buffers,
    digests,
    found_in,
    is_buffer,
    is_image,
    vectors,
)
from preprocessing.sources.scan_cache import Finding, file_digest, findings
from preprocessing.sources.untrusted.zarr_v2 import ZarrArray
from preprocessing.sources.vectors import as_vectors
from preprocessing.video.arrays import array_video, rows_at_once
from preprocessing.video.decode import open_video, probe_video
from preprocessing.video.frames import first_frames, kept_before, thinned

WIDE = 1024  # numbers per step; point clouds and depth have more
PROPRIO = re.compile(r"(robot|agent_pos|state|qpos|qvel|eef|joint|gripper|proprio)(?!.*(demo_|action))")
RATES = {"umi": (59.94, "a GoPro's"), "pusht": (10.0, "PushT's"), "unknown": (10.0, "Diffusion Policy's")}  # Hz
MAX_MISSING = 10  # steps that a video may end early, as in Diffusion Policy's own reader


def detect(path: Path) -> bool:
    return any(True for _ in buffers(path))


def encloses(path: Path) -> bool:
    """Whether everything below a folder belongs to a buffer."""
    return is_buffer(path)


def folders(path: Path) -> list[Path]:
    """The buffers in a folder, and the videos that belong to them."""
    found = [buffer for buffer in buffers(path) if buffer.is_dir()]
    return [*found, path / "videos"] if found else []


def scan(path: Path) -> Iterator[EpisodeRef]:
    for buffer, found in found_in(list(buffers(path))):
        yield from _with_videos(buffer, found)


def digest(ref: EpisodeRef) -> str:
    path = Path(ref.uri)
    buffer = Buffer.open(path)
    buffer.rows(ref.index)
    [found] = digests(buffer, [ref.index])
    if found.problem:
        raise BadEpisode(found.problem)
    videos = [] if _has_images(buffer) else _videos(path, ref.index)
    return _joined(found.digest, [(video, file_digest(video)) for video in videos])


def load(ref: EpisodeRef) -> Episode:
    path = Path(ref.uri)
    buffer = Buffer.open(path)
    start, stop = buffer.rows(ref.index)
    robot, repairs = _robot(buffer), list(buffer.dropped)
    for name in buffer.short(stop):
        text = f"{name} has {buffer.arrays[name].shape[0]} rows, but the episode ends at {stop}; left out"
        repairs.append(Repair("streams", text))
    buffer = replace(buffer, arrays={name: a for name, a in buffer.arrays.items() if a.shape[0] >= stop})
    signals, done = _numbers(buffer, start, stop)
    repairs += done
    fps = _rate(signals)
    if fps is None:
        fps, whose = RATES[robot]
        repairs.append(Repair("fps", f"the rate is not recorded; {fps:g} Hz assumed, {whose} rate"))
    if robot == "unknown":
        repairs.append(Repair("embodiment", "robot unknown"))
    recorded = set(signals)
    action = signals.pop("action", None)
    if action is None and "actions" in signals:
        action = signals.pop("actions")
        repairs.append(Repair("action", "no array action; actions is read as the action"))
    proprio = {name: signals.pop(name) for name in list(signals) if PROPRIO.match(name)}
    layout: tuple[ActionBlock, ...] = ()
    if robot == "umi" and action is None:
        action, layout = _next_poses(proprio)
        repairs.append(Repair("steps", "no actions are recorded; the next pose is used as the action"))
    elif action is None:
        repairs.append(Repair("action", "no actions are recorded"))
    elif robot == "pusht":
        signals["state"] = proprio.pop("state")
        proprio["agent_pos"] = signals["state"][:, :2]
        text = "state also holds the block's pose; only the agent's position is kept as proprio"
        repairs.append(Repair("proprio", text))
        layout = (ActionBlock(name="position", size=2, kind="position", mode="absolute"),)
    elif recorded >= {"robot_eef_pose", "timestamp", "stage"} and action.shape[1] == 6:
        layout = _pose("")  # as the real robot's recorder commands it
    else:
        layout = (ActionBlock(name="action", size=action.shape[1]),)

    if _has_images(buffer):
        cameras, done = _array_cameras(buffer, start, stop)
        repairs += done
    else:
        cameras, steps = _video_cameras(_videos(path, ref.index), stop - start, fps)
        if steps < stop - start:
            text = f"the videos end {stop - start - steps} steps before the log, which is cut there"
            repairs.append(Repair("frames", text))
            action = None if action is None else action[:steps]
            proprio = {name: values[:steps] for name, values in proprio.items()}
            signals = {name: values[:steps] for name, values in signals.items()}
    return Episode(
        ref=ref,
        fps=fps,
        cameras=cameras,
        proprio=proprio,
        action=action,
        action_layout=layout,
        instruction=None,
        success=None,
        embodiment=robot,
        repairs=tuple(repairs),
        signals=signals,
    )


def _robot(buffer: Buffer) -> str:
    widths = {name: array.shape[1:] for name, array in buffer.arrays.items()}
    if "camera0_rgb" in widths and "robot0_eef_pos" in widths:
        return "umi"
    return "pusht" if "img" in widths and widths.get("action") == (2,) and widths.get("state") == (5,) else "unknown"


def _numbers(buffer: Buffer, start: int, stop: int) -> tuple[dict[str, np.ndarray], list[Repair]]:
    """Arrays that are not images, by name, and the repairs made to them."""
    repairs, numbers = list[Repair](), dict[str, ZarrArray]()
    for name, array in buffer.arrays.items():
        if array.row_bytes > WIDE * array.dtype.itemsize:
            if not is_image(array):
                text = f"{name} is {array.shape[1:]} numbers per step, neither RGB nor a vector; dropped"
                repairs.append(Repair("streams", text))
        elif not is_image(array):
            numbers[name] = array
    if sum(array.row_bytes for array in numbers.values()) * (stop - start) > limits().array_bytes:
        raise BadEpisode("its numbers unpack to more than limits.array_bytes")
    values = dict[str, np.ndarray]()
    for name, array in numbers.items():
        try:
            lacking, rows = array.not_stored(start, stop), vectors(array, start, stop)
        except BadEpisode as error:
            if name in ACTIONS:
                raise
            repairs.append(Repair("streams", f"{error}; left out"))
            continue
        if lacking:
            text = f"{lacking} chunks of {name} are not stored; read as its fill value, as Zarr specifies"
            repairs.append(Repair("steps", text))
        values[name], mended = as_vectors(rows, name)
        repairs += mended
    return values, repairs


def _rate(signals: dict[str, np.ndarray]) -> float | None:
    """Steps per second, if timestamps in seconds are recorded."""
    clock = signals.get("timestamp", np.zeros((0, 1)))[:, 0]
    between = float(np.median(np.diff(clock))) if len(clock) > 1 else 0.0
    return round(1 / between, 2) if 0.001 <= between <= 100 else None


# ------------------------------------------------------------------------------------------------------- actions


def _next_poses(proprio: dict[str, np.ndarray]) -> tuple[np.ndarray, tuple[ActionBlock, ...]]:
    parts, layout = list[np.ndarray](), list[ActionBlock]()
    for robot in sorted(name.partition("_")[0] for name in proprio if re.fullmatch(r"robot\d+_eef_pos", name)):
        names = [f"{robot}_{part}" for part in ("eef_pos", "eef_rot_axis_angle", "gripper_width")]
        if [proprio[name].shape[1] if name in proprio else 0 for name in names] != [3, 3, 1]:
            raise BadEpisode(f"{', '.join(names)} are not all recorded as 3, 3 and 1 numbers")
        pose = np.concatenate([proprio[name] for name in names], axis=1)
        parts.append(np.concatenate([pose[1:], pose[-1:]]))
        width = ActionBlock(
            name=f"{robot}_gripper", size=1, kind="gripper", mode="absolute", unit="m", gripper_one_means="open"
        )
        layout += [*_pose(f"{robot}_"), width]
    return np.concatenate(parts, axis=1), tuple(layout)


def _pose(robot: str) -> tuple[ActionBlock, ...]:
    return (
        ActionBlock(name=f"{robot}position", size=3, kind="position", mode="absolute", frame="base", unit="m"),
        ActionBlock(
            name=f"{robot}rotation",
            size=3,
            kind="rotation",
            representation="axis_angle",
            mode="absolute",
            frame="base",
            unit="rad",
        ),
    )


# ------------------------------------------------------------------------------------------------------- cameras


def _has_images(buffer: Buffer) -> bool:
    return any(map(is_image, buffer.arrays.values()))


def _array_cameras(buffer: Buffer, start: int, stop: int) -> tuple[dict[str, Video], list[Repair]]:
    cameras, repairs = dict[str, Video](), list[Repair]()
    for name, array in buffer.arrays.items():
        if not is_image(array):
            continue
        try:
            cameras[name], done = array_video(name, array.shape[1:], array.dtype, partial(_pieces, array, start, stop))
        except BadEpisode as error:
            repairs.append(Repair("streams", f"{error}; left out"))
        else:
            repairs += done
    return cameras, repairs


def _pieces(array: ZarrArray, start: int, stop: int) -> Iterator[np.ndarray]:
    at_once = rows_at_once(array.shape[1:], array.dtype)
    for number, part in array.parts(start, stop):
        rows = array.slab(number)[part]
        for first in range(0, len(rows), at_once):
            yield rows[first : first + at_once]


def _videos(buffer: Path, index: int) -> list[Path]:
    return sorted((buffer.parent / "videos" / str(index)).glob("*.mp4"))


def _video_cameras(videos: list[Path], steps: int, rate: float) -> tuple[dict[str, Video], int]:
    """The cameras, and the number of steps that all of them show."""
    if not videos:
        raise BadEpisode("has no images: no array of them under data/, and no video of the episode under videos/")
    shown, shares = steps, dict[Path, float]()
    for video in videos:
        info = probe_video(video)
        if info.fps < 0.99 * rate:
            raise BadEpisode(f"{video.name} has {info.fps:g} frames a second, fewer than the log's {rate:g} steps")
        shares[video] = min(1.0, rate / info.fps)
        if info.declared_frames:
            shown = min(shown, kept_before(info.declared_frames, shares[video]))
    if shown < steps - MAX_MISSING:
        raise BadEpisode(f"the videos show only {shown} of {steps} steps")
    opened = {video.stem: thinned(open_video(video), share) for video, share in shares.items()}
    return {f"camera_{name}": first_frames(video, shown) for name, video in opened.items()}, shown


# --------------------------------------------------------------------------------------------------------- scans


def _with_videos(buffer: Path, found: list[Finding]) -> Iterator[EpisodeRef]:
    videos = {index: _videos(buffer, index) for index in range(len(found))} if _needs_videos(buffer) else {}
    every = [video for of_episode in videos.values() for video in of_episode]
    known = {video: one.digest for video, [one] in findings("replay_buffer video", every, _read_video)}
    cameras = {video.name for video in every}
    for index, one in enumerate(found):
        own = videos.get(index, [])
        lacking = cameras - {video.name for video in own}
        problem = one.problem or (f"videos/{index}/{min(lacking)} is missing" if lacking else None)
        joined = _joined(one.digest, [(video, known[video]) for video in own])
        yield EpisodeRef(str(buffer.absolute()), "replay_buffer", index, joined, problem)


def _needs_videos(buffer: Path) -> bool:
    if not (buffer.parent / "videos").is_dir():
        return False
    try:
        return not _has_images(Buffer.open(buffer))
    except (BadEpisode, OSError):  # reported by the findings
        return False


def _read_video(video: Path) -> list[Finding]:
    return [Finding(file_digest(video))]


def _joined(rows: str, videos: list[tuple[Path, str]]) -> str:
    if not videos:
        return rows
    return hashlib.sha256(json.dumps([rows, [(video.name, digest) for video, digest in videos]]).encode()).hexdigest()
