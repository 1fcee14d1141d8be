"""DP: Diffusion Policy (arXiv 2303.04137), as the UWM paper compares with it (arXiv 2504.02792, appendix B1).

It is UWM's transformer without the latent tokens, their timestep and the registers, all else the same: the condition
still reaches every block through its modulation. It never learns what the future looks like, and learns nothing from
action-free video.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from uwm_model import sampling
from uwm_model.batch import Batch
from uwm_model.blocks import Head, stack
from uwm_model.config import DiffusionConfig, ModelConfig
from uwm_model.model import Model
from uwm_model.objective import Losses, loss_counts, masked_mean, squared_error
from uwm_model.observation import observation
from uwm_model.randomness import Random, unit_noise
from uwm_model.sampling import Mode
from uwm_model.schedule import make_schedule
from uwm_model.tokens import ActionTokens, TimestepEmbedding


class DiffusionPolicy(Model):
    """p(action | observation)."""

    modes: ClassVar[tuple[Mode, ...]] = ("policy",)

    def __init__(self, model: ModelConfig, diffusion: DiffusionConfig):
        super().__init__(model, diffusion)
        self.observation = observation(model)
        self.denoiser = ActionDenoiser(model)
        self.schedule = make_schedule(diffusion)

    def loss(self, batch: Batch, random: Random = None, counts: Tensor | None = None) -> Losses:
        """Return the diffusion loss of the actions. The video loss is 0, and NaN per sample."""
        batch.check(self.model_config)
        if batch.action is None:
            raise ValueError("training needs batch.action (zeros where masked)")
        action, device = batch.action, batch.action.device
        t = self.schedule.draw(len(action), random, device)
        noise = unit_noise(action.shape, random, device)
        prediction = self._predict(batch, self.observation(batch), self.schedule.noisy(action, noise, t), t)
        error = squared_error(prediction, self.schedule.target(action, noise, t))
        action_loss, each = masked_mean(error, batch.action_mask, None if counts is None else counts[0])
        return self.losses(action_loss, torch.zeros_like(action_loss), each, torch.full_like(each, torch.nan))

    def loss_counts(self, batch: Batch) -> Tensor:
        return loss_counts(batch.action_mask, batch.camera_mask)

    @torch.no_grad()
    def sample(
        self,
        mode: Mode,
        batch: Batch,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        noise_action: Tensor | None = None,
        noise_latents: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Sample an action; ``noise_latents`` is ignored."""
        batch.check(self.model_config)
        sampling.require(mode, self.modes, "Diffusion Policy")
        c, condition = self.model_config, self.observation(batch)
        if noise_action is None:
            noise_action = unit_noise((len(condition), *c.action_shape), generator, condition.device)
        action, _ = sampling.sample(
            mode,
            lambda action, t, latents, _: (self._predict(batch, condition, action, t), latents),
            self.schedule,
            steps or self.diffusion_config.sampling_steps,
            self.diffusion_config.marginal_timestep,
            noise_action,
            noise_action.new_zeros(0),  # no latents
            action_limit=batch.action_limit,
        )
        return action.float() * batch.action_visible, None

    def _predict(self, batch: Batch, condition: Tensor, action: Tensor, t: Tensor) -> Tensor:
        return self.denoiser(condition, (action * batch.action_visible).to(condition.dtype), t)


class ActionDenoiser(nn.Module):
    """One token per action of the chunk. Condition and timestep reach every block through its modulation."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        modulated_by = config.condition_size + config.timestep_width
        self.actions = ActionTokens(config)
        self.position = nn.Parameter(0.02 * torch.randn(1, config.action_chunk, config.width))
        self.timestep = TimestepEmbedding(config.timestep_width, times=1)
        self.blocks = stack(config, modulated_by)
        self.head = Head(config.width, modulated_by)
        self.actions.silence()

    def forward(self, condition: Tensor, action: Tensor, t: Tensor) -> Tensor:
        """condition [B, condition_size], noisy action [B, L, A], t int64 [B] or 0-d -> a prediction [B, L, A]."""
        x_BLD = self.actions.encode(action) + self.position
        condition_BK = torch.cat([condition, self.timestep(t.expand(len(action)))], dim=1)
        for block in self.blocks:
            x_BLD = block(x_BLD, condition_BK, None)
        return self.actions.decode(self.head(x_BLD, condition_BK))
