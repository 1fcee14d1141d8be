"""The policy query against the plain sampling loop: equal where it is exact, close where it is approximate."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.models import SEEING, SHARED, TINY, TOKENS, changed, make_batch, seeded
from torch import Tensor

from uwm_model.batch import Batch
from uwm_model.config import DiffusionConfig, ModelConfig
from uwm_model.query import PolicyQuery
from uwm_model.schedule import Evaluation, make_schedule
from uwm_model.world_model import UnifiedWorldModel

ONE_BLOCK = dataclasses.replace(TINY, depth=1, registers=0, qkv_bias=False)
PIXELS = dataclasses.replace(TINY, observation="pixels", frame_width=16)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(config: ModelConfig = TINY, **diffusion: Any) -> UnifiedWorldModel:
    """A model without zero weights, so that everything that can affect an action does."""
    torch.manual_seed(0)
    model = UnifiedWorldModel(config, DiffusionConfig(**diffusion)).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def holes(config: ModelConfig = TINY) -> Batch:
    """Samples with a missing camera, padded action dimension and steps, no actions, and nothing missing."""
    full = make_batch(4, config=config)
    mask = changed(changed(full.action_mask, (0, ..., -1), False), (1, slice(4, None)), False)
    return dataclasses.replace(
        full,
        camera_mask=changed(full.camera_mask, (0, 1), False),
        action_mask=changed(mask, (2,), False),
        action=None,
        future_latents=None,
        current_pixels=torch.randint(0, 256, (4, 2, 2, 3, 32, 48), dtype=torch.uint8, generator=seeded(3)),
    )


def plain(model: UnifiedWorldModel, batch: Batch, steps: int | None = None, seed: int = 0) -> Tensor:
    action, _ = model.sample("policy", batch, steps, seeded(seed))
    assert action is not None
    return action


# The exact query


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(
    "config", [TINY, SEEING, ONE_BLOCK, SHARED, TOKENS], ids=["paper", "patches", "one", "shared", "tokens"]
)
@pytest.mark.parametrize("marginal", ["last", "leading"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_it_equals_the_plain_loop(prediction, marginal, config, dtype, tolerance) -> None:
    model = made(config, prediction=prediction, marginal_timestep=marginal).to(dtype)
    batch = holes(config).to("cpu", dtype)
    expected = plain(model, batch)
    answer = PolicyQuery(model)(batch, seeded(0))
    assert answer.dtype == torch.float32 and not answer.requires_grad
    torch.testing.assert_close(answer, expected, rtol=0, atol=tolerance)
    assert not answer[0, :, -1].any() and not answer[1, 4:].any() and answer[2].all()
    torch.testing.assert_close(PolicyQuery(model, 3)(batch, seeded(0)), plain(model, batch, 3), rtol=0, atol=tolerance)


def test_pixel_observation() -> None:
    model, batch = made(PIXELS), holes(PIXELS)
    torch.testing.assert_close(PolicyQuery(model)(batch, seeded(0)), plain(model, batch), rtol=0, atol=1e-5)
    assert not torch.allclose(
        plain(model, dataclasses.replace(batch, current_pixels=255 - batch.current_pixels)), plain(model, batch)
    )


@pytest.mark.parametrize("missing", [[0], [1], [0, 1]])
def test_a_camera_that_the_whole_batch_lacks_is_dropped(missing: list[int]) -> None:
    model, full = made(TOKENS), make_batch(2, config=TOKENS)
    batch = dataclasses.replace(full, camera_mask=changed(full.camera_mask, (slice(None), missing), False))
    torch.testing.assert_close(PolicyQuery(model)(batch, seeded(0)), plain(model, batch), rtol=0, atol=1e-5)


def test_noise_can_be_passed() -> None:
    model, batch = made(), holes()
    action = torch.randn((4, *TINY.action_shape), generator=seeded(1))
    latents = torch.randn((4, *TINY.latents_shape), generator=seeded(2))
    expected, _ = model.sample("policy", batch, noise_action=action, noise_latents=latents)
    answer = PolicyQuery(model)(batch, noise_action=action, noise_latents=latents)
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5)


def test_a_sample_does_not_depend_on_the_others() -> None:
    model, batch = made(), holes()
    action = torch.randn((4, *TINY.action_shape), generator=seeded(1))
    latents = torch.randn((4, *TINY.latents_shape), generator=seeded(2))
    together = PolicyQuery(model)(batch, noise_action=action, noise_latents=latents)
    for i in range(4):
        parts = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        alone = Batch(**{name: part if part is None else part[i : i + 1] for name, part in parts.items()})
        noise = {"noise_action": action[i : i + 1], "noise_latents": latents[i : i + 1]}
        torch.testing.assert_close(PolicyQuery(model)(alone, **noise), together[i : i + 1], rtol=0, atol=1e-5)
        sampled, _ = model.sample("policy", alone, **noise)
        torch.testing.assert_close(sampled, together[i : i + 1], rtol=0, atol=1e-5)


def test_the_seed_determines_the_result_and_no_state_is_kept() -> None:
    query, one, two = PolicyQuery(made(), refresh=(0,)), holes(), make_batch(2, seed=1)
    first = query(one, seeded(0))
    assert query(two, seeded(0)).shape == (2, *TINY.action_shape)
    assert torch.equal(query(one, seeded(0)), first)
    assert not torch.equal(query(one, seeded(1)), first)


def test_weights_may_change_between_queries() -> None:
    model, batch = made(), holes()
    query = PolicyQuery(model)
    before = query(batch, seeded(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = query(batch, seeded(0))
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, plain(model, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1}, "steps: 1; choose 2 to 100"),
        ({"steps": 101}, "steps: 101"),
        ({"refresh": ()}, r"refresh: \[\]; choose 0, and others of 0 to 9"),
        ({"refresh": (1, 5)}, r"refresh: \[1, 5\]"),
        ({"steps": 5, "refresh": (0, 5)}, r"refresh: \[0, 5\]; choose 0, and others of 0 to 4"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyQuery(made(), **settings)


# Approximate queries


@pytest.mark.parametrize("config", [TINY, SEEING], ids=["paper", "patches"])
def test_refresh_at_every_step_is_exact_and_otherwise_close(config: ModelConfig) -> None:
    model, batch = made(config), holes(config)
    exact = PolicyQuery(model)(batch, seeded(0))
    assert torch.equal(PolicyQuery(model, refresh=range(10))(batch, seeded(0)), exact)
    spread = (PolicyQuery(model)(batch, seeded(1)) - exact).abs().mean()
    seldom, often = (
        (PolicyQuery(model, refresh=steps)(batch, seeded(0)) - exact).abs().mean() for steps in ((0,), range(0, 10, 2))
    )
    assert 0 < often < seldom < spread / 4


def test_reusing_keys_and_values_that_cannot_change_is_exact() -> None:
    """With one block they depend only on the timestep; with a modulation that ignores it, on nothing."""
    config = dataclasses.replace(SEEING, depth=1)
    model, batch = made(config), holes(config)
    with torch.no_grad():
        model.denoiser.blocks[0].modulation[1].weight[:, config.condition_size :] = 0
    kept = PolicyQuery(model, refresh=(0,))(batch, seeded(0))
    torch.testing.assert_close(kept, plain(model, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("refresh", [None, (0, 5)])
def test_bfloat16_is_close(refresh: tuple[int, ...] | None) -> None:
    model, batch = made(), holes()
    precise = PolicyQuery(model, refresh=refresh)(batch, seeded(0))
    spread = (PolicyQuery(model)(batch, seeded(1)) - precise).abs().mean()
    coarse = PolicyQuery(model.bfloat16(), refresh=refresh)(batch, seeded(0))  # the query casts the batch
    assert coarse.dtype == torch.float32
    assert 0 < (coarse - precise).abs().mean() < spread / 20


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_bfloat16_weights_leave_the_schedule_precise(prediction: str) -> None:
    """An untrained model predicts 0 in any dtype, so only the arithmetic of the steps is left."""
    batch, diffusion = make_batch(2), DiffusionConfig(prediction=prediction, clip_sample=False)
    fresh = UnifiedWorldModel(TINY, diffusion)
    precise = PolicyQuery(fresh)(batch, seeded(0))
    assert precise.any() or prediction == "sample"
    torch.testing.assert_close(PolicyQuery(fresh.bfloat16())(batch, seeded(0)), precise, rtol=0, atol=0)


def test_bfloat16_weights_tell_neighbouring_timesteps_apart() -> None:
    embed = made().denoiser.timesteps
    t = torch.arange(100)
    precise = embed(t, torch.full_like(t, 99)).detach()
    coarse = embed.bfloat16()(t, torch.full_like(t, 99)).detach().float()
    nearest = torch.cdist(coarse, precise).argmin(dim=1)
    assert torch.equal(nearest, t)


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "flow"])
def test_the_second_order_solver_uses_its_previous_step(schedule) -> None:
    """Stepping by hand, the sampling loop and the query agree, and differ from a first-order solver."""
    model, batch = made(TINY), make_batch(2)
    settings = dataclasses.replace(model.diffusion_config, schedule=schedule, prediction="v", sampler="dpm_solver")
    model.diffusion_config, model.schedule = settings, make_schedule(settings)
    noise, latents = (torch.randn(shape.shape, generator=seeded(1)) for shape in (batch.action, batch.future_latents))
    action, before, times = noise, None, model.schedule.timesteps(5)
    first_order = noise
    condition = model.condition(batch)
    with torch.inference_mode():
        for t, t_next in zip(times, [*times[1:], None], strict=True):
            at, last = torch.tensor(t), torch.tensor(model.schedule.last)
            mask, current = batch.camera_mask, batch.current_latents
            seen = Evaluation(action, model.denoise(condition, action, at, latents, last, mask, current)[0], t)
            action, before = model.schedule.step(*seen, t_next, before), seen
            answer = model.denoise(condition, first_order, at, latents, last, mask, current)[0]
            first_order = model.schedule.step(first_order, answer, t, t_next)
    sampled, _ = model.sample("policy", batch, 5, noise_action=noise, noise_latents=latents)
    queried = PolicyQuery(model, 5)(batch, noise_action=noise, noise_latents=latents)
    torch.testing.assert_close(sampled, action, rtol=0, atol=1e-5)
    torch.testing.assert_close(queried, action, rtol=0, atol=1e-5)
    assert (sampled - first_order).abs().max() > 1e-3
