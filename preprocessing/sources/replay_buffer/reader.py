"""Replay buffers of Diffusion Policy and UMI: all episodes one after the other in the arrays of a Zarr group.

``data/NAME`` has a row a step, ``meta/episode_ends`` the step after the last one of each episode, in a folder or in a
zip file. The layout: https://github.com/real-stanford/diffusion_policy (``replay_buffer.py``). PushT stores pictures as
float32, UMI (https://github.com/real-stanford/universal_manipulation_interface) as a JPEG XL file each, and no actions;
Diffusion Policy's real robot stores films beside the buffer, ``videos/EPISODE/CAMERA.mp4``, which begin with their
episode and have a rate of their own.

An episode's digest covers its rows of all arrays, in the order of their names, and its films: the stored chunks where
a chunk holds one row, elsewhere the values. So it is the same in a folder and in a zip file, and when episodes are
added.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from preprocessing.episode import ActionBlock, Episode, EpisodeRef, Video
from preprocessing.errors import BadEpisode
from preprocessing.limits import limits
from preprocessing.sources.replay_buffer.buffer import Buffer, buffers, digests, found_in, is_picture, vectors
from preprocessing.sources.scan_cache import Finding, file_digest, findings
from preprocessing.sources.untrusted.zarr_v2 import ZarrArray
from preprocessing.video.decode import open_video, probe_video
from preprocessing.video.frames import chunks, first_frames, resize, thinned
from preprocessing.video.thinning import kept_before

WIDE = 1024  # numbers a step: point clouds and depth have more
PROPRIO = re.compile(r"(robot|agent_pos|state|qpos|qvel|eef|joint|gripper|proprio)(?!.*(demo_|action))")
RATES = {"umi": (59.94, "a GoPro's"), "pusht": (10.0, "PushT's"), "unknown": (10.0, "Diffusion Policy's")}
MAX_MISSING = 10  # steps that a film may end early, as in Diffusion Policy's own reader


def detect(path: Path) -> bool:
    return any(True for _ in buffers(path))


def encloses(path: Path) -> bool:
    """Whether what lies below a folder is chunks, or films that belong to a buffer."""
    return any(buffer.is_dir() for buffer in buffers(path))


def scan(path: Path) -> Iterator[EpisodeRef]:
    for buffer, found in found_in(list(buffers(path))):
        yield from _with_films(buffer, found)


def digest(ref: EpisodeRef) -> str:
    path = Path(ref.uri)
    buffer = Buffer.open(path)
    buffer.rows(ref.index)
    [found] = digests(buffer, [ref.index])
    if found.problem:
        raise BadEpisode(found.problem)
    films = [] if _has_pictures(buffer) else _films(path, ref.index)
    return _joined(found.digest, [(film, file_digest(film)) for film in films])


def load(ref: EpisodeRef) -> Episode:
    path = Path(ref.uri)
    buffer = Buffer.open(path)
    start, stop = buffer.rows(ref.index)
    robot, repairs = _robot(buffer), list(buffer.dropped)
    signals, done = _numbers(buffer, start, stop)
    repairs += done
    fps = _rate(signals)
    if fps is None:
        fps, whose = RATES[robot]
        repairs.append(f"the rate is not recorded; {fps:g} Hz assumed, as {whose} is")
    if robot == "unknown":
        repairs.append("robot unknown")
    recorded = set(signals)
    action = signals.pop("action", None)
    proprio = {name: signals.pop(name) for name in list(signals) if PROPRIO.match(name)}
    layout: tuple[ActionBlock, ...] = ()
    if robot == "umi" and action is None:
        action, layout = _next_poses(proprio)
        repairs.append("no actions are recorded; the next pose is taken for the action")
    elif action is None:
        repairs.append("no actions are recorded")
    elif robot == "pusht":
        signals["state"] = proprio.pop("state")
        proprio["agent_pos"] = signals["state"][:, :2]
        repairs.append("of state, which tells where the block is as well, only the agent's place is proprioception")
        layout = (ActionBlock(name="position", size=2, kind="position", mode="absolute"),)
    elif recorded >= {"robot_eef_pose", "timestamp", "stage"} and action.shape[1] == 6:
        layout = _pose("")  # what the real robot's recorder sends
    else:
        layout = (ActionBlock(name="action", size=action.shape[1]),)

    if _has_pictures(buffer):
        pictures = {name: _camera(array, start, stop) for name, array in buffer.arrays.items() if is_picture(array)}
        cameras = {name: video for name, (video, _) in pictures.items()}
        repairs += [f"{name} {mended}" for name, (_, done) in pictures.items() for mended in done]
    else:
        cameras, steps = _film_cameras(_films(path, ref.index), stop - start, fps)
        if steps < stop - start:
            repairs.append(f"the films end {stop - start - steps} steps before the log, which is cut there")
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


def _numbers(buffer: Buffer, start: int, stop: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """What is no picture, by name, and what had to be done to it."""
    repairs, numbers = list[str](), dict[str, ZarrArray]()
    for name, array in buffer.arrays.items():
        if array.row_bytes > WIDE * array.dtype.itemsize:
            if not is_picture(array):
                repairs.append(f"{name} is {array.shape[1:]} numbers a step, neither RGB nor a vector; dropped")
        elif not is_picture(array):
            numbers[name] = array
    if sum(array.row_bytes for array in numbers.values()) * (stop - start) > limits().array_bytes:
        raise BadEpisode("its numbers unpack to more than limits.array_bytes")
    values = dict[str, np.ndarray]()
    for name, array in numbers.items():
        if lacking := array.not_stored(start, stop):
            repairs.append(f"{lacking} chunks of {name} are not stored; its fill value is taken, as Zarr says")
        rows = vectors(array, start, stop)
        if name == "timestamp" and abs(float(rows[0, 0])) > 1e5:
            rows = rows.astype(np.float64) - float(rows[0, 0])
            repairs.append("timestamp counts from the first step, for float32 cannot hold the time of day")
        values[name] = rows.astype(np.float32)
    return values, repairs


def _rate(signals: dict[str, np.ndarray]) -> float | None:
    """Steps a second, where their times are recorded, and in seconds."""
    clock = signals.get("timestamp", np.zeros((0, 1)))[:, 0]
    between = float(np.median(np.diff(clock))) if len(clock) > 1 else 0.0
    return round(1 / between, 2) if 0.001 <= between <= 100 else None


# ------------------------------------------------------------------------------------------------------- actions


def _next_poses(proprio: dict[str, np.ndarray]) -> tuple[np.ndarray, tuple[ActionBlock, ...]]:
    parts, layout = list[np.ndarray](), list[ActionBlock]()
    for robot in sorted(name.partition("_")[0] for name in proprio if re.fullmatch(r"robot\d+_eef_pos", name)):
        names = [f"{robot}_{part}" for part in ("eef_pos", "eef_rot_axis_angle", "gripper_width")]
        if [proprio[name].shape[1] if name in proprio else 0 for name in names] != [3, 3, 1]:
            raise BadEpisode(f"{' or '.join(names)} is not recorded, or not as 3, 3 and 1 numbers")
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


def _has_pictures(buffer: Buffer) -> bool:
    return any(map(is_picture, buffer.arrays.values()))


def _camera(array: ZarrArray, start: int, stop: int) -> tuple[Video, list[str]]:
    """And what has to be done to its pictures."""
    first = array.shape[3] != 3
    scale = 1.0 if array.dtype.kind in "iu" or _exceeds_one(array, start, stop) else 255.0

    def frames(size: int | None) -> Iterator[np.ndarray]:
        slab = lru_cache(maxsize=1)(array.slab)
        rows = (row for number, part in array.parts(start, stop) for row in slab(number)[part])
        return chunks(resize(_picture(row, first, scale, array.path)[None], size)[0] for row in rows)

    repairs = ["has its colours in the first dimension; moved to the last"] if first else []
    if scale != 1:
        repairs.append("is recorded from 0 to 1; made 0 to 255")
    return Video(frames), repairs


def _exceeds_one(array: ZarrArray, start: int, stop: int) -> bool:
    """Whether floats go from 0 to 255, which the first picture tells that is not black."""
    return any(bool((array.slab(number)[part] > 1).any()) for number, part in array.parts(start, stop))


def _picture(row: np.ndarray, first: bool, scale: float, name: str) -> np.ndarray:
    if row.dtype != np.uint8:
        if not (np.isfinite(row).all() and row.min() >= 0 and row.max() * scale <= 255):
            raise BadEpisode(f"{name} goes from {row.min()} to {row.max()}, which are no colours")
        row = np.rint(row * scale).astype(np.uint8)
    return np.array(row.transpose(1, 2, 0) if first else row, order="C")  # a view would keep the whole chunk


def _films(buffer: Path, index: int) -> list[Path]:
    return sorted((buffer.parent / "videos" / str(index)).glob("*.mp4"))


def _film_cameras(films: list[Path], steps: int, rate: float) -> tuple[dict[str, Video], int]:
    """And how many of the steps all of them show."""
    if not films:
        raise BadEpisode("has no pictures: no array of them under data/, and no film of the episode under videos/")
    shown, shares = steps, dict[Path, float]()
    for film in films:
        info = probe_video(film)
        if info.fps < 0.99 * rate:
            raise BadEpisode(f"{film.name} has {info.fps:g} frames a second, fewer than the log's {rate:g} steps")
        shares[film] = min(1.0, rate / info.fps)
        if info.declared_frames:
            shown = min(shown, kept_before(info.declared_frames, shares[film]))
    if shown < steps - MAX_MISSING:
        raise BadEpisode(f"the films show {shown} of {steps} steps")
    cameras = {f"camera_{film.stem}": first_frames(thinned(open_video(film), shares[film]), shown) for film in films}
    return cameras, shown


# --------------------------------------------------------------------------------------------------------- scans


def _with_films(buffer: Path, found: list[Finding]) -> Iterator[EpisodeRef]:
    films = {index: _films(buffer, index) for index in range(len(found))} if _needs_films(buffer) else {}
    every = [film for of_episode in films.values() for film in of_episode]
    known = {film: one.digest for film, [one] in findings("film", every, _read_film)}
    cameras = {film.name for film in every}
    for index, one in enumerate(found):
        own = films.get(index, [])
        lacking = cameras - {film.name for film in own}
        problem = one.problem or (f"there is no videos/{index}/{min(lacking)}" if lacking else None)
        joined = _joined(one.digest, [(film, known[film]) for film in own])
        yield EpisodeRef(str(buffer.absolute()), "replay_buffer", index, joined, problem)


def _needs_films(buffer: Path) -> bool:
    if not (buffer.parent / "videos").is_dir():
        return False
    try:
        return not _has_pictures(Buffer.open(buffer))
    except (BadEpisode, OSError):  # which the findings say
        return False


def _read_film(film: Path) -> list[Finding]:
    return [Finding(file_digest(film))]


def _joined(rows: str, films: list[tuple[Path, str]]) -> str:
    if not films:
        return rows
    return hashlib.sha256(json.dumps([rows, [(film.name, digest) for film, digest in films]]).encode()).hexdigest()
