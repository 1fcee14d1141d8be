"""Random numbers: one generator for a whole batch, or one for each sample.

In training each sample has its own generator, seeded by the run's seed, the step and the sample's position in the
global batch. Its noise depends neither on the other samples nor on the worker that processes it, so any number of
workers trains the same model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Stream = Literal["training", "held_out"]
STREAMS: dict[Stream, int] = {"training": 0, "held_out": 1}


@dataclass(frozen=True)
class SampleGenerators:
    """CPU generators: one for each sample, and ``together`` for what the samples of all workers share."""

    each: list[torch.Generator]
    together: torch.Generator

    @classmethod
    def of(cls, seed: int, step: int, positions: Iterable[int], stream: Stream = "training") -> SampleGenerators:
        """Return the generators for samples at these positions (0, 1, ...) of that step's global batch.

        Streams are independent of each other. In "held_out", ``step`` is the number of the held-out batch.
        """
        shared, *each = (_generator(seed, STREAMS[stream], step, place) for place in (0, *(1 + p for p in positions)))
        return cls(each, shared)

    def __getitem__(self, some: slice) -> SampleGenerators:
        return SampleGenerators(self.each[some], self.together)


Random = torch.Generator | SampleGenerators | None


def unit_noise(shape: tuple[int, ...], random: Random, device: torch.device) -> Tensor:
    """Draw standard normal noise, float32 [B, ...], on ``device``.

    It is drawn on the generator's device: a CPU generator gives the same noise for every device.
    """
    if isinstance(random, SampleGenerators):
        return torch.stack([torch.randn(shape[1:], generator=one) for one in random.each]).to(device)
    return torch.randn(shape, generator=random, device=_home(random, device)).to(device)


def uniform(shape: tuple[int, ...], random: Random, device: torch.device) -> Tensor:
    """Draw float32 [B, ...] in [0, 1), like ``unit_noise``."""
    if isinstance(random, SampleGenerators):
        return torch.stack([torch.rand(shape[1:], generator=one) for one in random.each]).to(device)
    return torch.rand(shape, generator=random, device=_home(random, device)).to(device)


def integers(below: int, count: int, random: Random, device: torch.device) -> Tensor:
    """Draw int64 [count] from 0 to ``below`` - 1, like ``unit_noise``."""
    if isinstance(random, SampleGenerators):
        return torch.stack([torch.randint(below, (), generator=one) for one in random.each]).to(device)
    return torch.randint(below, (count,), generator=random, device=_home(random, device)).to(device)


def together(random: Random) -> torch.Generator | None:
    """Return the generator of what a whole batch shares."""
    return random.together if isinstance(random, SampleGenerators) else random


def _home(generator: torch.Generator | None, device: torch.device) -> torch.device:
    return generator.device if generator else device


def _generator(seed: int, *key: int) -> torch.Generator:
    # 15 microseconds. The modulus admits negative seeds. 32 bits: torch's CPU generator ignores the rest of a seed.
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=key)
    return torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
