"""The command line: results on stdout, and for each mistake of a user one clear line and the right exit code."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from helpers.command import Uwm
from helpers.formats import numbered, write_video
from helpers.rows import fill, write_episode

from pipelines.cli import contract as cli_contract
from preprocessing import sources
from preprocessing.store.store import LatentStore

VERBS = (
    "ingest",
    "pretrain",
    "finetune",
    "evaluate",
    "promote",
    "demo",
    "record",
    "train-vae",
    "store",
    "register",
    "report",
    "doctor",
)


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


def test_a_reader_that_has_seen_enough_is_no_failure(store: Path) -> None:
    for verb in (f"store statistics {store}", "contract list"):
        command = f"{Path(sys.executable).with_name('uwm')} {verb} | head -n 1"
        piped = subprocess.run(["sh", "-c", command], capture_output=True)
        assert len(piped.stdout.splitlines()) == 1 and piped.stderr == b""


def test_snapshots_are_named_in_one_way(store: Path, uwm: Uwm) -> None:
    newest = LatentStore.open(str(store)).snapshot().id
    fill(LatentStore.open(str(store)), ["c"])
    for verb in ("show", "statistics", "verify", "quarantine", "episodes"):
        for given in ([newest[:10]], ["--snapshot", newest], [newest[:10], "--snapshot", newest[:10]]):
            assert uwm("store", verb, store, *given)[0] == 0
        _one_clear_line(uwm("store", verb, store, newest[:9], "--snapshot", newest[:10]), "two snapshots")
    assert uwm("store", "tag", store, "paper", newest[:10], "--json")[1] == {"tag": "paper", "snapshot": newest}
    assert [row["id"] for row in uwm("store", "diff", store, "paper", "--json")[1]["added"]] == ["c"]
    _one_clear_line(uwm("store", "tag", store, "bad tag/x"), "bad tag/x", "letters")
    _one_clear_line(uwm("store", "rollback", store), "uwm store log")
    code, answer, text = uwm("store", "rollback", store, newest[:10], "--json")
    assert code == 0 and answer == {"snapshot": newest} and "to undo" in text


def test_what_cannot_be_undone_can_be_tried(store: Path, uwm: Uwm, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = LatentStore.open(str(store))
    head = opened.snapshot().id
    code, answer, text = uwm("store", "remove", store, "--episode", "a", "--dry-run", "--json")
    assert code == 0 and [row["id"] for row in answer["would_remove"]] == ["a"] and answer["removed"] == []
    assert "would remove 1 episodes" in text and opened.snapshot().id == head
    assert uwm("store", "gc", store, "--dry-run", "--json")[1]["would_delete"] == []
    code, answer, _ = uwm("store", "remove", store, "--episode", "a", "--json")  # no terminal: no question
    assert code == 0 and [row["id"] for row in answer["removed"]] == ["a"]


@pytest.mark.parametrize(("answer", "left"), [("n\n", 2), ("y\n", 1)])
def test_a_terminal_is_asked_before_what_cannot_be_undone(store: Path, answer: str, left: int) -> None:
    ours, theirs = pty.openpty()
    command = [Path(sys.executable).with_name("uwm"), "store", "remove", store, "--episode", "a"]
    asked = subprocess.Popen(command, stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs)
    os.write(ours, answer.encode())
    assert asked.wait() == (0 if left == 1 else 1)
    assert "cannot be undone" in os.read(ours, 10_000).decode()
    assert len(LatentStore.open(str(store)).snapshot().episodes(["id"])) == left


def test_statistics_name_the_columns_and_keep_them_apart(tmp_path: Path, uwm: Uwm) -> None:
    layout = json.dumps([{"name": "left_arm", "size": 2, "kind": "joint"}, {"name": "hand", "size": 1}])
    store = LatentStore.create(str(tmp_path / "store"))
    fork = store.fork()
    steps = np.array([[-1.234e-05, 1e9, -123456.0, 1, 2], [-2.2e-11, 2e9, -1.0, 1, 2]], np.float32)
    latents = {"front": np.zeros((2, 4, 8, 8), np.float16)}
    row, found = write_episode(fork, "one", latents, steps, 3, action_layout=layout)
    store.commit("test", [fork], [row], found, [])
    code, answer, text = uwm("store", "statistics", tmp_path / "store", "--json")
    assert code == 0
    names = ["left_arm[0]", "left_arm[1]", "hand[0]", "state[0]", "state[1]"]
    assert [column["name"] for column in answer["arm"]] == names
    assert [column["column"] for column in answer["arm"]][:3] == ["action[0]", "action[1]", "action[2]"]
    head, *lines = text.splitlines()[1:]
    assert [line.split()[0] for line in lines] == names
    assert all(len(line.split()) == 8 and len(line) <= 80 for line in lines) and len(head.split()) == 7


def test_the_version_and_the_completion(uwm: Uwm) -> None:
    code, _, text = uwm("--version")
    assert code == 0 and text == f"uwm {version('unified-world-models')}\n"
    assert "--install-completion" in uwm("--help")[2]


def test_the_doctor_says_what_is_wrong_and_how_to_mend_it(
    tmp_path: Path, uwm: Uwm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("UWM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, answer, _ = uwm("doctor", "--json")
    found = {one["what"]: one for one in answer["findings"]}
    assert code == 0 and answer["right"], answer
    assert {"python", "project", "extra ingest", "ray", "gpu", "rendering", "video", "cache", "mlflow"} <= set(found)
    assert "s3" not in found and all(one["mend"] for one in found.values() if one["state"] != "ok")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("UWM_CACHE", "/proc/none")
    code, answer, text = uwm("doctor", "--json")
    wrong = {one["what"] for one in answer["findings"] if one["state"] == "wrong"}
    assert code == 1 and wrong == {"mlflow", "ray cluster", "s3", "s3 endpoint", "cache"}
    assert "secret" not in text and "secret" not in json.dumps(answer)
