"""The transformer block with adaLN-Zero (DiT, arXiv 2212.09748): a condition vector shifts, scales and gates it."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from uwm_model.config import ModelConfig


class Block(nn.Module):
    """Attention and MLP. Freshly made it is the identity, since the modulation starts at zero and gates both."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qkv_bias: bool, condition_width: int):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.attention = Attention(width, heads, qkv_bias)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.modulation = modulation(condition_width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, keys: Tensor | None) -> Tensor:
        """x [B, N, D], condition [B, K], keys bool [B, 1, 1 or N, N] (False: not attended to) -> [B, N, D]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate_a * self.attention(normalise(x, shift_a, scale_a), keys)
        return x + gate_m * self.mlp(normalise(x, shift_m, scale_m))


class Head(nn.Module):
    """The last layer that actions and latents share: modulated norm, then linear."""

    def __init__(self, width: int, condition_width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.modulation = modulation(condition_width, 2 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, N, D], condition [B, K] -> [B, N, D]."""
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(normalise(x, shift, scale))


class Attention(nn.Module):
    """Multi-head self attention, queries, keys and values from one product."""

    def __init__(self, width: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """x [B, N, D], keys bool [B, 1, 1 or N, N] -> [B, N, D]."""
        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        return self.out(rearrange(mixed, "b heads n d -> b n (heads d)"))


def stack(config: ModelConfig, condition_width: int) -> nn.ModuleList:
    """The ``depth`` blocks of a transformer, modulated by a condition of that width."""
    return nn.ModuleList(
        Block(config.width, config.heads, config.mlp_ratio, config.qkv_bias, condition_width)
        for _ in range(config.depth)
    )


def modulation(condition_width: int, out: int) -> nn.Sequential:
    linear = nn.Linear(condition_width, out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


def normalise(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm of x [B, N, D], whose affine part is the modulation [B, 1, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
