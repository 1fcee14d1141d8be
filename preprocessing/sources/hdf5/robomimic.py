"""robomimic, LIBERO and Isaac Lab demonstrations: ``data/demo_i/{actions, obs/...}`` in one HDF5 file.

The layout: https://robomimic.github.io/docs/datasets/overview.html; LIBERO's additions are attributes of ``data``
(https://github.com/Lifelong-Robot-Learning/LIBERO); Isaac Lab's recorder nests groups and marks success in an attribute
(https://github.com/isaac-sim/IsaacLab, ``hdf5_dataset_file_handler.py``, ``recorders.py``). Observations are under
``obs``, at any depth. OpenGL's first row is the lowest, and LIBERO stores MuJoCo's images that way: its attribute
``macros_image_convention`` is ``opengl``, and the reader flips them. Everything else with a row per step becomes a
signal: rewards, other actions, the simulator's states. ``mask/train`` and ``mask/valid`` list robomimic's splits.

LIBERO's tool (``scripts/create_dataset.py``) replays each action and then stores the observation: row t of ``obs`` is
from after action t, row t of everything else from before it. Such files have a ``bddl_file_name``; the reader shifts
their actions by one row, so that each is paired with the observation it was commanded at.

An episode's index is its position among the demonstrations in natural order (``demo_2`` before ``demo_10``). Its digest
covers the values of its data sets and the attributes that change their meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from preprocessing.episode import ActionBlock, Episode, EpisodeRef, Repair
from preprocessing.errors import BadEpisode
from preprocessing.sources.hdf5.episodes import find_each, name_of
from preprocessing.sources.hdf5.kinds import hdf5_files, resembles
from preprocessing.sources.hdf5.streams import Streams, action_of, common_length, read_streams
from preprocessing.sources.hdf5.texts import instruction_of, other_texts, texts_of
from preprocessing.sources.scan_cache import Finding, findings
from preprocessing.sources.untrusted.hdf5 import child, digest_of, groups, json_of, numbers, own, text
from preprocessing.video.frames import first_frames, upside_down

DEFAULT_FPS = 20.0  # robosuite's control rate, and LIBERO's
SIMULATED = ("object", "datagen_info")  # object poses in robomimic, marks for Isaac Lab Mimic: no robot observes them
ROBOSUITE = 1  # its type in robomimic's env_args
ACTIONS = ("actions", "action")
OBSERVATIONS = ("obs", "observations", "observation")  # robomimic's name, and what others made of it
ONCE = ("next_obs", "initial_state")  # the first repeats the observations, one step later; the second has one row
LIBERO_CAMERAS = {"agentview_rgb", "eye_in_hand_rgb"}  # kept by tools that replay LIBERO and drop its attributes
OBSERVED_LATE = ("robot_states",)  # observed after the action, too, although outside of obs
SPLITS = ("train", "valid", "test")
ATTRIBUTES = ("macros_image_convention", "env_args", "problem_info", "language_instruction", "robot", "fps", "ep_meta")
OWN_TEXTS = ("language_instruction", "problem_info/language_instruction", "ep_meta/lang")


def detect(path: Path) -> bool:
    return any(True for _ in hdf5_files(path, "demonstrations"))


def scan(path: Path) -> Iterator[EpisodeRef]:
    for file, found in findings("hdf5", hdf5_files(path, "demonstrations"), _read):
        for index, demo in enumerate(found):
            yield EpisodeRef(str(file.absolute()), "hdf5", index, demo.digest, demo.problem)


def digest(ref: EpisodeRef) -> str:
    with h5py.File(ref.uri, "r") as file:
        data = _data(file)
        return _digest(data, name_of(ref, _names))


def load(ref: EpisodeRef) -> Episode:
    path = Path(ref.uri)
    with h5py.File(path, "r") as file:
        data = _data(file)
        name = name_of(ref, _names)
        demo = child(data, name, h5py.Group)
        seen, obs = _observations(demo)
        commands, parts, repairs = action_of(demo, ACTIONS)
        env = json_of(_attribute(data, demo, "env_args"))
        fps, robot = _fps(data, demo, env), _robot(data, demo, env)
        if fps is None:
            fps = DEFAULT_FPS
            repairs.append(Repair("fps", f"control rate unknown; {DEFAULT_FPS:g} Hz assumed"))
        if robot is None:
            repairs.append(Repair("embodiment", "robot unknown"))

        action = np.concatenate([*parts.values()], axis=1) if parts else None
        steps = len(next(iter(parts.values()))) if parts else common_length(obs)
        streams = read_streams(path, obs, steps, f"{seen}/")
        if streams.lengths and not {steps, steps + 1} & streams.lengths.keys():
            raise BadEpisode(f"{steps} actions, but observations of lengths {sorted(streams.lengths)}")
        elsewhere = (seen, *ONCE, *([commands] if commands in parts else []))
        others = read_streams(path, demo, steps, skip=lambda place: place.partition("/")[0] in elsewhere)
        repairs += [*streams.repairs, *others.repairs]
        cameras = others.cameras | streams.cameras
        proprio, signals = _sorted_out(streams, others, seen)
        if action is not None and _observed_after_action(data, demo) and steps > 1:
            steps -= 1
            action, proprio = action[1:], {key: rows[:steps] for key, rows in proprio.items()}
            late = {key for key in signals if key in OBSERVED_LATE or key.startswith(f"{seen}/")}
            signals = {key: rows[:steps] if key in late else rows[1:] for key, rows in signals.items()}
            cameras = {key: first_frames(video, steps) for key, video in cameras.items()}
            shifted = "LIBERO stores the observation after each action; actions are shifted by one row"
            repairs.append(Repair("steps", shifted))
        texts = _texts(file, data, demo) | others.texts
        texts |= {f"{seen}/{key}": words for key, words in streams.texts.items()}
        instruction, guess = instruction_of(texts, OWN_TEXTS)
        convention = text(_attribute(data, demo, "macros_image_convention"))
        if convention == "opengl" and cameras:
            cameras = {key: upside_down(video) for key, video in cameras.items()}
            repairs.append(Repair("flip", "images are stored bottom-up (opengl); flipped"))
        elif not convention and {f"{key}_rgb" for key in cameras} >= LIBERO_CAMERAS:
            untold = "LIBERO's own files store images bottom-up; this one does not say, and they are not flipped"
            repairs.append(Repair("flip", untold))
        return Episode(
            ref=ref,
            fps=fps,
            cameras=cameras,
            proprio=proprio,
            action=action,
            action_layout=_layout(parts, env),
            instruction=instruction,
            success=_success(demo),
            embodiment=robot or "unknown",
            repairs=(*repairs, *guess),
            signals=signals,
            texts=texts,
            dataset=_suite(data, demo),
            split=_split(file, name),
        )


def _observations(demo: h5py.Group) -> tuple[str, h5py.Group]:
    for name in OBSERVATIONS:
        if isinstance(group := own(demo, name), h5py.Group):
            return name, group
    advice = "; it has only a simulator's states: render them with robomimic's dataset_states_to_obs.py"
    raise BadEpisode(f"no group 'obs' in {demo.name}{advice if own(demo, 'states') is not None else ''}")


def _sorted_out(streams: Streams, others: Streams, seen: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Proprioception, and signals: what no robot observes, and all vectors outside of the observations."""
    simulated = {key for key in streams.vectors if key.partition("/")[0] in SIMULATED}
    signals = others.vectors | others.tables
    signals |= {f"{seen}/{key}": streams.vectors[key] for key in sorted(simulated)}
    signals |= {f"{seen}/{key}": rows for key, rows in streams.tables.items()}
    return {key: rows for key, rows in streams.vectors.items() if key not in simulated}, signals


