"""Ingests as Ray jobs, with real decode tasks, encoder actors and commits; and those that begin without Ray."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.formats import numbered, quadrants, write_demos, write_video
from helpers.rows import differences
from ray import cloudpickle

from pipelines.ingest import committer, dry_run, local
from pipelines.ingest import job as ingest_job
from pipelines.ingest import run as verb
from pipelines.ingest.episode_reader import Plan
from pipelines.ingest.run import ingest
from pipelines.recipe import IngestRecipe
from preprocessing import sources
from preprocessing.encoders.vae import load_encoder
from preprocessing.errors import UserError
from preprocessing.quality.filters import Filters
from preprocessing.store.store import LatentStore

pytestmark = pytest.mark.usefixtures("ray_cluster")

SMALL: dict[str, Any] = {"image_size": 64, "quality": Filters(frozen=None), "local_seconds": 0}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write every few rows, and commit complete episodes twice a second."""
    monkeypatch.setattr(ingest_job, "ROWS_PER_WRITE", 2)
    monkeypatch.setattr(committer, "COMMIT_MINUTES", 0)


@pytest.mark.slow
def test_too_many_bad_inputs_stop_the_job_and_keep_what_is_good(
    tmp_path: Path, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "ENOUGH_TO_JUDGE", 3)
    good = write_video(tmp_path / "0.mp4", numbered(40)).read_bytes()
    for number, frames in ((1, 1000), (2, 3000), (7, 3000)):
        write_video(tmp_path / f"{number}.mp4", quadrants(64)[None].repeat(frames, 0) - np.uint8(number))
    for number in range(3, 7):  # after enough others that the first one's rows do not wait for a full pass
        (tmp_path / f"{number}.mp4").write_bytes(good[: len(good) * 2 // 3 + number])
    store, decode = str(tmp_path / "store"), ingest_job.decode

    def in_turn(batch: Any, **arguments: Any) -> Any:
        """Decode the bad ones after a good one is committed, and the last one after all bad ones are refused."""
        number = json.loads(batch["ref"][0].as_py())["uri"][-5]

        def too_early() -> bool:
            now = LatentStore.open(store).snapshot()
            if number == "7":
                return len(now.quarantine()) < 4
            return number in "3456" and not now.episodes(["id"]).num_rows

        until = time.monotonic() + 30  # rows wait for a write to fill, which may take those of the waiting episodes
        while too_early() and time.monotonic() < until:
            time.sleep(0.1)
        yield from decode(batch, **arguments)

    monkeypatch.setattr(ingest_job, "decode", in_turn)
    with pytest.raises(UserError, match=r"4 of 8 episodes are bad, more than --max-bad 0\.4"):
        ingest([str(tmp_path)], store, IngestRecipe(**SMALL, max_bad=0.4))
    snapshot = LatentStore.open(store).snapshot()
    names = [Path(uri).name for uri in snapshot.episodes(["uri"])["uri"].to_pylist()]
    assert "0.mp4" in names and len(names) < 4
    assert len(snapshot.quarantine()) == 4 and not list(snapshot.verify())


@pytest.mark.slow
def test_a_store_that_takes_no_commits_stops_a_long_job_early(
    tmp_path: Path, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, frames in enumerate((100, 900, 900, 900)):
        write_video(tmp_path / f"{number}.mp4", quadrants(64)[None].repeat(frames, 0) - np.uint8(number))
    attempts = []

    def refuse(store: LatentStore, *arguments: Any) -> None:
        attempts.append(arguments)
        raise PermissionError("the key was revoked")

    monkeypatch.setattr(LatentStore, "commit", refuse)
    gc.disable()  # the next ingest itself has to free the cores that this one took
    try:
        with pytest.raises(UserError, match=r"stopped: commits failed \(the key was revoked\)"):
            ingest([str(tmp_path)], str(tmp_path / "store"), IngestRecipe(**SMALL))
        assert len(attempts) > 3 and len(attempts[-1][2]) < 4  # it stopped before everything was encoded
        monkeypatch.undo()
        recipe = IngestRecipe(**SMALL)
        assert ingest([str(tmp_path / "0.mp4")], str(tmp_path / "store"), recipe).episodes["new"] == 1
    finally:
        gc.enable()


def test_the_rows_are_the_same_without_ray_on_ray_and_when_handed_over(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    write_video(tmp_path / "raw" / "clip.mp4", numbered(160))
    write_demos(tmp_path / "raw" / "toy_demo.hdf5", demos=2, steps=70)
    for name, seconds in (("without", 60), ("on", 0), ("handed over", 1e-6)):
        recipe = IngestRecipe(image_size=64, local_seconds=seconds)
        report = ingest([str(tmp_path / "raw")], str(tmp_path / name), recipe)
        assert report.episodes == {"new": 3, "already": 0, "quarantined": 0, "filtered": 0} and report.frames == 300
        assert ("decode" in report.waiting) == (name != "without"), "only Ray's decoders wait"
        assert not differences(str(tmp_path / name), str(tmp_path / "without"))


def deadly_to_read(each: dict[str, Any], plan: Plan) -> Iterator[pa.Table]:
    if "deadly" in each["ref"]:
        os.kill(os.getpid(), signal.SIGKILL)
    yield from dry_run.read_one(each, plan)


def deadly(item: dict[str, Any], plan: Plan) -> Iterator[pa.Table]:
    for row in local.decode_or_refuse(item, plan):
        yield row
        if "deadly" in item["ref"]:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_files_that_change_vanish_or_kill_their_reader_are_quarantined_and_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in (("changing", 30), ("deadly", 100), ("staying", 32), ("vanishing", 31)):
        write_video(tmp_path / f"{name}.mp4", numbered(count))
    store, scan, decode = str(tmp_path / "store"), sources.scan, ingest_job.decode

    def scan_then_change_files(*arguments: Any) -> Any:
        refs = list(scan(*arguments))
        write_video(tmp_path / "changing.mp4", numbered(33))
        (tmp_path / "vanishing.mp4").unlink()
        return refs

    def die(batch: Any, **arguments: Any) -> Any:
        for rows in decode(batch, **arguments):
            yield rows
            if "deadly" in batch["ref"][0].as_py():
                os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(dry_run, "read_one", deadly_to_read)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import this module
    would = ingest([str(tmp_path)], store, IngestRecipe(image_size=64), dry_run=True)
    assert would.episodes == {"new": 3, "already": 0, "quarantined": 1, "filtered": 0}
    assert "died 3 times" in would.quarantine[0]["reason"] and would.quarantine[0]["uri"].endswith("deadly.mp4")
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(sources, "scan", scan_then_change_files)
    monkeypatch.setattr(ingest_job, "decode", die)
    monkeypatch.setattr(local, "decode_or_refuse", deadly)  # it begins without Ray, where dying is seen once
    report = ingest([str(tmp_path)], store, IngestRecipe(image_size=64))
    assert report.episodes == {"new": 1, "already": 0, "quarantined": 3, "filtered": 0}
    reasons = {Path(row["uri"]).stem: row["reason"] for row in report.quarantine}
    assert "changed while it was read" in reasons["changing"] and "No such file" in reasons["vanishing"]
    assert "died 3 times" in reasons["deadly"]
    monkeypatch.undo()
    again = ingest([str(tmp_path)], store, IngestRecipe(image_size=64))
    assert again.episodes == {"new": 2, "already": 1, "quarantined": 0, "filtered": 0}
    snapshot = LatentStore.open(store).snapshot()
    assert {row["frames"] for row in snapshot.rows()} == {32, 33, 100} and not list(snapshot.verify())
    [row] = [row for row in snapshot.rows() if row["frames"] == 33]
    seen = load_encoder("tiny").decode(snapshot.read(row["cameras"][0]["segments"])).reshape(33, -1).mean(1)
    assert np.corrcoef(seen, np.arange(33))[0, 1] > 0.99
