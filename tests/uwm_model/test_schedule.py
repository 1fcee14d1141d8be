"""Diffusion and flow, DDIM and DPM-Solver++: timesteps, single steps and the result of sampling."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from helpers.models import TINY, fresh, make_batch, repeated, seeded, stirred, train
from torch import Tensor

from uwm_model.config import DiffusionConfig
from uwm_model.sampling import ROLES, Role
from uwm_model.schedule import DiffusionSchedule, Evaluation, Schedule, make_schedule
from uwm_model.world_model import UnifiedWorldModel

KINDS = [
    ("squaredcos_cap_v2", "epsilon"),
    ("squaredcos_cap_v2", "v"),
    ("squaredcos_cap_v2", "sample"),
    ("flow", "v"),
    ("flow", "sample"),
]
SAMPLERS = ["ddim", "dpm_solver"]


def settings(schedule: str, prediction: str, sampler: str = "ddim", **others) -> DiffusionConfig:
    return DiffusionConfig(schedule=schedule, prediction=prediction, sampler=sampler, **others)


def run(schedule: Schedule, sample: Tensor, steps: int, predict: Callable[[Tensor, float], Tensor]) -> list[Tensor]:
    """Return the sample after every step."""
    before, after = None, []
    for t, t_next in itertools.pairwise([*schedule.timesteps(steps), None]):
        assert t is not None
        seen = Evaluation(sample, predict(sample, t), t)
        sample = schedule.step(*seen, t_next, before)
        before = seen
        after.append(sample)
    return after


def answer(schedule: Schedule, clean: Tensor, noise: Tensor, t: float) -> Tensor:
    """Return the network's ideal prediction at t."""
    return schedule.target(clean, noise, torch.full((len(clean),), t))


# Settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "linear"}, "schedule: linear is unknown; known: squaredcos_cap_v2, flow"),
        ({"schedule": "flow"}, r"prediction: epsilon is not for schedule flow; choose v \(the velocity\) or sample"),
        ({"sampler": "euler"}, "sampler: euler is unknown; known: ddim, dpm_solver"),
        ({"sampling_steps": 1}, "sampling_steps: 1; choose 2 to train_timesteps=100 where the prediction is epsilon"),
        ({"prediction": "v", "sampling_steps": 101}, "sampling_steps: 101; choose 1 to train_timesteps=100"),
        ({"video_steps": 11}, "video_steps: 11; choose 2 to sampling_steps=10"),
        ({"video_steps": 1}, "video_steps: 1; choose 2 to sampling_steps=10 where the prediction is epsilon"),
        ({"video_steps": 2.5}, "video_steps: 2.5 is not a whole number above 0"),
    ],
)
def test_an_invalid_setting_is_named(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**wrong)


def test_which_settings_allow_a_single_step() -> None:
    for kind in KINDS:
        if kind[1] == "epsilon":
            with pytest.raises(ValueError, match="steps: 1; choose 2 to 100"):
                make_schedule(settings(*kind)).timesteps(1)
        else:
            assert make_schedule(settings(*kind, sampling_steps=1)).timesteps(1) == [99]


# Times


def test_diffusion_timesteps_are_the_published_ones() -> None:
    schedule, published = DiffusionSchedule(DiffusionConfig()), DDIMScheduler(100, timestep_spacing="leading")
    for steps in range(2, 101):
        published.set_timesteps(steps)
        assert schedule.timesteps(steps) == published.timesteps.tolist()


def test_a_flow_is_a_straight_line_from_noise_to_the_clean_sample() -> None:
    schedule = make_schedule(settings("flow", "v"))
    clean, noise = torch.randn(3, 2, 2, generator=seeded(0)), torch.randn(3, 2, 2, generator=seeded(1))
    assert torch.equal(schedule.noisy(clean, noise, torch.tensor([0, 0, 0])), clean)
    assert torch.equal(schedule.noisy(clean, noise, torch.tensor([99.0, 99, 99])), noise)
    torch.testing.assert_close(schedule.noisy(clean, noise, torch.tensor([49.5] * 3)), (clean + noise) / 2)
    velocity = answer(schedule, clean, noise, 12.5)
    torch.testing.assert_close(clean + velocity, noise)
    assert schedule.timesteps(4) == [99, 74.25, 49.5, 24.75]
    assert len(schedule.timesteps(100)) == 100

    times = schedule.draw(10_000, seeded(0), torch.device("cpu"))
    assert times.dtype == torch.float32 and 0 <= times.min() < 0.1 and 98.9 < times.max() < 99
    assert times.mean().item() == pytest.approx(49.5, abs=1)


STAGES = {  # with ten steps
    "squaredcos_cap_v2": [90, 80, 70, 60, 50, 40, 30, 20, 10, 0],
    "flow": [99, 89.1, 79.2, 69.3, 59.4, 49.5, 39.6, 29.7, 19.8, 9.9],
}


def visited(model: UnifiedWorldModel, mode: str) -> list[tuple[float, float]]:
    """Return (t_action, t_video) of every evaluation."""
    times = []
    hook = model.denoiser.register_forward_pre_hook(lambda _, given: times.append((float(given[2]), float(given[4]))))
    model.sample(mode, make_batch(1), generator=seeded(0))  # type: ignore[arg-type]
    hook.remove()
    return times


