"""What can be refused is refused in the first second: before data are read, Ray is started or a run is recorded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command import Uwm
from helpers.formats import numbered, write_video
from helpers.rows import write_episode

from infra import tracking
from infra.cluster import check_address, cluster
from pipelines.models import checkpoint
from pipelines.recipe import load_recipe
from pipelines.train.pretrain import plan
from pipelines.train.run import run_title
from pipelines.train.validation import PICTURES
from preprocessing.encoders.vae import encoder_digest
from preprocessing.store.store import LatentStore

SMALL = ["model.width=16", "model.depth=1", "model.heads=1", "model.registers=1", "workers=1", "batch_size=4"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A store of two embodiments with actions, and an untrained checkpoint with a run in MLflow."""
    root = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        store = LatentStore.create(str(root / "store"))
        fork, digest = store.fork(), encoder_digest("tiny")
        latents = {"front": np.zeros((30, 4, 8, 8), np.float16), "wrist": np.zeros((30, 4, 8, 8), np.float16)}
        steps = np.random.default_rng(0).random((30, 5), np.float32)
        written = [
            write_episode(fork, f"{arm}{i}", latents, steps, 3, embodiment=arm, encoder_digest=digest, image_size=64)
            for arm in ("left", "right")
            for i in range(2)
        ]
        store.commit("test", [fork], [row for row, _ in written], [one for _, found in written for one in found], [])
        settings = plan(store.uri, load_recipe("small", [*SMALL, "validation_share=0"]))
        settings.run_id = tracking.start_run("uwm", "toy", {})
        checkpoint.save(root / "model", settings.build().state_dict(), settings)
        yield {"root": root, "store": store.uri, "model": root / "model", "run": settings.run_id}


def refused(answer: tuple[int, object, str], *words: str) -> None:
    code, _, text = answer
    assert code == 2, text
    [line] = text.splitlines()
    assert line.startswith("error: ") and len(line) < 600
    for word in words:
        assert word in line, line


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("seed=-1", ["seed", "0"]),
        ("name=a/b", ["name"]),
        ("betas=[0.9, 2]", ["betas"]),
        ("learning_rate=.inf", ["learning_rate"]),
        ("freeze=[nothing.*]", ["freeze", "nothing.*"]),
        ("model.patch=[2,3,3]", ["patch"]),
    ],
)
def test_a_recipe_that_cannot_be_trained(lab: Any, tmp_path: Path, uwm: Uwm, setting: str, words: list[str]) -> None:
    pretrain = ("pretrain", "--store", lab["store"], "--output", tmp_path / "runs", *SMALL)
    refused(uwm(*pretrain, setting), *words)
    refused(uwm(*pretrain, "--set", setting), *words)
    assert not (tmp_path / "runs").exists()


def test_places_that_cannot_be_written(lab: Any, tmp_path: Path, uwm: Uwm) -> None:
    file = tmp_path / "file"
    file.write_text("")
    clip = write_video(tmp_path / "clip.mp4", numbered(8))
    pretrain = ("pretrain", "--store", lab["store"], *SMALL)
    for folder in (file, file / "below", Path("/proc/none"), Path("/sys")):
        refused(uwm(*pretrain, "--output", folder), f"--output {folder}", "write")
        refused(uwm(*pretrain, "--output", tmp_path, "--checkpoints", folder), f"--checkpoints {folder}", "write")
        refused(uwm("evaluate", lab["model"], "--store", lab["store"], "--output", folder), f"--output {folder}")
        refused(uwm("contract", "infer", clip, "--output", folder / "x.yaml"), "--output")
        refused(uwm("train-vae", clip, "--output", folder / "vae"), "--output")
        refused(uwm("store", "export", lab["store"], folder / "out"), "FOLDER")
    refused(uwm(*pretrain, "--output", tmp_path, "--checkpoints", "s3://none/x?region="), "s3://none")


def test_a_folder_of_something_else_is_not_replaced_by_a_vae(tmp_path: Path, uwm: Uwm) -> None:
    clip = write_video(tmp_path / "clip.mp4", numbered(8))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    refused(uwm("train-vae", clip, "--output", tmp_path / "thesis"), "holds no VAE")
    refused(
        uwm("train-vae", clip, "--output", tmp_path / "vae", "--from", tmp_path / "thesis"),
        "--from",
        "no folder of VAE weights",
    )
    assert (tmp_path / "thesis" / "chapter.txt").exists()


@pytest.mark.parametrize("address", ["nonsense", "http://head:6379", "ray://head", ":6379", "head:port"])
def test_what_is_no_address_of_ray(lab: Any, tmp_path: Path, uwm: Uwm, address: str) -> None:
    clip = write_video(tmp_path / "clip.mp4", numbered(8))
    words = ("not the address of a Ray cluster", "HOST:PORT")
    refused(uwm("pretrain", "--store", lab["store"], "--output", tmp_path, "--address", address, *SMALL), *words)
    refused(uwm("ingest", clip, "--store", tmp_path / "store", "--address", address), *words)
    assert not (tmp_path / "store").exists()


