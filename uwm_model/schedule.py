"""Noise schedules: how noise is added in training and removed step by step in sampling.

A noisy value is signal * clean + share * noise; a schedule gives both factors at time t in 0 ... T-1:

- ``DiffusionSchedule`` is DDPM's forward process (arXiv 2006.11239) with the squared cosine schedule (arXiv
  2102.09672): whole timesteps, nearly clean at 0, nearly pure noise at T-1;
- ``FlowSchedule`` is flow matching on straight lines (rectified flow, arXiv 2209.03003; arXiv 2210.02747; for actions
  pi0, arXiv 2410.24164): continuous time, clean at exactly 0, pure noise at exactly T-1.

The rest of the package uses ``draw``, ``noisy``, ``target``, ``timesteps``, ``step`` and ``last``. Both take the same
steps (``advance``): DDIM (arXiv 2010.02502, eta = 0), which is Euler's method on straight lines, or DPM-Solver++ 2M
(arXiv 2211.01095).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from uwm_model.config import DiffusionConfig
from uwm_model.randomness import Random, integers, uniform


class Evaluation(NamedTuple):
    """One evaluation of the network: its noisy input, its prediction and the time."""

    sample: Tensor  # float [B, ...]
    prediction: Tensor  # float [B, ...]
    t: float


class DiffusionSchedule:
    """DDPM. Timestep t in 0 ... T-1: 0 is nearly clean, T-1 is nearly pure noise.

    ``alphas_cumprod`` float32 [T] is deliberately no module buffer: casting the model to bfloat16 must not cast it.
    """

    def __init__(self, config: DiffusionConfig):
        self.config = config
        self.last = config.train_timesteps - 1
        self.alphas_cumprod = squared_cosine(config.train_timesteps)

    def draw(self, count: int, random: Random, device: torch.device) -> Tensor:
        """Draw training times: int64 [count], uniform over 0 ... T-1."""
        return integers(self.last + 1, count, random, device)

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return ``clean`` [B, ...] noised to t int64 [B]."""
        alpha = self._alpha(t, clean)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the network's target at t int64 [B]: the noise, v (arXiv 2202.00512), or the clean sample."""
        if self.config.prediction == "epsilon":
            return noise
        if self.config.prediction == "sample":
            return clean
        alpha = self._alpha(t, clean)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean

    def _alpha(self, t: Tensor, like: Tensor) -> Tensor:
        return _broadcast(self.alphas_cumprod.to(like.device)[t], like)

    def timesteps(self, steps: int) -> list[int]:
        """Return the times of sampling, "leading": (S-1) * (T // S), ..., 0. For 10 of 100: 90, ..., 0, never 99.

        A single leading step would start at 0, where the network treats its input as clean; it starts at T-1 instead.
        """
        _check_steps(steps, self.config)
        stride = (self.last + 1) // steps
        return [stride * i for i in reversed(range(steps))] if steps > 1 else [self.last]

    def step(
        self,
        sample: Tensor,
        prediction: Tensor,
        t: float,
        t_next: float | None,
        previous: Evaluation | None = None,
        limit: Tensor | None = None,
    ) -> Tensor:
        """Return the sample at t_next (None: clean) from the sample and the prediction at t (see ``advance``)."""
        return advance(self, Evaluation(sample, prediction, t), t_next, previous, limit)

    def scales(self, t: float) -> tuple[Tensor, Tensor]:
        """Return (signal, share) at t, float32 []."""
        alpha = self.alphas_cumprod[int(t)]
        return alpha.sqrt(), (1 - alpha).sqrt()

    def clean_and_noise(self, evaluation: Evaluation) -> tuple[Tensor, Tensor]:
        """Return the predicted clean sample and noise."""
        sample, prediction, t = evaluation
        signal, share = self.scales(t)
        if self.config.prediction == "epsilon":
            return (sample - share * prediction) / signal, prediction
        if self.config.prediction == "sample":
            return prediction, (sample - signal * prediction) / share
        return signal * sample - share * prediction, signal * prediction + share * sample


