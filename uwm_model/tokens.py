"""Actions and latents to tokens, predictions back from tokens, and the timesteps to a vector."""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from uwm_model.config import ModelConfig


class LatentPatches(nn.Module):
    """Future latents <-> tokens, ordered camera, time, row, column.

    A patch is (frames, rows, columns) of one camera's latents; encoding is linear, and so is decoding (section III-B).
    This is the one place that knows in which order a patch's values lie: channel, frame, row, column.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        frames, rows, columns = config.patch
        values = config.latent_channels * frames * rows * columns
        self.patch = {"pt": frames, "ph": rows, "pw": columns}
        self.grid = {
            "v": config.cameras,
            "t": config.future_frames // frames,
            "h": config.latent_size[0] // rows,
            "w": config.latent_size[1] // columns,
        }
        self.encoder = nn.Linear(values, config.width)
        self.decoder = nn.Linear(config.width, values)
        if config.current_patches:
            self.current = nn.Linear(config.latent_channels * config.observed_frames * rows * columns, config.width)
            nn.init.zeros_(self.current.weight)  # what is at a place now is a hint, and must not drown the position

    def silence(self) -> None:
        """Let it predict exactly zero, until trained."""
        _zero(self.decoder)

    def encode(self, latents: Tensor) -> Tensor:
        """float [B, V, Tf, C, h, w] -> [B, V * patches, D]."""
        patches = rearrange(latents, "b v (t pt) c (h ph) (w pw) -> b (v t h w) (c pt ph pw)", **self.patch)
        return self.encoder(patches)

    def encode_current(self, latents: Tensor) -> Tensor:
        """float [B, V, To, C, h, w] -> [B, V * patches, D]: to each future patch what is at its place now."""
        size = {"ph": self.patch["ph"], "pw": self.patch["pw"]}
        places = self.current(rearrange(latents, "b v t c (h ph) (w pw) -> b v (h w) (t c ph pw)", **size))
        return repeat(places, "b v n d -> b (v t n) d", t=self.grid["t"])

    def decode(self, tokens: Tensor) -> Tensor:
        """[B, V * patches, D] -> float [B, V, Tf, C, h, w]."""
        return rearrange(
            self.decoder(tokens),
            "b (v t h w) (c pt ph pw) -> b v (t pt) c (h ph) (w pw)",
            **self.patch,
            **self.grid,
        )


class ActionTokens(nn.Module):
    """Actions <-> tokens, one a step, each way through a small MLP."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.encode = nn.Sequential(nn.Linear(config.action_dim, hidden), nn.Mish(), nn.Linear(hidden, config.width))
        self.decode = nn.Sequential(nn.Linear(config.width, hidden), nn.Mish(), nn.Linear(hidden, config.action_dim))

    def silence(self) -> None:
        """Let it predict exactly zero, until trained."""
        last = self.decode[2]
        assert isinstance(last, nn.Linear)
        _zero(last)


def _zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


class TimestepEmbedding(nn.Module):
    """Diffusion timesteps as one vector: sinusoids of each, side by side (t_action, then t_video), through an MLP."""

    def __init__(self, width: int, times: int = 2):
        super().__init__()
        self.frequencies = width // 2
        self.mlp = nn.Sequential(nn.Linear(times * width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))

    def forward(self, *times: Tensor) -> Tensor:
        """int64 or float32 [B] each -> [B, width]."""
        weights = next(self.mlp.parameters()).dtype
        # At least float32: bfloat16 cannot tell t = 98 from 99 in the fast sinusoids.
        precise = torch.promote_types(weights, torch.float32)
        step = math.log(10_000) / (self.frequencies - 1)
        frequency = torch.exp(-step * torch.arange(self.frequencies, device=times[0].device, dtype=precise))
        angle = torch.stack(times, dim=1)[:, :, None] * frequency  # [B, times, width / 2]
        sinusoids = torch.cat([angle.sin(), angle.cos()], dim=2).flatten(1)
        return self.mlp(sinusoids.to(weights))