@pytest.mark.parametrize("mode", list(ROLES))
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("schedule", "prediction"), KINDS)
def test_asked_runs_down_given_is_clean_ignored_is_noise(schedule, prediction, sampler, mode) -> None:
    table = {Role.ASKED: STAGES[schedule], Role.GIVEN: [0] * 10, Role.IGNORED: [99] * 10}
    times = visited(fresh(settings(schedule, prediction, sampler)), mode)
    for found, role in zip(zip(*times, strict=True), ROLES[mode], strict=True):
        assert found == pytest.approx(table[role], abs=1e-4)


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "flow"])
def test_video_can_take_fewer_steps_than_actions(schedule: str) -> None:
    model = fresh(settings(schedule, "v", video_steps=4))
    slow = model.schedule.timesteps(4)
    action, video = zip(*visited(model, "joint"), strict=True)
    assert action == pytest.approx(STAGES[schedule], abs=1e-4)
    assert video == pytest.approx([slow[i] for i in (0, 0, 0, 1, 1, 2, 2, 2, 3, 3)], abs=1e-4)
    assert visited(model, "video") == visited(fresh(settings(schedule, "v")), "video")
    with pytest.raises(ValueError, match="video_steps: 4 are more than the 3 steps"):
        model.sample("joint", make_batch(1), steps=3)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "flow"])
def test_video_is_unchanged_while_it_waits_and_ends_clean(schedule: str, sampler: str) -> None:
    """With a perfect network both modalities end clean, whatever the number of steps."""
    model = fresh(settings(schedule, "sample", sampler, video_steps=2))
    batch = make_batch(2)
    assert batch.action is not None and batch.future_latents is not None
    clean = batch.action, (batch.future_latents / 3).clamp(-1, 1)
    shown: list[Tensor] = []

    def denoise(_condition, _action, _t_action, latents: Tensor, *_) -> tuple[Tensor, Tensor]:
        shown.append(latents)
        return clean

    model.denoise = denoise  # type: ignore[method-assign, assignment]
    action, latents = model.sample("joint", batch, steps=5, generator=seeded(0))
    torch.testing.assert_close((action, latents), (clean[0], 3 * clean[1]))
    assert [torch.equal(a, b) for a, b in itertools.pairwise(shown)] == [True, True, False, True]


# Steps


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("kind", "prediction"), KINDS)
def test_a_perfect_prediction_leads_back_to_the_clean_sample(kind, prediction, sampler, steps: int) -> None:
    schedule = make_schedule(settings(kind, prediction, sampler))
    if steps == 1 and prediction == "epsilon":
        return
    clean = torch.rand(3, 5, generator=seeded(0), dtype=torch.float64) * 2 - 1
    noise = torch.randn(3, 5, generator=seeded(1), dtype=torch.float64)
    times = schedule.timesteps(steps)
    path = [schedule.noisy(clean, noise, torch.full((3,), t)) for t in times]
    after = run(schedule, path[0], steps, lambda _, t: answer(schedule, clean, noise, t))
    for found, expected in zip(after, [*path[1:], clean], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def gaussian(schedule: Schedule, steps: int, mean: float, deviation: float) -> tuple[float, float]:
    """Return (mean, deviation) of the samples for normally distributed data, whose optimal prediction is known."""
    quantiles = (torch.arange(4001, dtype=torch.float64) + 0.5) / 4001

    def predict(sample: Tensor, t: float) -> Tensor:
        signal, share = (scale.double() for scale in schedule.scales(t))
        gain = deviation**2 * signal / (signal**2 * deviation**2 + share**2)
        clean = mean + gain * (sample - signal * mean)
        return answer(schedule, clean, (sample - signal * clean) / share, t)

    found = run(schedule, torch.special.ndtri(quantiles)[:, None], steps, predict)[-1]
    return found.mean().item(), found.std().item()


def off(config: DiffusionConfig, steps: int) -> float:
    """Return the Wasserstein distance from N(0.3, 0.2)."""
    mean, deviation = gaussian(make_schedule(dataclasses.replace(config, clip_sample=False)), steps, 0.3, 0.2)
    return ((mean - 0.3) ** 2 + (deviation - 0.2) ** 2) ** 0.5


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("kind", "prediction"), KINDS)
def test_sampling_a_gaussian_converges_with_more_steps(kind, prediction, sampler) -> None:
    config = settings(kind, prediction, sampler)
    few, some, many = (off(config, steps) for steps in (2, 10, 100))
    assert few > 2 * some > 10 * many
    assert many < (0.008 if sampler == "ddim" else 0.002)


@pytest.mark.parametrize(("kind", "prediction"), KINDS)
def test_second_order_is_more_accurate_at_equal_steps(kind, prediction) -> None:
    first, second = (off(settings(kind, prediction, sampler), 10) for sampler in SAMPLERS)
    assert second < first / 1.5


