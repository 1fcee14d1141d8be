"""What version 0.1.0 wrote is read: ``recorded-0.1.0.tar.xz`` holds raw files, a store and a run cut off at step 4.

It was made by that version's command line:

    uwm ingest raw --store store --image-size 32
    uwm store tag store first
    uwm pretrain --store store --output runs steps=8 checkpoint_every=4 workers=1 model.width=8 ...
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command import Uwm
from helpers.models import Constant
from safetensors.torch import load_file

from pipelines.models import checkpoint
from pipelines.models.policy import Policy
from pipelines.recipe import Recipe, load_recipe
from pipelines.train.checkpoints import RunFolder
from pipelines.train.driver import train
from pipelines.train.run import RunRecord, _identity, adopted, is_same
from preprocessing.episode import Fit, Square
from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore
from preprocessing.video.frames import resize, sliced_video

COMMAND = [
    "steps=8", "checkpoint_every=4", "workers=1", "model.width=8", "model.depth=1", "model.heads=1",
    "model.patch=[2,2,2]", "model.registers=1", "model.timestep_width=4", "model.frame_width=2",
    "model.condition_width=8", "validation_share=0.3", "batch_size=4", "warmup_steps=2", "log_every=1", "seed=4",
    "freeze=[observation.rest.*,observation.proprio.*]",
]  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recorded")
    with tarfile.open(Path(__file__).with_name("recorded-0.1.0.tar.xz")) as archive:
        archive.extractall(root, filter="data")
    return root


@pytest.fixture(scope="module")
def run(recorded: Path) -> Path:
    [folder] = (recorded / "runs").iterdir()
    return folder


def test_its_store_is_read_and_complete(recorded: Path, uwm: Uwm) -> None:
    expected = np.load(recorded / "expected.npz")
    snapshot = LatentStore.open(str(recorded / "store")).snapshot("first")
    assert snapshot.id == str(expected["snapshot"]) and list(snapshot.verify()) == []
    rows = snapshot.episodes().to_pylist()
    for row in rows:
        latents = snapshot.read(row["cameras"][0]["segments"]).astype(np.float32)
        assert latents.shape == (row["frames"], 4, 4, 4)
        assert latents.mean() == pytest.approx(float(expected[row["id"]]), abs=1e-6)
    assert len(rows) == 4 and rows[0]["image_size"] is None
    raw = (recorded / "raw" / name for name in ("toy_demo.hdf5", "clip.mp4"))
    code, report, _ = uwm("ingest", *raw, "--store", recorded / "store", "--image-size", "32", "--json")
    assert code == 0 and report["episodes"] == {"new": 0, "already": 4, "quarantined": 0, "filtered": 0}


def test_its_checkpoint_acts_as_it_did(recorded: Path, run: Path) -> None:
    policy = Policy(run / "checkpoint")
    random, observed, size = np.random.default_rng(0), policy.settings.model.observed_frames, policy.image_size
    images = {name: random.integers(0, 256, (1, observed, size, size, 3), np.uint8) for name in policy.spec.seen}
    proprio = {
        name: random.standard_normal((1, observed, width)).astype(np.float32) for name, width in policy.spec.proprio
    }
    action = policy.act(images, proprio, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(action, np.load(recorded / "expected.npz")["action"], atol=1e-4)


def test_its_actions_are_clipped_where_its_data_ended(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "checkpoint", tmp_path / "wider")
    values = json.loads((folder / "settings.json").read_text())
    [name] = [name for name, spec in values["embodiments"].items() if spec["action_dim"]]
    values["embodiments"][name]["action_reach"] = [3.0] * values["embodiments"][name]["action_dim"]
    (folder / "settings.json").write_text(json.dumps(values))
    for place, acted in ((run / "checkpoint", 1), (folder, 2.5)):
        policy = Policy(place, name)
        size, observed = policy.image_size, policy.settings.model.observed_frames
        policy.model.denoiser.actions.decode = Constant(2.5, policy.settings.model.action_dim)
        images = {name: np.zeros((1, observed, size, size, 3), np.uint8) for name in policy.spec.seen}
        proprio = {name: np.zeros((1, observed, width), np.float32) for name, width in policy.spec.proprio}
        normalised = policy.spec.action_normalizer.apply(policy.act(images, proprio))
        np.testing.assert_allclose(normalised, acted, atol=1e-4)


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_live_frames_become_squares_as_the_training_datas_did(run: Path, fit: Fit) -> None:
    policy = Policy(run / "checkpoint")
    assert policy.image_size == 32 and policy.image_size.fit == "stretch", "as before there was a choice"
    policy.settings = policy.settings.model_copy(update={"fit": fit})
    live = np.random.default_rng(0).integers(0, 256, (2, 48, 80, 3), np.uint8)
    [ingested] = sliced_video(2, lambda start, stop: live[start:stop]).frames(Square(32, fit))
    np.testing.assert_array_equal(resize(live, policy.image_size), ingested)


def test_the_same_command_resumes_its_run(run: Path) -> None:
    record = RunRecord.model_validate_json((run / "run.json").read_text())
    asked = {"store": record.settings.store, "snapshot": None}
    assert is_same(record, "pretrain", asked, load_recipe("small", COMMAND))
    assert is_same(record, "pretrain", asked, load_recipe("small", [*COMMAND, "workers=2", "zero_stage=2"]))
    assert not is_same(record, "pretrain", asked, load_recipe("small", [*COMMAND, "seed=5"]))
    assert not is_same(record, "finetune", asked, load_recipe("small", COMMAND))


def test_a_run_resumes_again_after_recipes_have_gained_a_key(run: Path) -> None:
    record, asked = RunRecord.model_validate_json((run / "run.json").read_text()), {"store": "S", "snapshot": None}
    recipe = load_recipe("small", COMMAND)
    fewer = {key: value for key, value in recipe.model_dump().items() if key != "shuffle_windows"}
    settings = record.settings.model_copy(update={"recipe": fewer})
    older = record.model_copy(update={"settings": settings, "identity": _identity("pretrain", asked, fewer)})
    assert is_same(older, "pretrain", asked, recipe)
    assert not is_same(older, "pretrain", asked, load_recipe("small", [*COMMAND, "shuffle_windows=9"]))
    assert is_same(adopted(older, "pretrain", asked, recipe), "pretrain", asked, recipe)


def test_settings_of_a_newer_version_are_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    values = json.loads((run / "checkpoint" / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps(values | {"format": 99, "unknown": 1}))
    with pytest.raises(UserError, match="settings of format 99; this version reads up to 1; upgrade"):
        checkpoint.load_settings(tmp_path)


def test_its_run_is_trained_to_the_end(ray_cluster: None, recorded: Path, run: Path, tmp_path: Path) -> None:
    record = RunRecord.model_validate_json((run / "run.json").read_text())
    recipe = Recipe.model_validate(record.settings.recipe)
    settings = record.settings.model_copy(update={"store": str(recorded / "store"), "run_id": None})
    place = shutil.copytree(run, tmp_path / "run")
    assert RunFolder(str(place)).newest() == 4
    final = train(settings, recipe, tmp_path / "out", str(place))
    assert checkpoint.load_settings(final).step == 8
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (final, run / "checkpoint"))
    # Noise is drawn otherwise since 0.2.0, so four steps of rate 5e-4 lead to nearly the same weights.
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    assert ours.keys() == theirs.keys() and 0 < apart < 4 * 5e-4
