"""What is found in a source, what is named although it is not read, and that nothing outside of it is read."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.formats import numbered, rlds_episode, write_calvin, write_demos, write_lerobot, write_rlds, write_video
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bridge import toy as raw_bridge
from test_droid import place
from test_droid import toy as raw_droid
from test_replay_buffer import pusht
from test_ros import scene, write_bag2, write_mcap

from preprocessing.episode import EpisodeRef
from preprocessing.errors import BadEpisode, UserError
from preprocessing.sources import episodes, find, load, survey

EXAMPLES = int(os.environ.get("UWM_FUZZ_EXAMPLES", "25"))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 9\n" % 0


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_video(tmp_path_factory.mktemp("film") / "a.mp4", numbered(3, 32)).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of each format, in a folder of its name."""
    top = tmp_path_factory.mktemp("whole")
    write_lerobot(top / "lerobot", rows=4, episodes=2)
    write_rlds(top / "rlds", [rlds_episode()])
    write_calvin(top / "calvin", numbered(4, 16), sentences={(358482, 358484): "push"})
    raw_droid(3, size=16).write(place(top / "droid"))
    raw_bridge(top / "bridge", steps=3)
    pusht(numbered(4, 16), [2, 4], top / "replay_buffer" / "a.zarr")
    (top / "ros").mkdir()
    write_bag2(top / "ros" / "bag", scene())
    write_demos(top / "hdf5" / "a.hdf5", demos=1)
    return top