def test_one_step_gives_the_mean() -> None:
    for kind in KINDS[1:]:
        mean, deviation = gaussian(make_schedule(settings(*kind)), 1, 0.3, 0.2)
        assert mean == pytest.approx(0.3, abs=1e-3) and deviation < 1e-3


@pytest.mark.parametrize("steps", [2, 3, 10, 20])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("kind", "prediction"), KINDS)
def test_dpm_solver_equals_diffusers(kind: str, prediction: str, clip: bool, steps: int) -> None:
    """In diffusers, thresholding with a maximum of 1 is clipping to [-1, 1]."""
    schedule = make_schedule(settings(kind, prediction, "dpm_solver", clip_sample=clip))
    flow = kind == "flow"
    theirs = DPMSolverMultistepScheduler(
        100,
        beta_schedule="squaredcos_cap_v2",
        prediction_type={"epsilon": "epsilon", "sample": "sample", "v": "v_prediction"}[prediction]
        if not flow or prediction == "sample"
        else "flow_prediction",
        thresholding=clip,
        sample_max_value=1,
        use_flow_sigmas=flow,
    )
    times = schedule.timesteps(steps)
    if flow:
        theirs.set_timesteps(steps)
        theirs.sigmas = torch.tensor([*times, 0]) / 99
    else:
        theirs.set_timesteps(timesteps=times)
    answers = torch.randn(steps, 4, 3, 5, generator=seeded(1))  # inconsistent predictions
    ours = run(schedule, torch.randn(4, 3, 5, generator=seeded(0)), steps, lambda _, t: answers[times.index(t)])
    sample = torch.randn(4, 3, 5, generator=seeded(0))
    for i, found in enumerate(ours):
        sample = theirs.step(answers[i], theirs.timesteps[i], sample).prev_sample
        torch.testing.assert_close(found, sample, rtol=1e-3, atol=1e-4)


# The model


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("kind", "prediction"), KINDS)
def test_the_seed_determines_the_sample(kind, prediction, sampler) -> None:
    model = stirred()
    model.schedule = make_schedule(settings(kind, prediction, sampler))
    batch = make_batch(2)
    first, other = (model.sample("joint", batch, 3, seeded(seed)) for seed in (0, 1))
    again = model.sample("joint", batch, 3, seeded(0))
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert not any(torch.allclose(a, b) for a, b in zip(first, other, strict=True))
    losses = [model.loss(batch, seeded(seed)).total for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_a_flow_shows_action_free_video_with_pure_noise() -> None:
    model, batch = fresh(settings("flow", "v")), make_batch(3)
    free = dataclasses.replace(batch, action_mask=batch.action_mask & torch.tensor([True, False, True])[:, None, None])
    shown: list[tuple[Tensor, Tensor]] = []
    model.denoiser.register_forward_pre_hook(lambda _, given: shown.append((given[1], given[2])))
    losses = [model.loss(b, seeded(0)) for b in (free, dataclasses.replace(free, action=free.action + 1))]
    (noisy, t_action), (noisy_of_others, _) = shown
    assert t_action[1] == 99 and t_action.dtype == torch.float32 and not (t_action[[0, 2]] == 99).any()
    assert torch.equal(noisy[1], noisy_of_others[1]) and not torch.equal(noisy[0], noisy_of_others[0])
    assert losses[0].action_per_sample.isnan().tolist() == [False, True, False]


def test_bfloat16_leaves_flow_times_precise() -> None:
    model, batch = stirred(), make_batch(8)
    model.schedule = make_schedule(settings("flow", "v"))
    precise = model.loss(batch, seeded(0))
    coarse = model.bfloat16().loss(batch.to("cpu", torch.bfloat16), seeded(0))
    torch.testing.assert_close(coarse.total, precise.total, rtol=0.02, atol=0)
    vector = model.denoiser.timesteps
    assert not torch.equal(vector(*torch.tensor([[98.0], [1]])), vector(*torch.tensor([[98.5], [1]])))


def test_a_flow_learns_one_batch_in_every_mode() -> None:
    config = dataclasses.replace(TINY, latent_channels=2, latent_size=(4, 4), patch=(2, 2, 2))
    diffusion = settings("flow", "v")
    batch, model, untrained = make_batch(2, config=config), fresh(diffusion, config), fresh(diffusion, config)
    train(model, repeated(batch, 12), steps=250, learning_rate=4e-3)
    for sampler, (mode, (of_action, of_video)) in itertools.product(SAMPLERS, ROLES.items()):
        model.schedule = make_schedule(settings("flow", "v", sampler))
        action, latents = model.sample(mode, batch, generator=seeded(0))  # type: ignore[arg-type]
        action_before, latents_before = untrained.sample(mode, batch, generator=seeded(0))  # type: ignore[arg-type]
        if of_action is Role.ASKED:
            error, before = ((guess - batch.action).abs().mean() for guess in (action, action_before))
            assert error < 0.1 and error < before / 5, mode
        if of_video is Role.ASKED:
            error, before = ((guess - batch.future_latents).square().mean() for guess in (latents, latents_before))
            assert error < 0.3 and error < before / 10, mode
