"""The noise: how it is added in training, and taken away step by step in sampling.

``DiffusionSchedule`` is DDPM's forward process (arXiv 2006.11239) with the squared cosine schedule (arXiv 2102.09672),
and DDIM's deterministic steps (arXiv 2010.02502). What the rest of the package needs of it is ``noisy``, ``target``,
``timesteps``, ``step`` and ``last``; another kind of diffusion would answer the same five.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uwm_model.config import DiffusionConfig


class DiffusionSchedule:
    """Timestep t in 0 ... T-1: 0 is nearly clean, T-1 is nearly pure noise.

    ``alphas_cumprod`` float32 [T] is no buffer of a module on purpose: casting the model to bfloat16 must not touch it.
    """

    def __init__(self, config: DiffusionConfig):
        self.last = config.train_timesteps - 1
        self.clip = config.clip_sample
        self.prediction = config.prediction
        self.alphas_cumprod = squared_cosine(config.train_timesteps)

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What ``clean`` [B, ...] looks like at t int64 [B], given that noise."""
        alpha = self._alpha(t, clean)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def _alpha(self, t: Tensor, like: Tensor) -> Tensor:
        return self.alphas_cumprod.to(like.device)[t].reshape(-1, *[1] * (like.ndim - 1))

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network learns to predict at t int64 [B]: the noise, v (arXiv 2202.00512), or the clean sample."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        alpha = self._alpha(t, clean)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean

    def timesteps(self, steps: int) -> list[int]:
        """The times that sampling visits, "leading": (S-1) * (T // S), ..., 0. For 10 of 100: 90, ..., 0, never 99."""
        if not 2 <= steps <= self.last + 1:
            raise ValueError(f"steps: {steps}; choose 2 to {self.last + 1}, the timesteps of training")
        stride = (self.last + 1) // steps
        return [stride * i for i in reversed(range(steps))]

    def step(self, sample: Tensor, prediction: Tensor, t: int, t_next: int | None) -> Tensor:
        """The sample at t_next (None: clean) from the sample and the network's prediction at t (DDIM, eta = 0)."""
        alpha = self.alphas_cumprod[t]
        alpha_next = torch.tensor(1.0) if t_next is None else self.alphas_cumprod[t_next]
        # 0-d float32 coefficients do not change the sample's dtype, and come to any device by themselves.
        if self.prediction == "epsilon":
            noise = prediction
            clean = (sample - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        elif self.prediction == "sample":
            clean = prediction
            noise = (sample - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        else:
            noise = alpha.sqrt() * prediction + (1 - alpha).sqrt() * sample
            clean = alpha.sqrt() * sample - (1 - alpha).sqrt() * prediction
        if self.clip:
            clean = clean.clamp(-1, 1)
        # The noise is as predicted, not re-derived from the clipped sample.
        return alpha_next.sqrt() * clean + (1 - alpha_next).sqrt() * noise


def unit_noise(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """float32 on ``device``, drawn where the generator lives: a CPU generator gives every device the same noise."""
    return torch.randn(shape, generator=generator, device=home(generator, device)).to(device)


def home(generator: torch.Generator | None, device: torch.device) -> torch.device:
    return generator.device if generator else device


def squared_cosine(timesteps: int) -> Tensor:
    """alphas_cumprod float32 [T]: the product of 1 - beta, each beta at most 0.999."""

    def signal(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - signal((i + 1) / timesteps) / signal(i / timesteps), 0.999) for i in range(timesteps)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float32), dim=0)
