"""The joint transformer (section III-B): noisy actions and noisy future latents in, a prediction for each out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from uwm_model.blocks import Block, Head, Offset, modulation, modulations, stack
from uwm_model.config import ModelConfig
from uwm_model.tokens import ActionTokens, FactoredPosition, LatentPatches, TimestepEmbedding

# The network with one batch's observation and masks bound:
# (noisy action, t_action, noisy latents, t_video) -> predictions shaped like action and latents.
Denoise = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Denoiser(nn.Module):
    """One sequence of N tokens: L actions, V * patches future latents, V * observed_patches current latents (with
    observation "tokens"), R registers, under one position embedding.

    The condition and both timesteps reach every block through its modulation (K = condition_size + timestep_width),
    which is per block (the paper) or shared.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.actions = ActionTokens(config)
        self.latents = LatentPatches(config)
        self.registers = nn.Parameter(torch.empty(1, config.registers, config.width))
        self.position: nn.Parameter | FactoredPosition
        if config.position == "factored":
            self.position = FactoredPosition(config)
        else:
            self.position = nn.Parameter(torch.empty(1, config.tokens, config.width))
        self.timesteps = TimestepEmbedding(config.timestep_width)
        modulated_by = config.condition_size + config.timestep_width
        shared = config.modulation == "shared"
        self.modulation = modulation(modulated_by, 6 * config.width) if shared else nn.Identity()
        self.blocks = stack(config, None if shared else modulated_by)
        self.head = Head(config.width, modulated_by)
        self._initialise()

    def _initialise(self) -> None:
        """Small embeddings, and predictions of exactly zero: the initial loss is the noise's variance, 1."""
        nn.init.normal_(self.registers, std=0.02)
        if isinstance(self.position, nn.Parameter):
            nn.init.normal_(self.position, std=0.02)
        self.actions.silence()
        self.latents.silence()

    def forward(
        self,
        condition: Tensor,
        action: Tensor,
        t_action: Tensor,
        latents: Tensor,
        t_video: Tensor,
        camera_mask: Tensor | None = None,
        current_latents: Tensor | None = None,
        action_shown: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return predictions shaped like ``action`` and ``latents``.

        condition [B, condition_size], action [B, L, A], latents [B, V, Tf, C, h, w]; t_action and t_video int64 or
        float32, [B] or 0-d. camera_mask bool [B, V]: no token attends to those of a missing camera, and the prediction
        for it is meaningless; None: no camera is missing. current_latents [B, V, To, C, h, w] are used with
        ``current_patches`` and observation "tokens". action_shown bool [B]: where False, no token attends to the
        sample's action tokens; None: all are shown.
        """
        B, (L, patches) = len(action), (self.config.action_chunk, self.config.cameras * self.config.patches)
        of_action, of_others = self.positions()
        tokens = [self.embed_action(action, of_action), self.embed_others(latents, current_latents, of_others)]
        x_BND = torch.cat(tokens, dim=1)
        times = self.timesteps(t_action.expand(B), t_video.expand(B))
        condition_BK = torch.cat([condition, times], dim=1)
        keys = self.keys(camera_mask, action_shown)
        for_blocks = self.modulation(condition_BK)
        for block in self.blocks:
            x_BND = block(x_BND, for_blocks, keys)
        x_BND = self.head(x_BND, condition_BK)
        return self.actions.decode(x_BND[:, :L]), self.latents.decode(x_BND[:, L : L + patches])

    def modulations(self, condition: Tensor, times: Tensor) -> list[list[tuple[Tensor, ...]]]:
        """Return, for each block and then the head, and for each of the times [S, T], its modulations [B, 1, D].

        A block has six, the head two.
        """
        width = self.config.width
        if not isinstance(self.modulation, nn.Sequential):
            return [modulations(part.modulation, condition, times, width) for part in (*self.blocks, self.head)]
        shared = modulations(self.modulation, condition, times, width)
        of_parts = []
        for block in self.blocks:
            assert isinstance(block, Block) and isinstance(block.modulation, Offset)
            offset = block.modulation.offset.unflatten(0, (6, width))
            of_parts.append([tuple(a + b for a, b in zip(step, offset, strict=True)) for step in shared])
        return [*of_parts, modulations(self.head.modulation, condition, times, width)]

    def positions(self) -> tuple[Tensor, Tensor]:
        """Return the positions of the L action tokens [1, L, D] and of the others [1, N - L, D]."""
        every = self.position if isinstance(self.position, nn.Parameter) else self.position()
        return every[:, : self.config.action_chunk], every[:, self.config.action_chunk :]

    def embed_action(self, action: Tensor, positions: Tensor) -> Tensor:
        """float [B, L, A] -> the first L tokens, [B, L, D]."""
        return self.actions.encode(action) + positions

    def embed_others(self, latents: Tensor, current_latents: Tensor | None, positions: Tensor) -> Tensor:
        """float [B, V, Tf, C, h, w] and [B, V, To, C, h, w] -> tokens of latents and registers, [B, N - L, D]."""
        parts = [self.latents.encode(latents)]
        if self.config.current_patches or self.config.observed_patches:
            if current_latents is None:
                raise ValueError("a model with current_patches or observation tokens needs batch.current_latents")
            if self.config.current_patches:
                parts[0] = parts[0] + self.latents.encode_current(current_latents)
            if self.config.observed_patches:
                parts.append(self.latents.encode_observed(current_latents))
        parts.append(self.registers.expand(len(latents), -1, -1))
        return torch.cat(parts, dim=1) + positions

    def keys(self, camera_mask: Tensor | None, action_shown: Tensor | None = None) -> Tensor | None:
        """bool [B, V] and bool [B] -> bool [B, 1, 1, N]: which tokens may be attended to; None: all."""
        if camera_mask is None and action_shown is None:
            return None
        given = camera_mask if camera_mask is not None else action_shown
        assert given is not None
        L = self.config.action_chunk
        keys = given.new_ones(len(given), self.config.tokens)
        if action_shown is not None:
            keys[:, :L] = action_shown[:, None]
        if camera_mask is not None:
            both = (self.config.patches, self.config.observed_patches)
            of_latents = torch.cat([camera_mask.repeat_interleave(each, dim=1) for each in both], dim=1)
            keys[:, L : L + of_latents.shape[1]] = of_latents
        return keys[:, None, None]
