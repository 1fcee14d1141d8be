"""A checkpoint is either complete or ignored, in a folder and on S3."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.s3 import S3

from infra.engine import ParameterSlice
from pipelines.train.checkpoint_writer import CheckpointWriter
from pipelines.train.checkpoints import RunFolder
from pipelines.train.state import SavedState, save_state

pytest_plugins = ["helpers.s3"]


@pytest.fixture(params=["folder", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, s3: S3) -> RunFolder:
    return RunFolder(str(tmp_path / "run") if request.param == "folder" else s3.uri(f"run-{uuid.uuid4().hex}"))


def content(text: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "model.safetensors").write_text(text)

    return build


def test_a_checkpoint_is_listed_once_it_is_committed(folder: RunFolder) -> None:
    assert folder.complete() == {}
    folder.write(10, content("weights"))
    assert folder.complete() == {}
    folder.commit(10, {"validation_loss": 0.5})
    [about] = folder.complete().values()
    assert about == {"validation_loss": 0.5, "step": 10, "files": {"model.safetensors": 7}}
    with folder.fetched(10) as fetched:
        assert (fetched / "model.safetensors").read_text() == "weights"
    folder.drop(10)
    assert folder.complete() == {}


@pytest.mark.parametrize(("name", "left"), [("model.safetensors", b"weig"), ("checkpoint.json", b'{"step')])
def test_incomplete_checkpoints_are_ignored_and_swept_away(folder: RunFolder, name: str, left: bytes) -> None:
    for step in (10, 20):
        folder.write(step, content("weights"))
        folder.commit(step, {})
    folder.write(30, content("half"))
    files, root = folder._place.filesystem()
    with files.open_output_stream(f"{root}/step-00000020/{name}") as out:
        out.write(left)
    assert list(folder.complete()) == [10]
    folder.sweep()
    assert list(folder.complete()) == [10]
    folder.write(30, content("again"))
    folder.commit(30, {})
    assert folder.complete()[30]["files"] == {"model.safetensors": 5}
    if folder._local:
        assert {path.name for path in folder._local.iterdir()} == {"step-00000010", "step-00000030"}


def test_the_newest_and_the_best_are_kept(folder: RunFolder) -> None:
    for step, loss in ((10, 0.5), (20, 0.2), (30, 0.4), (40, None), (50, 0.3)):
        folder.write(step, content("weights"))
        folder.commit(step, {"validation_loss": loss})
        folder.prune(2, "validation_loss")
    assert list(folder.complete()) == [20, 40, 50]


def test_a_state_is_reassembled_from_any_number_of_slices(tmp_path: Path) -> None:
    values = torch.arange(10.0)
    for worker, (start, stop) in enumerate(((0, 4), (4, 5), (5, 10))):
        part = ParameterSlice("layer.weight", start, values[start:stop], {"exp_avg": -values[start:stop]})
        save_state(tmp_path / f"state-{worker}.safetensors", [part])
    with SavedState(tmp_path) as saved:
        assert list(saved.names()) == ["layer.weight"]
        assert saved.read("weight", "layer.weight").equal(values)
        assert saved.read("exp_avg", "layer.weight").equal(-values)


def test_a_checkpoint_counts_when_all_workers_have_written(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    savers = [CheckpointWriter(folder, leads=rank == 0, workers=2) for rank in range(2)]

    def settled() -> list[tuple[int | None, str | None]]:
        for saver in savers:
            if saver._draft:
                saver._draft.written.exception()  # waits
        written, failed = (sum(votes) for votes in zip(*(saver.votes() for saver in savers), strict=True))
        return [saver.settle(written, failed) for saver in savers]

    savers[0].begin(10, {}, content("a"))
    savers[1].begin(10, {}, lambda made: (made / "state-1").write_text("b") and None)
    assert savers[0].settle(1, 0) == (None, None) and savers[0].busy and folder.complete() == {}
    assert settled() == [(10, None), (10, None)]
    assert folder.complete()[10]["files"] == {"model.safetensors": 1, "state-1": 1}

    savers[0].begin(20, {}, content("a"))
    savers[1].begin(20, {}, lambda _: Path("/dev/full").write_text("b") and None)
    [(step, problem), _] = settled()
    assert step is None and problem is not None and problem.startswith("no checkpoint of step 20: ")
    assert list(folder.complete()) == [10] and not list(tmp_path.glob(".step-*"))
