"""A sample's random numbers depend on the seed, the stream, the step and its position, and on nothing else."""

from __future__ import annotations

import torch

from uwm_model.randomness import SampleGenerators, together, uniform, unit_noise

CPU = torch.device("cpu")


def test_noise_does_not_depend_on_the_worker() -> None:
    whole = unit_noise((6, 3), SampleGenerators.of(7, 4, range(6)), CPU)
    for world in (1, 2, 3, 6):
        for rank in range(world):
            share = SampleGenerators.of(7, 4, range(rank, 6, world))
            torch.testing.assert_close(unit_noise((6 // world, 3), share, CPU), whole[rank::world], rtol=0, atol=0)
    first, second = (torch.rand(3, generator=together(SampleGenerators.of(7, 4, some))) for some in ((0, 1), (5,)))
    assert first.equal(second), "what all samples share depends on which samples there are"


def test_seeds_streams_steps_and_positions_are_all_different() -> None:
    sources = [
        SampleGenerators.of(seed, step, range(4), stream)
        for seed in (0, 1, -1, -2, 2**32)
        for stream in ("training", "held_out")
        for step in range(4)
    ]
    drawn = [torch.rand(3, generator=one) for source in sources for one in (*source.each, source.together)]
    assert len(torch.stack(drawn).unique(dim=0)) == len(sources) * 5


def test_numbers_stay_the_same_on_every_machine() -> None:
    expected = [[0.22379714250564575, 0.9423930644989014], [0.07175135612487793, 0.13159579038619995]]
    drawn = uniform((2, 2), SampleGenerators.of(3, 10, (0, 5)), CPU)
    torch.testing.assert_close(drawn, torch.tensor(expected), rtol=0, atol=1e-7)
