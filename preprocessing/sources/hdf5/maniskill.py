"""ManiSkill trajectories: ``traj_i/{actions, obs/..., success, ...}`` in one HDF5 file, with a JSON file beside it.

The layout: https://github.com/haosulab/ManiSkill (``mani_skill/utils/wrappers/record.py``,
``docs/source/user_guide/datasets/demos.md``). Observations and the simulator's states have a row more than actions: the
last is from after the last action, and is not read. Cameras are ``obs/sensor_data/CAMERA/rgb``; ``obs/agent`` is what
the robot measures and proprioception here; ``obs/extra`` holds goals and poses of objects, too, so it becomes signals.
The JSON file of the same name tells the task, its robot and the controller (``control_mode``), which says what an
action means. ManiSkill publishes trajectories without observations; its ``replay_trajectory`` renders them.

An episode's index is its position in the order of the trajectories' numbers. Its digest covers its data sets and what
the JSON file says of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from preprocessing.episode import ActionBlock, Episode, EpisodeRef, Repair
from preprocessing.errors import BadEpisode
from preprocessing.sources.hdf5.episodes import find_each, name_of, names_in
from preprocessing.sources.hdf5.kinds import episode_groups, hdf5_files
from preprocessing.sources.hdf5.streams import action_of, read_streams, short_name
from preprocessing.sources.hdf5.texts import instruction_of
from preprocessing.sources.scan_cache import Finding, findings
from preprocessing.sources.untrusted.hdf5 import child, digest_of, numbers, own
from preprocessing.sources.untrusted.metadata import beside

FPS = 20.0  # SimConfig's control_freq, unless the task sets another
AGENT = "agent/"
GRIPPER = ActionBlock(name="gripper", size=1, kind="gripper", mode="absolute", unit="scaled", gripper_one_means="open")


def detect(path: Path) -> bool:
    return any(True for _ in hdf5_files(path, "maniskill"))


def scan(path: Path) -> Iterator[EpisodeRef]:
    for file, found in findings("maniskill", hdf5_files(path, "maniskill"), _read):
        said = _said(file)
        broken = len(found) == 1 and found[0].problem  # perhaps the whole file
        for index, (name, one) in enumerate(zip([""] if broken else names_in(file, _names), found, strict=True)):
            whole = _joined(one.digest, said.of(name))
            yield EpisodeRef(str(file.absolute()), "maniskill", index, whole, one.problem)


def digest(ref: EpisodeRef) -> str:
    file, name = Path(ref.uri), name_of(ref, _names)
    with h5py.File(file, "r") as opened:
        return _joined(_held(opened, name), _said(file).of(name))


def load(ref: EpisodeRef) -> Episode:
    path, name = Path(ref.uri), name_of(ref, _names)
    about = _said(path)
    said = about.of(name)
    repairs = [Repair("action_layout", about.problem)] if about.problem else []
    with h5py.File(path, "r") as file:
        episode = child(file, name, h5py.Group)
        commands, parts, mended = action_of(episode, ("actions",))
        if not parts:
            raise BadEpisode(f"no actions in {name}")
        action = np.concatenate([*parts.values()], axis=1)
        steps = len(action)
        obs = own(episode, "obs")
        if not isinstance(obs, h5py.Group):
            held = "only vectors of the simulator's state" if obs is not None else "no observations"
            replay = "render them: python -m mani_skill.trajectory.replay_trajectory --obs-mode rgb --save-traj"
            raise BadEpisode(f"has no camera: {name} holds {held}, as ManiSkill publishes them; {replay}")
        seen = read_streams(path, obs, steps, "obs/", last_too=True, name_of=_camera_name)
        used = {"obs", *([commands] if commands in parts else [])}
        others = read_streams(path, episode, steps, skip=lambda place: place.partition("/")[0] in used, last_too=True)
        robot = _robot(episode, said)
        success = _success(episode, said)
    repairs += [*mended, *seen.repairs, *others.repairs]
    if (fps := said.get("fps")) is None:
        fps = FPS
        repairs.append(Repair("fps", f"control rate unknown; {FPS:g} Hz assumed, ManiSkill's default"))
    if robot is None:
        repairs.append(Repair("embodiment", "robot unknown"))
    texts = {"env_id": said["env_id"]} if said.get("env_id") else {}
    texts |= {f"obs/{key}": words for key, words in seen.texts.items()} | others.texts
    instruction, guess = instruction_of(texts)
    agent = {key: rows for key, rows in seen.vectors.items() if key.startswith(AGENT)}
    outside = {f"obs/{key}": rows for key, rows in (seen.vectors | seen.tables).items() if key not in agent}
    return Episode(
        ref=ref,
        fps=fps,
        cameras=others.cameras | seen.cameras,
        proprio={key.removeprefix(AGENT): rows for key, rows in agent.items()},
        action=action,
        action_layout=_layout(parts, str(said.get("control_mode") or "")),
        instruction=instruction,
        success=success,
        embodiment=robot or "unknown",
        repairs=(*repairs, *guess),
        signals=others.vectors | others.tables | outside,
        texts=texts,
        dataset=said.get("env_id"),
    )


def _camera_name(path: str) -> str:
    """``sensor_data/base_camera/rgb``, and ``image/base_camera/rgb`` of ManiSkill 2."""
    return re.sub(r"^(sensor_data|image)/", "", short_name(re.sub(r"/Color$", "/color", path)))


def _layout(parts: dict[str, np.ndarray], mode: str) -> tuple[ActionBlock, ...]:
    """Of the Panda's controllers; its gripper's target is the last number, open at +1."""
    width = next(iter(parts.values())).shape[1]
    if len(parts) == 1 and width in (4, 7) and (found := re.match(r"pd_ee_(target_)?(delta_)?(pos|pose)$", mode)):
        delta = bool(found[2])
        position = ActionBlock(
            name="position",
            size=3,
            kind="position",
            mode="delta" if delta else "absolute",
            frame="base",
            unit="scaled" if delta else "m",
        )
        rotation = position.model_copy(
            update={"name": "rotation", "kind": "rotation", "unit": "scaled" if delta else "rad"}
        )
        if (width, found[3]) in ((7, "pose"), (4, "pos")):
            return (position, rotation, GRIPPER) if width == 7 else (position, GRIPPER)
    if len(parts) == 1 and width == 8 and (found := re.match(r"pd_joint_(target_)?(delta_)?pos$", mode)):
        delta = bool(found[2])
        joints = ActionBlock(
            name="joints",
            size=7,
            kind="joint",
            mode="delta" if delta else "absolute",
            unit="scaled" if delta else "rad",
        )
        return joints, GRIPPER
    return tuple(ActionBlock(name=name, size=rows.shape[1]) for name, rows in parts.items())


def _robot(episode: h5py.Group, said: dict[str, Any]) -> str | None:
    """The robot that the JSON file names, or else the only articulation of the simulator."""
    if isinstance(named := said.get("robot_uids"), str) and named:
        return named
    states = own(episode, "env_states")
    articulations = own(states, "articulations") if isinstance(states, h5py.Group) else None
    names = list(articulations) if isinstance(articulations, h5py.Group) else []
    return names[0] if len(names) == 1 else None


def _success(episode: h5py.Group, said: dict[str, Any]) -> bool | None:
    """Whether the task was done at the end, as ManiSkill counts it."""
    marks = own(episode, "success")
    if isinstance(marks, h5py.Dataset) and marks.size:
        return bool(numbers(marks).ravel()[-1] >= 1)
    return said["success"] if isinstance(said.get("success"), bool) else None


class _Said:
    """What the JSON file says of the data set and of each episode; nothing if there is none that can be read."""

    def __init__(self, table: dict[str, Any], problem: str | None = None):
        self.problem = problem
        env = _table(table.get("env_info"))
        kwargs = _table(env.get("env_kwargs"))
        sim = _table(kwargs.get("sim_config"))
        rate = sim.get("control_freq", kwargs.get("control_freq"))
        self._all = {
            "env_id": env.get("env_id") if isinstance(env.get("env_id"), str) else None,
            "robot_uids": kwargs.get("robot_uids"),
            "control_mode": kwargs.get("control_mode"),
            "fps": float(rate) if isinstance(rate, int | float) and 0 < rate <= 1000 else None,
        }
        listed = table.get("episodes")
        self._each = {
            f"traj_{one.get('episode_id')}": {key: one[key] for key in ("control_mode", "success") if key in one}
            for one in (listed if isinstance(listed, list) else [])
            if isinstance(one, dict)
        }

    def of(self, name: str) -> dict[str, Any]:
        return self._all | self._each.get(name, {})


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _said(file: Path) -> _Said:
    json_file = file.with_suffix(".json")
    return _parsed(json_file, json_file.stat().st_mtime_ns) if json_file.is_file() else _Said({})


@lru_cache(maxsize=2)  # the episodes of a file are read one after the other
def _parsed(file: Path, _modified: int) -> _Said:
    return _Said(*beside(file))


def _joined(held: str, said: dict[str, Any]) -> str:
    known = {key: value for key, value in said.items() if value is not None}
    return hashlib.sha256(json.dumps([held, known], sort_keys=True, default=str).encode()).hexdigest()


def _names(file: h5py.File) -> list[str]:
    return episode_groups(file, "traj")


def _read(file: Path) -> list[Finding]:
    return find_each(file, _names, _held)


def _held(file: h5py.File, name: str) -> str:
    return digest_of(child(file, name, h5py.Group), {})
