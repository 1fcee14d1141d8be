"""robomimic and LIBERO demonstrations: ``data/demo_i/{actions, obs/...}`` in one HDF5 file.

The layout: https://robomimic.github.io/docs/datasets/overview.html; LIBERO's additions are attributes of ``data``
(https://github.com/Lifelong-Robot-Learning/LIBERO). Images are uint8 data sets ``[T, H, W, 3]`` under ``obs``. OpenGL's
first row is the lowest, and LIBERO stores MuJoCo's images that way: its attribute ``macros_image_convention`` is
``opengl``, and the reader flips them. Everything else with a row per step becomes a signal: rewards, other actions, the
simulator's states. ``mask/train`` and ``mask/valid`` list robomimic's splits.

LIBERO's tool (``scripts/create_dataset.py``) replays each action and then stores the observation: row t of ``obs`` is
from after action t, row t of everything else from before it. Such files have a ``bddl_file_name``; the reader shifts
their actions by one row, so that each is paired with the observation it was commanded at.

An episode's index is its position among the demonstrations in natural order (``demo_2`` before ``demo_10``). Its digest
covers the values of its data sets and the attributes that change their meaning.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from preprocessing.episode import ActionBlock, Episode, EpisodeRef, Repair, Video
from preprocessing.errors import BadEpisode
from preprocessing.sources.scan_cache import Finding, file_digest, findings
from preprocessing.sources.untrusted.hdf5 import (
    at_once,
    child,
    datasets,
    digest_of,
    frames_reader,
    hdf5_files,
    json_of,
    numbers,
    own,
    text,
)
from preprocessing.video.frames import sliced_video, upside_down

DEFAULT_FPS = 20.0  # robosuite's control rate, and LIBERO's
SIMULATED = "object"  # object poses in robomimic, which no robot observes
ROBOSUITE = 1  # its type in robomimic's env_args
OBSERVED = ("obs/", "next_obs/")  # the second repeats the first, one step later
LIBERO_CAMERAS = {"agentview_rgb", "eye_in_hand_rgb"}  # kept by tools that replay LIBERO and drop its attributes
OBSERVED_LATE = ("robot_states",)  # observed after the action, too, although outside of obs
SPLITS = ("train", "valid", "test")
ATTRIBUTES = ("macros_image_convention", "env_args", "problem_info", "language_instruction", "robot", "fps", "ep_meta")


def detect(path: Path) -> bool:
    return any(True for _ in hdf5_files(path, "demonstrations"))


def scan(path: Path) -> Iterator[EpisodeRef]:
    for file, found in findings("hdf5", hdf5_files(path, "demonstrations"), _read):
        for index, demo in enumerate(found):
            yield EpisodeRef(str(file.absolute()), "hdf5", index, demo.digest, demo.problem)


def digest(ref: EpisodeRef) -> str:
    with h5py.File(ref.uri, "r") as file:
        data = _data(file)
        return _digest(data, _name(data, ref))


def load(ref: EpisodeRef) -> Episode:
    path = Path(ref.uri)
    with h5py.File(path, "r") as file:
        data = _data(file)
        name = _name(data, ref)
        demo = child(data, name, h5py.Group)
        obs = child(demo, "obs", h5py.Group)
        action = numbers(child(demo, "actions", h5py.Dataset))
        if action.ndim != 2:
            raise BadEpisode(f"actions have shape {action.shape}, not one vector per step")
        env = json_of(_attribute(data, demo, "env_args"))
        fps, robot, repairs = _fps(data, demo, env), _robot(data, demo, env), list[Repair]()
        if fps is None:
            fps = DEFAULT_FPS
            repairs.append(Repair("fps", f"control rate unknown; {DEFAULT_FPS:g} Hz assumed"))
        if robot is None:
            repairs.append(Repair("embodiment", "robot unknown"))

        inside = {key: value for key in sorted(obs) if isinstance(value := own(obs, key), h5py.Dataset)}
        links = [key for key in sorted(obs) if own(obs, key) is None]
        repairs += [Repair("streams", f"obs/{key} is a link and is not followed") for key in links]
        images = {k: d for k, d in inside.items() if d.ndim == 4 and d.shape[-1] == 3 and d.dtype == np.uint8}
        vectors = {k: d for k, d in inside.items() if d.ndim in (1, 2) and d.dtype.kind == "f"}
        lengths = {len(dataset) for dataset in (*images.values(), *vectors.values())}
        whole = {k: d for k, d in inside.items() if d.ndim in (1, 2) and d.dtype.kind in "iub" and {len(d)} == lengths}
        vectors = dict(sorted((vectors | whole).items()))
        misfits = [key for key in inside if key not in images and key not in vectors]
        why = "is neither RGB images nor one vector per frame; left out"
        repairs += [Repair("streams", f"obs/{key} {why}") for key in misfits]
        steps = len(action)
        if lengths == {steps + 1}:
            surplus = "one frame more than actions; the last one, from after the last action, is dropped"
            repairs.append(Repair("frames", surplus))
        elif lengths - {steps}:
            raise BadEpisode(f"{steps} actions, but observations of lengths {sorted(lengths)}")

        proprio = {key: numbers(d)[:steps].reshape(steps, -1) for key, d in vectors.items()}
        signals, left_out = _signals(demo, steps)
        repairs += left_out
        if _observed_after_action(data, demo) and steps > 1:
            steps -= 1
            action, proprio = action[1:], {key: rows[:steps] for key, rows in proprio.items()}
            signals = {key: rows[:steps] if key in OBSERVED_LATE else rows[1:] for key, rows in signals.items()}
            late = "LIBERO stores the observation after each action; actions are shifted by one row"
            repairs.append(Repair("steps", late))
        if SIMULATED in proprio:
            signals[f"obs/{SIMULATED}"] = proprio.pop(SIMULATED)
        texts = _texts(data, demo)
        bottom_up = text(_attribute(data, demo, "macros_image_convention")) == "opengl"
        cameras: dict[str, Video] = {}
        for key, stored in images.items():
            video = sliced_video(steps, frames_reader(path, f"data/{name}/obs/{key}"), at_once(stored))
            cameras[_camera_name(key, images)] = upside_down(video) if bottom_up else video
        if bottom_up and images:
            repairs.append(Repair("flip", "images are stored bottom-up (opengl); flipped"))
        elif images.keys() >= LIBERO_CAMERAS and not text(_attribute(data, demo, "macros_image_convention")):
            untold = "LIBERO's own files store images bottom-up; this one does not say, and they are not flipped"
            repairs.append(Repair("flip", untold))
        return Episode(
            ref=ref,
            fps=fps,
            cameras=cameras,
            proprio=proprio,
            action=action,
            action_layout=_layout(action.shape[1], env),
            instruction=next(filter(None, texts.values()), None),
            success=_success(demo),
            embodiment=robot or "unknown",
            repairs=tuple(repairs),
            signals=signals,
            texts=texts,
            dataset=_suite(data, demo),
            split=_split(file, name),
        )


def _observed_after_action(data: h5py.Group, demo: h5py.Group) -> bool:
    return bool(text(_attribute(data, demo, "bddl_file_name")))


def _camera_name(key: str, images: dict[str, Any]) -> str:
    """``agentview_rgb`` (LIBERO) and ``agentview_image`` (robomimic) are both the camera agentview."""
    short = re.sub(r"_(rgb|image)$", "", key)
    return key if sum(re.sub(r"_(rgb|image)$", "", other) == short for other in images) > 1 else short


def _layout(width: int, env: dict[str, Any]) -> tuple[ActionBlock, ...]:
    """robosuite's OSC_POSE takes seven numbers, Meta-World's controller four, all scaled to +-1; +1 closes the gripper.

    Other simulators and controllers differ (Isaac Lab opens the gripper at +1), so their actions stay one block.
    """
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


def _signals(demo: h5py.Group, steps: int) -> tuple[dict[str, np.ndarray], list[Repair]]:
    """All vectors with a row per step outside of the observations, and a repair for each that does not fit."""
    signals, repairs = dict[str, np.ndarray](), list[Repair]()
    for key, dataset in datasets(demo):
        if key == "actions" or key.startswith(OBSERVED) or dataset.dtype.kind not in "fiub":
            continue
        if dataset.ndim not in (1, 2) or dataset.size == 0:
            continue
        if len(dataset) not in (steps, steps + 1):
            repairs.append(Repair("streams", f"{key} has {len(dataset)} rows for {steps} actions; left out"))
            continue
        signals[key] = numbers(dataset)[:steps].reshape(steps, -1)
        if len(dataset) > steps:
            repairs.append(Repair("steps", f"{key} has one row more than actions; its last row is dropped"))
    return signals, repairs


def _texts(data: h5py.Group, demo: h5py.Group) -> dict[str, str]:
    found = {
        "language_instruction": _attribute(data, demo, "language_instruction"),
        "problem_info/language_instruction": json_of(_attribute(data, demo, "problem_info")).get(
            "language_instruction"
        ),
        "ep_meta/lang": json_of(_attribute(data, demo, "ep_meta")).get("lang"),  # RoboCasa
    }
    return {name: instruction for name, value in found.items() if (instruction := text(value))}


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
    """A sparse reward is 1 where the task is done. ``dones`` comes second: it may just mark the end."""
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
    try:
        with h5py.File(file, "r") as opened:
            data = _data(opened)
            return [_finding(file, data, name) for name in _demos(data)]
    except (BadEpisode, OSError, RuntimeError) as error:
        return [Finding(file_digest(file), f"not a readable demonstration file: {error}")]


def _finding(file: Path, data: h5py.Group, name: str) -> Finding:
    try:
        return Finding(_digest(data, name))
    except (BadEpisode, OSError, RuntimeError) as error:
        broken = hashlib.sha256(f"{file_digest(file)} {name}".encode()).hexdigest()
        return Finding(broken, f"{name} cannot be read: {error}")


def _digest(data: h5py.Group, name: str) -> str:
    demo = child(data, name, h5py.Group)
    late = "afterwards" if _observed_after_action(data, demo) else None
    return digest_of(demo, {name: _attribute(data, demo, name) for name in ATTRIBUTES} | {"seen": late})


def _data(file: h5py.File) -> h5py.Group:
    return child(file, "data", h5py.Group)


def _demos(data: h5py.Group) -> list[str]:
    names = [name for name in data if isinstance(own(data, name), h5py.Group)]
    if not names:
        raise BadEpisode("data/ holds no demonstration")
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _name(data: h5py.Group, ref: EpisodeRef) -> str:
    names = _demos(data)
    if ref.index >= len(names):
        raise BadEpisode(f"the file now has only {len(names)} demonstrations, fewer than when it was listed")
    return names[ref.index]
