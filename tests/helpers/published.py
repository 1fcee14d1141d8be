"""Files as the published code writes them."""

from __future__ import annotations

import torch
from torch import Tensor

from uwm_model.resnet import ResNet18

WRITER = """
import sys, types, numpy as np, torch

module = types.ModuleType("datasets.utils.normalizer")
class LinearNormalizer:
    def __init__(self, scale, offset):
        self.scale, self.offset, self.name, self.stats = scale, offset, "minmax", {"min": np.float64(-2)}
LinearNormalizer.__module__, LinearNormalizer.__qualname__ = module.__name__, "LinearNormalizer"
module.LinearNormalizer = LinearNormalizer
sys.modules.update({"datasets": types.ModuleType("datasets"), "datasets.utils": types.ModuleType("u")})
sys.modules[module.__name__] = module
normalizer = LinearNormalizer(np.arange(7, dtype=np.float32), torch.ones(7))
torch.save({"model": torch.load(sys.argv[1]), "action_normalizer": normalizer, "step": 42}, sys.argv[2])
"""


def published(
    cameras: int = 2, grid: int = 4, registers: int = 4, layers: int = 2, width: int = 64
) -> dict[str, Tensor]:
    """Random weights in the published layout: latents of grid x grid patches, 32 features per frame."""
    condition, tokens = cameras * 2 * 32 + 16, 16 + cameras * grid**2 + registers
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, tokens, width),
        "registers": (1, registers, width),
        "action_encoder.0.weight": (4 * width, 7),
        "action_encoder.2.weight": (width, 4 * width),
        "action_decoder.0.weight": (4 * width, width),
        "action_decoder.2.weight": (7, 4 * width),
        "obs_patchifier.patch_encoder.weight": (width, 4, 2, 4, 4),
        "obs_patchifier.patch_decoder.weight": (128, width),
        "timestep_embedding.proj.0.weight": (64, 32),
        "timestep_embedding.proj.2.weight": (16, 64),
        "head.linear.weight": (width, width),
        "head.adaLN_modulation.1.weight": (2 * width, condition),
    }
    for i in range(layers):
        shapes[f"blocks.{i}.attn.qkv.weight"] = (3 * width, width)
        shapes[f"blocks.{i}.attn.proj.weight"] = (width, width)
        shapes[f"blocks.{i}.mlp.fc1.weight"] = (4 * width, width)
        shapes[f"blocks.{i}.mlp.fc2.weight"] = (width, 4 * width)
        shapes[f"blocks.{i}.adaLN_modulation.1.weight"] = (6 * width, condition)
    biases = {f"{name.removesuffix('weight')}bias": s[:1] for name, s in shapes.items() if name.endswith("weight")}
    biases["obs_patchifier.patch_encoder.bias"] = (width,)
    random = torch.Generator().manual_seed(0)
    net = {f"noise_pred_net.{n}": torch.randn(s, generator=random) * 0.1 for n, s in (shapes | biases).items()}
    image = {f"obs_encoder.img_encoder.model.{n}": t for n, t in ResNet18(32).state_dict().items()}
    return net | image | {"obs_encoder.vae.scale": torch.full((1, 4, 1, 1), 3.0)}
