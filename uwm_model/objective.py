"""The training loss (section III-A): each modality is noised to its own, independent timestep, and both predicted.

A sample that lacks a modality has no loss for it. The actions of action-free video are pure noise at t_action = T-1,
so the network learns that this timestep means "the action is unknown"; sampling relies on that to ignore actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from uwm_model.denoiser import Denoise
from uwm_model.randomness import Random, unit_noise
from uwm_model.schedule import Schedule


class Losses(NamedTuple):
    """Only ``total`` carries gradients. Per-sample losses are NaN where a sample lacks the modality."""

    total: Tensor  # float []: Model.total_loss of the next two
    action: Tensor  # float []
    video: Tensor  # float []
    action_per_sample: Tensor  # float [B]
    video_per_sample: Tensor  # float [B]


@dataclass(frozen=True)
class Noise:
    """Everything that is random in a loss."""

    action: Tensor  # float32 [B, L, A]
    latents: Tensor  # float32 [B, V, Tf, C, h, w]
    t_action: Tensor  # int64 [B]; float32 for a flow
    t_video: Tensor  # int64 [B]; float32 for a flow


def draw_noise(action: Tensor, latents: Tensor, schedule: Schedule, random: Random) -> Noise:
    """Draw unit noise of these shapes, and timesteps from the schedule, on the same device."""
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (action loss, video loss, both by sample) of clean actions [B, L, A] and latents [B, V, Tf, C, h, w].

    action_mask bool [B, L, A]: which action values exist. action_counted bool [B, L, A]: which of them have a loss.
    camera_mask bool [B, V]. counts float [2]: what ``masked_mean`` divides the action and the video loss by.
    """
    has_action = action_mask.any(dim=(1, 2))
    t_action = noise.t_action.where(has_action, schedule.last)
    noisy_action = schedule.noisy(action, noise.action, t_action)
    noisy_latents = schedule.noisy(latents, noise.latents, noise.t_video)
    action_prediction, latent_prediction = denoise(noisy_action, t_action, noisy_latents, noise.t_video)
    action_loss, action_each = masked_mean(
        squared_error(action_prediction, schedule.target(action, noise.action, t_action)),
        action_counted,
        None if counts is None else counts[0],
    )
    target = schedule.target(latents, noise.latents, noise.t_video)
    video_error_BV = squared_error(latent_prediction, target).mean(dim=(2, 3, 4, 5))
    video_loss, video_each = masked_mean(video_error_BV, camera_mask, None if counts is None else counts[1])
    return action_loss, video_loss, action_each, video_each


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return it in at least float32: a mean of bfloat16 keeps two digits."""
    precise = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(precise) - target.to(precise)).square()


def masked_mean(error: Tensor, mask: Tensor, total: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the mean over all True entries (0 if there are none) and each sample's mean; error and mask [B, ...].

    ``total`` float [] replaces this batch's number of True entries as the divisor of the first, such as the number to
    expect in a share of the global batch.
    """
    error_sum, count = error.where(mask, 0).flatten(1).sum(1), mask.flatten(1).sum(1)
    return error_sum.sum() / (count.sum().clamp(min=1) if total is None else total), error_sum / count


def loss_counts(action_counted: Tensor, camera_mask: Tensor) -> Tensor:
    """Return the number of True entries of each mask, float32 [2]: the divisors of the action and video losses."""
    return torch.stack([action_counted.sum(), camera_mask.sum()]).float()
