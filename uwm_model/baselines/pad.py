"""PAD, Prediction with Action (arXiv 2411.18179), as the UWM paper compares with it (arXiv 2504.02792, appendix B2).

It is UWM's transformer, but actions and future latents share one timestep and are denoised together, so neither can
be given or ignored: it always samples the joint distribution.
From PAD: the clean current latents enter with the noisy future ones at the same place (``current_patches``: a linear
layer over both, concatenated); a sample without actions has its action tokens masked in attention, and no action loss.
The UWM paper's version puts a learned token in their place instead.
From neither: the modulation carries the observation as in UWM, together with the timestep. Proprio and embodiment have
no other way in, and the network stays as large as UWM's.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from uwm_model import objective, sampling
from uwm_model.batch import Batch
from uwm_model.config import DiffusionConfig, ModelConfig
from uwm_model.denoiser import Denoise, Denoiser
from uwm_model.model import Model
from uwm_model.objective import Losses, Noise
from uwm_model.observation import observation
from uwm_model.randomness import Random, unit_noise
from uwm_model.sampling import Mode
from uwm_model.schedule import make_schedule


class PredictionWithAction(Model):
    """p(action, future | observation) with one timestep for both modalities."""

    modes: ClassVar[tuple[Mode, ...]] = ("policy", "video", "joint")

    def __init__(self, model: ModelConfig, diffusion: DiffusionConfig):
        super().__init__(model, diffusion)
        self.observation = observation(model)
        self.denoiser = Denoiser(dataclasses.replace(model, current_patches=True))
        self.schedule = make_schedule(diffusion)

    def loss(self, batch: Batch, random: Random = None, counts: Tensor | None = None) -> Losses:
        """Return UWM's joint loss, with both modalities at the timestep that is drawn for the video."""
        batch.check(self.model_config)
        if batch.action is None or batch.future_latents is None:
            raise ValueError("training needs batch.action and batch.future_latents (zeros where masked)")
        latents = batch.future_latents / self.diffusion_config.latent_divisor
        drawn = objective.draw_noise(batch.action, latents, self.schedule, random)
        parts = objective.joint_loss(
            self._denoiser_of(batch),
            self.schedule,
            batch.action,
            batch.action_mask,
            latents,
            batch.camera_mask,
            Noise(drawn.action, drawn.latents, t_action=drawn.t_video, t_video=drawn.t_video),
            batch.action_mask,
            counts,
        )
        return self.losses(*parts)

    def loss_counts(self, batch: Batch) -> Tensor:
        return objective.loss_counts(batch.action_mask, batch.camera_mask)

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
        """Sample the joint, and return it or one modality of it. The action is 0 where all of ``action_mask`` is False.

        Forward and inverse dynamics are impossible: with a single timestep, neither modality can be given.
        """
        batch.check(self.model_config)
        sampling.require(mode, self.modes, "PAD")
        B, device, c = len(batch.embodiment), batch.embodiment.device, self.model_config
        if noise_action is None:
            noise_action = unit_noise((B, *c.action_shape), generator, device)
        if noise_latents is None:
            noise_latents = unit_noise((B, *c.latents_shape), generator, device)
        action, latents = sampling.sample(
            "joint",
            self._denoiser_of(batch),
            self.schedule,
            steps or self.diffusion_config.sampling_steps,
            self.diffusion_config.marginal_timestep,
            noise_action,
            noise_latents,
            action_limit=batch.action_limit,
        )
        latents = latents.float() * self.diffusion_config.latent_divisor
        return (
            action.float() * batch.action_mask if mode != "video" else None,
            latents * batch.camera_mask[:, :, None, None, None, None] if mode != "policy" else None,
        )

    def _denoiser_of(self, batch: Batch) -> Denoise:
        """Bind this batch's observation and masks to the network. Its one timestep is the video's."""
        condition, shown = self.observation(batch), batch.action_mask.any(dim=(1, 2))

        def denoise(action: Tensor, _: Tensor, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            action, latents = (action * batch.action_mask).to(condition.dtype), latents.to(condition.dtype)
            return self.denoiser(condition, action, t, latents, t, batch.camera_mask, batch.current_latents, shown)

        return denoise
