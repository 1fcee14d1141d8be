"""UnifiedWorldModel: ``loss(batch)`` to train it, ``sample(mode, batch)`` to use it."""

from __future__ import annotations

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
from uwm_model.sampling import Mode, Role
from uwm_model.schedule import make_schedule


class UnifiedWorldModel(Model):
    """p(action, future | observation) with a timestep for each modality, which makes it five models (sampling.py)."""

    modes: ClassVar[tuple[Mode, ...]] = ("policy", "forward_dynamics", "inverse_dynamics", "video", "joint")

    def __init__(self, model: ModelConfig, diffusion: DiffusionConfig):
        super().__init__(model, diffusion)
        self.observation = observation(model)
        self.denoiser = Denoiser(model)
        self.schedule = make_schedule(diffusion)

    def loss(
        self, batch: Batch, random: Random = None, counts: Tensor | None = None, noise: Noise | None = None
    ) -> Losses:
        """Return the joint diffusion loss. ``random`` draws noise and timesteps unless ``noise`` is passed."""
        batch.check(self.model_config)
        if batch.action is None or batch.future_latents is None:
            raise ValueError("training needs batch.action and batch.future_latents (zeros where masked)")
        latents = batch.future_latents / self.diffusion_config.latent_divisor
        parts = objective.joint_loss(
            self._denoiser_of(batch),
            self.schedule,
            batch.action,
            batch.action_mask,
            latents,
            batch.camera_mask,
            noise or objective.draw_noise(batch.action, latents, self.schedule, random),
            self._action_counted(batch),
            counts,
        )
        return self.losses(*parts)

    def loss_counts(self, batch: Batch) -> Tensor:
        return objective.loss_counts(self._action_counted(batch), batch.camera_mask)

    def expected_counts(self, action_values: float, without_actions: float, cameras: float) -> Tensor:
        steps, width = self.model_config.action_shape
        of_noise = without_actions * steps * width if self.diffusion_config.action_free_loss else 0
        return super().expected_counts(action_values + of_noise, without_actions, cameras)

    def _action_counted(self, batch: Batch) -> Tensor:
        """bool [B, L, A]: which action values have a loss."""
        return batch.action_visible if self.diffusion_config.action_free_loss else batch.action_mask

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
        """``forward_dynamics`` reads ``batch.action``, ``inverse_dynamics`` reads ``batch.future_latents``."""
        batch.check(self.model_config)
        of_action, of_video = sampling.roles(mode)
        B, device, c = len(batch.embodiment), batch.embodiment.device, self.model_config
        if of_action is Role.GIVEN:
            if batch.action is None:
                raise ValueError(f"mode {mode} needs batch.action")
            action = batch.action
        elif noise_action is None:
            action = unit_noise((B, *c.action_shape), generator, device)
        else:
            action = noise_action
        divisor = self.diffusion_config.latent_divisor
        if of_video is Role.GIVEN:
            if batch.future_latents is None:
                raise ValueError(f"mode {mode} needs batch.future_latents")
            latents = batch.future_latents / divisor
        elif noise_latents is None:
            latents = unit_noise((B, *c.latents_shape), generator, device)
        else:
            latents = noise_latents
        action, latents = sampling.sample(
            mode,
            self._denoiser_of(batch),
            self.schedule,
            steps or self.diffusion_config.sampling_steps,
            self.diffusion_config.marginal_timestep,
            action,
            latents,
            self.diffusion_config.video_steps,
            action_limit=batch.action_limit,
        )
        return (
            action.float() * batch.action_visible if of_action is Role.ASKED else None,
            latents.float() * divisor * batch.camera_mask[:, :, None, None, None, None]
            if of_video is Role.ASKED
            else None,
        )

    def condition(self, batch: Batch) -> Tensor:
        """Encode the current observation: [B, condition_size]."""
        return self.observation(batch)

    def denoise(
        self,
        condition: Tensor,
        action: Tensor,
        t_action: Tensor,
        latents: Tensor,
        t_video: Tensor,
        camera_mask: Tensor | None = None,
        current_latents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Evaluate the network once (see Denoiser.forward), in the dtype of its weights."""
        dtype = condition.dtype
        return self.denoiser(
            condition, action.to(dtype), t_action, latents.to(dtype), t_video, camera_mask, current_latents
        )

    def _denoiser_of(self, batch: Batch) -> Denoise:
        """Bind this batch's observation and masks to the network; the observation is encoded once."""
        condition, visible = self.condition(batch), batch.action_visible

        def denoise(action: Tensor, t_action: Tensor, latents: Tensor, t_video: Tensor) -> tuple[Tensor, Tensor]:
            action = action * visible
            return self.denoise(condition, action, t_action, latents, t_video, batch.camera_mask, batch.current_latents)

        return denoise