def put(path: Path, data: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def refs_of(path: Path) -> list[EpisodeRef]:
    return [ref for _, ref in episodes(survey(path), lambda _: None)]


def names(refs: list[EpisodeRef]) -> list[str]:
    return sorted(Path(ref.uri).name for ref in refs if not ref.problem)


def problems(path: Path) -> dict[str, str]:
    return {Path(ref.uri).name: ref.problem for ref in refs_of(path) if ref.problem}


# -------------------- every byte goes in once


def hub(top: Path, film: bytes, snapshots: int = 1) -> Path:
    """A data set as huggingface_hub caches it."""
    cache = top / "datasets--x--y"
    for number in range(snapshots):
        blob = put(cache / "blobs" / f"{number:064d}", film + bytes(8 + number))
        link = cache / "snapshots" / f"{number:040d}" / "data" / "a.mp4"
        link.parent.mkdir(parents=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    put(cache / "refs" / "main", b"%040d" % 0)
    return cache


@pytest.mark.parametrize(
    "below", ["", "datasets--x--y", "datasets--x--y/snapshots", f"datasets--x--y/snapshots/{0:040d}"]
)
def test_of_a_hubs_cache_one_snapshot_is_read_and_no_blob(tmp_path: Path, film: bytes, below: str) -> None:
    hub(tmp_path, film, snapshots=3)
    found = survey(tmp_path / below)
    assert [path.name for _, path in found.places] == ["data"] and f"{0:040d}" in str(found.places[0][1])
    assert len(refs_of(tmp_path / below)) == 1 and not found.problems
    told = [note for note in found.notes if "of 3 snapshots, " in note]
    assert len(told) == (not below.endswith("0"))


def test_a_download_that_was_not_finished_is_named(tmp_path: Path, film: bytes) -> None:
    cache = hub(tmp_path, film)
    next((cache / "blobs").iterdir()).unlink()
    assert "which does not exist; finish the download" in problems(tmp_path)["a.mp4"]


@pytest.mark.parametrize(
    "copy, of",
    [
        ("GL010042.LRV", "GX010042.MP4"),
        ("GOPR0042.LRV", "GOPR0042.MP4"),
        ("DJI_0042.LRF", "DJI_0042.MP4"),
        ("c1_Proxy.mov", "c1.mp4"),
        ("Proxy/c1.mov", "c1.mp4"),
        ("M4ROOT/SUB/C0042S03.MP4", "M4ROOT/CLIP/C0042.MP4"),
        ("a_preview.mp4", "a.mp4"),
        ("preview.mp4", "a.mcap"),
        ("a.gif", "a.mkv"),
    ],
)
def test_proxies_and_previews_are_told_and_not_read(tmp_path: Path, film: bytes, copy: str, of: str) -> None:
    put(tmp_path / copy, film)
    put(tmp_path / of, film + bytes(8))
    found = survey(tmp_path)
    assert [file.name for file in found.copies] == [Path(copy).name]
    assert any(Path(copy).name in note for note in found.notes)
    assert Path(copy).name not in names(refs_of(tmp_path))
    (tmp_path / of).unlink()  # then it is the only one
    assert Path(copy).name in [Path(ref.uri).name for ref in refs_of(tmp_path)]


@pytest.mark.parametrize("format", ["lerobot", "rlds", "calvin", "bridge", "droid"])
def test_films_in_a_data_sets_folder_belong_to_it(tmp_path: Path, whole: Path, film: bytes, format: str) -> None:
    shutil.copytree(whole / format, tmp_path / "d")
    [(_, folder)] = find(tmp_path / "d")
    put(folder / "preview.mp4", film)
    put(folder / "previews" / "b.mp4", film)
    assert {ref.format for ref in refs_of(tmp_path)} == {format}


# -------------------- what nobody reads is named


def test_files_of_other_kinds_are_counted(tmp_path: Path, film: bytes) -> None:
    put(tmp_path / "ok.mp4", film)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        file.writestr("other", "x")
    put(tmp_path / "b.ZIP", (tmp_path / "set.zip").read_bytes())
    for name in ("notes.txt", "deep/c.svo", "README.txt", "LICENSE", "ok.json", ".hidden.zip", "raw"):
        put(tmp_path / name, b"x")
    found = survey(tmp_path)
    assert found.unread == {".zip": 2, ".txt": 1, ".svo": 1, "without a suffix": 1}
    assert found.notes == ["5 files of kinds that are not read: 2 .zip, 1 .svo, 1 .txt, 1 without a suffix"]
    assert names(refs_of(tmp_path)) == ["ok.mp4"] and not found.problems
    assert not survey(tmp_path, "video").notes  # the user asked for nothing else
    (tmp_path / "ok.mp4").unlink()
    with pytest.raises(UserError, match=r"no known format; expected .*; 5 files of kinds that are not read: 2 \.zip"):
        survey(tmp_path)


@pytest.mark.parametrize(
    "name", ["run.mcap", "run.bag", "run.db3", "a.tfrecord", "a.h5", "a.mp4", "a.tar", "a.zarr.zip"]
)
def test_an_empty_recording_is_named(tmp_path: Path, film: bytes, name: str) -> None:
    put(tmp_path / "ok.mov", film)
    put(tmp_path / name)
    assert [*problems(tmp_path)] == [name] and names(refs_of(tmp_path)) == ["ok.mov"]
    (tmp_path / "ok.mov").unlink()
    assert [*problems(tmp_path)] == [name]  # alone, too: nothing to ingest, and a reason


@pytest.mark.parametrize("name", ["a.mp4", "a.mcap", "a.h5", "a.tar", "a", "a.tfrecord", "b.zarr.zip"])
def test_an_unreadable_file_costs_only_itself(tmp_path: Path, film: bytes, name: str, monkeypatch) -> None:
    put(tmp_path / "ok.mov", film)
    shut, real = put(tmp_path / name, film), os.open

    def closed(path: object, *how: object) -> int:
        if Path(str(path)) == shut:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *how)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(os, "open", closed)  # the tests may run as root, who may read everything
    if name.endswith((".h5", ".zarr.zip", ".tar")):
        shut.chmod(0)
    assert names(refs_of(tmp_path)) == ["ok.mov"]
    assert [*problems(tmp_path)] == [name]


@pytest.mark.parametrize("make", ["fifo", "socket"])
def test_special_files_are_named_and_never_opened(tmp_path: Path, film: bytes, make: str) -> None:
    put(tmp_path / "ok.mp4", film)
    if make == "fifo":
        os.mkfifo(tmp_path / "a.mp4")
    else:
        here = Path.cwd()
        os.chdir(tmp_path)  # a socket's path may have 100 bytes
        socket.socket(socket.AF_UNIX).bind("a.mp4")
        os.chdir(here)
    assert "not a file" in problems(tmp_path)["a.mp4"] and names(refs_of(tmp_path)) == ["ok.mp4"]
    with pytest.raises(UserError, match="neither a file nor a folder"):
        find(tmp_path / "a.mp4")


# -------------------- a data set's files: pointers, pipes, links out

# One file of a data set that its episode needs, by the end of its path.
FILES = {
    "lerobot": ["episode_000000.parquet", "episode_000000.mp4", "info.json", "tasks.jsonl", "episodes.jsonl"],
    "rlds": ["-00000-of-00001", "features.json"],
    "calvin": ["episode_0358483.npz", "auto_lang_ann.npy"],
    "droid": ["trajectory.h5", ".mp4"],
    "bridge": ["obs_dict.pkl", "policy_out.pkl", "im_1.jpg"],
    "replay_buffer": ["img/.zarray", "img/0.0.0.0", "episode_ends/.zarray"],
    "ros": ["metadata.yaml", "bag.db3"],
    "hdf5": ["a.hdf5"],
}
CASES = [(format, file) for format, files in FILES.items() for file in files]


def spoilt(whole: Path, top: Path, format: str, file: str, how: Callable[[Path], object]) -> str:
    """Why episodes cannot be read, or not whole, once one of their files was replaced."""
    shutil.copytree(whole / format, top / "d" / "set", dirs_exist_ok=True)
    [found] = [path for path in (top / "d").rglob("*") if str(path).endswith(file) and "1.mp4" not in path.name][:1]
    shutil.move(found, top / "elsewhere")
    how(found)
    reasons = []
    for ref in refs_of(top / "d"):
        try:
            episode = load(ref)
            for video in episode.cameras.values():
                [*video.frames(8)]
            reasons += [repair.text for repair in episode.repairs]
        except BadEpisode as error:
            reasons.append(str(error))
    return " ".join(reasons)


@pytest.mark.parametrize("format, file", CASES)
def test_a_pointer_says_how_to_fetch_the_file(tmp_path: Path, whole: Path, format: str, file: str) -> None:
    said = spoilt(whole, tmp_path, format, file, lambda path: path.write_bytes(LFS))
    assert "Git LFS" in said and "git lfs pull" in said


@pytest.mark.parametrize("format, file", CASES)
def test_a_pipe_in_the_place_of_a_file_does_not_block(tmp_path: Path, whole: Path, format: str, file: str) -> None:
    assert spoilt(whole, tmp_path, format, file, os.mkfifo) is not None


@pytest.mark.parametrize("format, file", CASES)
def test_a_link_out_of_the_source_is_not_followed(tmp_path: Path, whole: Path, format: str, file: str) -> None:
    said = spoilt(whole, tmp_path, format, file, lambda path: path.symlink_to(tmp_path / "elsewhere"))
    assert "outside of the source" in said
    shutil.move(tmp_path / "elsewhere", tmp_path / "d" / "pool")
    [link] = [path for path in (tmp_path / "d").rglob("*") if path.is_symlink()]
    link.unlink()
    link.symlink_to(tmp_path / "d" / "pool")  # within it, links are followed
    assert not problems(tmp_path / "d") or "pool" in problems(tmp_path / "d")


def test_a_folder_or_film_that_is_linked_from_outside(tmp_path: Path, film: bytes) -> None:
    put(tmp_path / "other" / "secret.mp4", film)
    put(tmp_path / "d" / "ok.mp4", film + bytes(8))
    (tmp_path / "d" / "more").symlink_to(tmp_path / "other")
    (tmp_path / "d" / "b.mp4").symlink_to(tmp_path / "other" / "secret.mp4")
    assert names(refs_of(tmp_path / "d")) == ["ok.mp4"]
    assert all("outside of the source" in why for why in problems(tmp_path / "d").values())
    assert names(refs_of(tmp_path / "d" / "more")) == ["secret.mp4"]  # the user named the link
    assert names(refs_of(tmp_path / "d" / "b.mp4")) == ["b.mp4"]
    assert len(names(refs_of(tmp_path))) == 2 + 1  # the link to the file is the same episode


@pytest.mark.parametrize("store", [".git/annex/objects", ".dvc/cache"])
def test_a_repositorys_store_belongs_to_its_working_tree(tmp_path: Path, film: bytes, store: str) -> None:
    put(tmp_path / store / "ab" / "cd", film)
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.mp4").symlink_to(tmp_path / store / "ab" / "cd")
    assert names(refs_of(tmp_path / "films")) == ["a.mp4"]
    (tmp_path / store / "ab" / "cd").unlink()
    assert ("git annex get" if "annex" in store else "does not exist") in problems(tmp_path / "films")["a.mp4"]


def test_data_that_dvc_did_not_fetch_are_named(tmp_path: Path, film: bytes) -> None:
    put(tmp_path / "ok.mp4", film)
    for name in ("ok.mp4.dvc", "lost.mp4.dvc"):
        put(tmp_path / name, b"outs:\n- md5: 0\n  path: x\n")
    assert [*problems(tmp_path)] == ["lost.mp4.dvc"] and "dvc pull" in problems(tmp_path)["lost.mp4.dvc"]


# -------------------- recognised by content, not by name


@pytest.mark.parametrize(
    "file, data",
    [
        ("meta/info.json", b'{"dataset_name": "x"}'),
        ("meta/info.json", b"[]"),
        ("features.json", b"{}"),
        ("a.tfrecord", b"not a TFRecord, but notes on one"),
        ("ep_start_end_ids.npy", b"x"),
        ("trajectory.h5", b"x"),
        ("obs_dict.pkl", b"x"),
        ("metadata.yaml", b"title: a film"),
        ("meta/episode_ends/.zarray", b"x"),
        ("videos/../meta/.zgroup", b"{}"),
    ],
)
def test_a_foreign_file_of_a_known_name_hides_no_film(tmp_path: Path, film: bytes, file: str, data: bytes) -> None:
    put(tmp_path / "data" / "ok.mp4", film)
    put(tmp_path / "data" / "images0" / "ok.mp4", film)
    put(tmp_path / "videos" / "ok.mp4", film)
    for folder in (tmp_path, tmp_path / "data"):
        put(folder / file, data)
    films = [ref for ref in refs_of(tmp_path) if ref.format == "video"]
    assert len(films) == 3 and not any(ref.problem for ref in films)
    assert {ref.format for ref in refs_of(tmp_path)} <= {"video", "hdf5", "unreadable"}


def test_films_beside_a_replay_buffer_are_read(tmp_path: Path, whole: Path, film: bytes) -> None:
    shutil.copytree(whole / "replay_buffer", tmp_path / "d")
    put(tmp_path / "d" / "videos" / "0" / "0.mp4", film)
    put(tmp_path / "d" / "others" / "b.mp4", film)
    put(tmp_path / "d" / "c.mp4", film)
    found = survey(tmp_path)
    assert [(name, path.name) for name, path in found.places] == [
        ("replay_buffer", "d"),
        ("video", "d"),
        ("video", "others"),
    ]


@pytest.mark.parametrize("kind", ["mxf", "apng"])
def test_other_containers_that_ffmpeg_reads(tmp_path: Path, kind: str) -> None:
    codec, pixels = ("mpeg2video", "yuv420p") if kind == "mxf" else ("apng", "rgb24")
    write_video(tmp_path / f"a.{kind}", numbered(4, 32), fps=25, codec=codec, pix_fmt=pixels)
    [ref] = refs_of(tmp_path)
    assert sum(len(frames) for frames in load(ref).cameras["video"].frames(8)) == 4


@pytest.mark.parametrize("fps", [float("inf"), float("nan"), -5.0, 1e7])
@pytest.mark.parametrize("format", ["lerobot", "hdf5"])
def test_a_rate_that_is_none_is_refused(tmp_path: Path, whole: Path, format: str, fps: float) -> None:
    shutil.copytree(whole / format, tmp_path / "d")
    if format == "lerobot":
        info = tmp_path / "d" / "meta" / "info.json"
        info.write_text(json.dumps(json.loads(info.read_text()) | {"fps": fps}))
        for table in (tmp_path / "d").rglob("*.parquet"):
            pq.write_table(pq.read_table(table).drop_columns("timestamp"), table)
    else:
        with h5py.File(tmp_path / "d" / "a.hdf5", "a") as file:
            file["data"].attrs["fps"] = fps
    for ref in refs_of(tmp_path):
        try:
            assert 0 < load(ref).fps <= 1e4 and not fps > 0  # robomimic's reader takes its default
        except BadEpisode as error:
            assert "rate" in str(error)


def test_a_long_shard_that_is_broken_is_not_read_to_its_end(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole / "rlds", tmp_path / "d")
    with next((tmp_path / "d").glob("*.tfrecord*")).open("r+b") as file:
        file.seek(0, 2)
        file.truncate(file.tell() + 2**42)  # sparse; reading it would take an hour
    good, broken = refs_of(tmp_path)
    assert not good.problem and "wrong checksum" in str(broken.problem)


# -------------------- any name

NAMES = st.binary(min_size=1, max_size=40).map(os.fsdecode)
NAMES |= st.text(min_size=1, max_size=40)
NAMES |= st.sampled_from(
    ["-rf", "a\nb.mp4", "\u202egpj.mp4", "x" * 250, "\udcb2.mp4", "%d.mp4", "a:b.mp4", "concat:a", " "]
)


@settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(NAMES, st.sampled_from(["", ".mp4", ".tar", ".mcap", ".h5", ".zarr.zip", ".LRV"])), max_size=4)
)
def test_files_of_any_name_are_read_or_named(tmp_path: Path, film: bytes, parts: list[tuple[str, str]]) -> None:
    top = tmp_path / "any"
    put(top / "ok.mov", film)
    made = set()
    for number, (name, suffix) in enumerate(parts):
        for path in (top / f"{name}{suffix}", top / name / f"b{suffix or '.mp4'}"):
            with contextlib.suppress(OSError, ValueError):  # no name of a file here
                if "/" not in name and name not in (".", "..") and not name.startswith("."):
                    made.add(put(path, film + bytes(8 + number)))
    try:
        found = survey(top)
        for _, ref in episodes(found, lambda _: None):
            with contextlib.suppress(BadEpisode):
                assert load(EpisodeRef(**json.loads(json.dumps(asdict(ref))))).cameras
            made.discard(Path(ref.uri))
        quiet = [path for path in made - {*found.copies} if path.suffix in (".mp4", ".tar", ".mcap", ".h5", ".zip")]
        assert not quiet
    finally:
        shutil.rmtree(top)


def test_one_mcap_is_one_episode(tmp_path: Path) -> None:
    write_mcap(tmp_path / "a.mcap", scene())
    shutil.copy(tmp_path / "a.mcap", tmp_path / "b")  # by content
    found = survey(tmp_path)
    assert [name for name, _ in found.places] == ["ros"] and not found.problems and not found.unread
    assert json.dumps(found.notes) == "[]" and np.size(refs_of(tmp_path)) == 2
