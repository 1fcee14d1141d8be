"""The paper's comparisons: what each learns, which modes it rejects, and that masked inputs have no effect."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from helpers.baselines import fresh, stirred
from helpers.command import Uwm
from helpers.formats import numbered, write_demos, write_video
from helpers.models import SEEING, TINY, Constant, changed, make_batch, repeated, seeded, train
from pydantic import TypeAdapter

from infra import tracking
from pipelines.evaluate.run import evaluate
from pipelines.ingest.run import ingest
from pipelines.models import checkpoint
from pipelines.recipe import IngestRecipe
from uwm_model.baselines.dp import DiffusionPolicy
from uwm_model.baselines.gr1 import GR1
from uwm_model.baselines.pad import PredictionWithAction
from uwm_model.config import DiffusionConfig, ModelConfig
from uwm_model.query import PolicyQuery
from uwm_model.randomness import SampleGenerators
from uwm_model.sampling import ROLES, Mode
from uwm_model.world_model import UnifiedWorldModel

MODES = {"dp": ["policy"], "pad": ["policy", "video", "joint"], "gr1": ["policy", "video", "joint"]}
HAS = [(kind, mode) for kind, modes in MODES.items() for mode in modes]
HAS_NOT = [(kind, mode) for kind, modes in MODES.items() for mode in ROLES if mode not in modes]
PAPER = ModelConfig(
    cameras=2,
    latent_channels=4,
    latent_size=(28, 28),
    action_dim=7,
    proprio_dim=9,
    embodiments=1,
    width=768,
    depth=12,
    heads=12,
    registers=24,
    timestep_width=512,
    observation="pixels",
    frame_width=768,
)
DEFAULT = ModelConfig(
    cameras=2, latent_channels=4, latent_size=(16, 16), action_dim=7, proprio_dim=9, embodiments=6, current_patches=True
)


# The interface


def test_kind_selects_the_class_and_defaults_to_uwm() -> None:
    classes = {"uwm": UnifiedWorldModel, "dp": DiffusionPolicy, "pad": PredictionWithAction, "gr1": GR1}
    for kind, expected in classes.items():
        assert type(fresh(kind)) is expected
    adapter = TypeAdapter(ModelConfig)
    before = {name: value for name, value in dataclasses.asdict(TINY).items() if name != "kind"}
    assert adapter.validate_json(json.dumps(before)) == TINY and TINY.kind == "uwm"
    with pytest.raises(ValueError, match="kind: act is unknown; known: uwm, dp, pad, gr1"):
        dataclasses.replace(TINY, kind="act")  # type: ignore[arg-type]


def test_modes_of_each_model() -> None:
    assert set(UnifiedWorldModel.modes) == set(ROLES) == set(get_args(Mode))
    assert {kind: list(fresh(kind).modes) for kind in MODES} == MODES


@pytest.mark.parametrize(("kind", "mode"), HAS)
def test_a_mode_returns_its_outputs_from_the_observation_alone(kind: str, mode: Any) -> None:
    full = make_batch()
    batch = dataclasses.replace(full, action=None, future_latents=None)
    model = stirred(kind)
    action, latents = model.sample(mode, batch, steps=2, generator=seeded(0))
    assert (action is not None, latents is not None) == (mode != "video", mode != "policy")
    for given, like, limit in ((action, full.action, 1), (latents, full.future_latents, 3)):
        assert given is None or (given.shape == like.shape and given.dtype == torch.float32)
        assert given is None or given.abs().max() <= limit
    torch.testing.assert_close(model.sample(mode, batch, 2, seeded(0)), (action, latents), rtol=0, atol=0)
    other = model.sample(mode, batch, 2, seeded(1))
    deterministic = [torch.equal(a, b) for a, b in zip((action, latents), other, strict=True) if a is not None]
    assert deterministic == [kind == "gr1"] * len(deterministic)


@pytest.mark.parametrize(("kind", "mode"), HAS_NOT)
def test_a_mode_that_the_model_lacks_is_rejected(kind: str, mode: Any) -> None:
    with pytest.raises(ValueError, match=f"has no {mode}; it has {', '.join(MODES[kind])}"):
        fresh(kind).sample(mode, make_batch(1))


@pytest.mark.parametrize("kind", MODES)
def test_an_unknown_mode_and_a_batch_without_targets_are_rejected(kind: str) -> None:
    with pytest.raises(ValueError, match="mode: planner is unknown"):
        fresh(kind).sample("planner", make_batch(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"training needs batch.action"):
        fresh(kind).loss(dataclasses.replace(make_batch(1), action=None))


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("config", [TINY, DEFAULT, PAPER], ids=["tiny", "default", "paper"])
def test_it_is_about_as_large_as_uwm(kind: str, config: ModelConfig) -> None:
    def size(kind: str) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in fresh(kind, config).parameters())

    assert size(kind) == pytest.approx(size("uwm"), rel=0.1)


@pytest.mark.parametrize("kind", MODES)
def test_every_parameter_is_trained(kind: str) -> None:
    model = stirred(kind, SEEING)
    model.loss(make_batch(), seeded(0)).total.backward()
    idle = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()}
    assert idle == {"observation.missing"}  # no sample here lacks a camera


@pytest.mark.parametrize("action_free_loss", [False, True])
@pytest.mark.parametrize("kind", ["uwm", *MODES])
def test_the_mean_of_the_shares_losses_is_the_loss_of_the_batch(kind: str, action_free_loss: bool) -> None:
    model, full = fresh(kind, diffusion=DiffusionConfig(action_free_loss=action_free_loss)), make_batch(4)
    mask = changed(changed(full.action_mask, (0,), False), (1, slice(2, None)), False)
    batch = dataclasses.replace(full, action_mask=mask, camera_mask=changed(full.camera_mask, (2, 1), False))
    counts = model.loss_counts(batch)
    visible = batch.action_visible if kind == "uwm" and action_free_loss else mask
    assert counts.tolist() == [visible.sum(), 7]
    random = SampleGenerators.of(0, 1, range(4))
    whole = model.loss(batch, random)
    assert whole.total == model.total_loss(whole.action, whole.video)
    random = SampleGenerators.of(0, 1, range(4))
    shares = [model(batch[some], random[some], counts / 2) for some in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(share.total for share in shares) / 2, whole.total)


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver"])
@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "flow"])
@pytest.mark.parametrize("kind", ["uwm", "query", "dp", "pad", "gr1"])
def test_samplers_clip_actions_where_the_data_ended(kind: str, schedule: str, sampler: str) -> None:
    """A network that knows the action: 4.5 where the data reach 5, capped where they reach 2 or, without a word, 1."""
    settings = DiffusionConfig(schedule=schedule, sampler=sampler, prediction="sample", sampling_steps=4)
    model = fresh("uwm" if kind == "query" else kind, diffusion=settings)
    net, config = getattr(model, "denoiser", None) or model.transformer, model.model_config
    net.actions.decode = Constant(4.5, config.action_dim)
    reach = torch.ones(2, config.action_dim)
    reach[0], reach[1] = 5, 2
    for given, expected in ((reach, [4.5, 2]), (None, [1, 1])):
        batch = dataclasses.replace(make_batch(2), action_reach=given)
        action = PolicyQuery(model)(batch, seeded(0)) if kind == "query" else model.sample("policy", batch)[0]
        assert action is not None
        for found, value in zip(action, expected, strict=True):
            torch.testing.assert_close(found, torch.full_like(found, value), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", MODES)
def test_bfloat16_gives_about_the_same_loss(kind: str) -> None:
    model, batch = stirred(kind), make_batch(8)
    precise = model.loss(batch, seeded(0)).total
    coarse = model.bfloat16().loss(batch.to("cpu", torch.bfloat16), seeded(0)).total
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, precise, rtol=0.02, atol=0)
    for given in model.sample("policy", batch.to("cpu", torch.bfloat16), 2, seeded(0)):
        assert given is None or given.dtype == torch.float32


@pytest.mark.parametrize("kind", MODES)
def test_pixel_observation(kind: str) -> None:
    model = fresh(kind, dataclasses.replace(TINY, observation="pixels"))
    pixels = torch.randint(256, (2, 2, 2, 3, 64, 96), generator=seeded(0), dtype=torch.uint8)
    batch = dataclasses.replace(make_batch(2), current_pixels=pixels)
    assert model.loss(batch, seeded(0)).total.isfinite()
    assert model.sample("policy", batch, 2, seeded(0))[0] is not None


# Masks


@pytest.mark.parametrize(("kind", "mode"), HAS)
def test_a_padded_action_dimension_changes_nothing(kind: str, mode: Any) -> None:
    model, full = stirred(kind), make_batch()
    batch = dataclasses.replace(full, action_mask=changed(full.action_mask, (..., -1), False))
    noise = torch.randn(full.action.shape, generator=seeded(1))
    outputs = []
    for value in (0, 7):
        junk = dataclasses.replace(batch, action=changed(full.action, (..., -1), value))
        given = changed(noise, (..., -1), value)
        outputs.append(model.sample(mode, junk, 3, seeded(0), noise_action=given))
    torch.testing.assert_close(*outputs)
    assert outputs[0][0] is None or not outputs[0][0][..., -1].any()


@pytest.mark.parametrize("config", [TINY, SEEING], ids=["paper", "current patches"])
@pytest.mark.parametrize(("kind", "mode"), HAS)
def test_a_missing_camera_changes_nothing(kind: str, mode: Any, config: ModelConfig) -> None:
    model, full = stirred(kind, config), make_batch()
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
    assert outputs[0][1] is None or not outputs[0][1][:, 1].any()


@pytest.mark.parametrize("kind", MODES)
def test_masked_values_have_no_loss(kind: str) -> None:
    model, full = stirred(kind), make_batch()
    batch = dataclasses.replace(
        full,
        action_mask=changed(changed(full.action_mask, (..., -1), False), (1, slice(4, None)), False),
        camera_mask=changed(full.camera_mask, (2, 1), False),
    )
    junk = dataclasses.replace(
        batch,
        action=changed(batch.action, ~batch.action_mask, 5),
        future_latents=changed(batch.future_latents, ~batch.camera_mask, 5),
        current_latents=changed(batch.current_latents, ~batch.camera_mask, 5),
    )
    torch.testing.assert_close(model.loss(junk, seeded(0)), model.loss(batch, seeded(0)), equal_nan=True)


@pytest.mark.parametrize("kind", MODES)
def test_an_action_free_sample_has_no_action_loss_and_does_not_affect_others(kind: str) -> None:
    model, full = stirred(kind), make_batch()
    free = dataclasses.replace(full, action_mask=changed(full.action_mask, (1,), False))
    losses, of_full = model.loss(free, seeded(0)), model.loss(full, seeded(0))
    others = [0, 2, 3]
    assert losses.action_per_sample[1].isnan()
    torch.testing.assert_close(losses.action_per_sample[others], of_full.action_per_sample[others])
    torch.testing.assert_close(losses.action, of_full.action_per_sample[others].mean())
    torch.testing.assert_close(losses.video_per_sample[others], of_full.video_per_sample[others], equal_nan=True)
    # The values in place of its action do not affect its video.
    junk = dataclasses.replace(free, action=changed(free.action, (1,), 5))
    torch.testing.assert_close(model.loss(junk, seeded(0)), losses, equal_nan=True)

    nobody = dataclasses.replace(free, action_mask=torch.zeros_like(full.action_mask))
    model.zero_grad()
    losses = model.loss(nobody, seeded(0))
    losses.total.backward()
    assert losses.action == 0
    torch.testing.assert_close(losses.total, losses.video)
    trained = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    assert not any("actions." in name for name in trained)
    assert bool(trained) == (kind != "dp")


# Characteristics of each


def test_pad_uses_one_timestep_for_both_modalities() -> None:
    model, full = fresh("pad"), make_batch(64)
    batch = dataclasses.replace(full, action_mask=changed(full.action_mask, (slice(32),), False))
    times: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.denoiser.register_forward_pre_hook(lambda _, given: times.append((given[2], given[4])))
    drawn: list[torch.Tensor] = []
    noisy = model.schedule.noisy
    model.schedule.noisy = lambda clean, noise, t: (drawn.append(t), noisy(clean, noise, t))[1]  # type: ignore[method-assign]
    model.loss(batch, seeded(0))
    [(of_action, of_video)] = times
    assert torch.equal(of_action, of_video) and len(set(of_video.tolist())) > 20
    noised_action, noised_video = drawn
    assert torch.equal(noised_action[32:], noised_video[32:]) and torch.equal(noised_video, of_video)
    times.clear()
    for mode in model.modes:
        model.sample(mode, batch, generator=seeded(0))
    assert [(int(a), int(v)) for a, v in times] == [(t, t) for t in range(90, -1, -10)] * 3


def test_pad_hides_the_action_tokens_of_action_free_video() -> None:
    model, full = stirred("pad"), make_batch()
    free = dataclasses.replace(full, action_mask=changed(full.action_mask, (1,), False))
    latents = []
    for seed in (1, 2):
        noise = torch.randn(full.action.shape, generator=seeded(seed))
        latents.append(model.sample("video", free, 3, seeded(0), noise_action=noise)[1])
    same = [torch.equal(one, other) for one, other in zip(*latents, strict=True)]
    assert same == [False, True, False, False]
    with torch.no_grad():
        model.denoiser.position[:, : TINY.action_chunk] += 1  # the tokens' other content must not matter either
    moved = model.sample("video", free, 3, seeded(0), noise_action=noise)[1]
    assert torch.equal(moved[1], latents[1][1]) and not torch.equal(moved[0], latents[1][0])


def test_gr1_action_depends_on_the_future_and_not_the_reverse() -> None:
    model, batch = stirred("gr1"), make_batch()
    action, latents = model.sample("joint", batch)
    futures = TINY.cameras * TINY.patches
    queries = model.transformer.queries
    with torch.no_grad():
        queries[:, :futures] += 1
        other_action, other_latents = model.sample("joint", batch)
        assert not torch.allclose(other_action, action) and not torch.allclose(other_latents, latents)
        queries[:, :futures] -= 1
        queries[:, futures:] += 1
        other_action, other_latents = model.sample("joint", batch)
    assert not torch.allclose(other_action, action)
    torch.testing.assert_close(other_latents, latents)


def test_an_untrained_model_predicts_zero_noise() -> None:
    assert fresh("dp").loss(make_batch(64), seeded(0)).total.item() == pytest.approx(1, abs=0.05)
    assert fresh("pad").loss(make_batch(64), seeded(0)).total.item() == pytest.approx(2, abs=0.1)


# Learning


@pytest.mark.parametrize("kind", MODES)
def test_it_learns_one_batch_in_every_mode(kind: str) -> None:
    config = dataclasses.replace(TINY, latent_channels=2, latent_size=(4, 4), patch=(2, 2, 2))
    batch, model, untrained = make_batch(2, config=config), fresh(kind, config), fresh(kind, config)
    train(model, repeated(batch, 1 if kind == "gr1" else 12), steps=250, learning_rate=4e-3)
    for mode in model.modes:
        action, latents = model.sample(mode, batch, steps=50, generator=seeded(0))
        action_before, latents_before = untrained.sample(mode, batch, steps=50, generator=seeded(0))
        if action is not None:
            error, before = ((guess - batch.action).abs().mean() for guess in (action, action_before))
            assert error < 0.1 and error < before / 4, (mode, error, before)
        if latents is not None:
            error, before = ((guess - batch.future_latents).square().mean() for guess in (latents, latents_before))
            # Always predicting the mean has an error of 1.
            assert error < 0.3 and error < before / 3, (mode, error, before)


# End to end


@pytest.mark.slow
def test_training_and_evaluation_end_to_end(
    ray_cluster: None, tmp_path: Path, uwm: Uwm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is trained and evaluated on robot data and video; the others are evaluated untrained."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    raw, store, runs = tmp_path / "raw", tmp_path / "store", ("--output", tmp_path / "runs")
    raw.mkdir()
    write_demos(raw / "toy_demo.hdf5", demos=6, steps=20)
    write_video(raw / "clip.mp4", numbered(60))
    ingest([str(raw)], str(store), IngestRecipe(image_size=64))
    small = ["workers=1", "steps=4", "batch_size=8", "validation_share=0.3", "log_every=2"]
    tiny = ["model.width=32", "model.depth=1", "model.heads=2", "model.kind=dp"]
    code, trained, err = uwm("pretrain", "--store", store, *runs, "--json", *small, *tiny)
    assert code == 0, err
    client, run_id = tracking.MlflowClient(), trained["run_id"]
    run = client.get_run(run_id).data
    assert run.params["model.kind"] == "dp" and np.isfinite(run.metrics["validation_loss_action"])

    settings = checkpoint.load_settings(Path(trained["checkpoint"]))
    checkpoints = {"dp": Path(trained["checkpoint"]), "pad": tmp_path / "pad", "gr1": tmp_path / "gr1"}
    for kind in ("pad", "gr1"):
        config = dataclasses.replace(settings.model, kind=kind)
        other = settings.model_copy(update={"model": config, "run_id": None})
        checkpoint.save(checkpoints[kind], other.build().state_dict(), other)
    for kind, folder in checkpoints.items():
        assert list(checkpoint.load(folder)[0].modes) == MODES[kind]
        report = evaluate(str(folder), str(store), None, 0, tmp_path / f"evaluation-{kind}")
        measured = {name for name, value in report["open_loop"].items() if value is not None}
        assert measured == {"windows", "action_error_policy", "action_error_mean"} < set(report["open_loop"])
        assert not list((tmp_path / f"evaluation-{kind}").glob("*.png"))
    code, _, err = uwm("evaluate", checkpoints["dp"], "--store", store, *runs, "--fast")
    assert code == 2 and "kind dp has no fast inference" in err
    code, _, err = uwm("evaluate", checkpoints["dp"], "--store", store, *runs, "--json")
    assert code == 0 and "None" not in err, err
    logged = set(client.get_run(run_id).data.metrics)
    assert measured <= logged and not {"action_error_inverse", "psnr_forward"} & logged


def test_a_checkpoint_without_a_kind_loads(tmp_path: Path) -> None:
    where = {"encoder": "tiny", "encoder_digest": "0", "embodiments": {}, "store": "", "snapshot": "", "recipe": {}}
    settings = checkpoint.Settings(model=TINY, diffusion=DiffusionConfig(), **where)
    checkpoint.save(tmp_path / "old", settings.build().state_dict(), settings)
    written = json.loads((tmp_path / "old" / "settings.json").read_text())
    del written["model"]["kind"]
    del written["checksums"]
    (tmp_path / "old" / "settings.json").write_text(json.dumps(written))
    (tmp_path / "old" / "checkpoint.json").unlink()
    assert type(checkpoint.load(tmp_path / "old")[0]) is UnifiedWorldModel
