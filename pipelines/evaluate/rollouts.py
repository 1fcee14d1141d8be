"""Closed loop: success rate of a policy in a simulator, and a video of every episode."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from tqdm import tqdm

from infra.simulators.face import SUITES, Simulator, Suite, episode_seed, load_suite
from pipelines.evaluate.intervals import wilson_interval
from pipelines.models.policy import Policy
from pipelines.models.session import Session
from preprocessing.errors import UserError
from preprocessing.video.write import write_video


class RolloutVideo(TypedDict):
    """A video next to evaluation.json."""

    file: str
    episode: int
    success: bool


@dataclass
class ClosedLoop:
    """Success rate over episodes of one task, with its 95 % Wilson interval."""

    task: str
    episodes: int
    successes: int
    success_rate: float
    low: float
    high: float


def closed_loop(
    policy: Policy, env: str, episodes: int, output: Path, seed: int, label: str
) -> tuple[ClosedLoop, list[RolloutVideo]]:
    """Run the policy in ``SUITE:TASK`` on all cores; write a video of each episode to ``output``.

    An episode's initial state and the policy's noise depend only on ``seed`` and the episode's number. The policy must
    accept the suite's interface; ``label`` names it in the progress line.
    """
    task = env.partition(":")[2]
    videos: list[RolloutVideo] = []
    with ProcessPoolExecutor(min(os.cpu_count() or 1, episodes), get_context("spawn")) as pool:
        try:
            jobs = [
                pool.submit(rollout, policy.folder, policy.embodiment, policy.fast, env, seed, number, output)
                for number in range(episodes)
            ]
            with tqdm(as_completed(jobs), f"{label} on {task}", total=episodes, unit="ep") as bar:
                for job in bar:
                    videos.append(job.result())
                    bar.set_postfix_str(f"{sum(one['success'] for one in videos)} of {len(videos)} succeed")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    videos.sort(key=lambda video: video["episode"])
    successes = sum(video["success"] for video in videos)
    low, high = wilson_interval(successes, episodes)
    return ClosedLoop(env, episodes, successes, successes / episodes, low, high), videos


def find_suite(env: str) -> Suite:
    """Return the suite of ``SUITE:TASK``. Raises UserError if there is no such suite or task."""
    name, _, task = env.partition(":")
    if name not in SUITES:
        raise UserError(f"{env}: unknown suite {name}; known: {', '.join(SUITES)}, e.g. --env metaworld:drawer-close")
    suite = load_suite(name)
    if task not in suite.INSTRUCTIONS:
        near = get_close_matches(task, suite.INSTRUCTIONS, n=3, cutoff=0.4)
        hint = f"is it {' or '.join(near)}?" if near else f"it has {', '.join(suite.INSTRUCTIONS)}"
        raise UserError(f"{env}: {name} has no such task; {hint}")
    return suite


@cache
def _loaded(folder: Path, embodiment: str, fast: bool, env: str) -> tuple[Policy, Simulator]:
    """Load the policy and the simulator, once per process: either takes a second."""
    torch.set_num_threads(1)  # one process per core
    policy = Policy(folder, embodiment, fast)
    suite, _, task = env.partition(":")
    return policy, load_suite(suite).make(task, policy.image_size)


def rollout(folder: Path, embodiment: str, fast: bool, env: str, seed: int, number: int, output: Path) -> RolloutVideo:
    """Run one episode in this process and write its video to ``output``."""
    policy, simulator = _loaded(folder, embodiment, fast, env)
    session = Session(policy, seed + number)
    observation, _ = simulator.reset(seed=episode_seed(seed, number))
    seen = [observation["images"]]
    success = ended = False
    while not (success or ended):
        action = session.act(observation, simulator.instruction)
        observation, _, terminated, truncated, info = simulator.step(action)
        seen.append(observation["images"])
        success, ended = info["success"], terminated or truncated
    outcome = "success" if success else "failure"
    frames = (np.concatenate(list(images.values()), axis=1) for images in seen)
    file = f"{env.partition(':')[2]}_{number:02d}_{outcome}.mp4"
    write_video(output / file, frames, policy.spec.fps, quality=26)
    return {"file": file, "episode": number, "success": success}
