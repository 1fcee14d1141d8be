"""GR-1 (arXiv 2312.13139), as the UWM paper compares with it (arXiv 2504.02792, section IV-A and appendix B3).

No diffusion: one pass of a transformer answers with the future and the action, by least squares.
From GR-1: a GPT-like transformer reads tokens of the observation, then learned queries whose outputs are decoded.
From the UWM paper: it predicts a chunk of actions and the frames after it, from queries for each; an MLP decodes
actions, and the future has a DiT block of its own before its decoder.
From neither: the order. GR-1's two kinds of query do not see each other, and the UWM paper names no order. Here the
sequence is causal, part by part: observation, future, action. The action attends to what the future is decoded from,
while no future sees an action, so action-free video needs no token in place of one (the UWM paper's has a learned one).
Nor the modulation: in both, the observation is in the sequence alone. Here it also modulates the blocks, as in UWM,
which keeps the blocks the same and the network about as large.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from uwm_model import sampling
from uwm_model.batch import Batch
from uwm_model.blocks import Block, Head, stack
from uwm_model.config import DiffusionConfig, ModelConfig
from uwm_model.objective import Losses, masked_mean
from uwm_model.observation import observation
from uwm_model.randomness import Random
from uwm_model.sampling import Mode
from uwm_model.tokens import ActionTokens, LatentPatches


class GR1(nn.Module):
    """future = f(observation), action = g(observation, future). Deterministic.

    Latents are divided by ``latent_divisor`` inside; with ``clip_sample``, both answers are clipped to [-1, 1] there.
    The rest of DiffusionConfig has no meaning here.
    """

    modes: ClassVar[tuple[Mode, ...]] = ("policy", "video", "joint")

    def __init__(self, model: ModelConfig, diffusion: DiffusionConfig):
        super().__init__()
        self.model_config, self.diffusion_config = model, diffusion
        self.observation = observation(model)
        self.transformer = Predictor(model)

    def forward(self, batch: Batch, random: Random = None, counts: Tensor | None = None) -> Losses:
        """``loss``, under the name that training engines call."""
        return self.loss(batch, random, counts=counts)

    def loss(self, batch: Batch, random: Random = None, counts: Tensor | None = None) -> Losses:
        """Squared errors of the actions and of the latents that there are. Nothing in it is random."""
        if batch.action is None or batch.future_latents is None:
            raise ValueError("training needs batch.action and batch.future_latents (zeros where masked)")
        action, latents = self._predict(batch)
        target = batch.future_latents.float() / self.diffusion_config.latent_divisor
        of_action, of_video = (None, None) if counts is None else counts
        action_total, action_each = masked_mean((action - batch.action.float()).square(), batch.action_mask, of_action)
        video_error_BV = (latents - target).square().mean(dim=(2, 3, 4, 5))
        video_total, video_each = masked_mean(video_error_BV, batch.camera_mask, of_video)
        return Losses(
            total=action_total + video_total,
            action=action_total.detach(),
            video=video_total.detach(),
            action_per_sample=action_each.detach(),
            video_per_sample=video_each.detach(),
        )

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
        """(action [B, L, A] or None, future latents [B, V, Tf, C, h, w] or None), float32, padding 0.

        Steps and noise are those of other models; they change nothing. ValueError for forward and inverse dynamics:
        it reads no action and no future.
        """
        sampling.require(mode, self.modes, "GR1")
        action, latents = self._predict(batch)
        if self.diffusion_config.clip_sample:
            action, latents = action.clamp(-1, 1), latents.clamp(-1, 1)
        latents = latents * self.diffusion_config.latent_divisor
        return (
            action * batch.action_visible if mode != "video" else None,
            latents * batch.camera_mask[:, :, None, None, None, None] if mode != "policy" else None,
        )

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """float32 action [B, L, A], and latents [B, V, Tf, C, h, w] divided by ``latent_divisor``."""
        action, latents = self.transformer(self.observation(batch), batch.camera_mask, batch.current_latents)
        return action.float(), latents.float()


class Predictor(nn.Module):
    """One sequence of N tokens: R of the observation, V * patches future queries, L action queries.

    R is V * To, one token for each camera's each frame. A part sees itself and the parts before it.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.seen = config, config.cameras * config.observed_frames
        queries = config.cameras * config.patches + config.action_chunk
        self.observed = nn.Linear(config.condition_size, self.seen * config.width)
        self.queries = nn.Parameter(0.02 * torch.randn(1, queries, config.width))
        self.actions = ActionTokens(config)
        self.latents = LatentPatches(config)
        self.blocks = stack(config, config.condition_size)
        self.draw = Block(config.width, config.heads, config.mlp_ratio, config.qkv_bias, config.condition_size)
        self.head = Head(config.width, config.condition_size)
        self.actions.silence()
        self.latents.silence()
        del self.actions.encode, self.latents.encoder  # the queries take the place of what these would read

    def forward(self, condition: Tensor, camera_mask: Tensor, current_latents: Tensor) -> tuple[Tensor, Tensor]:
        """condition [B, condition_size] -> action [B, L, A] and future latents [B, V, Tf, C, h, w].

        camera_mask bool [B, V]: nobody attends to the queries of a missing camera, and its prediction means nothing.
        current_latents [B, V, To, C, h, w] are for ``current_patches``.
        """
        B, L = len(condition), self.config.action_chunk
        observed = self.observed(condition).unflatten(1, (self.seen, self.config.width))
        future, action = self.queries.expand(B, -1, -1).split([self.queries.shape[1] - L, L], dim=1)
        if self.config.current_patches:
            future = future + self.latents.encode_current(current_latents.to(condition.dtype))
        x_BND = torch.cat([observed, future, action], dim=1)
        seen_by = self._seen_by(camera_mask)
        for block in self.blocks:
            x_BND = block(x_BND, condition, seen_by)
        future = self.draw(x_BND[:, :-L], condition, seen_by[:, :, :-L, :-L])[:, self.seen :]
        action = x_BND[:, -L:]
        return self.actions.decode(self.head(action, condition)), self.latents.decode(self.head(future, condition))

    def _seen_by(self, camera_mask: Tensor) -> Tensor:
        """bool [B, V] -> bool [B, 1, N, N]: whether the token of a row attends to that of a column."""
        there_BN = camera_mask.new_ones(len(camera_mask), self.seen + self.queries.shape[1])
        L = self.config.action_chunk
        there_BN[:, self.seen : -L] = camera_mask.repeat_interleave(self.config.patches, dim=1)
        seen_by_BNN = there_BN[:, None].repeat(1, there_BN.shape[1], 1)
        seen_by_BNN[:, : self.seen, self.seen :] = False  # the observation sees itself
        seen_by_BNN[:, :-L, -L:] = False  # the future sees no action
        return seen_by_BNN[:, None]
