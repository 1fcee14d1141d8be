"""The verbs in sequence on small raw data of several formats: ``uwm demo`` without a simulator."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import Uwm
from helpers.formats import REAL, numbered, write_demos, write_lerobot, write_video
from helpers.rows import fill

from infra import registry, tracking
from pipelines.errors import Refused
from pipelines.evaluate.run import evaluate
from pipelines.ingest.run import ingest
from pipelines.models import checkpoint, manifest
from pipelines.models.policy import Policy
from pipelines.models.resolve import resolve
from pipelines.recipe import IngestRecipe, load_recipe
from pipelines.registry.promote import promote
from pipelines.registry.register import register
from pipelines.train.finetune import finetune
from pipelines.train.pretrain import pretrain
from pipelines.train.run import RunOptions
from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore

SMALL = ["workers=2", "batch_size=8", "log_every=2", "warmup_steps=2", "validation_share=0.3"]
TINY = ["model.width=32", "model.depth=1", "model.heads=2", "model.patch=[2,4,4]", "model.registers=2"]


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Any:
    """Ingest raw data of three formats, pretrain and finetune; return paths and ids."""
    root = tmp_path_factory.mktemp("road")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        patch.setenv("UWM_CACHE", str(root / "cache"))
        raw, store = root / "raw", str(root / "store")
        (raw / "videos").mkdir(parents=True)
        (raw / "hdf5").mkdir()
        write_demos(raw / "hdf5" / "toy_demo.hdf5", demos=6, steps=20)
        write_lerobot(raw / "lerobot", rows=24, episodes=4)
        write_video(raw / "videos" / "clip.mp4", numbered(90))
        first = ingest([str(raw)], store, IngestRecipe(image_size=64))
        pre_run, pre = pretrain(
            store, load_recipe("small", ["steps=6", *SMALL, *TINY]), RunOptions(output=root / "runs")
        )
        fine_run, fine = finetune(
            str(pre), store, load_recipe("finetune", ["steps=4", *SMALL, "workers=1"]), RunOptions(output=root / "runs")
        )
        yield {"root": root, "raw": raw, "store": store, "first": first, "pretrained": pre, "pretrain_run": pre_run,
               "finetuned": fine, "finetune_run": fine_run}  # fmt: skip


def test_an_ingest_stores_every_episode(road: Any) -> None:
    assert road["first"].episodes == {"new": 11, "already": 0, "quarantined": 0, "filtered": 0}
    rows = LatentStore.open(road["store"]).snapshot().episodes().to_pylist()
    assert sorted(row["format"] for row in rows) == ["hdf5"] * 6 + ["lerobot"] * 4 + ["video"]
    assert {row["format"]: row["frames"] for row in rows} == {"hdf5": 20, "lerobot": 24, "video": 90}
    assert road["first"].frames == sum(row["frames"] for row in rows)
    snapshot = LatentStore.open(road["store"]).snapshot()
    for row in rows:
        for camera in row["cameras"]:
            assert snapshot.read(camera["segments"]).shape == (row["frames"], 4, 8, 8)
    assert list(snapshot.verify()) == []


def test_ingesting_again_or_from_a_copy_encodes_nothing(road: Any, tmp_path: Path) -> None:
    again = ingest([str(road["raw"])], road["store"], IngestRecipe(image_size=64))
    assert again.episodes == {"new": 0, "already": 11, "quarantined": 0, "filtered": 0}
    assert again.snapshot == road["first"].snapshot
    copy = shutil.copy(road["raw"] / "videos" / "clip.mp4", tmp_path / "renamed.mp4")
    assert ingest([str(copy)], road["store"], IngestRecipe(image_size=64)).episodes["new"] == 0


def test_a_new_size_is_new_work_and_a_contract_is_not(road: Any, tmp_path: Path) -> None:
    clip = str(road["raw"] / "videos" / "clip.mp4")
    assert ingest([clip], road["store"], dry_run=True).episodes["new"] == 1
    from preprocessing.contracts.contract import DataContract

    contract = DataContract(embodiment="somebody")
    would = ingest([clip], road["store"], IngestRecipe(image_size=64), contract=contract, dry_run=True)
    assert would.episodes["new"] == 0 and would.updated == 1  # its latents are those of the frames as before


def test_latents_are_those_of_the_frames_in_order(road: Any) -> None:
    from preprocessing.encoders.vae import load_encoder

    snapshot = LatentStore.open(road["store"]).snapshot()
    [row] = [row for row in snapshot.episodes().to_pylist() if row["format"] == "video"]
    rebuilt = load_encoder("tiny").decode(snapshot.read(row["cameras"][0]["segments"]))
    levels = rebuilt.reshape(len(rebuilt), -1).mean(1)
    assert np.abs(levels - numbered(90).reshape(90, -1).mean(1)).max() < 25
    assert np.corrcoef(levels, np.arange(90))[0, 1] > 0.99


def test_training_records_its_losses_and_its_lineage(road: Any) -> None:
    settings = checkpoint.load_settings(road["pretrained"])
    assert settings.snapshot == road["first"].snapshot and settings.step == 6
    assert set(settings.embodiments) >= {"video"} and len(settings.embodiments) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{road['root'] / 'mlflow.db'}")
        tracking.connect()
        assert [step for step, _ in tracking.history(road["pretrain_run"], "loss")] == [2, 4, 6]
        assert all(np.isfinite(value) for _, value in tracking.history(road["pretrain_run"], "loss_video"))
    child = checkpoint.load_settings(road["finetuned"])
    assert child.parent == road["pretrain_run"] and child.embodiments == settings.embodiments
    before, after = (checkpoint.load(road[name])[0].state_dict() for name in ("pretrained", "finetuned"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_model_of_another_encoder_is_refused_in_one_line(road: Any, tmp_path: Path, uwm: Uwm) -> None:
    fill(LatentStore.create(str(tmp_path / "other")), ["a", "b"])
    runs = ("--output", tmp_path / "runs")
    code, _, err = uwm("finetune", "--from", road["pretrained"], "--store", tmp_path / "other", *runs)
    [line] = err.strip().splitlines()
    assert code == 2 and "no latents of the model's encoder" in line and "uwm ingest" in line
    moved = shutil.copytree(road["pretrained"], tmp_path / "moved")
    settings = json.loads((moved / "settings.json").read_text())
    (moved / "settings.json").write_text(json.dumps(settings | {"encoder_digest": "0" * 16}))
    written = [path for path in moved.iterdir() if path.name != manifest.MANIFEST]
    (moved / manifest.MANIFEST).write_bytes(manifest.dump(manifest.measure(written), {}))
    code, _, err = uwm("evaluate", moved, "--store", road["store"], *runs)
    [line] = err.strip().splitlines()
    assert code == 2 and "trained on latents of encoder tiny (0000000000000000)" in line
    assert not (tmp_path / "runs").exists()


def test_a_policy_acts_in_the_robots_units_and_refuses_other_inputs(road: Any) -> None:
    settings = checkpoint.load_settings(road["finetuned"])
    name = next(name for name, spec in settings.embodiments.items() if spec.action_dim)
    policy = Policy(road["finetuned"], name)
    images = {camera: np.zeros((3, 2, 64, 64, 3), np.uint8) for camera in policy.spec.cameras}
    proprio = {part: np.zeros((3, 2, width), np.float32) for part, width in policy.spec.proprio}
    action = policy.act(images, proprio, torch.Generator().manual_seed(0))
    assert action.shape == (3, settings.model.action_chunk, policy.spec.action_dim)
    normalizer = policy.spec.action_normalizer
    assert (np.abs(action - normalizer.offset) <= np.asarray(normalizer.scale) * 1.001).all()
    fast = Policy(road["finetuned"], name, fast=True)
    near = fast.act(images, proprio, torch.Generator().manual_seed(0))
    gap = np.abs(near - action) / normalizer.scale
    assert 0 < gap.mean() < 0.2, "a model trained for six steps predicts little but noise"
    with pytest.raises(UserError, match="camera"):
        policy.act({"elsewhere": images[policy.spec.cameras[0]]}, proprio)
    with pytest.raises(UserError, match="expected uint8"):
        policy.act({camera: value[:, :1] for camera, value in images.items()}, proprio)


def test_evaluation_registration_and_the_gate(road: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{road['root'] / 'mlflow.db'}")
    monkeypatch.setenv("UWM_CACHE", str(road["root"] / "cache"))
    settings = checkpoint.load_settings(road["finetuned"])
    name = next(name for name, spec in settings.embodiments.items() if spec.action_dim)
    report = evaluate(str(road["finetuned"]), road["store"], None, 1, tmp_path / "evaluation", name)
    assert report["open_loop"]["psnr_ceiling"] > report["open_loop"]["psnr_forward"] - 3
    assert json.loads((tmp_path / "evaluation" / "evaluation.json").read_text()) == report
    assert list((tmp_path / "evaluation").glob("forward_*.png"))
    fast = evaluate(str(road["finetuned"]), road["store"], None, 1, tmp_path / "fast", name, fast=True)
    exactly, nearly = (each["open_loop"].pop("action_error_policy") for each in (report, fast))
    assert exactly != nearly and nearly < 1.5 * exactly and (report["fast"], fast["fast"]) == (False, True)
    logged = tracking.MlflowClient().get_run(road["finetune_run"]).data.metrics
    assert logged["action_error_policy"] == exactly and logged["fast.action_error_policy"] == nearly

    one = register(road["finetuned"], "toy", name)
    with pytest.raises(Refused, match="no success rate"):
        promote("toy", one)
    tracking.log_metrics(road["finetune_run"], {"success_rate.toy.task": 0.4}, 4)
    with pytest.raises(Refused, match="worse"):
        promote("toy", one)
    assert promote("toy", one, floor=0.3).previous is None
    assert registry.version_of("toy", "champion") == (one, road["finetune_run"])

    two = register(road["pretrained"], "toy", name)
    tracking.log_metrics(road["pretrain_run"], {"success_rate.toy.task": 0.3}, 4)
    with pytest.raises(Refused, match="worse"):
        promote("toy", two)
    tracking.log_metrics(road["pretrain_run"], {"success_rate.toy.task": 0.9}, 5)
    assert promote("toy", two).previous == one
    assert checkpoint.load_settings(resolve("models:/toy@champion")).run_id == road["pretrain_run"]


def test_a_registered_model_loads_through_mlflow_and_rejects_other_shapes(
    road: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{road['root'] / 'mlflow.db'}")
    settings = checkpoint.load_settings(road["finetuned"])
    name = next(name for name, spec in settings.embodiments.items() if spec.action_dim)
    spec = settings.embodiments[name]
    version = register(road["finetuned"], "served", name)
    model = mlflow.pyfunc.load_model(f"models:/served/{version}")
    inputs = {f"image.{camera}": np.zeros((1, 2, 64, 64, 3), np.uint8) for camera in spec.cameras}
    inputs |= {f"proprio.{part}": np.zeros((1, 2, width), np.float32) for part, width in spec.proprio}
    answer = model.predict(inputs)
    assert answer.shape == (1, settings.model.action_chunk, spec.action_dim)
    fast = mlflow.pyfunc.load_model(f"models:/served/{version}", model_config={"fast": True})
    assert fast.unwrap_python_model()._policy.fast and not model.unwrap_python_model()._policy.fast
    assert fast.predict(inputs).shape == answer.shape
    with pytest.raises(mlflow.exceptions.MlflowException):
        model.predict({key: value.astype(np.float64) for key, value in inputs.items()})
    model.predict(inputs, {"contract": spec.interface.model_dump_json()})
    *blocks, gripper = spec.interface.action_layout
    other = gripper.model_copy(update={"gripper_one_means": "open"})
    interface = spec.interface.model_copy(update={"action_layout": (*blocks, other), "fps": 50.0})
    with pytest.raises(UserError, match=r"gripper is open .*, not closed; the rate is 50 Hz, not"):
        model.predict(inputs, {"contract": interface.model_dump_json()})


@pytest.mark.skipif(not REAL.is_dir(), reason="real robot logs are not beside the checkout")
def test_real_robot_logs_and_videos_go_into_one_store_and_one_run(
    ray_cluster: None, tmp_path: Path, uwm: Uwm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("UWM_CACHE", str(tmp_path / "cache"))
    store = tmp_path / "store"
    videos = ("corrupted.mp4", "nasa_13013.mp4", "test_clip_10s.mp4")
    sources = [REAL / "bridge_rlds", REAL / "gr1_lerobot_v2", *(REAL / "video" / name for name in videos)]
    code, report, _ = uwm("ingest", *sources, "--store", store, "--image-size", "64", "--json")
    assert code == 3 and report["episodes"] == {"new": 32, "already": 0, "quarantined": 1, "filtered": 0}
    assert report["quarantine"][0]["uri"].endswith("corrupted.mp4")
    code, again, _ = uwm("ingest", *sources, "--store", store, "--image-size", "64", "--json")
    assert code == 3 and again["episodes"] == {"new": 0, "already": 32, "quarantined": 1, "filtered": 0}
    code, episodes, _ = uwm("store", "episodes", store, "--json")
    assert code == 0 and len(episodes) == 32
    assert {row["action_dim"] for row in episodes} == {7, 44, 0}
    assert max(len(row["cameras"]) for row in episodes) == 3  # of Bridge's four, one is black
    code, trained, err = uwm(
        "pretrain", "--store", store, "--output", tmp_path / "runs", "--json", "steps=4", *SMALL, *TINY, "workers=1"
    )
    assert code == 0, err
    settings = checkpoint.load_settings(Path(trained["checkpoint"]))
    assert settings.model.action_dim == 44 and settings.model.cameras == 3 and len(settings.embodiments) == 3
