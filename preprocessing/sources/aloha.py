"""ALOHA and ACT recordings: one HDF5 file per episode, of two arms with seven joints each.

``/action`` and ``/observations/{qpos, qvel, effort}`` have a row per step, ``/observations/images/CAMERA`` an image:
uint8 ``[T, H, W, 3]``, or, if the file has ``compress``, a JPEG padded with zeros. Mobile ALOHA adds ``/base_action``,
the velocities of its base. The layout: https://github.com/tonyzhaozh/act (``record_sim_episodes.py``) and
https://github.com/tonyzhaozh/aloha (``record_episodes.py``), which sends a command every 0.02 s and stores no rate.

An episode's digest covers the values of all its data sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np

from preprocessing.episode import ActionBlock, Episode, EpisodeRef, Repair, Video
from preprocessing.errors import BadEpisode
from preprocessing.sources.scan_cache import Finding, file_digest, findings
from preprocessing.sources.untrusted.hdf5 import (
    at_once,
    child,
    digest_of,
    frames_reader,
    hdf5_files,
    numbers,
    own,
    text,
)
from preprocessing.video.frames import decode_image, sliced_video

FPS = 50.0
ARM = 7  # six joints and a gripper
ACTIONS = ("action", "base_action")
INSTRUCTIONS = ("language_instruction", "language_raw")  # not part of the layout, but commonly added


def detect(path: Path) -> bool:
    return any(True for _ in hdf5_files(path, "aloha"))


def scan(path: Path) -> Iterator[EpisodeRef]:
    for file, [found] in findings("aloha", hdf5_files(path, "aloha"), _read):
        yield EpisodeRef(str(file.absolute()), "aloha", 0, found.digest, found.problem)


def digest(ref: EpisodeRef) -> str:
    with h5py.File(ref.uri, "r") as file:
        return digest_of(file, {name: file.attrs.get(name) for name in INSTRUCTIONS})


def load(ref: EpisodeRef) -> Episode:
    path = Path(ref.uri)
    with h5py.File(path, "r") as file:
        observations = child(file, "observations", h5py.Group)
        images = child(observations, "images", h5py.Group)
        action = _vectors(child(file, "action", h5py.Dataset))
        layout = _layout(action.shape[1])
        if isinstance(base := own(file, "base_action"), h5py.Dataset):
            speeds = _vectors(base)
            if len(speeds) != len(action):
                raise BadEpisode(f"{len(action)} actions, but {len(speeds)} rows of base_action")
            action = np.concatenate([action, speeds], axis=1)
            layout += (ActionBlock(name="base", size=speeds.shape[1], mode="velocity"),)
        members = {key: own(observations, key) for key in sorted(observations)}
        recorded = {key: rows for key, rows in members.items() if isinstance(rows, h5py.Dataset)}
        vectors = {key: r for key, r in recorded.items() if r.ndim in (1, 2) and r.dtype.kind in "fiub"}
        proprio = {key: numbers(rows).reshape(len(rows), -1) for key, rows in vectors.items()}
        repairs = [Repair("fps", "control rate unknown; 50 Hz assumed, ALOHA's rate")]
        others = [key for key in recorded if key not in vectors]
        repairs += [
            Repair("streams", f"observations/{key} is not one vector of numbers per step; left out") for key in others
        ]
        cameras: dict[str, Video] = {}
        for key in sorted(images):
            stored = child(images, key, h5py.Dataset)
            if len(stored) != len(action):
                raise BadEpisode(f"{len(action)} actions, but {len(stored)} images of {key}")
            name = f"observations/images/{key}"
            if stored.ndim == 4 and stored.shape[3] == 3 and stored.dtype == np.uint8:
                cameras[key] = sliced_video(len(stored), frames_reader(path, name), at_once(stored))
            elif stored.ndim <= 2:
                cameras[key] = sliced_video(len(stored), _decoded(frames_reader(path, name)))
            else:
                misfit = f"{name} is {stored.shape} of {stored.dtype}, not RGB images; left out"
                repairs.append(Repair("streams", misfit))
        if any(child(images, key, h5py.Dataset).ndim <= 2 for key in cameras):
            repairs.append(Repair("bgr", "ALOHA's tools write JPEG files with red and blue swapped; swapped back"))
        instructions = {name: file.attrs.get(name, own(file, name)) for name in INSTRUCTIONS}
        texts = {name: text(v[()] if isinstance(v, h5py.Dataset) else v) for name, v in instructions.items()}
        signals = _signals(file, len(action))
    return Episode(
        ref=ref,
        fps=FPS,
        cameras=cameras,
        proprio=proprio,
        action=action,
        action_layout=layout,
        instruction=next(filter(None, texts.values()), None),
        success=None,
        embodiment="aloha",
        repairs=tuple(repairs),
        signals=signals,
        texts={name: instruction for name, instruction in texts.items() if instruction},
    )


def _vectors(rows: h5py.Dataset) -> np.ndarray:
    if rows.ndim != 2:
        raise BadEpisode(f"{rows.name} has shape {rows.shape}, not one vector per step")
    return numbers(rows)


def _signals(file: h5py.File, steps: int) -> dict[str, np.ndarray]:
    """Data sets that recorders add at the top level, with a number or a vector per step."""
    members = {key: own(file, key) for key in sorted(file) if key not in ACTIONS}
    return {
        key: numbers(rows).reshape(steps, -1)
        for key, rows in members.items()
        if isinstance(rows, h5py.Dataset) and rows.dtype.kind in "fiub" and rows.ndim in (1, 2) and len(rows) == steps
    }


def _layout(width: int) -> tuple[ActionBlock, ...]:
    """Target joint positions; a gripper is open at 1."""
    if width % ARM:
        return (ActionBlock(name="action", size=width),)
    names = ["left", "right"] if width == 2 * ARM else [f"arm_{number}" for number in range(width // ARM)]
    blocks = []
    for name in names:
        blocks.append(ActionBlock(name=f"{name}_joints", size=ARM - 1, kind="joint", mode="absolute"))
        blocks.append(
            ActionBlock(name=f"{name}_gripper", size=1, kind="gripper", mode="absolute", gripper_one_means="open")
        )
    return tuple(blocks)


def _decoded(read: Callable[[int, int], np.ndarray]) -> Callable[[int, int], np.ndarray]:
    """Decode JPEG files whose red and blue are swapped: OpenCV takes channels for BGR, and ALOHA passes it RGB."""

    def frames(start: int, stop: int) -> np.ndarray:
        return np.stack([decode_image(np.asarray(row, np.uint8).tobytes())[..., ::-1] for row in read(start, stop)])

    return frames


def _read(file: Path) -> list[Finding]:
    try:
        with h5py.File(file, "r") as opened:
            return [Finding(digest_of(opened, {name: opened.attrs.get(name) for name in INSTRUCTIONS}))]
    except (OSError, RuntimeError) as error:
        return [Finding(file_digest(file), f"cannot be read: {error}")]
