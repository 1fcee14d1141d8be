"""Actions and latents to tokens and back, position embeddings, and the timestep embedding."""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from uwm_model.config import ModelConfig


class LatentPatches(nn.Module):
    """Future latents <-> tokens, ordered camera, time, row, column.

    A patch is (frames, rows, columns) of one camera's latents; encoding and decoding are linear (section III-B). Only
    this class knows the order of a patch's values: channel, frame, row, column.
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
        observed = config.latent_channels * config.observed_frames * rows * columns
        if config.observation == "tokens":
            self.observed = nn.Linear(observed, config.width)
        if config.current_patches:
            self.current = nn.Linear(observed, config.width)
            nn.init.zeros_(self.current.weight)  # a hint that must not drown the position embedding

    def silence(self) -> None:
        """Make the initial predictions exactly zero."""
        _zero(self.decoder)

    def encode(self, latents: Tensor) -> Tensor:
        """float [B, V, Tf, C, h, w] -> [B, V * patches, D]."""
        patches = rearrange(latents, "b v (t pt) c (h ph) (w pw) -> b (v t h w) (c pt ph pw)", **self.patch)
        return self.encoder(patches)

    def encode_current(self, latents: Tensor) -> Tensor:
        """float [B, V, To, C, h, w] -> [B, V * patches, D]: for each future patch, the current one at its place."""
        return repeat(self.current(self._places(latents)), "b v n d -> b (v t n) d", t=self.grid["t"])

    def encode_observed(self, latents: Tensor) -> Tensor:
        """float [B, V, To, C, h, w] -> separate tokens, [B, V * observed_patches, D]."""
        return self.observed(self._places(latents)).flatten(1, 2)

    def _places(self, latents: Tensor) -> Tensor:
        size = {"ph": self.patch["ph"], "pw": self.patch["pw"]}
        return rearrange(latents, "b v t c (h ph) (w pw) -> b v (h w) (t c ph pw)", **size)

    def decode(self, tokens: Tensor) -> Tensor:
        """[B, V * patches, D] -> float [B, V, Tf, C, h, w]."""
        return rearrange(
            self.decoder(tokens),
            "b (v t h w) (c pt ph pw) -> b v (t pt) c (h ph) (w pw)",
            **self.patch,
            **self.grid,
        )


class ActionTokens(nn.Module):
    """Actions <-> tokens, one per step, each way through a small MLP."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.encode = nn.Sequential(nn.Linear(config.action_dim, hidden), nn.Mish(), nn.Linear(hidden, config.width))
        self.decode = nn.Sequential(nn.Linear(config.width, hidden), nn.Mish(), nn.Linear(hidden, config.action_dim))

    def silence(self) -> None:
        """Make the initial predictions exactly zero."""
        last = self.decode[2]
        assert isinstance(last, nn.Linear)
        _zero(last)


def _zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


class FactoredPosition(nn.Module):
    """Position embedding [1, N, D] composed from a token's kind, camera, time, row and column.

    No weight's shape depends on the number of steps, frames, rows or columns, so the weights serve any horizon and
    latent size; each camera has a row of ``camera``. Time is a single axis: actions at 0 ... L-1, future patches from L
    on, current patches at 0.
    """

    coordinates: Tensor
    cameras: Tensor
    kinds: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind = nn.Parameter(0.02 * torch.randn(3, config.width))  # actions, future, present
        self.camera = nn.Parameter(0.02 * torch.randn(config.cameras, config.width))
        self.mix = nn.Linear(config.width, config.width, bias=False)
        nn.init.normal_(self.mix.weight, std=0.02)
        (pt, ph, pw), (h, w), L = config.patch, config.latent_size, config.action_chunk
        places = []  # (kind, camera, time, row, column)
        places += [(0, -1, step, 0, 0) for step in range(L)]
        for camera in range(config.cameras):
            for frame in range(0, config.future_frames, pt):
                places += [(1, camera, L + frame, y, x) for y in range(h // ph) for x in range(w // pw)]
        for camera in range(config.cameras if config.observed_patches else 0):
            places += [(2, camera, 0, y, x) for y in range(h // ph) for x in range(w // pw)]
        table = torch.tensor(places)
        widths = (config.width // 2, config.width // 4, config.width // 4)
        features = torch.cat([_waves(table[:, 2 + i], width) for i, width in enumerate(widths)], dim=1)
        self.registers = config.registers
        self.register_buffer("coordinates", features, persistent=False)
        self.register_buffer("kinds", table[:, 0], persistent=False)
        self.register_buffer("cameras", table[:, 1], persistent=False)

    def forward(self) -> Tensor:
        """Return [1, N, D], zero for the registers, which are learned vectors already."""
        of_camera = self.camera[self.cameras.clamp(min=0)] * (self.cameras >= 0)[:, None]
        place = self.mix(self.coordinates.to(self.kind.dtype)) + self.kind[self.kinds] + of_camera
        return F.pad(place, (0, 0, 0, self.registers))[None]


def _waves(at: Tensor, width: int) -> Tensor:
    """Sinusoids of integers [N] -> float32 [N, width]."""
    frequency = 10_000 ** -torch.linspace(0, 1, width // 2)
    angle = at[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class TimestepEmbedding(nn.Module):
    """Diffusion timesteps as one vector: concatenated sinusoids (t_action, then t_video) through an MLP."""

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
