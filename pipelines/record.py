"""``uwm record``: raw data as a robot lab has it, from Meta-World's scripted experts.

The first half of each task's demonstrations goes into an HDF5 file as LIBERO writes them, the second half into one
LeRobot data set; additional ones become MP4 videos without actions. The robot executes a noisy action while the
expert's own is recorded, so that a policy sees how to recover from mistakes (Laskey et al. 2017, DART).
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from infra.simulators.face import episode_seed
from infra.simulators.metaworld import ACTION_REPEAT, CAMERAS, FPS, INSTRUCTIONS, MetaWorld
from pipelines.outputs import check_writable
from preprocessing.errors import UserError
from preprocessing.video.write import write_video

DISTURBANCE = 0.3  # standard deviation of the noise on executed actions
AFTER_SUCCESS = 5  # steps recorded beyond the first success
ATTEMPTS = 20
PROCESSES = 2
QUALITY = 16  # x264's CRF: few artefacts, so that models learn from the camera and not the codec


@dataclass
class Demonstration:
    """images uint8 [T, H, W, 3] by camera; state and action float32 [T, 4]."""

    task: str
    images: dict[str, np.ndarray]
    state: np.ndarray
    action: np.ndarray


def record(out: Path, tasks: list[str], episodes: int, videos: int, image_size: int = 128, seed: int = 0) -> str:
    """Write ``out/hdf5``, ``out/lerobot`` and ``out/videos``; return a summary. Does nothing if already recorded."""
    settings = {
        "tasks": tasks,
        "episodes": episodes,
        "videos": videos,
        "image_size": image_size,
        "seed": seed,
        "action_repeat": ACTION_REPEAT,
        "disturbance": DISTURBANCE,
    }
    summary = f"{len(tasks) * episodes} demonstrations and {len(tasks) * videos} videos of {', '.join(tasks)}"
    done = out / "recording.json"
    if done.exists() and json.loads(done.read_text()) == settings:
        return f"{summary}, already recorded"
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out}: holds something other than this recording; choose another folder, or remove it")
    check_writable(out.parent, "OUTPUT")
    building = out.with_name(f".{out.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    wanted = [(task, number, image_size, seed) for task in tasks for number in range(episodes + videos)]
    writer = _Writer(building, tasks)
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        jobs = [pool.submit(demonstrate, *one) for one in wanted]
        try:
            # In order, so that the same settings give the same bytes; popped, to free the frames.
            for _, number, *_ in tqdm(wanted, "record", unit="ep", mininterval=0.5):
                demonstration = jobs.pop(0).result()
                if number >= episodes:
                    writer.video(demonstration, number - episodes)
                elif number < episodes // 2:
                    writer.hdf5(demonstration, number)
                else:
                    writer.lerobot(demonstration)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    writer.close()
    (building / "recording.json").write_text(json.dumps(settings))
    shutil.rmtree(out, ignore_errors=True)
    building.rename(out)
    return summary


@cache
def _simulator(task: str, image_size: int) -> MetaWorld:
    return MetaWorld(task, image_size)  # cached per process: making one takes a second


def demonstrate(task: str, number: int, image_size: int, seed: int) -> Demonstration:
    """Return one successful demonstration. It depends on the arguments only."""
    simulator = _simulator(task, image_size)
    for attempt in range(ATTEMPTS):
        random = np.random.default_rng((seed, number, attempt))
        observation, _ = simulator.reset(seed=episode_seed(seed, number + 10_000 * attempt))
        steps: list[tuple[Any, np.ndarray]] = []
        left: int | None = None
        truncated = False
        while not truncated and left != 0:
            action = simulator.expert_action()
            steps.append((observation, action))
            disturbed = action + random.normal(0, DISTURBANCE, 4) * [1, 1, 1, 0]  # noise must not open the gripper
            observation, _, _, truncated, info = simulator.step(disturbed)
            left = left - 1 if left is not None else AFTER_SUCCESS if info["success"] else None
        if left is not None:
            break
    else:
        raise UserError(f"{task}: the scripted expert failed {ATTEMPTS} times in a row; choose another task")
    images = {camera: np.stack([seen["images"][camera] for seen, _ in steps]) for camera in CAMERAS}
    return Demonstration(
        task, images, np.stack([seen["proprio"]["state"] for seen, _ in steps]), np.stack([a for _, a in steps])
    )


class _Writer:
    """Writes the three kinds of raw data under one folder."""

    def __init__(self, folder: Path, tasks: list[str]):
        self._hdf5, self._lerobot, self._videos = (folder / name for name in ("hdf5", "lerobot", "videos"))
        for path in (self._hdf5, self._videos, self._lerobot / "meta", self._lerobot / "data" / "chunk-000"):
            path.mkdir(parents=True)
        self._tasks = tasks
        self._episodes: list[dict[str, Any]] = []

    def video(self, demonstration: Demonstration, number: int) -> None:
        path = self._videos / f"{demonstration.task}_{number:03d}.mp4"
        write_video(path, demonstration.images["agentview"], FPS, QUALITY)

    def hdf5(self, demonstration: Demonstration, number: int) -> None:
        """Write robomimic's layout with LIBERO's conventions: frames bottom-up, instruction in ``problem_info``."""
        with h5py.File(self._hdf5 / f"{demonstration.task}_demo.hdf5", "a") as file:
            data = file.require_group("data")
            data.attrs["macros_image_convention"] = "opengl"
            data.attrs["problem_info"] = json.dumps({"language_instruction": INSTRUCTIONS[demonstration.task]})
            data.attrs["env_args"] = json.dumps({"env_name": demonstration.task, "env_kwargs": {"robots": ["Sawyer"]}})
            data.attrs["fps"] = FPS
            demo = data.create_group(f"demo_{number}")
            length = len(demonstration.action)
            demo.attrs["num_samples"] = length
            demo["actions"] = demonstration.action
            demo["dones"] = (np.arange(length) == length - 1).astype(np.uint8)
            demo["rewards"] = (np.arange(length) >= length - AFTER_SUCCESS).astype(np.float32)
            demo["obs/state"] = demonstration.state
            for camera, images in demonstration.images.items():
                demo.create_dataset(f"obs/{camera}_rgb", data=images[:, ::-1], chunks=(1, *images.shape[1:]))

    def lerobot(self, demonstration: Demonstration) -> None:
        """Write LeRobot v2.1: per episode a Parquet file and one video per camera."""
        index, length = len(self._episodes), len(demonstration.action)
        task = self._tasks.index(demonstration.task)
        start = sum(episode["length"] for episode in self._episodes)
        columns = {
            "observation.state": list(demonstration.state),
            "action": list(demonstration.action),
            "timestamp": (np.arange(length) / FPS).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, index),
            "index": start + np.arange(length),
            "task_index": np.full(length, task),
            "next.done": np.arange(length) == length - 1,
        }
        pq.write_table(pa.table(columns), self._lerobot / "data" / "chunk-000" / f"episode_{index:06d}.parquet")
        for camera, images in demonstration.images.items():
            folder = self._lerobot / "videos" / "chunk-000" / f"observation.images.{camera}"
            folder.mkdir(parents=True, exist_ok=True)
            write_video(folder / f"episode_{index:06d}.mp4", images, FPS, QUALITY)
        self._size = demonstration.images["agentview"].shape[1:]
        self._episodes.append({"episode_index": index, "tasks": [INSTRUCTIONS[demonstration.task]], "length": length})

    def close(self) -> None:
        names = {"action": ["x", "y", "z", "gripper"], "observation.state": ["x", "y", "z", "gripper"]}
        vectors = {key: {"dtype": "float32", "shape": [4], "names": value} for key, value in names.items()}
        video = {"dtype": "video", "shape": self._size, "names": ["height", "width", "channel"]}
        frames = sum(episode["length"] for episode in self._episodes)
        info = {
            "codebase_version": "v2.1",
            "robot_type": "sawyer",
            "fps": FPS,
            "total_episodes": len(self._episodes),
            "total_frames": frames,
            "total_tasks": len(self._tasks),
            "chunks_size": 1000,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
            "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
            "features": vectors | {f"observation.images.{camera}": video for camera in CAMERAS},
        }
        meta = self._lerobot / "meta"
        (meta / "info.json").write_text(json.dumps(info, indent=1))
        tasks = [{"task_index": i, "task": INSTRUCTIONS[task]} for i, task in enumerate(self._tasks)]
        for name, rows in (("tasks", tasks), ("episodes", self._episodes)):
            (meta / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