def _observed_after_action(data: h5py.Group, demo: h5py.Group) -> bool:
    return bool(text(_attribute(data, demo, "bddl_file_name")))


def _layout(parts: dict[str, np.ndarray], env: dict[str, Any]) -> tuple[ActionBlock, ...]:
    """robosuite's OSC_POSE takes seven numbers, Meta-World's controller four, all scaled to +-1; +1 closes the gripper.

    Other simulators and controllers differ (Isaac Lab opens the gripper at +1), so their actions stay one block.
    """
    if len(parts) != 1:
        return tuple(ActionBlock(name=name, size=rows.shape[1]) for name, rows in parts.items())
    width = next(iter(parts.values())).shape[1]
    kind, delta = _controller(env)
    elsewhere = isinstance(env.get("type"), int) and env["type"] != ROBOSUITE
    if elsewhere or kind not in (None, "OSC_POSE", "OSC_POSITION"):
        return (ActionBlock(name="action", size=width),)
    position = ActionBlock(name="position", size=3, kind="position", mode="delta", frame="base", unit="scaled")
    gripper = ActionBlock(name="gripper", size=1, kind="gripper", mode="absolute", gripper_one_means="closed")
    if not delta:
        position = position.model_copy(update={"mode": "absolute", "unit": "m"})
    if width == 7:
        rotation = position.model_copy(
            update={
                "name": "rotation",
                "kind": "rotation",
                "representation": "axis_angle",
                "unit": "scaled" if delta else "rad",
            },
        )
        return position, rotation, gripper
    if width == 4:
        return position, gripper
    return (ActionBlock(name="action", size=width),)


