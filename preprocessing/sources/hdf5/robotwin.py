"""RoboTwin recordings: one HDF5 file per episode, ``data/episode7.hdf5``; its texts in ``instructions/episode7.json``.

The layout: https://github.com/RoboTwin-Platform/RoboTwin (``envs/_base_task.py``, ``envs/utils/pkl2hdf5.py``,
``description/utils/generate_episode_instructions.py``). ``observation/CAMERA/rgb`` are JPEG files padded with zeros,
whose red and blue are exchanged: OpenCV takes channels for BGR, and RoboTwin passes it RGB. ``joint_action`` holds the
targets of the joints and grippers in force at each frame, ``endpose`` the poses of the hands. RoboTwin's own policies
observe row t and act by row t+1 (``policy/ACT/process_data.py``); so does this reader, which repeats the last row. A
gripper is open at 1 (``envs/robot/robot.py``).

The simulator runs at 250 Hz and records every 15th step (``save_freq`` in ``task_config``); neither rate nor robot is
in the file. An episode's digest covers its data sets and its instructions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from preprocessing.episode import ActionBlock, Episode, EpisodeRef, Repair
from preprocessing.errors import BadEpisode
from preprocessing.sources.hdf5.kinds import hdf5_files
from preprocessing.sources.hdf5.streams import action_of, read_streams, short_name
from preprocessing.sources.scan_cache import Finding, file_digest, findings
from preprocessing.sources.untrusted.files import within
from preprocessing.sources.untrusted.hdf5 import child, digest_of
from preprocessing.sources.untrusted.metadata import beside

FPS = round(250 / 15, 2)
ARMS = ("left_arm", "left_gripper", "right_arm", "right_gripper")  # the order of ``vector``
VECTOR = "joint_action/vector"


def detect(path: Path) -> bool:
    return any(True for _ in hdf5_files(path, "robotwin"))


def scan(path: Path) -> Iterator[EpisodeRef]:
    for file, [found] in findings("robotwin", hdf5_files(path, "robotwin"), _read):
        yield EpisodeRef(str(file.absolute()), "robotwin", 0, _joined(found.digest, _texts(file)[0]), found.problem)


def digest(ref: EpisodeRef) -> str:
    with h5py.File(ref.uri, "r") as file:
        return _joined(digest_of(file, {}), _texts(Path(ref.uri))[0])


def load(ref: EpisodeRef) -> Episode:
    path = Path(ref.uri)
    with h5py.File(path, "r") as file:
        targets = child(file, "joint_action", h5py.Group)
        names = ("vector",) if "vector" in targets else ARMS
        _, parts, repairs = action_of(file, ("joint_action",))
        held = {name: parts[f"joint_action/{name}"] for name in names if f"joint_action/{name}" in parts}
        if not held:
            raise BadEpisode(f"joint_action holds neither vector nor {', '.join(ARMS)}")
        widths = {name: parts[f"joint_action/{name}"].shape[1] for name in ARMS if f"joint_action/{name}" in parts}
        state = np.concatenate([*held.values()], axis=1)
        steps = len(state)
        seen = read_streams(
            path, child(file, "observation", h5py.Group), steps, "observation/", bgr=True, name_of=short_name,
            skip=_is_no_camera,
        )  # fmt: skip
        if not seen.cameras and seen.lengths and steps not in seen.lengths:
            raise BadEpisode(f"{steps} rows of joint_action, but observations of lengths {sorted(seen.lengths)}")
        used = {"observation", "joint_action"}
        others = read_streams(path, file, steps, skip=lambda place: place.partition("/")[0] in used, bgr=True)
    repairs = [repair for repair in repairs if repair.field != "action"]
    repairs += [*seen.repairs, *others.repairs]
    repairs.append(Repair("steps", "joint_action holds the targets in force; the next row is read as the action"))
    repairs.append(Repair("fps", f"control rate unknown; {FPS:g} Hz assumed, RoboTwin's default"))
    repairs.append(Repair("embodiment", "robot unknown"))
    if seen.has_jpeg or others.has_jpeg:
        repairs.append(Repair("bgr", "RoboTwin writes JPEG files with red and blue swapped; swapped back"))
    texts, problem = _texts(path)
    repairs += [Repair("instruction", problem)] if problem else []
    poses = {key: rows for key, rows in others.vectors.items() if key.startswith("endpose/")}
    outside = {key: rows for key, rows in (others.vectors | others.tables).items() if key not in poses}
    return Episode(
        ref=ref,
        fps=FPS,
        cameras=others.cameras | seen.cameras,
        proprio={f"joint_action/{name}": rows for name, rows in held.items()} | poses,
        action=np.concatenate([state[1:], state[-1:]]),
        action_layout=_layout(widths, state.shape[1]),
        instruction=next(iter(texts.values()), None),
        success=None,
        embodiment="unknown",
        repairs=tuple(repairs),
        signals=outside | {f"observation/{key}": rows for key, rows in (seen.vectors | seen.tables).items()},
        texts=texts,
    )


def _is_no_camera(path: str) -> bool:
    """Colours of a segmentation look like a camera's, but are none."""
    return path.endswith("_segmentation")


def _layout(widths: dict[str, int], width: int) -> tuple[ActionBlock, ...]:
    if sum(widths.values()) != width:
        return (ActionBlock(name="action", size=width),)
    return tuple(
        ActionBlock(name=name, size=size, kind="gripper", mode="absolute", gripper_one_means="open")
        if name.endswith("gripper")
        else ActionBlock(name=name, size=size, kind="joint", mode="absolute", unit="rad")
        for name, size in widths.items()
    )


def _texts(file: Path) -> tuple[dict[str, str], str | None]:
    """The first sentence of each list beside the episode, ``seen`` in training and ``unseen``; and what is wrong."""
    with within(file.parent.parent):  # the user may name the folder of the episodes alone
        table, problem = beside(file.parent.parent / "instructions" / f"{file.stem}.json")
    lists = {key: table.get(key) for key in ("seen", "unseen")}
    return {
        key: said[0].strip()
        for key, said in lists.items()
        if isinstance(said, list) and said and isinstance(said[0], str) and said[0].strip()
    }, problem


def _joined(held: str, texts: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([held, texts], sort_keys=True).encode()).hexdigest() if texts else held


def _read(file: Path) -> list[Finding]:
    try:
        with h5py.File(file, "r") as opened:
            return [Finding(digest_of(opened, {}))]
    except (BadEpisode, OSError, RuntimeError) as error:
        return [Finding(file_digest(file), f"cannot be read: {error}")]
