"""A checkpoint is either complete or ignored, in a folder and on S3."""

from __future__ import annotations

import contextlib
import hashlib
import random
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rows import fill
from helpers.s3 import S3, FaultyProxy

from infra.engine import ParameterSlice
from pipelines.models import checkpoint, manifest
from pipelines.recipe import load_recipe
from pipelines.train.checkpoint_writer import CheckpointWriter
from pipelines.train.checkpoints import RunFolder
from pipelines.train.pretrain import plan
from pipelines.train.run import RunRecord, _identity, _interrupted_run
from pipelines.train.state import SavedState, save_state
from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore

pytest_plugins = ["helpers.s3"]
TINY = ["model.width=32", "model.depth=1", "model.heads=2", "model.registers=1", "model.condition_width=16"]


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
    digest = hashlib.sha256(b"weights").hexdigest()
    assert about["files"] == {"model.safetensors": 7} and about["sha256"] == {"model.safetensors": digest}
    assert about["validation_loss"] == 0.5 and about["step"] == 10
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


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def rewrite(folder: RunFolder, name: str, change: Callable[[bytes], bytes | None]) -> None:
    """Change a file of the run behind its back; ``change`` returns None to delete it."""
    files, root = folder._place.filesystem()
    content = change(folder.read(name))
    files.delete_file(f"{root}/{name}")
    if content is not None:
        with files.open_output_stream(f"{root}/{name}") as out:
            out.write(content)


FILES = ["model.safetensors", "state-1.safetensors", "settings.json", "checkpoint.json"]
DAMAGES = ["bit", "cut", "missing", "header"]
ON_S3 = [(name, damage, "s3") for name, damage in zip(FILES, DAMAGES, strict=True)]


@pytest.mark.parametrize(
    ("name", "damage", "folder"),
    [*((name, damage, "folder") for name in FILES for damage in DAMAGES), *ON_S3, ("checkpoint.json", "missing", "s3")],
    indirect=["folder"],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(folder: RunFolder, name: str, damage: str) -> None:
    def build(made: Path) -> None:
        for file in ("model.safetensors", "state-1.safetensors", "settings.json"):
            (made / file).write_bytes(random.Random(file).randbytes(600))

    for step in (0, 10, 20, 30):
        folder.write(step, build)
        folder.commit(step, {"validation_loss": step / 7})
    changes: dict[str, Callable[[bytes], bytes | None]] = {
        "bit": lambda content: flipped(content, random.Random(name).randrange(8 * len(content))),
        "cut": lambda content: content[:-1],
        "missing": lambda content: None,
        "header": lambda content: bytes(8) + content[8:],
    }
    rewrite(folder, f"step-00000030/{name}", changes[damage])
    said = folder.sweep()
    incomplete = damage == "missing" and name == "checkpoint.json" and not folder._local  # as if never completed
    assert len(said) == (not incomplete) and all("step 30 is damaged" in line and name in line for line in said)
    assert folder.newest() == 20 and list(folder.complete()) == [0, 10, 20] and folder.sweep() == []
    rewrite(folder, f"step-00000000/{name}", changes[damage])
    with pytest.raises(UserError, match=r"step 0 is damaged .* start anew with --new"), folder.fetched(0):
        pass
    assert folder.sweep() == []


def test_any_flipped_bit_of_a_manifest_is_noticed() -> None:
    about = {"validation_loss": 0.1 + 0.2, "tally": [[1.0, 2.0]], "identity": "ab"}
    content = manifest.dump({"model.safetensors": (7, "0" * 64)}, about | {"step": 8})
    written = manifest.parse(content)
    for bit in range(8 * len(content)):
        with contextlib.suppress(ValueError):  # white space may become other white space
            assert manifest.parse(flipped(content, bit)) == written


def test_what_was_not_written_with_a_checkpoint_is_not_read(tmp_path: Path) -> None:
    part = ParameterSlice("layer.weight", 0, torch.zeros(4), {})
    folder = RunFolder(str(tmp_path))
    folder.write(10, lambda made: save_state(made / "state-0.safetensors", [part]))
    folder.commit(10, {})
    extra = ParameterSlice("layer.weight", 4, torch.ones(4), {})
    save_state(tmp_path / "step-00000010" / "state-1.safetensors", [extra])
    with folder.fetched(10) as fetched, SavedState(fetched) as saved:
        assert saved.read("weight", "layer.weight").equal(torch.zeros(4))


def test_a_server_that_fails_does_not_make_a_checkpoint_damaged(s3: S3) -> None:
    with FaultyProxy(s3.port) as proxy:
        run = f"run-{uuid.uuid4().hex}"
        writer, folder = RunFolder(s3.uri(run)), RunFolder(s3.uri(run, proxy.endpoint))
        writer.write(10, content("weights" * 1000))
        writer.commit(10, {})
        proxy.inject("truncate", times=2)
        assert list(folder.complete()) == [10] and folder.sweep() == []
        for fault in ("truncate", "500"):
            proxy.inject(fault, only=lambda request: "model" in request.path or "checkpoint" in request.path)
            with pytest.raises(OSError):
                folder.sweep()
            proxy.heal()
        assert list(folder.complete()) == [10]


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


@pytest.mark.parametrize("damage", ["cut", "bit", "missing"])
def test_a_damaged_record_of_a_run_is_healed_from_its_checkpoint(tmp_path: Path, damage: str) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    fill(store, ["a", "b"])
    recipe = load_recipe("small", [*TINY, "validation_share=0"])
    asked: dict[str, str | None] = {"store": store.uri}
    settings = plan(store.uri, recipe).model_copy(update={"run_id": "0" * 32, "recipe": recipe.model_dump()})
    home, kept = str(tmp_path / "runs"), RunFolder(str(tmp_path / "runs" / "small-1"))
    record = RunRecord(identity=_identity("pretrain", asked, recipe.model_dump()), name="small-1", settings=settings)
    written = settings.model_copy(update={"step": 20})
    kept.write(20, lambda folder: checkpoint.write(folder, written.build().state_dict(), written))

    def found(**about: Any) -> bytes:
        kept.commit(20, about)
        kept.put("run.json", record.dump())
        whole = _interrupted_run(home, "pretrain", asked, recipe)
        file = tmp_path / "runs" / "small-1" / "run.json"
        if damage == "missing":
            file.unlink()
        else:
            content = file.read_bytes()
            file.write_bytes(content[: len(content) // 2] if damage == "cut" else flipped(content, 4000))
        again = _interrupted_run(home, "pretrain", asked, recipe)
        assert whole and again and whole.dump() == record.dump()
        return again.dump()

    assert found(identity=record.identity) == record.dump()
    assert _interrupted_run(home, "pretrain", asked, load_recipe("small", [*TINY, "seed=1"])) is None
    kept.drop(20)
    assert _interrupted_run(home, "pretrain", asked, recipe) is None
    kept.write(20, lambda folder: checkpoint.write(folder, written.build().state_dict(), written))
    with pytest.raises(UserError, match="an earlier version; restore it, or use --new"):
        found()
