"""``uwm evaluate``: how good a model is, on held-out episodes (open loop) and in a simulator (closed loop).

Open loop: action error in policy and inverse-dynamics mode; PSNR of forward dynamics between its floor (the current
frame, copied) and its ceiling (the true future frame through the VAE); all as far as this kind of model has those
modes. Closed loop: success rate with its interval, and a video of every episode. Everything goes into a folder and to
the model's MLflow run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from infra import tracking
from pipelines.models.data import dataset, to_batch
from pipelines.models.policy import Policy, history
from pipelines.models.published import resolve
from pipelines.recipe import Recipe
from preprocessing import sources
from preprocessing.contracts.contract import DataContract
from preprocessing.contracts.interface import Promise
from preprocessing.episode import EpisodeRef
from preprocessing.errors import BadEpisode, UserError
from preprocessing.store.store import LatentStore
from uwm_model.augment import centre
from uwm_model.metrics import psnr, wilson_interval

EXECUTED = 8  # actions of a chunk that are carried out before the policy looks again
WINDOWS = 64
PICTURES = 4
IDENTICAL = 60.0  # dB that equal pictures count as, for their PSNR is infinite


@dataclass
class OpenLoop:
    """Means over held-out windows; action errors in the robot's units, PSNR in dB. None: this kind of model cannot."""

    windows: int
    action_error_policy: float
    action_error_inverse: float | None
    action_error_mean: float  # of always answering the training mean: what an error is to be held against
    psnr_forward: float | None
    psnr_floor: float | None
    psnr_ceiling: float | None


@dataclass
class ClosedLoop:
    """Success rate over episodes of one task, with its 95 % Wilson interval."""

    task: str
    episodes: int
    successes: int
    success_rate: float
    low: float
    high: float


def evaluate(
    model: str,
    store_uri: str | None,
    env: str | None,
    episodes: int,
    output: Path,
    embodiment: str | None = None,
    seed: int = 1000,
    fast: bool = False,
) -> dict[str, Any]:
    """Evaluate MODEL where asked to; writes ``output/evaluation.json`` and returns its content."""
    folder = resolve(model, store_uri, embodiment)
    policy = Policy(folder, embodiment, fast)
    output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "model": model,
        "run_id": policy.settings.run_id,
        "embodiment": policy.embodiment,
        "cameras": list(policy.spec.seen),
        "seed": seed,
        "fast": fast,
    }
    metrics: dict[str, float] = {}
    if store_uri:
        result = open_loop(policy, store_uri, output)
        report["open_loop"] = asdict(result)
        metrics |= {name: float(value) for name, value in asdict(result).items() if value is not None}
    if env:
        of_task = closed_loop(policy, env, episodes, output, seed)
        report["closed_loop"] = asdict(of_task)
        metrics[f"success_rate.{env.replace(':', '.')}"] = of_task.success_rate
    (output / "evaluation.json").write_text(json.dumps(report, indent=1))
    if fast:  # how another policy fares, as far as the gates of promotion are concerned
        asked = ("action_error_policy", "success_rate")
        metrics = {f"fast.{name}" if name.startswith(asked) else name: value for name, value in metrics.items()}
    if policy.settings.run_id:
        tracking.connect()
        tracking.log_metrics(policy.settings.run_id, metrics, policy.settings.step)
        tracking.log_folder(policy.settings.run_id, output, "evaluation")
    return report


@torch.inference_mode()
def open_loop(policy: Policy, store_uri: str, output: Path) -> OpenLoop:
    """Held-out windows of the store that the model was trained on; writes predicted against true frames as PNG."""
    model, held_out = policy.model, HeldOut(policy, store_uri)
    batch, generator = held_out.batch, torch.Generator().manual_seed(0)
    by_policy = policy.ask(batch, generator)
    by_inverse = None
    if "inverse_dynamics" in model.modes:
        by_inverse, _ = model.sample("inverse_dynamics", batch, generator=generator)
    of_frames: tuple[float | None, float | None, float | None] = (None, None, None)
    if "forward_dynamics" in model.modes:
        _, future = model.sample("forward_dynamics", batch, generator=generator)
        assert future is not None
        of_frames = _frame_quality(policy, held_out, future.numpy(), output)
    return OpenLoop(
        WINDOWS,
        held_out.error(by_policy),
        None if by_inverse is None else held_out.error(by_inverse),
        held_out.error(held_out.mean_action()),
        *of_frames,
    )


