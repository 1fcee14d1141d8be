"""TAESD, the small autoencoder (github.com/madebyollin/taesd), with the weights of diffusers' ``AutoencoderTiny``.

The same arithmetic as diffusers', to the bit. Importing diffusers takes some five seconds of a core, for each process
that encodes, and a small ingest encodes for less than one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# Settings of diffusers that TAESD does not vary.
FIXED = {
    "act_fn": "relu",
    "in_channels": 3,
    "out_channels": 3,
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}


class Taesd(nn.Module):
    """``encode``: images ``[N, 3, H, W]`` in [-1, 1] -> latents ``[N, C, H/8, W/8]``. ``decode``: the reverse."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        channels = config["latent_channels"]
        encoder = _encoder(config["encoder_block_out_channels"], config["num_encoder_blocks"], channels)
        decoder = _decoder(config["decoder_block_out_channels"], config["num_decoder_blocks"], channels)
        self.encoder, self.decoder = nn.ModuleDict({"layers": encoder}), nn.ModuleDict({"layers": decoder})

    @classmethod
    def load(cls, config: Mapping[str, Any], weights: Path) -> Taesd:
        """Raises ValueError for settings of another architecture, RuntimeError for weights that do not fit."""
        for name, value in FIXED.items():
            if config.get(name, value) != value:
                raise ValueError(f"{name} is {config[name]}, not {value}")
        model = cls(config)
        model.load_state_dict(load_file(weights))
        return model

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder["layers"]((images + 1) / 2)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder["layers"](torch.tanh(latents / 3) * 3) * 2 - 1


class _Block(nn.Module):
    def __init__(self, into: int, out: int):
        super().__init__()
        self.conv = nn.Sequential(_conv(into, out), nn.ReLU(), _conv(out, out), nn.ReLU(), _conv(out, out))
        self.skip = nn.Conv2d(into, out, 1, bias=False) if into != out else nn.Identity()

    def forward(self, values: Tensor) -> Tensor:
        return torch.relu(self.conv(values) + self.skip(values))


def _conv(into: int, out: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, padding=1, **options)


def _encoder(widths: Sequence[int], blocks: Sequence[int], channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        layers.append(_conv(width, width, stride=2, bias=False) if level else _conv(3, width))
        layers += [_Block(width, width) for _ in range(count)]
    return nn.Sequential(*layers, _conv(widths[-1], channels))


def _decoder(widths: Sequence[int], blocks: Sequence[int], channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [_conv(channels, widths[0]), nn.ReLU()]
    for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        layers += [_Block(width, width) for _ in range(count)]
        if level == len(widths) - 1:
            layers.append(_conv(width, 3))
        else:
            layers += [nn.Upsample(scale_factor=2), _conv(width, width, bias=False)]
    return nn.Sequential(*layers)
