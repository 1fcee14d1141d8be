"""Open loop: action error and frame prediction on held-out episodes of a store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pipelines.console import say
from pipelines.models.batch import to_batch
from pipelines.models.data import dataset
from pipelines.models.policy import Policy
from pipelines.recipe import Recipe
from preprocessing import sources
from preprocessing.contracts.contract import DataContract
from preprocessing.contracts.interface import Interface
from preprocessing.episode import EpisodeRef
from preprocessing.errors import BadEpisode, UserError
from preprocessing.store.store import LatentStore
from uwm_model.augment import centre
from uwm_model.metrics import action_error, psnr

WINDOWS = 64
COMPARED_WINDOWS = 4  # windows whose frames are written as PNG
IDENTICAL = 60.0  # dB for identical frames, whose PSNR is infinite


class Comparison(TypedDict):
    """A PNG next to evaluation.json for the report: frames side by side, and their headings."""

    file: str
    columns: list[str]


@dataclass
class OpenLoop:
    """Means over held-out windows: action errors in the robot's units, PSNR in dB. None: the model has no such mode."""

    windows: int
    action_error_policy: float
    action_error_inverse: float | None
    action_error_mean: float  # of the constant mean action of these windows: the baseline
    psnr_forward: float | None
    psnr_floor: float | None
    psnr_ceiling: float | None


@torch.inference_mode()
def open_loop(policy: Policy, store_uri: str, output: Path) -> tuple[OpenLoop, list[Comparison]]:
    """Evaluate on held-out windows of the model's training snapshot; write predicted and true frames as PNG."""
    model, held_out = policy.model, HeldOut(policy, store_uri)
    batch, generator = held_out.batch, torch.Generator().manual_seed(0)
    by_policy = policy.ask(batch, generator)
    by_inverse = None
    if "inverse_dynamics" in model.modes:
        by_inverse, _ = model.sample("inverse_dynamics", batch, generator=generator)
    quality: tuple[float | None, float | None, float | None] = (None, None, None)
    comparisons: list[Comparison] = []
    if "forward_dynamics" in model.modes:
        _, future = model.sample("forward_dynamics", batch, generator=generator)
        assert future is not None
        quality, comparisons = _frame_quality(policy, held_out, future.numpy(), output)
    result = OpenLoop(
        WINDOWS,
        held_out.error(by_policy),
        None if by_inverse is None else held_out.error(by_inverse),
        held_out.error(held_out.mean_action()),
        *quality,
    )
    return result, comparisons


class HeldOut:
    """Windows of held-out episodes of the policy's embodiment, the same at every call.

    ``batch`` holds the model's input. Raises UserError if there are none, or if they do not match the policy's
    interface.
    """

    def __init__(self, policy: Policy, store_uri: str):
        at = LatentStore.open(store_uri).snapshot(policy.settings.snapshot).uri  # the store may have moved
        settings = policy.settings.model_copy(update={"store": at})
        self.data = data = dataset(settings, validation=True, recipe=Recipe.model_validate(settings.recipe))
        chosen = [i for i, row in enumerate(data.rows) if row["embodiment"] == policy.embodiment]
        if not chosen:
            raise UserError(
                f"{store_uri}: no held-out episode of {policy.embodiment}; raise validation_share in training"
            )
        for row in (data.rows[i] for i in chosen):
            if broken := policy.spec.interface.differences(Interface.of(row)):
                raise UserError(f"{row['uri']} #{row['index']} does not fit {policy.folder}: {'; '.join(broken)}")
        random = np.random.default_rng(0)
        self.episode = random.choice(chosen, WINDOWS)
        # Windows whose future is inside the episode: padding repeats the last frame, which is trivial to predict.
        ahead = data.shape.action_chunk + data.shape.future_frames
        self.frame = (random.random(WINDOWS) * np.maximum(data.frames[self.episode] - ahead, 1)).astype(int)
        arrays = data.gather(self.episode, self.frame)
        self.batch = centre(to_batch(arrays, torch.device("cpu"), torch.float32), settings.model.latent_size)
        self._true, self._mask = arrays["action"], arrays["action_mask"]
        self._scale = np.ones(settings.model.action_dim)
        self._scale[: policy.spec.action_dim] = policy.spec.action_normalizer.scale

    def error(self, action: torch.Tensor) -> float:
        """Mean absolute error of normalised actions [windows, L, A], in the robot's units."""
        return action_error(action.numpy() * self._scale, self._true * self._scale, self._mask)

    def mean_action(self) -> torch.Tensor:
        """Return the mean action of these windows over windows and steps, [windows, L, A]: a constant prediction."""
        mean = self._true.sum((0, 1)) / np.maximum(self._mask.sum((0, 1)), 1)
        return torch.from_numpy(np.broadcast_to(mean, self._true.shape).copy())


def _frame_quality(
    policy: Policy, held_out: HeldOut, predicted_latents: np.ndarray, output: Path
) -> tuple[tuple[float, float, float], list[Comparison]]:
    """Return the PSNR of predicted frames, of copies of the current ones (floor), of decoded true latents (ceiling).

    Latents [windows, V, Tf, C, h, w]. Comparisons of the first windows are written to ``output``.
    """
    assert held_out.batch.future_latents is not None
    true_latents = held_out.batch.future_latents.numpy()
    # The last future frame of each window, decoded for all windows of a camera slot at once.
    slots = range(true_latents.shape[1])
    predictions = [policy.encoder.decode(predicted_latents[:, slot, -1]) for slot in slots]
    rebuilds = [policy.encoder.decode(true_latents[:, slot, -1]) for slot in slots]
    quality: list[list[float]] = []
    shown: list[np.ndarray] = []
    for i, frames in enumerate(tqdm(_true_frames(policy, held_out), "frames", total=WINDOWS, leave=False)):
        for slot, (now, then) in frames.items():
            predicted, rebuilt = predictions[slot][i], rebuilds[slot][i]
            quality.append([min(float(psnr(image, then)), IDENTICAL) for image in (predicted, now, rebuilt)])
            if len(shown) < COMPARED_WINDOWS * len(slots):
                shown.append(np.concatenate([now, predicted, then], axis=1))
    comparisons: list[Comparison] = []
    for number, image in enumerate(shown):
        comparisons.append({"file": f"forward_{number}.png", "columns": ["now", "predicted", "true"]})
        Image.fromarray(image).save(output / comparisons[-1]["file"])
    if not quality:
        say("predicted frames are not judged: the source files of the held-out episodes are gone or have changed")
    forward, floor, ceiling = np.mean(quality, axis=0) if quality else [float("nan")] * 3
    return (float(forward), float(floor), float(ceiling)), comparisons


def _true_frames(policy: Policy, held_out: HeldOut) -> Iterator[dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Yield for each window, by camera slot, (current frame, last future frame), cropped to what the model sees.

    The frames come from the source files: latents alone cannot show what the camera saw. If the source is gone or
    changed, the window has no frames.
    """
    data, shape = held_out.data, held_out.data.shape
    decoded: dict[int, dict[str, np.ndarray]] = {}
    stride, seen = policy.settings.stride, policy.settings.model.latent_size[0]
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
