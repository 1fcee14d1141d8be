"""Encoders of the current observation into the condition vector."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from uwm_model.batch import Batch
from uwm_model.config import ModelConfig
from uwm_model.resnet import ResNet18

CHANNELS = (64, 128)  # of the two convolutions over latents
PROPRIO_WIDTH = 128
EMBODIMENT_WIDTH = 64
INSTRUCTION_WIDTH = 128
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of red, green, blue


def observation(config: ModelConfig) -> PixelObservation | LatentObservation:
    """Return the encoder that the settings name, from a Batch to the condition [B, condition_size]."""
    return PixelObservation(config) if config.observation == "pixels" else LatentObservation(config)


class PixelObservation(nn.Module):
    """Current pixels -> condition [B, V * To * frame_width]: the paper's encoder (section III-B), pixels only.

    One ResNet-18 for all cameras and frames; features are concatenated, camera-major, and zero for a missing camera.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.image = ResNet18(config.frame_width)
        mean, deviation = torch.tensor(IMAGENET)[:, None, None, None, :, None, None]
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        if batch.current_pixels is None:
            raise ValueError("a model that observes pixels needs batch.current_pixels")
        pixels, dtype = batch.current_pixels, self.image.fc.weight.dtype
        images = pixels.to(dtype) / 255 if pixels.dtype == torch.uint8 else pixels.to(dtype)
        B, V, To = images.shape[:3]
        features = self.image(((images - self.mean) / self.deviation).flatten(0, 2))
        features_BVTF = rearrange(features, "(b v t) f -> b v t f", b=B, v=V, t=To)
        return features_BVTF.where(batch.camera_mask[:, :, None, None], 0).flatten(1)


class LatentObservation(nn.Module):
    """Current latents, proprio, embodiment and instruction -> condition [B, condition_width].

    Replaces the paper's ResNet-18 on pixels (section III-B): the VAE has already extracted features, so two strided
    convolutions, shared by cameras and frames, suffice. Their map is flattened, not pooled, to keep positions. With
    observation "tokens" the latents are left out.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.sees_latents = config.observation == "latents"
        joined_width = PROPRIO_WIDTH + EMBODIMENT_WIDTH
        if self.sees_latents:
            one, two = CHANNELS
            cells = (-(-config.latent_size[0] // 4)) * (-(-config.latent_size[1] // 4))  # two strides of 2, rounded up
            self.first = nn.Conv2d(config.latent_channels, one, 3, stride=2, padding=1)
            self.camera = nn.Embedding(config.cameras, one)  # added before the first nonlinearity
            self.rest = nn.Sequential(
                nn.GroupNorm(8, one),
                nn.GELU(),
                nn.Conv2d(one, two, 3, stride=2, padding=1),
                nn.GroupNorm(8, two),
                nn.GELU(),
                nn.Flatten(),
                nn.Linear(two * cells, config.frame_width),
            )
            self.missing = nn.Parameter(torch.zeros(config.frame_width))  # replaces the features of a missing frame
            joined_width += config.cameras * config.observed_frames * config.frame_width
        self.proprio = nn.Sequential(
            nn.Linear((config.observed_frames + 1) * config.proprio_dim, PROPRIO_WIDTH),
            nn.GELU(),
            nn.Linear(PROPRIO_WIDTH, PROPRIO_WIDTH),
        )
        self.embodiment = nn.Embedding(config.embodiments, EMBODIMENT_WIDTH)
        if config.text_width:
            self.instruction = nn.Linear(config.text_width, INSTRUCTION_WIDTH)
            self.untold = nn.Parameter(torch.zeros(INSTRUCTION_WIDTH))  # replaces a missing instruction
            joined_width += INSTRUCTION_WIDTH
        self.join = nn.Sequential(
            nn.Linear(joined_width, config.condition_width),
            nn.GELU(),
            nn.Linear(config.condition_width, config.condition_width),
        )

    def forward(self, batch: Batch) -> Tensor:
        known = batch.proprio_mask.to(batch.proprio.dtype)  # [B, P]
        proprio = torch.cat([batch.proprio * known[:, None], known[:, None]], dim=1).flatten(1)  # [B, (To + 1) * P]
        parts = [self._encode_latents(batch)] if self.sees_latents else []
        parts += [self.proprio(proprio), self.embodiment(batch.embodiment)]
        if hasattr(self, "instruction"):
            parts.append(self._encode_instruction(batch))
        return self.join(torch.cat(parts, dim=1))

    def _encode_latents(self, batch: Batch) -> Tensor:
        """[B, V * To * frame_width]"""
        B, V, To = batch.current_latents.shape[:3]
        x = self.first(rearrange(batch.current_latents, "b v t c h w -> (b v t) c h w"))
        camera = self.camera.weight[:, None].expand(B, V, To, -1)
        x = self.rest(x + rearrange(camera, "b v t c -> (b v t) c 1 1"))
        frames_BVTF = torch.where(
            batch.camera_mask[:, :, None, None], rearrange(x, "(b v t) f -> b v t f", b=B, v=V), self.missing
        )
        return frames_BVTF.flatten(1)

    def _encode_instruction(self, batch: Batch) -> Tensor:
        """[B, INSTRUCTION_WIDTH]"""
        if batch.instruction is None or batch.instruction_mask is None:
            return self.untold.expand(len(batch.embodiment), -1)
        return self.instruction(batch.instruction).where(batch.instruction_mask[:, None], self.untold)
