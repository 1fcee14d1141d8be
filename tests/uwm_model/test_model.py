"""UWM: what each mode returns, that masked inputs have no effect, and that it learns."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.models import SEEING, SHARED, TINY, TOKENS, changed, fresh, make_batch, repeated, seeded, stirred, train
from pydantic import TypeAdapter, ValidationError

import uwm_model
from uwm_model.config import DiffusionConfig, ModelConfig
from uwm_model.observation import LatentObservation
from uwm_model.sampling import ROLES, Role
from uwm_model.schedule import DiffusionSchedule

GOLDEN_LOSSES = Path(__file__).parents[1] / "golden" / "losses.json"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Shapes and settings


@pytest.mark.parametrize("mode", list(ROLES))
def test_a_mode_returns_its_outputs_and_needs_only_its_inputs(mode) -> None:
    of_action, of_video = ROLES[mode]
    full = make_batch()
    batch = dataclasses.replace(
        full,
        action=full.action if of_action is Role.GIVEN else None,
        future_latents=full.future_latents if of_video is Role.GIVEN else None,
    )
    model = stirred()
    action, latents = model.sample(mode, batch, steps=2, generator=seeded(0))
    assert (action is not None) == (of_action is Role.ASKED)
    assert (latents is not None) == (of_video is Role.ASKED)
    if action is not None:
        assert action.shape == full.action.shape
        assert action.abs().max() <= 1
    if latents is not None:
        assert latents.shape == full.future_latents.shape
        assert latents.abs().max() <= 3
    again = model.sample(mode, batch, steps=2, generator=seeded(0))
    torch.testing.assert_close(again, (action, latents), rtol=0, atol=0)
    if Role.GIVEN in (of_action, of_video):
        with pytest.raises(ValueError, match="needs batch"):
            model.sample(mode, dataclasses.replace(batch, action=None, future_latents=None))


@pytest.mark.parametrize(
    ("mode", "marginal", "action", "video"),
    [
        ("policy", "last", range(90, -1, -10), [99] * 10),
        ("policy", "leading", range(90, -1, -10), [90] * 10),
        ("video", "last", [99] * 10, range(90, -1, -10)),
        ("forward_dynamics", "last", [0] * 10, range(90, -1, -10)),
        ("inverse_dynamics", "last", range(90, -1, -10), [0] * 10),
        ("joint", "last", range(90, -1, -10), range(90, -1, -10)),
    ],
)
def test_timesteps_of_every_step(mode, marginal, action, video) -> None:
    model = fresh(DiffusionConfig(marginal_timestep=marginal))
    times = []
    model.denoiser.register_forward_pre_hook(lambda _, given: times.append((int(given[2]), int(given[4]))))
    model.sample(mode, make_batch(1))
    assert times == list(zip(action, video, strict=True))


def test_unknown_mode_and_invalid_steps_are_rejected() -> None:
    with pytest.raises(ValueError, match="known: policy, video"):
        fresh().sample("planner", make_batch(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps: 101"):
        fresh().sample("policy", make_batch(1), steps=101)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("heads", 7, "heads: 7 does not divide width 64"),
        ("latent_size", (8, 10), "latent_size: .* not a multiple of the patch"),
        ("future_frames", 3, "future_frames: 3 is not a multiple"),
        ("latent_size", 8, "latent_size: 8 is not 2 whole numbers"),
        ("depth", 0, "depth: 0 is not a whole number"),
        ("width", "64", "width: '64' is not a whole number"),
        ("timestep_width", 33, "timestep_width: 33"),
    ],
)
def test_an_invalid_setting_is_named(key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **{key: value})


def test_settings_round_trip_through_json_and_reject_unknown_keys() -> None:
    adapter = TypeAdapter(ModelConfig)
    assert adapter.validate_json(adapter.dump_json(TINY)) == TINY
    assert dataclasses.replace(TINY, latent_size=[8, 12]) == TINY  # type: ignore[arg-type]  # YAML gives lists
    with pytest.raises(ValidationError, match="dephth"):
        adapter.validate_python({**dataclasses.asdict(TINY), "dephth": 3})


def test_odd_latents_and_several_patches_in_time() -> None:
    config = dataclasses.replace(
        TINY, cameras=3, latent_size=(6, 10), future_frames=4, patch=(2, 3, 5), qkv_bias=False, registers=0
    )
    model, batch = fresh(config=config), make_batch(2, config=config)
    model.loss(batch).total.backward()
    _, latents = model.sample("video", batch, steps=2)
    assert latents is not None and latents.shape == batch.future_latents.shape


def test_bfloat16_leaves_the_targets_precise() -> None:
    batch = make_batch().to("cpu", torch.bfloat16)
    assert batch.proprio.dtype == batch.current_latents.dtype == torch.bfloat16
    assert batch.action is not None and batch.future_latents is not None
    assert torch.equal(batch.action, make_batch().action) and torch.equal(
        batch.future_latents, make_batch().future_latents
    )
    assert batch.to("cpu", torch.float64).action.dtype == torch.float64
    targets: list[torch.Tensor] = []
    model = fresh(DiffusionConfig(prediction="sample")).bfloat16()
    target = model.schedule.target
    model.schedule.target = lambda *given: targets.append(target(*given)) or targets[-1]
    model.loss(batch, seeded(0))
    assert torch.equal(targets[0], batch.action)


def test_bfloat16_leaves_the_schedule_precise() -> None:
    model = stirred()
    batch = make_batch(8)
    precise = model.loss(batch, seeded(0))
    coarse = model.bfloat16().loss(batch.to("cpu", torch.bfloat16), seeded(0))
    assert coarse.total.dtype == torch.float32
    torch.testing.assert_close(coarse.total, precise.total, rtol=0.02, atol=0)
    assert model.schedule.alphas_cumprod.dtype == torch.float32


def test_factored_positions_transfer_to_another_horizon_and_more_cameras() -> None:
    one = dataclasses.replace(TOKENS, cameras=1)
    weights, wide = stirred(one).state_dict(), stirred(TOKENS)
    longer = stirred(dataclasses.replace(one, action_chunk=12, latent_size=(16, 16), future_frames=4))
    assert {name: tensor.shape for name, tensor in longer.state_dict().items()} == {
        name: tensor.shape for name, tensor in weights.items()
    }
    differing = {name for name, tensor in wide.state_dict().items() if tensor.shape != weights[name].shape}
    assert differing == {"denoiser.position.camera"}

    camera = torch.cat([weights["denoiser.position.camera"], torch.ones(1, TOKENS.width)])
    wide.load_state_dict({**weights, "denoiser.position.camera": camera})
    narrow = stirred(one)
    narrow.load_state_dict(weights)
    full = make_batch(3, config=TOKENS)
    both = dataclasses.replace(full, camera_mask=changed(full.camera_mask, (slice(None), 1), False))
    first = dataclasses.replace(
        full,
        current_latents=full.current_latents[:, :1],
        future_latents=full.future_latents[:, :1],
        camera_mask=full.camera_mask[:, :1],
    )
    noise = torch.randn(full.future_latents.shape, generator=seeded(1))
    for mode in ROLES:
        action, latents = wide.sample(mode, both, 3, seeded(0), noise_latents=noise)
        action_of_one, latents_of_one = narrow.sample(mode, first, 3, seeded(0), noise_latents=noise[:, :1])
        if action is not None:
            torch.testing.assert_close(action, action_of_one)
        if latents is not None:
            torch.testing.assert_close(latents[:, :1], latents_of_one)


# Masks


@pytest.mark.parametrize("mode", list(ROLES))
def test_a_padded_action_dimension_changes_nothing(mode) -> None:
    model, full = stirred(), make_batch()
    batch = dataclasses.replace(full, action_mask=changed(full.action_mask, (..., -1), False))
    noise = torch.randn(full.action.shape, generator=seeded(1))
    outputs = []
    for value in (0, 7):
        junk = dataclasses.replace(batch, action=changed(full.action, (..., -1), value))
        given = changed(noise, (..., -1), value)
        outputs.append(model.sample(mode, junk, 3, seeded(0), noise_action=given))
    torch.testing.assert_close(*outputs)
    if outputs[0][0] is not None:
        assert not outputs[0][0][..., -1].any()


@pytest.mark.parametrize("config", [TINY, SEEING, TOKENS], ids=["paper", "current patches", "tokens"])
@pytest.mark.parametrize("mode", list(ROLES))
def test_a_missing_camera_changes_nothing(mode, config: ModelConfig) -> None:
    model, full = stirred(config), make_batch()
    batch = dataclasses.replace(full, camera_mask=changed(full.camera_mask, (slice(None), 1), False))
    noise = torch.randn(full.future_latents.shape, generator=seeded(1))
    outputs = []
    for value in (0, 7):
        junk = dataclasses.replace(
            batch,
            current_latents=changed(full.current_latents, (slice(None), 1), value),
            future_latents=changed(full.future_latents, (slice(None), 1), value),
        )
        given = changed(noise, (slice(None), 1), value)
        outputs.append(model.sample(mode, junk, 3, seeded(0), noise_latents=given))
    torch.testing.assert_close(*outputs)
    seen = model.sample(mode, full, 3, seeded(0), noise_latents=noise)
    for with_it, without in zip(seen, outputs[0], strict=True):
        assert with_it is None or not torch.allclose(with_it[:, 0], without[:, 0]), "the camera was never looked at"


def test_masked_proprio_changes_nothing_and_masked_differs_from_zero() -> None:
    observation, full = LatentObservation(TINY), make_batch()
    zero = dataclasses.replace(full, proprio=changed(full.proprio, (..., 0), 0))
    masked = dataclasses.replace(full, proprio_mask=changed(full.proprio_mask, (..., 0), False))
    masked_zero = dataclasses.replace(zero, proprio_mask=masked.proprio_mask)
    torch.testing.assert_close(observation(masked), observation(masked_zero))
    assert not torch.allclose(observation(zero), observation(masked))


def test_masked_values_have_no_loss() -> None:
    model, full = stirred(), make_batch()
    batch = dataclasses.replace(
        full,
        action_mask=changed(changed(full.action_mask, (..., -1), False), (1, slice(4, None)), False),
        camera_mask=changed(full.camera_mask, (2, 1), False),
    )
    junk = dataclasses.replace(
        batch,
        action=changed(batch.action, ~batch.action_mask, 5),
        future_latents=changed(batch.future_latents, ~batch.camera_mask, 5),
    )
    torch.testing.assert_close(model.loss(junk, seeded(0)), model.loss(batch, seeded(0)))


def test_an_action_free_sample_has_no_action_loss_and_does_not_affect_others() -> None:
    model, full = stirred(), make_batch()
    free = dataclasses.replace(
        full, action_mask=changed(full.action_mask, (1,), False), action=changed(full.action, (1,), 0)
    )
    times = []
    handle = model.denoiser.register_forward_pre_hook(lambda _, given: times.append(given[2]))
    losses, of_full = model.loss(free, seeded(0)), model.loss(full, seeded(0))
    handle.remove()
    others = [0, 2, 3]
    assert times[0][1] == 99
    assert torch.equal(times[0][others], times[1][others])

    assert losses.action_per_sample[1].isnan()
    torch.testing.assert_close(losses.action_per_sample[others], of_full.action_per_sample[others])
    torch.testing.assert_close(losses.action, of_full.action_per_sample[others].mean())
    torch.testing.assert_close(losses.video_per_sample[others], of_full.video_per_sample[others])

    nobody = dataclasses.replace(free, action_mask=torch.zeros_like(full.action_mask))
    model.zero_grad()
    losses = model.loss(nobody, seeded(0))
    losses.total.backward()
    assert losses.action == 0
    assert torch.equal(losses.total, losses.video)
    assert not any(parameter.grad.any() for parameter in model.denoiser.actions.decode.parameters())
    assert model.denoiser.latents.decoder.weight.grad.any()


# Learning


def test_golden_losses() -> None:
    """Regenerate with: PYTHONPATH=tests python tests/uwm_model/test_model.py. New numbers: the model changed."""
    expected = json.loads(GOLDEN_LOSSES.read_text())
    for step, (ours, golden) in enumerate(zip(golden_run(), expected, strict=True)):
        assert ours == pytest.approx(golden, abs=1e-4), f"step {step}"


def golden_run() -> list[dict[str, float]]:
    full = make_batch()
    batch = dataclasses.replace(
        full,
        action_mask=changed(full.action_mask, (1,), False),
        camera_mask=changed(full.camera_mask, (2, 1), False),
    )
    return train(fresh(), batch, steps=8, learning_rate=1e-3)


def test_an_untrained_model_predicts_zero_noise() -> None:
    first = train(fresh(), make_batch(64), steps=1, learning_rate=0)[0]
    assert first == pytest.approx({"action": 1, "video": 1}, abs=0.05)


@pytest.mark.parametrize(
    ("prediction", "config"), [("epsilon", TINY), ("sample", SEEING), ("sample", SHARED), ("v", TOKENS)]
)
def test_it_learns_one_batch_in_every_mode(prediction, config: ModelConfig) -> None:
    config = dataclasses.replace(config, latent_channels=2, latent_size=(4, 4), patch=(2, 2, 2))
    diffusion = DiffusionConfig(prediction=prediction)
    batch, model, untrained = make_batch(2, config=config), fresh(diffusion, config), fresh(diffusion, config)
    train(model, repeated(batch, 12), steps=250, learning_rate=4e-3)
    for mode, (of_action, of_video) in ROLES.items():
        action, latents = model.sample(mode, batch, steps=50, generator=seeded(0))
        action_before, latents_before = untrained.sample(mode, batch, steps=50, generator=seeded(0))
        if of_action is Role.ASKED:
            error, before = ((guess - batch.action).abs().mean() for guess in (action, action_before))
            assert error < 0.1 and error < before / 5, mode
        if of_video is Role.ASKED:
            error, before = ((guess - batch.future_latents).square().mean() for guess in (latents, latents_before))
            assert error < 0.3 and error < before / 10, mode  # predicting the mean: 1


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_a_perfect_prediction_leads_back_to_the_clean_sample(prediction: str) -> None:
    schedule = DiffusionSchedule(DiffusionConfig(prediction=prediction))
    clean, noise = torch.rand(3, 5, dtype=torch.float64) * 2 - 1, torch.randn(3, 5, dtype=torch.float64)
    for t in (0, 40, 90):
        at = torch.full((3,), t)
        sample, answer = schedule.noisy(clean, noise, at), schedule.target(clean, noise, at)
        torch.testing.assert_close(schedule.step(sample, answer, t, None), clean, atol=1e-5, rtol=0)
        expected = schedule.noisy(clean, noise, torch.full((3,), 20))
        torch.testing.assert_close(schedule.step(sample, answer, t, 20), expected, atol=1e-5, rtol=0)


# The package


def test_the_package_imports_no_sibling_and_reads_no_file() -> None:
    known = {"__future__", "abc", "collections", "dataclasses", "einops", "enum", "math", "numpy", "torch", "typing"}
    more = {
        "__init__.py": {"importlib"},
        "published.py": {"os", "re", "pickle"},
        "augment.py": {"kornia"},
        "query.py": {"copy"},
    }
    folder = Path(uwm_model.__file__).parent
    for path in folder.rglob("*.py"):
        known_here = more.get(path.name, set())
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in known | known_here | {"uwm_model"}, f"{path.name} imports {name}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN_LOSSES.write_text(json.dumps(golden_run(), indent=1) + "\n")
