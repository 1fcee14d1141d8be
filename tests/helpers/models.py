"""Small models and batches."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from uwm_model.batch import Batch
from uwm_model.config import DiffusionConfig, ModelConfig
from uwm_model.world_model import UnifiedWorldModel

TINY = ModelConfig(
    cameras=2,
    latent_channels=4,
    latent_size=(8, 12),
    action_dim=5,
    proprio_dim=3,
    embodiments=2,
    action_chunk=6,
    width=64,
    depth=2,
    heads=4,
    registers=2,
    timestep_width=32,
    frame_width=32,
    condition_width=64,
)


SEEING = dataclasses.replace(TINY, current_patches=True)


SHARED = dataclasses.replace(SEEING, modulation="shared")


TOKENS = dataclasses.replace(TINY, observation="tokens", position="factored")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fresh(diffusion: DiffusionConfig | None = None, config: ModelConfig = TINY) -> UnifiedWorldModel:
    torch.manual_seed(0)
    return UnifiedWorldModel(config, diffusion or DiffusionConfig())


def stirred(config: ModelConfig = TINY) -> UnifiedWorldModel:
    """A model without zero weights, so that everything that can affect an output does."""
    model = fresh(config=config)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_batch(size: int = 4, seed: int = 0, config: ModelConfig = TINY) -> Batch:
    """Nothing masked; latents are unit noise."""
    generator = seeded(seed)
    B, V, h, w = size, config.cameras, *config.latent_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Batch(
        current_latents=normal(B, V, config.observed_frames, config.latent_channels, h, w),
        future_latents=normal(B, V, config.future_frames, config.latent_channels, h, w),
        camera_mask=torch.ones(B, V, dtype=torch.bool),
        action=torch.rand((B, config.action_chunk, config.action_dim), generator=generator) * 1.8 - 0.9,
        action_mask=torch.ones(B, config.action_chunk, config.action_dim, dtype=torch.bool),
        proprio=normal(B, config.observed_frames, config.proprio_dim),
        proprio_mask=torch.ones(B, config.proprio_dim, dtype=torch.bool),
        embodiment=torch.arange(B) % config.embodiments,
    )


class Constant(torch.nn.Module):
    """In place of a decoder of actions: a network that knows the answer."""

    def __init__(self, value: float, width: int):
        super().__init__()
        self.value, self.width = value, width

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.new_full((*tokens.shape[:2], self.width), self.value)


def changed(tensor: Tensor | None, where: tuple, value: float | bool) -> Tensor:
    assert tensor is not None
    tensor = tensor.clone()
    tensor[where] = value
    return tensor


def train(model: UnifiedWorldModel, batch: Batch, steps: int, learning_rate: float) -> list[dict[str, float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = []
    for step in range(steps):
        losses = model.loss(batch, seeded(step))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        decay.step()
        history.append({"action": losses.action.item(), "video": losses.video.item()})
    return history


def repeated(batch: Batch, times: int) -> Batch:
    """Repeat the samples, for more noise levels per step."""
    tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return Batch(**{name: tensor.repeat(times, *[1] * (tensor.ndim - 1)) for name, tensor in given.items()})