class FlowSchedule:
    """Flow matching. Continuous time t in [0, T-1]: a fraction t / (T-1) of a noisy value is noise, the rest is clean.

    Times have the diffusion's scale, so that the full range of the timestep embedding is used, and 0 means "given" and
    T-1 "ignored" in both.
    """

    def __init__(self, config: DiffusionConfig):
        self.config = config
        self.last = config.train_timesteps - 1

    def draw(self, count: int, random: Random, device: torch.device) -> Tensor:
        """Draw training times: float32 [count], uniform in [0, T-1)."""
        return self.last * uniform((count,), random, device)

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return ``clean`` [B, ...] noised to t [B]."""
        share = _broadcast(t / self.last, clean)
        return (1 - share) * clean + share * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the network's target: the velocity, the same at every t [B], or the clean sample."""
        return clean if self.config.prediction == "sample" else noise - clean

    def timesteps(self, steps: int) -> list[float]:
        """Return the times of sampling, evenly spaced from pure noise: T-1, ..., (T-1) / S."""
        _check_steps(steps, self.config)
        return [self.last * i / steps for i in range(steps, 0, -1)]

    def step(
        self,
        sample: Tensor,
        prediction: Tensor,
        t: float,
        t_next: float | None,
        previous: Evaluation | None = None,
        limit: Tensor | None = None,
    ) -> Tensor:
        """Return the sample at t_next (None: clean) from the sample and the prediction at t > 0 (see ``advance``)."""
        return advance(self, Evaluation(sample, prediction, t), t_next, previous, limit)

    def scales(self, t: float) -> tuple[Tensor, Tensor]:
        """Return (signal, share) at t, float32 []."""
        share = torch.tensor(t / self.last)
        return 1 - share, share

    def clean_and_noise(self, evaluation: Evaluation) -> tuple[Tensor, Tensor]:
        """Return the predicted clean sample and noise."""
        sample, prediction, t = evaluation
        signal, share = self.scales(t)
        if self.config.prediction == "sample":
            return prediction, (sample - signal * prediction) / share
        return sample - share * prediction, sample + signal * prediction


Schedule = DiffusionSchedule | FlowSchedule


def make_schedule(config: DiffusionConfig) -> Schedule:
    return FlowSchedule(config) if config.schedule == "flow" else DiffusionSchedule(config)


def advance(
    schedule: Schedule,
    now: Evaluation,
    t_next: float | None,
    previous: Evaluation | None,
    limit: Tensor | None = None,
) -> Tensor:
    """Return the sample [B, ...] at t_next (None: clean), by the solver of the settings, in the sample's dtype.

    DPM-Solver++ extrapolates the last two predicted clean samples linearly in log(signal / share), half way to t_next.
    ``previous`` is the evaluation one step earlier; without it, and at the last step, the solver is first-order like
    DDIM. Both clip each predicted clean sample if ``clip_sample`` is set: to +- ``limit``, which broadcasts with it, or
    to +- 1.
    """
    clean, noise = schedule.clean_and_noise(now)
    clean = _clip(clean, schedule.config, limit)
    # 0-d float32 coefficients do not change the sample's dtype, and work with a sample on any device.
    signal_next, share_next = (torch.tensor(1.0), torch.tensor(0.0)) if t_next is None else schedule.scales(t_next)
    if schedule.config.sampler == "dpm_solver":
        signal, share = schedule.scales(now.t)
        if previous is not None and t_next is not None:
            signal_previous, share_previous = schedule.scales(previous.t)
            clean_previous = _clip(schedule.clean_and_noise(previous)[0], schedule.config, limit)
            ahead = (signal_next / share_next).log() - (signal / share).log()
            behind = (signal / share).log() - (signal_previous / share_previous).log()  # infinite after pure noise
            clean = clean + ahead / (2 * behind) * (clean - clean_previous)
        noise = (now.sample - signal * clean) / share
    # DDIM uses the predicted noise, not one re-derived from the clipped sample.
    return signal_next * clean + share_next * noise


def _clip(clean: Tensor, config: DiffusionConfig, limit: Tensor | None) -> Tensor:
    if not config.clip_sample:
        return clean
    return clean.clamp(-1, 1) if limit is None else clean.clamp(-limit.to(clean.dtype), limit.to(clean.dtype))


def squared_cosine(timesteps: int) -> Tensor:
    """Return alphas_cumprod float32 [T]: the product of 1 - beta, each beta at most 0.999."""

    def signal(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - signal((i + 1) / timesteps) / signal(i / timesteps), 0.999) for i in range(timesteps)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float32), dim=0)


def _check_steps(steps: int, config: DiffusionConfig) -> None:
    if not config.fewest_steps <= steps <= config.train_timesteps:
        raise ValueError(
            f"steps: {steps}; choose {config.fewest_steps} to {config.train_timesteps}, the timesteps of training, "
            f"where the prediction is {config.prediction}"
        )


def _broadcast(each: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], to broadcast with ``like`` [B, ...]."""
    return each.reshape(-1, *[1] * (like.ndim - 1))