def test_a_registration_that_would_fail_after_the_training(lab: Any, tmp_path: Path, uwm: Uwm) -> None:
    finetune = ("finetune", "--from", lab["model"], "--store", lab["store"], "--output", tmp_path / "runs", "workers=1")
    for dry_run in ((), ("--dry-run",)):
        refused(uwm(*finetune, *dry_run, "--register", "my"), "--embodiment", "left, right")
        refused(uwm(*finetune, *dry_run, "--register", "my", "--embodiment", "lefty"), "lefty", "left, right")
        for name in ("my/policy", "my:policy", "my@champion", ""):
            refused(uwm(*finetune, *dry_run, "--register", name or " @", "--embodiment", "left"), "no name for a model")
    assert not (tmp_path / "runs").exists()


def test_an_evaluation_that_cannot_be_done(lab: Any, tmp_path: Path, uwm: Uwm) -> None:
    evaluate = ("evaluate", lab["model"], "--store", lab["store"], "--output", tmp_path / "runs")
    refused(uwm(*evaluate, "--embodiment", "left", "--env", "libero:pick"), "libero", "metaworld")
    refused(uwm(*evaluate, "--embodiment", "left", "--env", "metaworld:drawer-clos"), "drawer-close")
    refused(uwm(*evaluate, "--embodiment", "left", "--env", "metaworld:drawer-close"), "does not fit the interface")
    refused(uwm(*evaluate), "--embodiment", "left, right")
    assert not (tmp_path / "runs").exists()


def test_register_and_evaluate_what_was_registered(lab: Any, tmp_path: Path, uwm: Uwm) -> None:
    from pipelines.models.policy import Policy

    refused(uwm("register", lab["run"], "my"), "no such model")  # the run has no checkpoint in MLflow
    refused(uwm("register", lab["model"], "my"), "--embodiment", "left, right")
    refused(uwm("register", lab["model"], "a/b", "--embodiment", "left"), "no name for a model")
    code, answer, text = uwm("register", lab["model"], "my", "--embodiment", "right", "--json")
    assert code == 0 and answer == {"name": "my", "version": "1"}, text
    assert "uwm evaluate models:/my/1" in text
    assert Policy.of("models:/my/1").embodiment == "right"
    assert Policy.of("models:/my/1", embodiment="left").embodiment == "left"
    assert uwm("register", "models:/my/1", "other", "--json")[1] == {"name": "other", "version": "1"}
    refused(uwm("promote", "my", "1", "--alias", "latest"), "--alias")
    refused(uwm("promote", "my", "1", "--alias", "a b"), "--alias")


def test_a_checkpoint_of_another_mlflow_is_told(lab: Any, tmp_path: Path, uwm: Uwm) -> None:
    settings = checkpoint.load_settings(lab["model"]).model_copy(update={"run_id": "0" * 32})
    checkpoint.save(tmp_path / "model", settings.build().state_dict(), settings)
    refused(uwm("register", tmp_path / "model", "my", "--embodiment", "left"), "0" * 32, "MLFLOW_TRACKING_URI")


def test_ids_may_be_shortened(lab: Any, tmp_path: Path, uwm: Uwm) -> None:
    from pipelines.models.resolve import resolve

    tracking.log_folder(lab["run"], lab["model"], "checkpoint")
    for length in (8, 31, 32):
        assert (resolve(lab["run"][:length]) / "settings.json").exists()
    others = [tracking.start_run("uwm", "toy", {}) for _ in range(17)]  # two begin with the same of 16 digits
    first = next(digit for digit in "0123456789abcdef" if sum(one[0] == digit for one in [lab["run"], *others]) > 1)
    refused(uwm("evaluate", first, "--store", lab["store"]), "runs begin with", "give more characters")


def test_versions_that_differ_from_the_cluster_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray._private.utils import check_version_info

    def init(**_: Any) -> None:
        check_version_info({"ray_version": "2.59.0", "python_version": "3.12.1"}, "node 10.0.0.7:6379")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    told = r"cluster runs Ray 2.59.0 and Python 3.12.1, this machine Ray 2.* and Python 3.1"
    with pytest.raises(ConnectionError, match=told), cluster("auto"):
        pass
    assert check_address("auto") == "auto"


def test_mlflow_names_runs_and_pictures_for_people(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = checkpoint.load_settings(lab["model"])
    assert re.fullmatch(r"pretrain: left, right, \d\.\d M", run_title(load_recipe("small", SMALL), settings))
    recipe = load_recipe("small", [*SMALL, "instructions=[close the drawer]"])
    assert run_title(recipe, settings).startswith("pretrain: close the drawer, ")
    tracking.connect()
    tracking.log_image(lab["run"], np.zeros((8, 24, 3), np.uint8), PICTURES, 1)
    client = tracking.MlflowClient()
    assert client.list_artifacts(lab["run"], "images")[0].path.startswith(f"images/{PICTURES}+step+1")
    experiment = client.get_experiment(client.get_run(lab["run"]).info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert tracking.ui() == f"mlflow ui --backend-store-uri sqlite:///{lab['root'] / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@lab.example/mlflow")
    assert tracking.ui() == "https://lab.example/mlflow"
