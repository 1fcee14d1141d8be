"""The transformer block with adaLN-Zero (DiT, arXiv 2212.09748): a condition vector shifts, scales and gates it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uwm_model.config import ModelConfig

KeysValues = Sequence[Tensor]  # keys and values, each [B, heads, N, d]


class Block(nn.Module):
    """Attention and MLP. It is initialised as the identity: the modulation starts at zero and gates both.

    ``condition_width`` None: the condition is the six modulations that all blocks share, and the block adds its own
    offset (PixArt-alpha's adaLN-single, arXiv 2310.00426).
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, qkv_bias: bool, condition_width: int | None):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.attention = Attention(width, heads, qkv_bias)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.modulation = Offset(6 * width) if condition_width is None else modulation(condition_width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, keys: Tensor | None) -> Tensor:
        """x [B, N, D], condition [B, K], or [B, 6 * D] if shared -> [B, N, D].

        keys bool [B, 1, 1 or N, N]: False for tokens that are masked in attention.
        """
        return self.modulated(x, self.modulation(condition)[:, None].chunk(6, dim=-1), keys)[0]

    def modulated(
        self,
        x: Tensor,
        modulation: Sequence[Tensor],
        keys: Tensor | None,
        queries: int | None = None,
        others: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """Apply the block under six modulations [B, 1, D] to x [B, M, D]; return tokens, and the keys and values of x.

        Only the first ``queries`` tokens are updated and returned, [B, queries, D]; None: all. ``others`` are the keys
        and values of N - M tokens that are not in x, attended to as if they followed it.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        q, *own = self.attention.project(normalise(x, shift_a, scale_a))
        k, v = own if others is None else (torch.cat(pair, dim=2) for pair in zip(own, others, strict=True))
        x = torch.addcmul(x[:, :queries], gate_a, self.attention.mix(q[:, :, :queries], k, v, keys))
        return torch.addcmul(x, gate_m, self.mlp(normalise(x, shift_m, scale_m))), own


class Offset(nn.Module):
    """Adds a learned vector, initialised to zero."""

    def __init__(self, width: int):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


class Head(nn.Module):
    """The last layer that actions and latents share: a modulated norm, then a linear layer."""

    def __init__(self, width: int, condition_width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.modulation = modulation(condition_width, 2 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, N, D], condition [B, K] -> [B, N, D]."""
        return self.modulated(x, self.modulation(condition)[:, None].chunk(2, dim=-1))

    def modulated(self, x: Tensor, modulation: Sequence[Tensor]) -> Tensor:
        """Apply the head under two modulations [B, 1, D]: x [B, N, D] -> [B, N, D]."""
        return self.linear(normalise(x, *modulation))


class Attention(nn.Module):
    """Multi-head self-attention with one product for queries, keys and values."""

    def __init__(self, width: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.out = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, D] -> queries, keys and values [B, heads, N, d]."""
        # Not einops: its overhead shows in a small model's query.
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
        """q [B, heads, M, d], k and v [B, heads, N, d], keys bool [B, 1, 1 or M, N] -> [B, M, D]."""
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        return self.out(mixed.transpose(1, 2).flatten(2))


def stack(config: ModelConfig, condition_width: int | None) -> nn.ModuleList:
    """Return the ``depth`` blocks of a transformer; ``condition_width`` as in Block."""
    return nn.ModuleList(
        Block(config.width, config.heads, config.mlp_ratio, config.qkv_bias, condition_width)
        for _ in range(config.depth)
    )


def modulation(condition_width: int, out: int) -> nn.Sequential:
    """Return the layers from a condition [B, condition_width] to a modulation [B, out], initialised to zero."""
    linear = nn.Linear(condition_width, out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


def modulations(layers: nn.Sequential, condition: Tensor, times: Tensor, width: int) -> list[tuple[Tensor, ...]]:
    """Return, for each of the times [S, T], the modulations [B, 1, width] of condition [B, K - T] and that time.

    A linear map of two concatenated vectors is the sum of a map of each. The condition, by far the wider one, is mapped
    once instead of S times. In bfloat16 the sum is rounded one additional time.
    """
    activation, linear = layers
    assert isinstance(linear, nn.Linear)
    of_condition, of_times = linear.weight.split([condition.shape[1], times.shape[1]], dim=1)
    known = F.linear(activation(condition), of_condition, linear.bias)
    both = known + F.linear(activation(times), of_times)[:, None]  # [S, B, out]
    return [step.unbind() for step in both.unflatten(2, (-1, 1, width)).transpose(1, 2)]


def normalise(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return the layer norm of x [B, N, D] with the modulation [B, 1, D] as its affine part."""
    if len(x) == 1 and not torch.is_grad_enabled():  # a robot's query: the norm's own affine part takes one pass
        return F.layer_norm(x, x.shape[-1:], 1 + scale.flatten(), shift.flatten(), eps=1e-6)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)
