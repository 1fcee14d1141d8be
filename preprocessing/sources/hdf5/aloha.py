"""ALOHA and ACT recordings: one HDF5 file per episode, of two arms with seven joints each.

``/action`` and ``/observations/{qpos, qvel, effort}`` have a row per step, ``/observations/images/CAMERA`` an image:
uint8 ``[T, H, W, 3]``, or, if the file has ``compress``, a JPEG padded with zeros. Mobile ALOHA adds ``/base_action``,
the velocities of its base; others who write this layout nest groups, or name their actions ``actions``. The layout:
https://github.com/tonyzhaozh/act (``record_sim_episodes.py``) and https://github.com/tonyzhaozh/aloha
(``record_episodes.py``), which sends a command every 0.02 s and stores no rate.

An episode's digest covers the values of all its data sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from preprocessing.episode import ActionBlock, Episode, EpisodeRef, Repair
from preprocessing.errors import BadEpisode
from preprocessing.sources.hdf5.kinds import hdf5_files
from preprocessing.sources.hdf5.streams import action_of, read_streams
from preprocessing.sources.hdf5.texts import instruction_of, other_texts, texts_of
from preprocessing.sources.scan_cache import Finding, file_digest, findings
from preprocessing.sources.untrusted.hdf5 import child, digest_of

FPS = 50.0
ARM = 7  # six joints and a gripper
ACTIONS, BASE = ("action", "actions"), "base_action"
PADDING = "compress_len"  # the lengths of the JPEG files before they were padded
INSTRUCTIONS = ("language_instruction", "language_raw")  # not part of the layout, but commonly added


def detect(path: Path) -> bool:
    return any(True for _ in hdf5_files(path, "aloha"))


def scan(path: Path) -> Iterator[EpisodeRef]:
    for file, [found] in findings("aloha", hdf5_files(path, "aloha"), _read):
        yield EpisodeRef(str(file.absolute()), "aloha", 0, found.digest, found.problem)


def digest(ref: EpisodeRef) -> str:
    with h5py.File(ref.uri, "r") as file:
        return _digest(file)


def load(ref: EpisodeRef) -> Episode:
    path = Path(ref.uri)
    with h5py.File(path, "r") as file:
        observations = child(file, "observations", h5py.Group)
        commands, parts, repairs = action_of(file, ACTIONS)
        if not parts:
            raise BadEpisode("no numbers in action")
        action = np.concatenate([*parts.values()], axis=1)
        steps, layout = len(action), _layout(parts)
        _, base, mended = action_of(file, (BASE,))
        repairs += mended
        for name, speeds in base.items():
            if len(speeds) != steps:
                raise BadEpisode(f"{steps} actions, but {len(speeds)} rows of {name}")
            action = np.concatenate([action, speeds], axis=1)
            layout += (ActionBlock(name="base" if name == BASE else name, size=speeds.shape[1], mode="velocity"),)
        seen = read_streams(path, observations, steps, "observations/", bgr=True, name_of=_camera_name)
        if seen.lengths and not {steps, steps + 1} & seen.lengths.keys():
            raise BadEpisode(f"{steps} actions, but observations of lengths {sorted(seen.lengths)}")
        used = {"observations", PADDING, BASE, *([commands] if commands in parts else [])}
        others = read_streams(path, file, steps, skip=lambda place: place.partition("/")[0] in used)
        repairs += [Repair("fps", "control rate unknown; 50 Hz assumed, ALOHA's rate"), *seen.repairs, *others.repairs]
        if seen.has_jpeg:
            repairs.append(Repair("bgr", "ALOHA's tools write JPEG files with red and blue swapped; swapped back"))
        texts = texts_of(file) | {f"observations/{name}": words for name, words in seen.texts.items()} | others.texts
        instruction, guess = instruction_of(texts, INSTRUCTIONS)
    return Episode(
        ref=ref,
        fps=FPS,
        cameras=others.cameras | seen.cameras,
        proprio=seen.vectors,
        action=action,
        action_layout=layout,
        instruction=instruction,
        success=None,
        embodiment="aloha",
        repairs=(*repairs, *guess),
        signals=others.vectors | others.tables | {f"observations/{name}": rows for name, rows in seen.tables.items()},
        texts=texts,
    )


def _camera_name(path: str) -> str:
    return path.removeprefix("images/")


def _layout(parts: dict[str, np.ndarray]) -> tuple[ActionBlock, ...]:
    """Target joint positions; a gripper is open at 1."""
    if len(parts) > 1:
        return tuple(ActionBlock(name=name, size=rows.shape[1]) for name, rows in parts.items())
    width = next(iter(parts.values())).shape[1]
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


def _digest(file: h5py.File) -> str:
    known = {name: file.attrs.get(name) for name in INSTRUCTIONS}
    return digest_of(file, known | other_texts(known, file))


def _read(file: Path) -> list[Finding]:
    try:
        with h5py.File(file, "r") as opened:
            return [Finding(_digest(opened))]
    except (OSError, RuntimeError) as error:
        return [Finding(file_digest(file), f"cannot be read: {error}")]