class HeldOut:
    """Windows of held-out episodes of the policy's embodiment, the same at every call.

    ``batch`` is what the model sees of them. Raises UserError where there are none, or they are not what it knows.
    """

    def __init__(self, policy: Policy, store_uri: str):
        at = LatentStore.open(store_uri).snapshot(policy.settings.snapshot).uri  # a store may have moved
        settings = policy.settings.model_copy(update={"store": at})
        self.data = data = dataset(settings, validation=True, recipe=Recipe.model_validate(settings.recipe))
        chosen = [i for i, row in enumerate(data.rows) if row["embodiment"] == policy.embodiment]
        if not chosen:
            raise UserError(
                f"{store_uri}: no held-out episode of {policy.embodiment}; raise validation_share in training"
            )
        for row in (data.rows[i] for i in chosen):
            if broken := policy.spec.promise.differences(Promise.of(row)):
                raise UserError(f"{row['uri']} #{row['index']} is not what {policy.folder} knows: {'; '.join(broken)}")
        random = np.random.default_rng(0)
        self.episode = random.choice(chosen, WINDOWS)
        # Windows whose future is still in the episode: a frame that merely repeats the last one predicts itself.
        ahead = data.shape.action_chunk + data.shape.future_frames
        self.frame = (random.random(WINDOWS) * np.maximum(data.frames[self.episode] - ahead, 1)).astype(int)
        arrays = data.gather(self.episode, self.frame)
        self.batch = centre(to_batch(arrays, torch.device("cpu"), torch.float32), settings.model.latent_size)
        self._true, self._mask = arrays["action"], arrays["action_mask"]
        self._scale = np.ones(settings.model.action_dim)
        self._scale[: policy.spec.action_dim] = policy.spec.action_normalizer.scale

    def error(self, action: torch.Tensor) -> float:
        """Mean absolute error of normalised actions [windows, L, A], in the robot's units."""
        return float((np.abs(action.numpy() - self._true) * self._scale)[self._mask].mean())

    def mean_action(self) -> torch.Tensor:
        """Of these windows, for each step and dimension, [windows, L, A]: an answer without a look."""
        mean = self._true.sum((0, 1)) / np.maximum(self._mask.sum((0, 1)), 1)
        return torch.from_numpy(np.broadcast_to(mean, self._true.shape).copy())


def _frame_quality(
    policy: Policy, held_out: HeldOut, predicted_latents: np.ndarray, output: Path
) -> tuple[float, float, float]:
    """PSNR of the predicted frames, of the current ones copied (floor), of the true latents decoded (ceiling).

    Latents [windows, V, Tf, C, h, w]. Pictures of the first predictions go to ``output``.
    """
    assert held_out.batch.future_latents is not None
    true_latents = held_out.batch.future_latents.numpy()
    # The farthest of the future frames, of every window and camera slot at once.
    slots = range(true_latents.shape[1])
    predictions = [policy.encoder.decode(predicted_latents[:, slot, -1]) for slot in slots]
    rebuilds = [policy.encoder.decode(true_latents[:, slot, -1]) for slot in slots]
    quality: list[list[float]] = []
    pictures: list[np.ndarray] = []
    for i, frames in enumerate(tqdm(_true_frames(policy, held_out), "frames", total=WINDOWS, leave=False)):
        for slot, (now, then) in frames.items():
            predicted, rebuilt = predictions[slot][i], rebuilds[slot][i]
            quality.append([min(float(psnr(image, then)), IDENTICAL) for image in (predicted, now, rebuilt)])
            if len(pictures) < PICTURES * len(slots):
                pictures.append(np.concatenate([now, predicted, then], axis=1))
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(output / f"forward_{number}.png")
    forward, floor, ceiling = np.mean(quality, axis=0) if quality else [float("nan")] * 3
    return float(forward), float(floor), float(ceiling)


