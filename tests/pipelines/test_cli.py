"""The command line: results on stdout, and for each mistake of a user one clear line and the right exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command import Uwm
from helpers.formats import numbered, write_video
from helpers.rows import fill

from pipelines.cli import contract as cli_contract
from preprocessing import sources
from preprocessing.store.store import LatentStore

VERBS = ("ingest", "pretrain", "finetune", "evaluate", "promote", "demo", "record", "train-vae", "store")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    fill(LatentStore.create(str(tmp_path / "store")), ["a", "b"])
    return tmp_path / "store"


def _one_clear_line(answer: tuple[int, object, str], *words: str) -> None:
    code, _, err = answer
    assert code == 2, err
    [line] = [line for line in err.splitlines() if line.strip()]
    assert line.startswith("error: ") and "Traceback" not in err
    for word in words:
        assert word in line


def test_mistaken_arguments_of_ingest(tmp_path: Path, uwm: Uwm) -> None:
    store = tmp_path / "new"
    _one_clear_line(uwm("ingest", tmp_path / "nowhere", "--store", store), "nowhere")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no data")
    _one_clear_line(uwm("ingest", tmp_path / "notes", "--store", store), "notes", "rlds")
    clip = write_video(tmp_path / "clip.mp4", numbered(8))
    _one_clear_line(uwm("ingest", clip, "--store", store, "--format", "tapes"), "tapes", "rlds")
    _one_clear_line(uwm("ingest", clip, "--store", store, "--encoder", "no/such/folder"), "no/such/folder")
    _one_clear_line(uwm("ingest", clip, "--store", store, "--image-size", "60"), "60")
    contract = tmp_path / "contract.yaml"
    contract.write_text("speed: 3\n")
    _one_clear_line(uwm("ingest", clip, "--store", store, "--contract", contract), "contract.yaml", "speed")
    _one_clear_line(uwm("ingest", clip, "--store", tmp_path / "notes"), "not a latent store")
    assert not store.exists()


def test_mistaken_arguments_of_training(store: Path, tmp_path: Path, uwm: Uwm) -> None:
    runs = ("--output", tmp_path / "runs")
    _one_clear_line(uwm("pretrain", "--store", tmp_path / "nowhere", *runs), "nowhere", "uwm ingest")
    _one_clear_line(uwm("pretrain", "--store", store, "--recipe", "nonsense", *runs), "nonsense", "small")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 5\nbatch_size: 4\nlearning_rate: 0.1\nlearning_rat: 3\n")
    _one_clear_line(uwm("pretrain", "--store", store, "--recipe", recipe, *runs), "learning_rat", "known keys")
    _one_clear_line(uwm("pretrain", "--store", store, "model.widht=3", *runs), "widht", "width")
    _one_clear_line(uwm("pretrain", "--store", store, "model.heads=7", *runs), "heads")
    _one_clear_line(uwm("pretrain", "--store", store, "steps=-1", *runs), "steps")
    _one_clear_line(uwm("pretrain", "--store", store, "steps", *runs), "KEY=VALUE")
    _one_clear_line(uwm("pretrain", "--store", store, "instructions=[dance]", *runs), "dance", "close the drawer")
    _one_clear_line(uwm("pretrain", "--store", store, "encoder=sdxl-vae", *runs), "sdxl-vae", "tiny")
    _one_clear_line(uwm("finetune", "--from", tmp_path / "nowhere", "--store", store, *runs), "nowhere")
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_prints_the_resolved_recipe_and_writes_nothing(store: Path, tmp_path: Path, uwm: Uwm) -> None:
    code, plan, text = uwm("pretrain", "--store", store, "--dry-run", "--json", "model.width=64", "steps=7")
    assert code == 0
    assert plan["recipe"]["steps"] == 7 and plan["recipe"]["model"]["width"] == 64
    assert plan["recipe"]["model"]["latent_size"] == [8, 8] and plan["parameters"] > 1000
    assert "learning_rate" in text


def test_the_help_names_every_format() -> None:
    assert ", ".join(sources.FORMATS) == cli_contract.FORMATS


def test_the_store_verbs(store: Path, uwm: Uwm) -> None:
    code, log, _ = uwm("store", "log", store, "--json")
    assert code == 0 and log[0]["counts"] == {"episodes": 2, "frames": 140, "quarantined": 0, "filtered": 0}
    code, episodes, _ = uwm("store", "episodes", store, "--json")
    assert code == 0 and [row["id"] for row in episodes] == ["a", "b"]
    named = "id uri index format frames fps cameras action_dim proprio instruction embodiment repairs repair_fields"
    assert set(episodes[0]) == set(named.split())
    assert uwm("store", "verify", store)[0] == 0
    assert uwm("store", "show", store, "--json")[1]["embodiments"][0]["episodes"] == 2
    _one_clear_line(uwm("store", "show", store, "--snapshot", "nonsense"), "nonsense", "uwm store log")
    _one_clear_line(uwm("store", "show", store.parent / "nowhere"), "nowhere")
    assert uwm("store", "tag", store, "first", "--snapshot", log[1]["snapshot"])[0] == 0
    code, changed, _ = uwm("store", "diff", store, "first", log[0]["snapshot"], "--json")
    assert code == 0 and [row["id"] for row in changed["added"]] == ["a", "b"] and changed["removed"] == []
    assert uwm("store", "quarantine", store, "--json")[1] == []
    _one_clear_line(uwm("store", "remove", store), "--episode", "--source")
    assert uwm("store", "rollback", store, "--snapshot", log[1]["snapshot"])[0] == 0
    assert uwm("store", "episodes", store, "--json")[1] == []
    chunk = max((store / "chunks").iterdir(), key=lambda path: path.stat().st_size)
    chunk.write_bytes(b"12345678" + chunk.read_bytes()[8:])
    code, damage, _ = uwm("store", "verify", store, "--snapshot", log[0]["snapshot"], "--json")
    assert code == 1 and len(damage["damaged"]) == 1


def test_mistaken_arguments_of_evaluate_and_promote(tmp_path: Path, uwm: Uwm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    _one_clear_line(
        uwm("evaluate", "models:/none@champion", "--env", "metaworld:drawer-close"), "models:/none@champion"
    )
    _one_clear_line(uwm("evaluate", tmp_path), "--store", "--env")
    _one_clear_line(uwm("promote", "none", "1"), "none version 1")


def run_uwm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([Path(sys.executable).with_name("uwm"), *arguments], capture_output=True, text=True)


def test_help_names_every_verb() -> None:
    shown = run_uwm("--help")
    assert shown.returncode == 0 and all(verb in shown.stdout for verb in VERBS)


def test_results_are_on_stdout_and_with_json_on_stderr(store: Path) -> None:
    plain, as_json = run_uwm("store", "show", store), run_uwm("store", "show", store, "--json")
    assert plain.stdout.startswith("snapshot ") and "2 episodes" in plain.stdout and plain.stderr == ""
    assert as_json.stderr == plain.stdout
    [line] = as_json.stdout.splitlines()
    assert json.loads(line)["embodiments"][0]["episodes"] == 2


def test_a_closed_stderr_and_a_wrong_pace_of_progress() -> None:
    program = Path(sys.executable).with_name("uwm")
    closed = subprocess.run(["sh", "-c", f"{program} store show /nowhere 2>&-"], capture_output=True, text=True)
    assert closed.returncode == 2 and not closed.stdout
    environment = os.environ | {"UWM_PROGRESS_SECONDS": "often"}
    wrong = subprocess.run([program, "--help"], env=environment, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: UWM_PROGRESS_SECONDS: ")
    assert len(wrong.stderr.splitlines()) == 1
