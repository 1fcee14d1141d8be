"""GR-1 (arXiv 2312.13139), as the UWM paper compares with it (arXiv 2504.02792, section IV-A and appendix B3).

No diffusion: one pass of a transformer predicts the future and the action, trained with a squared error.
From GR-1: a GPT-like transformer reads observation tokens, then learned queries whose outputs are decoded.
From the UWM paper: it predicts a chunk of actions and the frames after it, with queries for each; an MLP decodes
actions, and the future has its own DiT block before its decoder.
From neither: the order. GR-1's two kinds of query do not attend to each other, and the UWM paper names no order. Here
the sequence is block-causal: observation, future, action. The action attends to the tokens that the future is decoded
from, and no future token attends to an action, so action-free video needs no placeholder (the UWM paper learns one).
Nor the modulation: in both papers the observation is only in the sequence. Here it also modulates the blocks, as in
UWM, which keeps the blocks the same and the network about as large.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from uwm_model import sampling
from uwm_model.batch import Batch
from uwm_model.blocks import Block, Head, stack
from uwm_model.config import DiffusionConfig, ModelConfig
from uwm_model.model import Model
from uwm_model.objective import Losses, loss_counts, masked_mean
from uwm_model.observation import observation
from uwm_model.randomness import Random
from uwm_model.sampling import Mode
from uwm_model.tokens import ActionTokens, LatentPatches


class GR1(Model):
    """future = f(observation), action = g(observation, future). Deterministic.

    Of DiffusionConfig it uses ``latent_divisor`` and ``clip_sample``: predicted latents are clipped to [-1, 1], actions
    to +- ``action_reach`` of the batch.
    """

    modes: ClassVar[tuple[Mode, ...]] = ("policy", "video", "joint")

    def __init__(self, model: ModelConfig, diffusion: DiffusionConfig):
        super().__init__(model, diffusion)
        self.observation = observation(model)
        self.transformer = Predictor(model)

    def loss(self, batch: Batch, random: Random = None, counts: Tensor | None = None) -> Losses:
        """Return the squared errors of actions and latents. ``random`` is ignored."""
        batch.check(self.model_config)
        if batch.action is None or batch.future_latents is None:
            raise ValueError("training needs batch.action and batch.future_latents (zeros where masked)")
        action, latents = self._predict(batch)
        target = batch.future_latents.float() / self.diffusion_config.latent_divisor
        action_count, video_count = (None, None) if counts is None else counts
        action_error = (action - batch.action.float()).square()
        action_loss, action_each = masked_mean(action_error, batch.action_mask, action_count)
        video_error_BV = (latents - target).square().mean(dim=(2, 3, 4, 5))
        video_loss, video_each = masked_mean(video_error_BV, batch.camera_mask, video_count)
        return self.losses(action_loss, video_loss, action_each, video_each)

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
        """Predict; steps, generator and noise are ignored.

        Forward and inverse dynamics are impossible: the network reads neither actions nor future latents.
        """
        batch.check(self.model_config)
        sampling.require(mode, self.modes, "GR1")
        action, latents = self._predict(batch)
        if self.diffusion_config.clip_sample:
            limit = action.new_ones(()) if batch.action_limit is None else batch.action_limit
            action, latents = action.clamp(-limit, limit), latents.clamp(-1, 1)
        latents = latents * self.diffusion_config.latent_divisor
        return (
            action * batch.action_visible if mode != "video" else None,
            latents * batch.camera_mask[:, :, None, None, None, None] if mode != "policy" else None,
        )

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return actions [B, L, A] and latents [B, V, Tf, C, h, w] divided by ``latent_divisor``, float32."""
        action, latents = self.transformer(self.observation(batch), batch.camera_mask, batch.current_latents)
        return action.float(), latents.float()


class Predictor(nn.Module):
    """One sequence of N tokens: V * To observation tokens, V * patches future queries, L action queries.

    Each group of tokens attends to itself and to the groups before it.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.observation_tokens = config, config.cameras * config.observed_frames
        queries = config.cameras * config.patches + config.action_chunk
        self.observed = nn.Linear(config.condition_size, self.observation_tokens * config.width)
        self.queries = nn.Parameter(0.02 * torch.randn(1, queries, config.width))
        self.actions = ActionTokens(config)
        self.latents = LatentPatches(config)
        self.blocks = stack(config, config.condition_size)
        self.draw = Block(config.width, config.heads, config.mlp_ratio, config.qkv_bias, config.condition_size)
        self.head = Head(config.width, config.condition_size)
        self.actions.silence()
        self.latents.silence()
        del self.actions.encode, self.latents.encoder  # queries replace what these would encode

    def forward(self, condition: Tensor, camera_mask: Tensor, current_latents: Tensor) -> tuple[Tensor, Tensor]:
        """condition [B, condition_size] -> action [B, L, A] and future latents [B, V, Tf, C, h, w].

        camera_mask bool [B, V]: no token attends to the queries of a missing camera, and its prediction is meaningless.
        current_latents [B, V, To, C, h, w] are used with ``current_patches``.
        """
        B, L = len(condition), self.config.action_chunk
        observed = self.observed(condition).unflatten(1, (self.observation_tokens, self.config.width))
        future, action = self.queries.expand(B, -1, -1).split([self.queries.shape[1] - L, L], dim=1)
        if self.config.current_patches:
            future = future + self.latents.encode_current(current_latents.to(condition.dtype))
        x_BND = torch.cat([observed, future, action], dim=1)
        mask = self._attention_mask(camera_mask)
        for block in self.blocks:
            x_BND = block(x_BND, condition, mask)
        future = self.draw(x_BND[:, :-L], condition, mask[:, :, :-L, :-L])[:, self.observation_tokens :]
        action = x_BND[:, -L:]
        return self.actions.decode(self.head(action, condition)), self.latents.decode(self.head(future, condition))

    def _attention_mask(self, camera_mask: Tensor) -> Tensor:
        """bool [B, V] -> bool [B, 1, N, N]: whether the row's token attends to the column's."""
        present_BN = camera_mask.new_ones(len(camera_mask), self.observation_tokens + self.queries.shape[1])
        L = self.config.action_chunk
        present_BN[:, self.observation_tokens : -L] = camera_mask.repeat_interleave(self.config.patches, dim=1)
        mask_BNN = present_BN[:, None].repeat(1, present_BN.shape[1], 1)
        mask_BNN[:, : self.observation_tokens, self.observation_tokens :] = (
            False  # the observation attends to itself only
        )
        mask_BNN[:, :-L, -L:] = False  # the future attends to no action
        return mask_BNN[:, None]