def _controller(env: dict[str, Any]) -> tuple[str | None, bool]:
    """The controller's type, and whether it takes deltas. Since version 1.5, robosuite has one per body part."""
    config = _kwargs(env).get("controller_configs")
    config = config[0] if isinstance(config, list) and config else config
    if isinstance(config, dict) and isinstance(parts := config.get("body_parts"), dict):
        arms = parts.get("arms")
        parts = arms if isinstance(arms, dict) else parts
        config = parts.get("right")
    if not isinstance(config, dict):
        return None, True
    delta = config.get("control_delta") is not False and config.get("input_type") != "absolute"
    return text(config.get("type")) or None, delta


def _texts(file: h5py.File, data: h5py.Group, demo: h5py.Group) -> dict[str, str]:
    found = {
        "language_instruction": _attribute(data, demo, "language_instruction"),
        "problem_info/language_instruction": json_of(_attribute(data, demo, "problem_info")).get(
            "language_instruction"
        ),
        "ep_meta/lang": json_of(_attribute(data, demo, "ep_meta")).get("lang"),  # RoboCasa
    }
    own_texts = {name: instruction for name, value in found.items() if (instruction := text(value))}
    return own_texts | {name: said for name, said in texts_of(demo, data, file).items() if name not in own_texts}


def _suite(data: h5py.Group, demo: h5py.Group) -> str | None:
    """LIBERO's suite, from the path of its task description: ``.../bddl_files/libero_90/TASK.bddl``."""
    suite = re.search(r"bddl_files/(\w+)/", text(_attribute(data, demo, "bddl_file_name")))
    return suite[1] if suite else None


def _split(file: h5py.File, name: str) -> str | None:
    masks = own(file, "mask")
    for split in SPLITS if isinstance(masks, h5py.Group) else ():
        names = own(masks, split)
        if isinstance(names, h5py.Dataset) and names.ndim == 1 and name in map(text, names[()]):
            return split
    return None


def _success(demo: h5py.Group) -> bool | None:
    """A sparse reward is 1 where the task is done. ``dones`` comes last: it may just mark the end."""
    if isinstance(marked := demo.attrs.get("success"), bool | np.bool_ | int | np.integer):  # Isaac Lab
        return bool(marked)
    for name in ("rewards", "dones"):
        values = own(demo, name)
        if isinstance(values, h5py.Dataset) and values.size:
            return bool((numbers(values) >= 1).any())
    return None


def _fps(data: h5py.Group, demo: h5py.Group, env: dict[str, Any]) -> float | None:
    for value in (_attribute(data, demo, "fps"), _kwargs(env).get("control_freq")):
        if isinstance(value, int | float | np.number) and value > 0:
            return float(value)
    return None


def _robot(data: h5py.Group, demo: h5py.Group, env: dict[str, Any]) -> str | None:
    return text(_attribute(data, demo, "robot")) or text(_kwargs(env).get("robots")) or None


def _kwargs(env: dict[str, Any]) -> dict[str, Any]:
    return kwargs if isinstance(kwargs := env.get("env_kwargs"), dict) else {}


def _attribute(data: h5py.Group, demo: h5py.Group, name: str) -> Any:
    return demo.attrs.get(name, data.attrs.get(name))


def _read(file: Path) -> list[Finding]:
    return find_each(file, _names, lambda opened, name: _digest(_data(opened), name))


def _digest(data: h5py.Group, name: str) -> str:
    demo = child(data, name, h5py.Group)
    late = "afterwards" if _observed_after_action(data, demo) else None
    known = {name: _attribute(data, demo, name) for name in ATTRIBUTES} | {"seen": late}
    marked = {"success": None if (mark := demo.attrs.get("success")) is None else str(mark)}
    return digest_of(demo, known | marked | other_texts(known, demo, data, data.file))


def _data(file: h5py.File) -> h5py.Group:
    if not isinstance(data := own(file, "data"), h5py.Group):
        raise BadEpisode(f"no group 'data' in /: {resembles(file)}")
    return data


def _names(file: h5py.File) -> list[str]:
    names = groups(_data(file))
    if not names:
        raise BadEpisode("data/ holds no demonstration")
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