def _true_frames(policy: Policy, held_out: HeldOut) -> Iterator[dict[int, tuple[np.ndarray, np.ndarray]]]:
    """For each window, by camera slot: (the current frame, the farthest future frame) from the source files, of which
    as much as the model sees.

    Windows whose source is gone or changed yield nothing: latents alone cannot say what the camera saw.
    """
    data, shape = held_out.data, held_out.data.shape
    decoded: dict[int, dict[str, np.ndarray]] = {}
    stride, seen = policy.encoder.stride, policy.settings.model.latent_size[0]
    first = (policy.image_size // stride - seen) // 2 * stride
    middle = slice(first, first + seen * stride)
    for index, at in zip(held_out.episode, held_out.frame, strict=True):
        row = data.rows[index]
        if index not in decoded:
            ref = EpisodeRef(row["uri"], row["format"], row["index"], digest="")
            contract = DataContract.model_validate_json(row["contract"]) if row["contract"] else None
            try:
                cameras = sources.load(ref, contract).cameras
                decoded[index] = {
                    name: np.concatenate(list(video.frames(policy.image_size)))[:, middle, middle]
                    for name, video in cameras.items()
                    if name in policy.spec.cameras
                }
            except (BadEpisode, UserError, OSError):
                decoded[index] = {}
        ahead = min(at + shape.action_chunk + shape.future_frames - 1, data.frames[index] - 1)
        now, future = data.first[index] + at, data.first[index] + ahead
        yield {
            policy.spec.cameras.index(name): (frames[now], frames[future])
            for name, frames in decoded[index].items()
            if len(frames) == row["frames"]
        }


def closed_loop(policy: Policy, env: str, episodes: int, output: Path, seed: int) -> ClosedLoop:
    """Roll the policy out in ``SUITE:TASK`` on all cores, a video of each episode in ``output``.

    An episode's initial state and the policy's noise are functions of ``seed`` and the episode's number.
    """
    suite, _, task = env.partition(":")
    if suite != "metaworld":
        raise UserError(f"{env}: unknown suite {suite}; known: metaworld, e.g. --env metaworld:drawer-close")
    from infra.simulators.metaworld import INSTRUCTIONS, PROMISE

    if task not in INSTRUCTIONS:
        raise UserError(f"{env}: no such Meta-World task; one of {', '.join(INSTRUCTIONS)}")
    policy.accept(PROMISE, env)
    successes = 0
    with ProcessPoolExecutor(min(os.cpu_count() or 1, episodes), get_context("spawn")) as pool:
        try:
            jobs = [
                pool.submit(rollout, policy.folder, policy.embodiment, policy.fast, task, seed, number, output)
                for number in range(episodes)
            ]
            with tqdm(as_completed(jobs), f"rollout {task}", total=episodes, unit="ep") as bar:
                for done, job in enumerate(bar, 1):
                    successes += job.result()
                    bar.set_postfix_str(f"{successes} of {done} succeed")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    low, high = wilson_interval(successes, episodes)
    return ClosedLoop(env, episodes, successes, successes / episodes, low, high)


@cache
def _player(folder: Path, embodiment: str, fast: bool, task: str, seed: int) -> tuple[Policy, Any]:
    """A process keeps its policy and its simulator."""
    from infra.simulators.metaworld import MetaWorld

    torch.set_num_threads(1)  # as many processes as cores
    policy = Policy(folder, embodiment, fast)
    return policy, MetaWorld(task, policy.image_size, seed)


def rollout(folder: Path, embodiment: str, fast: bool, task: str, seed: int, number: int, output: Path) -> bool:
    """One episode in this process, on one thread: whether it succeeded. Its video goes to ``output``."""
    from infra.simulators.metaworld import FPS, HORIZON

    policy, simulator = _player(folder, embodiment, fast, task, seed)
    generator = torch.Generator().manual_seed(seed + number)
    seen = [simulator.reset(number)]
    queue: list[np.ndarray] = []
    success = False
    while not success and len(seen) <= HORIZON:
        if not queue:
            images, proprio = history(seen, policy.settings.model.observed_frames)
            action = policy.act(images, proprio, generator, instruction=simulator.instruction)
            queue = list(action[0, :EXECUTED])
        observation, success = simulator.step(queue.pop(0))
        seen.append(observation)
    outcome = "success" if success else "failure"
    write_video(output / f"{task}_{number:02d}_{outcome}.mp4", [o["images"] for o in seen], FPS)
    return success


def write_video(path: Path, frames: list[dict[str, np.ndarray]], fps: int) -> None:
    """All cameras side by side, h264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "26", "preset": "veryfast"})
        height, width, _ = next(iter(frames[0].values())).shape
        stream.width, stream.height, stream.pix_fmt = width * len(frames[0]), height, "yuv420p"
        for cameras in frames:
            picture = av.VideoFrame.from_ndarray(np.concatenate(list(cameras.values()), axis=1), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def timestamped(folder: Path) -> Path:
    return folder / time.strftime("evaluation-%Y%m%d-%H%M%S")
