"""Where random numbers come from: one generator for a batch, or one for each of its samples.

While training each sample has its own: its noise depends on the seed, the step and its place in the global batch, and
neither on the samples beside it nor on the worker that has it. So any number of workers trains the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleGenerators:
    """CPU generators: ``each`` of one sample, ``together`` of what all workers' samples share."""

    each: list[torch.Generator]
    together: torch.Generator

    @classmethod
    def of(cls, seed: int, step: int, places: Iterable[int]) -> SampleGenerators:
        """For the samples at these places of that step's global batch."""
        return cls([_generator(seed, step, place) for place in places], _generator(seed, step, -1))

    def __getitem__(self, some: slice) -> SampleGenerators:
        return SampleGenerators(self.each[some], self.together)


Random = torch.Generator | SampleGenerators | None


def unit_noise(shape: tuple[int, ...], random: Random, device: torch.device) -> Tensor:
    """float32 [B, ...] on ``device``, drawn where a generator lives: a CPU generator gives every device the same."""
    if isinstance(random, SampleGenerators):
        return torch.stack([torch.randn(shape[1:], generator=one) for one in random.each]).to(device)
    return torch.randn(shape, generator=random, device=_home(random, device)).to(device)


def uniform(shape: tuple[int, ...], random: Random, device: torch.device) -> Tensor:
    """float32 [B, ...] in [0, 1), like ``unit_noise``."""
    if isinstance(random, SampleGenerators):
        return torch.stack([torch.rand(shape[1:], generator=one) for one in random.each]).to(device)
    return torch.rand(shape, generator=random, device=_home(random, device)).to(device)


def integers(below: int, count: int, random: Random, device: torch.device) -> Tensor:
    """int64 [count] from 0 to ``below`` - 1, like ``unit_noise``."""
    if isinstance(random, SampleGenerators):
        return torch.stack([torch.randint(below, (), generator=one) for one in random.each]).to(device)
    return torch.randint(below, (count,), generator=random, device=_home(random, device)).to(device)


def together(random: Random) -> torch.Generator | None:
    """The generator of what a whole batch shares."""
    return random.together if isinstance(random, SampleGenerators) else random


def _home(generator: torch.Generator | None, device: torch.device) -> torch.device:
    return generator.device if generator else device


def _generator(*numbers: int) -> torch.Generator:
    # Of integers Python's hash is the same everywhere; -1 and -2 count as the same.
    return torch.Generator().manual_seed(hash(numbers) % 2**63)
