"""The training loss (section III-A): both modalities noised to their own, independent time, both noises predicted.

Who lacks a modality has no loss for it. Action-free video goes in with pure noise for actions at t_action = T-1, so
the network learns that time to mean "no action is known", which is what sampling relies on to ignore one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from uwm_model.batch import Batch
from uwm_model.denoiser import Denoise
from uwm_model.randomness import Random, unit_noise
from uwm_model.schedule import Schedule


class Losses(NamedTuple):
    """``total`` alone carries gradients. Per-sample losses are NaN where a sample lacks the modality."""

    total: Tensor  # float []: action + video
    action: Tensor  # float []
    video: Tensor  # float []
    action_per_sample: Tensor  # float [B]
    video_per_sample: Tensor  # float [B]


@dataclass(frozen=True)
class Noise:
    """Everything random in a loss."""

    action: Tensor  # float32 [B, L, A]
    latents: Tensor  # float32 [B, V, Tf, C, h, w]
    t_action: Tensor  # int64 [B], of a flow float32
    t_video: Tensor  # the same


def draw_noise(action: Tensor, latents: Tensor, schedule: Schedule, random: Random) -> Noise:
    """Unit noise for these shapes, and uniform times of the schedule, all on their device."""
    device = action.device
    t_action, t_video = (schedule.draw(len(action), random, device) for _ in range(2))
    return Noise(unit_noise(action.shape, random, device), unit_noise(latents.shape, random, device), t_action, t_video)


def joint_loss(
    denoise: Denoise,
    schedule: Schedule,
    action: Tensor,
    action_mask: Tensor,
    latents: Tensor,
    camera_mask: Tensor,
    noise: Noise,
    action_counted: Tensor,
    counts: Tensor | None = None,
) -> Losses:
    """action [B, L, A] and latents [B, V, Tf, C, h, w] clean, camera_mask bool [B, V].

    action_mask bool [B, L, A] says which actions there are, action_counted, of the same shape, which have a loss.
    ``counts`` is of ``masked_mean``: float [2], of the actions and of the cameras.
    """
    has_action = action_mask.any(dim=(1, 2))
    t_action = noise.t_action.where(has_action, schedule.last)
    noisy_action = schedule.noisy(action, noise.action, t_action)
    noisy_latents = schedule.noisy(latents, noise.latents, noise.t_video)
    action_prediction, latent_prediction = denoise(noisy_action, t_action, noisy_latents, noise.t_video)
    action_total, action_each = masked_mean(
        squared_error(action_prediction, schedule.target(action, noise.action, t_action)),
        action_counted,
        None if counts is None else counts[0],
    )
    target = schedule.target(latents, noise.latents, noise.t_video)
    video_error_BV = squared_error(latent_prediction, target).mean(dim=(2, 3, 4, 5))
    video_total, video_each = masked_mean(video_error_BV, camera_mask, None if counts is None else counts[1])
    return Losses(
        total=action_total + video_total,
        action=action_total.detach(),
        video=video_total.detach(),
        action_per_sample=action_each.detach(),
        video_per_sample=video_each.detach(),
    )


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """At least float32: a mean of bfloat16 keeps two digits."""
    precise = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(precise) - target.to(precise)).square()


def masked_mean(error: Tensor, mask: Tensor, total: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """error and mask [B, ...] -> the mean over all True entries (0 where there is none), and that of each sample.

    ``total`` float []: what the sum is divided by instead of this batch's own True entries. Whoever shares a batch out,
    over workers or passes, says so how many there are in a share on average; the mean of the shares is then that of the
    whole, however they differ.
    """
    counted, count = error.where(mask, 0).flatten(1).sum(1), mask.flatten(1).sum(1)
    return counted.sum() / (count.sum().clamp(min=1) if total is None else total), counted / count


def counted(batch: Batch, action_free_loss: bool) -> Tensor:
    """float32 [2]: how many action values, and how many cameras, have a loss in this batch."""
    action = batch.action_visible if action_free_loss else batch.action_mask
    return torch.stack([action.sum(), batch.camera_mask.sum()]).float()
