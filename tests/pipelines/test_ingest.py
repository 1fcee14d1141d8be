"""Ingests of small files: what goes in, what is refused, and what a second ingest does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.command import Uwm
from helpers.formats import (
    PICTURES,
    moving,
    numbered,
    renamed,
    write_demos,
    write_lerobot,
    write_pictures,
    write_video,
)

from pipelines.ingest import local
from pipelines.ingest.run import ingest
from pipelines.recipe import IngestRecipe
from preprocessing.encoders.vae import Encoder, encoder_digest
from preprocessing.episode import Episode, EpisodeRef
from preprocessing.sources import video
from preprocessing.store.store import LatentStore


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder ``raw`` with a video, a broken copy of it and a demonstration; its ingest is in ``store``."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "raw").mkdir()
    whole = write_video(folder / "raw" / "clip.mp4", numbered(60)).read_bytes()  # at 20 Hz
    (folder / "raw" / "broken.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    write_demos(folder / "raw" / "toy_demo.hdf5", demos=1, steps=20)
    report = ingest([str(folder / "raw")], str(folder / "store"), IngestRecipe(image_size=64, fps=5))
    assert report.episodes == {"new": 2, "already": 0, "quarantined": 1, "filtered": 0}
    return folder


def test_what_was_guessed_or_mended_is_told_and_kept(tmp_path: Path, uwm: Uwm) -> None:
    raw, store = tmp_path / "raw", tmp_path / "store"
    write_demos(raw / "toy_demo.hdf5", demos=2, steps=20)
    renamed(write_lerobot(raw / "lerobot", rows=20, episodes=1), {"action": "commands"})
    code, report, err = uwm("ingest", raw, "--store", store, "--image-size", "64", "--json")
    assert code == 0 and report["without_action"] == 1 and "1 robot log without actions" in err
    [guess] = [repair for repair in report["repairs"] if repair["field"] == "fps"]
    assert guess == {"field": "fps", "text": "control rate unknown; 20 Hz assumed", "episodes": 2}
    assert "noted in 2 episodes (fps): control rate unknown; 20 Hz assumed" in err
    assert "noted in 1 episode (action): no action was found" in err and "Recorded vectors: commands, state" in err
    shown = uwm("store", "show", store, "--json")[1]
    assert shown["repairs"] == report["repairs"]
    with_actions = {group["embodiment"]: group["with_actions"] for group in shown["embodiments"]}
    assert with_actions == {"panda": 2, "so100-follower": 0}
    rows = uwm("store", "episodes", store, "--json")[1]
    found = [dict(zip(row["repair_fields"], row["repairs"], strict=True)) for row in rows]
    assert [repairs.get("fps") for repairs in found].count("control rate unknown; 20 Hz assumed") == 2


def test_what_is_not_read_is_told(tmp_path: Path, uwm: Uwm) -> None:
    raw, store = tmp_path / "raw", tmp_path / "store"
    raw.mkdir()
    (raw / "run.mcap").touch()
    code, report, _ = uwm("ingest", raw, "--store", store, "--image-size", "64", "--json")  # nothing but that
    assert code == 3 and [row["reason"] for row in report["quarantine"]] == ["is empty"]
    film = write_video(raw / "GX010042.MP4", moving(20)).read_bytes()
    (raw / "GL010042.LRV").write_bytes(film + bytes(8))
    for name in ("a.svo", "b.svo", "c.txt", os.fsdecode(b"\xb2.\xe2\xff"), "README.md"):
        (raw / name).write_bytes(b"x")
    for again in ([], ["--dry-run"]):
        code, report, err = uwm("ingest", raw, "--store", store, "--image-size", "64", "--json", *again)
        assert code == 3 and report["episodes"] | {"new": 0, "already": 0} == {
            "new": 0, "already": 0, "quarantined": 1, "filtered": 0
        }  # fmt: skip
        assert report["unread"] == {".svo": 2, ".txt": 1, "without a suffix": 1}
        assert "4 files of kinds that are not read: 2 .svo, 1 .txt, 1 without a suffix" in err
        assert "1 proxy or preview file not read: GL010042.LRV repeats GX010042.MP4" in err
    assert [row["uri"] for row in uwm("store", "episodes", store, "--json")[1]] == [str(raw / "GX010042.MP4")]


def test_a_camera_that_is_of_no_use_is_left_out(tmp_path: Path, uwm: Uwm) -> None:
    """Black in every frame, frozen, broken in the middle, too short: whatever the format, the others go in."""
    path = write_demos(tmp_path / "raw" / "toy_demo.hdf5", demos=1, steps=20)
    with h5py.File(path, "a") as file:
        obs = file["data/demo_0/obs"]
        obs["black_rgb"], obs["still_rgb"] = np.zeros((20, 64, 64, 3), np.uint8), moving(20)[:1].repeat(20, axis=0)
    folder = write_pictures(tmp_path / "raw" / "lerobot", "front", "broken")
    table = pq.read_table(folder / "data/chunk-000/episode_000000.parquet")
    broken = [{"bytes": PICTURES[i] if i != 3 else PICTURES[3][:60], "path": ""} for i in range(6)]
    table = table.set_column(table.column_names.index("broken"), "broken", pa.array(broken))
    pq.write_table(table, folder / "data/chunk-000/episode_000000.parquet")
    code, report, err = uwm("ingest", tmp_path / "raw", "--store", tmp_path / "store", "--image-size", "64", "--json")
    assert code == 0 and report["episodes"]["new"] == 2
    rows = uwm("store", "episodes", tmp_path / "store", "--json")[1]
    assert sorted(row["cameras"] for row in rows) == [["agentview"], ["front"]]
    told = {repair["text"] for repair in report["repairs"]}
    assert "camera black is black in every frame; left out (quality.black=false keeps it)" in told
    assert "camera still is frozen in every frame, 19 in a row; left out (quality.frozen=false keeps it)" in told
    assert any(text.startswith("camera broken: ") and text.endswith("; left out") for text in told)
    assert "noted in 1 episode (quality): camera black is black in every frame" in err


@pytest.fixture
def again(mixed: Path, tmp_path: Path) -> Path:
    """A copy of ``mixed`` that a test may change."""
    return shutil.copytree(mixed, tmp_path / "copy")


OPTIONS = ("--image-size", "64", "--fps", "5", "--json")


def test_a_corrupt_file_is_quarantined_once_and_the_rest_goes_in(mixed: Path, again: Path, uwm: Uwm) -> None:
    head = LatentStore.open(str(mixed / "store")).snapshot().id
    arguments = ("ingest", mixed / "raw", "--store", again / "store", *OPTIONS)
    code, report, err = uwm(*arguments)
    assert code == 3 and report["episodes"] == {"new": 0, "already": 2, "quarantined": 1, "filtered": 0}
    [bad] = report["quarantine"]
    assert bad["uri"].endswith("broken.mp4") and bad["reason"] in err and report["snapshot"] == head
    assert uwm("store", "quarantine", again / "store", "--json")[1] == [bad | {"filter": None}]
    expected = {"new": 0, "already": 2, "quarantined": 1, "filtered": 0}  # a dry run reads what is new
    assert uwm(*arguments, "--retry", "--dry-run")[1]["episodes"] == expected
    shutil.copy(again / "raw" / "clip.mp4", again / "raw" / "broken.mp4")  # repaired: now a copy of the good one
    report = uwm("ingest", again / "raw", "--store", again / "store", *OPTIONS)[1]
    assert report["episodes"] == {"new": 0, "already": 3, "quarantined": 0, "filtered": 0}


def test_the_beginning_of_a_broken_video_is_kept_on_request(tmp_path: Path, uwm: Uwm) -> None:
    video = write_video(tmp_path / "video.mp4", moving(60), g="1", bf="0")
    video.write_bytes(video.read_bytes()[: video.stat().st_size * 2 // 3])
    arguments = ("ingest", video, "--store", tmp_path / "store", "--image-size", "64", "--json")
    assert uwm(*arguments)[1]["episodes"] == {"new": 0, "already": 0, "quarantined": 1, "filtered": 0}
    code, report, _ = uwm(*arguments, "--keep-broken")
    assert code == 0 and report["episodes"] == {"new": 1, "already": 0, "quarantined": 0, "filtered": 0}
    [row] = LatentStore.open(str(tmp_path / "store")).snapshot().rows()
    assert 30 < row["frames"] == report["frames"] < 50
    assert row["repairs"][-1].startswith(f"declares 60 frames, breaks after {row['frames']}: ")
    assert row["repairs"][-1].endswith("; kept up to there")


def test_videos_are_thinned_on_request_and_each_rate_is_new_work(mixed: Path, uwm: Uwm) -> None:
    rows = {row["format"]: row for row in LatentStore.open(str(mixed / "store")).snapshot().rows()}
    assert (rows["video"]["frames"], rows["video"]["fps"], rows["hdf5"]["frames"]) == (15, 5.0, 20)
    every = ("ingest", mixed / "raw", "--store", mixed / "store", "--image-size", "64", "--dry-run", "--json")
    assert uwm(*every)[1]["episodes"] == {"new": 1, "already": 1, "quarantined": 1, "filtered": 0}


def test_a_removed_episode_is_not_ingested_again(mixed: Path, again: Path, uwm: Uwm) -> None:
    code, removed, _ = uwm("store", "remove", again / "store", "--source", mixed / "raw" / "clip.mp4", "--json")
    assert code == 0 and len(removed["removed"]) == 1
    copy = shutil.copy(mixed / "raw" / "clip.mp4", again / "renamed.mp4")
    code, report, err = uwm("ingest", copy, "--store", again / "store", *OPTIONS)
    assert code == 0 and report["episodes"] == {"new": 0, "already": 0, "quarantined": 0, "filtered": 0}
    assert report["removed"] == 1 and "removed from this store" in err and report["snapshot"] == removed["snapshot"]


def _with_actions(path: Path, width: int, seed: int) -> Path:
    write_demos(path, demos=1, steps=8)
    with h5py.File(path, "a") as file:
        del file["data/demo_0/actions"]
        file["data/demo_0/actions"] = np.random.default_rng(seed).normal(size=(8, width))
    return path


def test_a_source_keeps_its_contract_and_its_interface(tmp_path: Path, uwm: Uwm) -> None:
    raw, store = tmp_path / "raw", tmp_path / "store"
    arguments = ("ingest", raw, "--store", store, "--image-size", "32", "--json")
    (tmp_path / "first.yaml").write_text("embodiment: somebody\nflip: []\n")
    (tmp_path / "other.yaml").write_text("embodiment: somebody\nfps: 10\n")
    (tmp_path / "wrong.yaml").write_text("cameras: {wrist: wrist}\n")
    _with_actions(raw / "a.hdf5", 7, 0)
    code, report, err = uwm(*arguments, "--contract", tmp_path / "wrong.yaml")
    assert code == 2 and "cameras: 'wrist' is not in" in err and "recorded are: agentview" in err
    code, report, err = uwm(*arguments, "--contract", tmp_path / "first.yaml")
    assert code == 0 and report["episodes"]["new"] == 1 and not report["notes"]

    _with_actions(raw / "b.hdf5", 7, 1)
    _with_actions(raw / "c.hdf5", 6, 2)  # the same embodiment with other actions
    code, report, err = uwm(*arguments)
    assert code == 3 and report["episodes"] == {"new": 1, "already": 1, "quarantined": 1, "filtered": 0}
    assert report["notes"] == [f"{raw}: using the contract of its last ingest"]
    [bad] = report["quarantine"]
    assert bad["uri"].endswith("c.hdf5") and "actions have 6 columns, not 7" in bad["reason"]
    rows = LatentStore.open(str(store)).snapshot().episodes().to_pylist()
    assert {row["embodiment"] for row in rows} == {"somebody"} and {row["source"] for row in rows} == {str(raw)}
    assert all("flip" in row["contract"] for row in rows)
    assert [part["name"] for part in rows[0]["signals"]] == ["dones"]
    assert rows[0]["texts"] == [{"name": "problem_info/language_instruction", "text": "open the drawer"}]

    code, report, err = uwm(*arguments, "--contract", tmp_path / "other.yaml", "--dry-run")
    assert report["notes"] == [
        f"{raw}: 2 episodes were ingested with another contract (fps, flip); ingesting them again"
    ]
    assert code == 3 and report["episodes"]["new"] == 2 and report["frames"] == 16
    assert report["expected"]["pictures"] == 16 and report["expected"]["seconds"] > 0
    assert report["expected"]["bytes"] == 16 * (4 * 4 * 4 * 2) + 16 * 4 * (7 + 7 + 1 + 1)
    assert "nothing was written" in err and "16 frames" in err


def test_filtered_episodes_are_listed_and_remembered(tmp_path: Path, uwm: Uwm) -> None:
    raw, store, noise = tmp_path / "raw", tmp_path / "store", np.random.default_rng(0)
    raw.mkdir()
    shots = np.concatenate([moving(40), 255 - moving(40)[:, ::-1]])
    write_video(raw / "good.mp4", shots)
    write_video(raw / "good again.mp4", shots, crf="30")
    write_video(raw / "black.mp4", noise.integers(0, 6, (30, 64, 64, 3), np.uint8))
    write_video(raw / "still.mp4", moving(30)[:1].repeat(30, axis=0))
    write_video(raw / "one frame.mp4", moving(1))
    asked = ("--set", "quality.near_duplicates=4", "--set", "quality.shots=3")
    arguments = ("ingest", raw, "--store", store, "--image-size", "64", "--json", *asked)
    code, would, err = uwm(*arguments, "--dry-run")
    assert would["snapshot"] is None and not store.exists()
    assert code == 0 and would["episodes"] == {"new": 1, "already": 0, "quarantined": 0, "filtered": 4}
    assert {Path(row["uri"]).stem: row["filter"] for row in would["filtered"]} == {
        "black": "black", "still": "frozen", "one frame": "min_frames", "good": "near_duplicates",
    }  # fmt: skip
    assert "1 black" in err and "1 near_duplicates" in err
    code, report, _ = uwm(*arguments)
    assert code == 0 and report["episodes"] == would["episodes"] and report["frames"] == would["frames"] == 80
    assert sorted(row["reason"] for row in report["filtered"]) == sorted(row["reason"] for row in would["filtered"])
    listed = uwm("store", "quarantine", store, "--json")[1]
    assert sorted(row["filter"] for row in listed) == ["black", "frozen", "min_frames", "near_duplicates"]
    shown = uwm("store", "show", store, "--json")[1]
    assert (shown["filtered"], shown["quarantine"]) == (4, [])
    [row] = LatentStore.open(str(store)).snapshot().episodes().to_pylist()
    assert row["spans"] == [{"first": 0, "stop": 40}, {"first": 40, "stop": 80}]
    code, again, _ = uwm(*arguments)
    assert again["episodes"] == {"new": 0, "already": 1, "quarantined": 0, "filtered": 4}
    assert again["snapshot"] == report["snapshot"]
    code, report, _ = uwm(*arguments, "--set", "quality.black=false", "--set", "quality.frozen=false")
    assert code == 0 and report["episodes"] == {"new": 2, "already": 1, "quarantined": 0, "filtered": 2}


def test_encoders_share_one_pass_and_a_new_one_adds_to_the_old(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    raw, store, other = tmp_path / "raw", str(tmp_path / "store"), tmp_path / "other"
    raw.mkdir()
    write_demos(raw / "toy_demo.hdf5", demos=3, steps=20)
    AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).save_pretrained(other)
    assert ingest([str(raw)], store, IngestRecipe(image_size=64)).episodes["new"] == 3
    write_video(raw / "clip.mp4", numbered(90))
    both = ingest([str(raw)], store, IngestRecipe(image_size=64, encoder=["tiny", str(other)]))
    assert both.episodes == {"new": 4, "already": 0, "quarantined": 0, "filtered": 0} and both.bound_by
    assert ingest([str(raw)], store, IngestRecipe(image_size=64, encoder=[str(other)])).episodes["already"] == 4
    snapshot = LatentStore.open(store).snapshot()
    assert len(snapshot.episodes(["id"])) == 8 and not list(snapshot.verify())
    rows = {name: {row["id"]: row for row in snapshot.rows(encoder_digest(name))} for name in ("tiny", str(other))}
    assert rows["tiny"].keys() == rows[str(other)].keys() and len(rows["tiny"]) == 4
    for row, twin in zip(rows["tiny"].values(), (rows[str(other)][id] for id in rows["tiny"]), strict=True):
        if row["format"] == "hdf5":
            np.testing.assert_array_equal(snapshot.read([row["steps"]]), snapshot.read([twin["steps"]]))
        latents, theirs = (snapshot.read(one["cameras"][0]["segments"]) for one in (row, twin))
        assert latents.shape == theirs.shape and not np.array_equal(latents, theirs)
        statistics = snapshot.statistics([row["key"]], row["cameras"][0]["name"])
        assert statistics and statistics.count == row["frames"] * 64
        np.testing.assert_allclose(statistics.mean, latents.mean((0, 2, 3), dtype=np.float64), atol=1e-4)
        np.testing.assert_allclose(statistics.std, latents.std((0, 2, 3), dtype=np.float64), rtol=1e-4)


def test_nothing_that_one_input_holds_ends_the_ingest_of_the_others(
    tmp_path: Path, uwm: Uwm, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, store = tmp_path / "raw", tmp_path / "store"
    (raw / "sub").mkdir(parents=True)
    names = {b"good.mp4": "good.mp4", b"sub/\xb2\xe2.mp4": r"sub/\udcb2\udce2.mp4", b"\xff/x.mp4": r"\udcff/x.mp4"}
    (raw / os.fsdecode(b"\xff")).mkdir()
    for number, name in enumerate(names):
        write_video(tmp_path / "any.mp4", numbered(30 + number)).rename(raw / os.fsdecode(name))
    (raw / os.fsdecode(b"\xff") / os.fsdecode(b"cut\xfe.mp4")).write_bytes(b"cut")
    locked, beyond, surrogates = raw / "locked", raw / "beyond.mp4", raw / "half a pair.mp4"
    locked.mkdir()
    for place, frames in ((locked / "any.mp4", 10), (beyond, 11), (surrogates, 12)):
        write_video(place, numbered(frames))
    look, load, scan = video.detect, video.load, video.scan

    def refuse_to_look(path: Path) -> bool:
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    def number_beyond_int64(path: Path) -> Iterator[EpisodeRef]:
        for found in scan(path):
            yield replace(found, index=2**70) if found.uri == str(beyond) else found

    def half_a_surrogate_pair(ref: EpisodeRef) -> Episode:
        half = ref.uri == str(surrogates)
        return replace(load(ref), instruction="\ud83d", texts={"\ud83d": "\ud83d"}) if half else load(ref)

    monkeypatch.setattr(video, "detect", refuse_to_look)
    monkeypatch.setattr(video, "scan", number_beyond_int64)
    monkeypatch.setattr(video, "load", half_a_surrogate_pair)
    monkeypatch.setattr(local, "apart", in_this_process)
    code, report, err = uwm("ingest", raw, "--store", store, "--image-size", "64", "--json")
    assert code == 3 and report["episodes"] == {"new": 4, "already": 0, "quarantined": 3, "filtered": 0}, err
    rows = {row["uri"].removeprefix(f"{raw}/"): row for row in LatentStore.open(str(store)).snapshot().rows()}
    assert rows.keys() == {*names.values(), "half a pair.mp4"}
    assert rows["half a pair.mp4"]["instruction"] == r"\ud83d"
    reasons = {row["uri"].removeprefix(f"{raw}/"): row["reason"] for row in report["quarantine"]}
    assert reasons.keys() == {"locked", "beyond.mp4", r"\udcff/cut\udcfe.mp4"}
    assert "Permission denied" in reasons["locked"] and "check its permissions" in reasons["locked"]
    assert "OverflowError" in reasons["beyond.mp4"]
    code, report, _ = uwm("ingest", raw, "--store", store, "--image-size", "64", "--json")
    assert report["episodes"] == {"new": 0, "already": 4, "quarantined": 3, "filtered": 0}


@contextmanager
def in_this_process(function: Callable[..., Any], items: list[Any], **arguments: Any) -> Iterator[Iterator[Any]]:
    """In place of a decoding process, so that a test can replace what it calls."""
    yield (table for item in items for table in function(item, **arguments))


def test_an_episode_that_breaks_the_encoder_is_quarantined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_demos(tmp_path / "raw" / "toy_demo.hdf5", demos=3, steps=20)
    write_video(tmp_path / "raw" / "clip.mp4", numbered(21))
    encode = Encoder.encode

    def fail_for_the_video(encoder: Encoder, frames: np.ndarray) -> np.ndarray:
        if len(frames) > 1 and len(frames) % 20:
            raise RuntimeError("a shape that no kernel takes")
        return encode(encoder, frames)

    monkeypatch.setattr(Encoder, "encode", fail_for_the_video)
    report = ingest([str(tmp_path / "raw")], str(tmp_path / "store"), IngestRecipe(image_size=64))
    assert report.episodes == {"new": 3, "already": 0, "quarantined": 1, "filtered": 0}
    assert "cannot be encoded: RuntimeError: a shape" in report.quarantine[0]["reason"]

    def fail(encoder: Encoder, frames: np.ndarray) -> np.ndarray:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Encoder, "encode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):  # not any episode's fault
        ingest([str(tmp_path / "raw")], str(tmp_path / "other"), IngestRecipe(image_size=64))


@pytest.mark.parametrize("seconds", [60, 0])
def test_an_ingest_in_which_nothing_can_be_read(tmp_path: Path, uwm: Uwm, ray_cluster: None, seconds: int) -> None:
    for name in ("only.mp4", "two.mp4"):
        (tmp_path / name).write_text(f"not a film: {name}")
    store = tmp_path / "store"
    code, report, err = uwm("ingest", tmp_path, "--store", store, "--json", "--set", f"local_seconds={seconds}")
    assert code == 3 and report["episodes"] == {"new": 0, "already": 0, "quarantined": 2, "filtered": 0}, err


def test_a_source_that_is_no_file_is_refused_in_one_line(tmp_path: Path, uwm: Uwm) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for source in (tmp_path / "pipe.mp4", Path("/dev/null")):
        code, _, err = uwm("ingest", source, "--store", tmp_path / "store")
        assert code == 2 and err == f"error: {source}: neither a file nor a folder; copy what it yields to a file\n"


def test_an_archive_is_ingested_once_and_what_is_added_to_it(tmp_path: Path, uwm: Uwm) -> None:
    raw, store, archive = tmp_path / "raw", tmp_path / "store", tmp_path / "packed" / "set.zip"
    write_demos(raw / "robot" / "a.hdf5", demos=1, steps=20)
    archive.parent.mkdir()
    arguments = ("ingest", archive.parent, "--store", store, "--image-size", "32", "--json")

    def pack() -> None:
        shutil.make_archive(str(archive.with_suffix("")), "zip", raw)

    pack()
    assert uwm(*arguments)[1]["episodes"] == {"new": 1, "already": 0, "quarantined": 0, "filtered": 0}
    [row] = LatentStore.open(str(store)).snapshot().rows()
    assert (row["uri"], row["source"]) == (f"{archive}!/robot/a.hdf5", f"{archive}!/robot")
    folder = uwm("ingest", raw, "--store", store, "--image-size", "32", "--json")[1]
    assert folder["episodes"] == {"new": 0, "already": 1, "quarantined": 0, "filtered": 0}

    write_video(raw / "clip.mp4", moving(20))
    pack()
    (archive.parent / "cut.tar.gz").write_bytes(b"\x1f\x8b")
    code, report, err = uwm(*arguments)
    assert code == 3 and report["episodes"] == {"new": 1, "already": 1, "quarantined": 1, "filtered": 0}
    [bad] = report["quarantine"]
    assert bad["uri"] == f"{archive.parent}/cut.tar.gz" and "cut.tar.gz is damaged or cut" in bad["reason"]
    assert bad["reason"] in err
    assert uwm("store", "quarantine", store, "--json")[1] == [bad | {"filter": None}]
    shutil.move(shutil.make_archive(str(tmp_path / "whole"), "gztar", raw), archive.parent / "cut.tar.gz")
    code, report, _ = uwm(*arguments, "--retry")
    assert code == 0 and report["episodes"] == {"new": 0, "already": 4, "quarantined": 0, "filtered": 0}

    code, removed, _ = uwm("store", "remove", store, "--source", archive, "--json")
    assert code == 0 and {one["uri"] for one in removed["removed"]} == {
        f"{archive}!/robot/a.hdf5", f"{archive}!/clip.mp4",
    }  # fmt: skip
    assert uwm(*arguments)[1]["removed"] == 4
