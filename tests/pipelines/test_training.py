"""Training with the command line: dry run, progress, results and mistakes."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command import Uwm
from helpers.rows import Made, commit, fill, write_episodes

from infra import tracking
from pipelines.models import checkpoint
from pipelines.recipe import load_recipe
from pipelines.train.validation import BATCHES
from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore
from uwm_model.randomness import SampleGenerators, unit_noise

TINY = [
    "workers=1", "model.width=32", "model.depth=1", "model.heads=2", "model.registers=1", "model.timestep_width=16",
    "model.frame_width=8", "model.condition_width=16", "validation_share=0.2", "batch_size=8", "warmup_steps=2",
]  # fmt: skip


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    made = LatentStore.create(str(tmp_path / "store"))
    fill(made, [f"episode-{i}" for i in range(12)], frames=40)
    return made.uri


def test_a_run_logs_curves_images_and_its_lineage_whoever_reads_its_stderr(
    ray_cluster: None, store: str, tmp_path: Path, uwm: Uwm, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody, end = os.pipe()
    os.close(nobody)
    lost = os.fdopen(end, "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", lost)
    code, trained, _ = uwm(
        "pretrain", "--store", store, "--output", tmp_path / "runs", "--json", "steps=6", "checkpoint_every=3",
        "log_every=2", "micro_batch_size=3", *TINY,
    )  # fmt: skip
    with pytest.raises(BrokenPipeError):
        lost.close()
    assert code == 0
    run = tracking.MlflowClient().get_run(trained["run_id"])
    measured = set(run.data.metrics)
    assert {"loss", "loss_action", "loss_video", "loss_action.arm", "loss_video.arm", "validation_loss"} <= measured
    assert {"learning_rate", "gradient_norm", "samples_per_second", "data_wait_share"} <= measured
    assert [step for step, _ in tracking.history(trained["run_id"], "validation_loss")] == [3, 6]
    assert run.data.tags["snapshot"] and run.data.tags["version"] and run.data.params["micro_batch_size"] == "3"
    assert run.data.params["device"] == "cpu"
    images = [file.path for file in tracking.MlflowClient().list_artifacts(trained["run_id"], "images")]
    assert len([path for path in images if path.endswith(".png")]) == 2
    folder = Path(trained["checkpoint"])
    settings = checkpoint.load_settings(folder)
    assert settings.step == 6 and settings.recipe["device"] == "cpu"
    kept = {path.name for path in folder.parent.glob("step-*")}
    assert kept == {"step-00000003", "step-00000006"}


def test_nan_in_the_data_stops_training_and_names_the_episode(
    ray_cluster: None, store: str, tmp_path: Path, uwm: Uwm
) -> None:
    broken = np.full((10, 4, 8, 8), np.nan, np.float16)
    opened = LatentStore.open(store)
    fork = opened.fork()
    made = [Made("broken", {"front": broken}, np.zeros((10, 5), np.float32), 3)]
    commit(opened, [(fork, *written) for written in write_episodes(fork, made)])
    code, _, err = uwm(
        "pretrain", "--store", store, "--output", tmp_path / "runs", "steps=60", "checkpoint_every=1", "log_every=1",
        *TINY, "seed=3",
    )  # fmt: skip
    line = err.strip().splitlines()[-1]
    assert code == 1 and "failed: Diverged: step" in line and "the loss is nan in 1 of 8 samples" in line, err
    found = re.search(r"step (\d+): .*; the last good checkpoint is at step (\d+); .* episodes: broken \(-v", line)
    assert found and 0 < int(found[1]) - int(found[2]) < 4, line  # one is written while the next step runs


def test_a_dry_run_estimates_memory_time_and_cost(store: str, uwm: Uwm) -> None:
    code, plan, err = uwm("pretrain", "--store", store, "--dry-run", "--json", "worker_price=2", "steps=1000", *TINY)
    assert code == 0, err
    found = plan["estimate"]
    assert found["parameters"] == found["trained"] > 1000 and found["samples"] == 8000 and found["workers"] == 1
    # float32 weights, gradients, master weights, two moments, two averages
    assert found["state_bytes"] == found["parameters"] * 4 * 7
    assert found["cost"] == pytest.approx(found["seconds"] / 3600 * 2)
    sharded = uwm("pretrain", "--store", store, "--dry-run", "--json", *TINY, "workers=4", "zero_stage=3")[1][
        "estimate"
    ]
    assert sharded["state_bytes"] == pytest.approx(found["parameters"] * (4 / 4 + 4 / 4 + 4 + 12 / 4), rel=0.01)
    less = uwm("pretrain", "--store", store, "--dry-run", "--json", *TINY, "activation_checkpointing=true")[1]
    assert less["estimate"]["activation_bytes"] < found["activation_bytes"]
    assert "memory" in err and "s per step, if every worker is like this" in err


def test_no_two_samples_share_their_noise() -> None:
    generators = [SampleGenerators.of(0, step, range(4)) for step in range(5)]
    generators += [SampleGenerators.of(0, number, range(4), "held_out") for number in range(BATCHES)]
    drawn = [unit_noise((4, 3), each, torch.device("cpu")) for each in generators]
    assert len(torch.cat(drawn).unique(dim=0)) == 4 * len(generators)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("workers=0", "workers 0: choose a number above 0"),
        ("workers=[3, 2]", "choose a number above 0, or [least, most]"),
        ("workers=[1, 100]", "batch_size 64 is too small for 100 workers"),
        ("zero_stage=4", "zero_stage 4"),
    ],
)
def test_impossible_recipes_are_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[")) as refused:
        load_recipe("small", [override])
    assert "\n" not in str(refused.value)


def test_stage_0_and_compiling_have_their_limits() -> None:
    with pytest.raises(UserError, match="zero_stage 0 needs float32 and no offload; choose 1"):
        load_recipe("small", ["zero_stage=0", "precision=bfloat16"])
    with pytest.raises(UserError, match="compile does not work with zero_stage 3"):
        load_recipe("small", ["zero_stage=3", "compile=true"])
