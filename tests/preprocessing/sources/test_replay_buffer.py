"""Replay buffers as Diffusion Policy and UMI write them, with real frames, and malicious or broken ones."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from functools import cache
from pathlib import Path

import av
import imagecodecs
import numcodecs
import numpy as np
import pytest
import zarr
from helpers.formats import REAL, numbered, quadrants, write_video
from helpers.readers import episodes_of, frames_of, real, refs_of, said
from hypothesis import given, settings
from hypothesis import strategies as st
from imagecodecs.numcodecs import Jpegxl

from preprocessing.contracts.contract import DataContract
from preprocessing.errors import BadEpisode, UserError
from preprocessing.sources import digest, find, load

DISK = numcodecs.Blosc("zstd", clevel=5, shuffle=numcodecs.Blosc.BITSHUFFLE)  # PushT's compressor


@cache
def real_frames(number: int, size: int) -> np.ndarray:
    """Every fifth frame of a GR1 video, cropped to a central square."""
    video_file = REAL / f"gr1_lerobot_v2/videos/chunk-000/observation.images.ego_view/episode_{number:06d}.mp4"
    with av.open(str(video_file)) as container:
        frames = [f.to_ndarray(format="rgb24") for at, f in enumerate(container.decode(video=0)) if at % 5 == 0]
    images = np.stack(frames[:12])
    step = min(images.shape[1:3]) // size
    return np.ascontiguousarray(images[:, : size * step : step, : size * step : step])


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(((one.astype(float) - other) ** 2).mean(), 1e-9)))


def write_buffer(
    path: Path, data: dict, ends: list[int], chunks: dict | None = None, packed: dict | None = None
) -> Path:
    """Write a Zarr v2 group with the zarr library. ``chunks`` and ``packed`` (compressors) are by array name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    store = zarr.storage.ZipStore(path, mode="w") if path.suffix == ".zip" else zarr.storage.LocalStore(path)
    root = zarr.open_group(store, mode="w", zarr_format=2)
    for name, values in [*data.items(), ("episode_ends", np.array(ends))]:
        array = root.create_array(
            f"data/{name}" if name in data else "meta/episode_ends",
            shape=values.shape,
            dtype=values.dtype,
            chunks=(chunks or {}).get(name, values.shape),
            compressors=(packed or {}).get(name, DISK),
            config={"write_empty_chunks": True},
        )
        array[...] = values
    store.close()
    return path


def pusht(frames: np.ndarray, ends: list[int], path: Path, **more: np.ndarray) -> tuple[Path, dict]:
    rng = np.random.default_rng(7)  # a longer buffer begins with the rows of a shorter one
    rows = rng.normal(200, 50, (100, 40)).astype(np.float32)[: len(frames)]
    data = {
        "img": frames.astype(np.float32),
        "action": rows[:, :2],
        "state": rows[:, 2:7],
        "keypoint": rows[:, 7:25].reshape(-1, 9, 2),
        "n_contacts": rows[:, 25:26],
        **more,
    }
    return write_buffer(path, data, ends, {"img": (5, *frames.shape[1:]), "action": (7, 2), "state": (4, 5)}), data


def umi(frames: np.ndarray, ends: list[int], path: Path, robots: int = 1) -> tuple[Path, dict]:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(100, 60)).astype(np.float32)[: len(frames)]
    data: dict[str, np.ndarray] = {}
    for robot in range(robots):
        own = rows[:, 20 * robot :]
        data[f"robot{robot}_eef_pos"] = own[:, :3]
        data[f"robot{robot}_eef_rot_axis_angle"] = own[:, 3:6]
        data[f"robot{robot}_gripper_width"] = own[:, 6:7]
        data[f"robot{robot}_demo_start_pose"] = own[:, 7:13].astype(np.float64)
        data[f"robot{robot}_demo_end_pose"] = own[:, 13:19].astype(np.float64)
        data[f"camera{robot}_rgb"] = frames if robot == 0 else frames[:, ::-1]
    lossy = Jpegxl(level=99, lossless=False, numthreads=1)
    cameras = {name: (1, *frames.shape[1:]) for name in data if name.startswith("camera")}
    packed = {name: lossy if name in cameras else None for name in data}
    return write_buffer(path, data, ends, cameras, packed), data


def repacked(folder: Path, path: Path, root: str = "", method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for member in sorted(folder.rglob("*")):
            if member.is_file():
                file.write(member, root + str(member.relative_to(folder)))
    return path


def old(folder: Path) -> None:
    """Set mtimes an hour back; ctime cannot be set."""
    for file in folder.rglob("*"):
        os.utime(file, (file.stat().st_mtime - 3600,) * 2)


# ------------------------------------------------------------------------------------------------ what is published


@real
def test_pusht(tmp_path):
    frames = np.concatenate([real_frames(0, 96), real_frames(1, 96)])
    path, data = pusht(frames, [9, 24], tmp_path / "pusht_cchi_v7_replay.zarr")
    assert find(tmp_path) == [("replay_buffer", path)]
    first, second = episodes_of(tmp_path)
    for episode, rows in ((first, slice(0, 9)), (second, slice(9, 24))):
        assert np.array_equal(frames_of(episode, "img"), frames[rows])
        assert np.array_equal(episode.action, data["action"][rows])
        assert np.array_equal(episode.proprio["agent_pos"], data["state"][rows, :2])
        assert np.array_equal(episode.signals["state"], data["state"][rows])
        assert np.array_equal(episode.signals["keypoint"], data["keypoint"][rows].reshape(-1, 18))
        assert np.array_equal(episode.signals["n_contacts"], data["n_contacts"][rows])
        assert list(episode.proprio) == ["agent_pos"]
        assert (episode.embodiment, episode.fps) == ("pusht", 10.0)
    assert frames_of(first, "img", 32).shape == (9, 32, 32, 3)
    assert [block.mode for block in first.action_layout] == ["absolute"]
    assert any("10 Hz assumed" in repair for repair in said(first))
    assert any("only the agent's position" in repair for repair in said(first))


def test_a_contract_settles_rate_and_robot(tmp_path):
    [ref] = refs_of(write_buffer(tmp_path / "a.zarr", {"img": numbered(6), "agent_pos": np.zeros((6, 2))}, [6]))
    assert [repair.field for repair in load(ref).repairs] == ["fps", "embodiment", "action"]
    episode = load(ref, DataContract(fps=12, embodiment="arm"))
    assert episode.fps == 12 and said(episode) == ["no actions are recorded"]


@real
@pytest.mark.parametrize("robots", [1, 2])
def test_umi(tmp_path, robots):
    frames = np.concatenate([real_frames(0, 112), real_frames(1, 112)])
    path, data = umi(frames, [10, 24], tmp_path / "dataset.zarr.zip", robots)
    for episode, rows in zip(episodes_of(path), (slice(0, 10), slice(10, 24)), strict=True):
        for robot in range(robots):
            seen, recorded = frames_of(episode, f"camera{robot}_rgb"), data[f"camera{robot}_rgb"][rows]
            assert len(seen) == len(recorded)
            for at, image in enumerate(seen):
                assert psnr(image, recorded[at]) > 35
                assert psnr(image, recorded[at]) > psnr(image[..., ::-1], recorded[at]) + 5
            parts = ("eef_pos", "eef_rot_axis_angle", "gripper_width")
            pose = np.concatenate([data[f"robot{robot}_{part}"][rows] for part in parts], axis=1)
            action = episode.action[:, 7 * robot : 7 * robot + 7]
            assert np.array_equal(action[:-1], pose[1:]) and np.array_equal(action[-1], pose[-1])
            assert np.array_equal(episode.proprio[f"robot{robot}_eef_pos"], pose[:, :3])
            start = data[f"robot{robot}_demo_start_pose"][rows]
            assert np.allclose(episode.signals[f"robot{robot}_demo_start_pose"], start)
        assert len(episode.proprio) == 3 * robots and len(episode.signals) == 2 * robots
        assert [b.name for b in episode.action_layout][:3] == ["robot0_position", "robot0_rotation", "robot0_gripper"]
        assert episode.action_layout[1].representation == "axis_angle"
        for block in episode.action_layout:
            assert block.mode == "absolute" and block.unit == ("rad" if block.kind == "rotation" else "m")
            assert block.kind == "gripper" or block.frame == "base"
            assert block.kind != "gripper" or block.gripper_one_means == "open"
        assert (episode.embodiment, episode.fps) == ("umi", 59.94)
        assert "no actions are recorded; the next pose is used as the action" in said(episode)
        assert "the rate is not recorded; 59.94 Hz assumed, a GoPro's rate" in said(episode)


@real
def test_videos_next_to_a_buffer(tmp_path):
    """As the real robot's recorder writes: steps at 10 Hz, videos at 30 Hz."""
    rng = np.random.default_rng(0)
    steps, videos = [6, 8], {}
    data = {
        "action": rng.normal(size=(14, 6)),
        "robot_eef_pose": rng.normal(size=(14, 6)),
        "robot_joint": rng.normal(size=(14, 6)),
        "stage": np.arange(14) // 7,
        "timestamp": 1.67e9 + np.concatenate([np.arange(6), 100 + np.arange(8)]) * 0.1,
    }
    write_buffer(tmp_path / "real" / "replay_buffer.zarr", data, [6, 14])
    for episode, count in enumerate(steps):
        folder = tmp_path / "real" / "videos" / str(episode)
        folder.mkdir(parents=True)
        for camera in (0, 2):
            videos[episode, camera] = shown = real_frames(episode + camera, 96)[:count].copy()
            for at in range(count):  # the robot hardly moves in these videos
                shown[at, :8, 8 * at : 8 * at + 8] = 255
            shown = shown.repeat(3, axis=0)
            write_video(folder / f"{camera}.mp4", np.concatenate([shown, shown[-2:]]), fps=30, crf="8")
    assert find(tmp_path) == [("replay_buffer", tmp_path / "real")]
    start = 0
    for number, episode in enumerate(episodes_of(tmp_path)):
        rows = slice(start, start + steps[number])
        start += steps[number]
        assert episode.fps == 10.0 and set(episode.cameras) == {"camera_0", "camera_2"}
        for camera in (0, 2):
            seen = frames_of(episode, f"camera_{camera}")
            assert len(seen) == steps[number]
            for at, image in enumerate(seen):
                quality = [psnr(image, recorded) for recorded in videos[number, camera]]
                assert quality[at] > 33 and quality[at] == max(quality)
        assert np.allclose(episode.action, data["action"][rows])
        assert np.allclose(episode.proprio["robot_joint"], data["robot_joint"][rows])
        assert np.allclose(episode.signals["timestamp"][:, 0], np.arange(steps[number]) * 0.1, atol=1e-5)
        assert [block.kind for block in episode.action_layout] == ["position", "rotation"]
        assert not any("rate" in repair for repair in said(episode))

    before = refs_of(tmp_path)
    assert [digest(ref) for ref in before] == [ref.digest for ref in before]
    write_video(tmp_path / "real/videos/1/0.mp4", numbered(18), fps=30)  # six of eight steps
    after = refs_of(tmp_path)
    assert after[0].digest == before[0].digest and after[1].digest != before[1].digest
    episode = load(after[1])
    assert len(frames_of(episode, "camera_2")) == len(episode.action) == len(episode.signals["stage"]) == 6
    assert "the videos end 2 steps before the log, which is cut there" in said(episode)
    write_video(tmp_path / "real/videos/1/0.mp4", numbered(8), fps=5)
    with pytest.raises(BadEpisode, match=r"0\.mp4 has 5 frames a second, fewer than the log's 10 steps"):
        load(refs_of(tmp_path)[1])
    (tmp_path / "real/videos/0/2.mp4").unlink()
    assert [ref.problem for ref in refs_of(tmp_path)] == ["videos/0/2.mp4 is missing", None]
    shutil.rmtree(tmp_path / "real/videos")
    with pytest.raises(BadEpisode, match="has no images: no array of them under data/"):
        load(refs_of(tmp_path / "real/replay_buffer.zarr")[0])


@real
def test_images_of_other_kinds(tmp_path):
    frames = real_frames(0, 48)
    data = {
        "first": frames.transpose(0, 3, 1, 2).copy(),
        "share": (frames / 255).astype(np.float32),
        "black": np.concatenate([np.zeros_like(frames[:3]), frames[3:]]).astype(np.float32),
        "near": np.maximum(frames - 0.3, 0).astype(np.float32),
        "corners": np.arange(12 * 48.0).reshape(12, 4, 4, 3),
        "depth": np.zeros((12, 48, 48), np.uint16),
        "point_cloud": np.zeros((12, 512, 6), np.float32),
        "words": np.array(["push"] * 12),
        "agent_pos": np.arange(24.0).reshape(12, 2),
    }
    [episode] = episodes_of(write_buffer(tmp_path / "a.zarr", data, [12], {"black": (1, 20, 48, 3)}))
    assert set(episode.cameras) == {"first", "share", "black", "near"}
    assert np.array_equal(frames_of(episode, "near"), frames)
    assert np.array_equal(frames_of(episode, "first"), frames)
    assert np.array_equal(frames_of(episode, "share"), frames)
    assert np.array_equal(frames_of(episode, "black")[3:], frames[3:]) and not frames_of(episode, "black")[:3].any()
    assert (episode.action, episode.action_layout, episode.embodiment) == (None, (), "unknown")
    assert list(episode.proprio) == ["agent_pos"] and list(episode.signals) == ["corners"]
    assert np.array_equal(episode.signals["corners"], data["corners"].reshape(12, 48))
    for text in (
        "first has its channels first; moved last",
        "share is recorded from 0 to 1; scaled to 0 to 255",
        "depth is (48, 48) numbers per step, neither RGB nor a vector; dropped",
        "point_cloud is (512, 6) numbers per step, neither RGB nor a vector; dropped",
        "data/words holds <U4, not numbers; dropped",
        "no actions are recorded",
    ):
        assert text in said(episode)


@pytest.mark.parametrize(
    "compressor",
    [None, numcodecs.Zstd(), numcodecs.LZ4(), numcodecs.Zlib(), numcodecs.GZip(), numcodecs.BZ2(), numcodecs.LZMA()]
    + [numcodecs.Blosc(name) for name in ("lz4", "lz4hc", "blosclz", "zlib", "zstd")],
    ids=str,
)
def test_compressors(tmp_path, compressor):
    data = {"img": numbered(9, 16), "action": np.arange(18, dtype=">f8").reshape(9, 2)}
    path = write_buffer(tmp_path / "a.zarr", data, [4, 9], {"img": (2, 16, 7, 3)}, dict.fromkeys(data, compressor))
    _, episode = episodes_of(path)
    assert np.array_equal(frames_of(episode, "img"), data["img"][4:])
    assert np.array_equal(episode.action, data["action"][4:])


def test_chunk_orders_and_separators(tmp_path):
    data = {"img": numbered(9, 16), "action": np.arange(27, dtype="<f4").reshape(9, 3)}
    path = write_buffer(tmp_path / "a.zarr", data, [4, 9])
    for name, values, chunks in (("img", data["img"], (2, 16, 7, 3)), ("action", data["action"], (2, 2))):
        shutil.rmtree(path / "data" / name)
        array = zarr.open_group(path, zarr_format=2).create_array(
            f"data/{name}",
            shape=values.shape,
            dtype=values.dtype,
            chunks=chunks,
            order="F",
            chunk_key_encoding={"name": "v2", "separator": "/"},
            fill_value=3,
        )
        array[...] = values
    store = zarr.open_group(path, zarr_format=2)
    gone = store.create_array("data/gone", shape=(9, 2), dtype="<f4", chunks=(2, 2), fill_value=3)
    gone[:4] = 1
    assert (path / "data/img/0/0/1/0").is_file() and json.loads((path / "data/img/.zarray").read_text())["order"] == "F"
    first, second = episodes_of(path)
    assert np.array_equal(frames_of(second, "img"), data["img"][4:])
    assert np.array_equal(second.action, data["action"][4:])
    assert (first.signals["gone"] == 1).all() and (second.signals["gone"] == 3).all()


def test_zip_files_with_several_buffers(tmp_path):
    path, _ = pusht(numbered(6, 16), [6], tmp_path / "a.zarr")
    with zipfile.ZipFile(tmp_path / "extra.zip", "w") as file:
        for member in sorted(path.rglob("*")):
            if member.is_file():
                info = zipfile.ZipInfo(str(member.relative_to(path)))
                info.extra = b"\xfe\xca\4\0time"  # as Info-ZIP writes
                file.writestr(info, member.read_bytes())
    [episode] = episodes_of(tmp_path / "extra.zip")
    assert np.array_equal(frames_of(episode, "img"), numbered(6, 16))
    repacked(path, tmp_path / "two.zip", "one/")
    with zipfile.ZipFile(tmp_path / "two.zip", "a") as file:
        file.write(path / "meta/episode_ends/.zarray", "two/meta/episode_ends/.zarray")
    [ref] = refs_of(tmp_path / "two.zip")
    assert ref.problem == "a zip file with 2 meta/episode_ends/.zarray instead of one"


def test_where_buffers_are_found(tmp_path):
    """A buffer's folder is closed; zip files may be among other files."""
    path, _ = pusht(numbered(6, 16), [6], tmp_path / "many" / "a.zarr")
    repacked(path, tmp_path / "many" / "b.zarr.zip")
    repacked(path, tmp_path / "many" / "pusht.zip", root="pusht/a.zarr/", method=zipfile.ZIP_DEFLATED)
    (tmp_path / "many" / "cut.zarr.zip").write_bytes((tmp_path / "many" / "b.zarr.zip").read_bytes()[:-300])
    (tmp_path / "many" / "other.zip").write_bytes(b"PK\x03\x04 nothing")
    write_video(tmp_path / "many" / "video_file.mp4", numbered(3))
    assert [(format, found.name) for format, found in find(tmp_path)] == [
        ("replay_buffer", "many"),
        ("video", "many"),
        ("replay_buffer", "a.zarr"),
    ]
    refs = [ref for ref in refs_of(tmp_path) if ref.format == "replay_buffer"]
    assert {Path(ref.uri).name: ref.problem for ref in refs} == {
        "b.zarr.zip": None,
        "cut.zarr.zip": "cannot be read as a zip file: File is not a zip file",
        "pusht.zip": None,
        "a.zarr": None,
    }
    assert len({ref.id for ref in refs if not ref.problem}) == 1
    assert np.array_equal(frames_of(load(refs[2]), "img"), numbered(6, 16))


# ----------------------------------------------------------------------------------------------------------- digests


@pytest.mark.parametrize("write", [pusht, umi])
def test_a_digest_covers_only_its_episode(tmp_path, write):
    frames = numbered(20, 32)
    path, _ = write(frames[:13], [6, 13], tmp_path / "a.zarr")
    before = [ref.digest for ref in refs_of(path)]
    assert [digest(ref) for ref in refs_of(path)] == before and len(set(before)) == 2
    assert [ref.digest for ref in refs_of(repacked(path, tmp_path / "b.zarr.zip"))] == before
    assert [ref.digest for ref in refs_of(write(frames, [6, 13, 20], tmp_path / "c.zarr")[0])][:2] == before
    assert [ref.digest for ref in refs_of(write(frames, [6, 13, 20], tmp_path / "d.zarr.zip")[0])][:2] == before
    shutil.move(path, tmp_path / "renamed.zarr")
    assert [ref.digest for ref in refs_of(tmp_path / "renamed.zarr")] == before

    frames = frames.copy()
    frames[8, 3, 3, 0] += 60
    after = [ref.digest for ref in refs_of(write(frames[:13], [6, 13], tmp_path / "e.zarr")[0])]
    assert after[0] == before[0] and after[1] != before[1]


def test_a_folder_is_cached_until_a_file_in_it_changes(tmp_path, monkeypatch):
    path, _ = umi(numbered(6, 32), [3, 6], tmp_path / "a.zarr")
    old(path)
    now = [2_000_000_000]  # a clock far enough ahead for all files to be at rest
    monkeypatch.setattr("time.time_ns", lambda: now[0] * 10**9)
    before = refs_of(path)
    chunk = path / "data/camera0_rgb/4.0.0.0"
    status = chunk.stat()
    assert refs_of(path) == before

    changed = bytearray(chunk.read_bytes())
    changed[-20] ^= 1
    chunk.write_bytes(changed)
    os.utime(chunk, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time of writing
    after = refs_of(path)
    assert after[0] == before[0] and after[1].digest != before[1].digest
    chunk.unlink()
    assert [ref.problem for ref in refs_of(path)] == [None, "chunk data/camera0_rgb/4.0.0.0 is missing"]


def test_digest_reads_the_files_again(tmp_path):
    path, data = pusht(numbered(12, 16), [6, 12], tmp_path / "a.zarr")
    _, ref = refs_of(path)
    write_buffer(path, {**data, "n_contacts": data["n_contacts"] + 1}, [6, 12])
    assert digest(ref) != ref.digest
    write_buffer(path, data, [12])
    with pytest.raises(BadEpisode, match="the buffer now has only 1 episodes"):
        digest(ref)
    shutil.rmtree(path)
    with pytest.raises(BadEpisode):
        digest(ref)


# ------------------------------------------------------------------------------------------------------- what is broken


def test_a_broken_chunk_costs_its_episodes(tmp_path):
    frames = numbered(20, 16)
    path, _ = pusht(frames, [4, 10, 20], tmp_path / "a.zarr")
    (path / "data/img/1.0.0.0").write_bytes(b"\x02\x01\x11\x04 nonsense")  # rows 5 to 9
    refs = refs_of(path)
    assert [ref.problem for ref in refs] == [
        None,
        "chunk 1.0.0.0 of data/img cannot be decompressed: its header declares another size",
        None,
    ]
    assert np.array_equal(frames_of(load(refs[0]), "img"), frames[:4])
    assert np.array_equal(frames_of(load(refs[2]), "img"), frames[10:])


def test_a_flipped_bit_in_a_zip_is_found(tmp_path):
    path, _ = umi(numbered(6, 32), [3, 6], tmp_path / "a.zarr.zip")
    with zipfile.ZipFile(path) as file:
        info = file.getinfo("data/camera0_rgb/4.0.0.0")
    data = bytearray(path.read_bytes())
    data[info.header_offset + 80] ^= 4
    path.write_bytes(data)
    assert [ref.problem for ref in refs_of(path)] == [
        None,
        "data/camera0_rgb/4.0.0.0 does not match its checksum",
    ]


def mend(path: Path, name: str, **changes: object) -> None:
    file = path / name / ".zarray"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "name, changes, says",
    [
        ("data/img", {"dtype": "|O", "filters": [{"id": "pickle"}]}, "has no images"),
        ("data/img", {"filters": [{"id": "pickle", "protocol": 5}]}, "data/img has filters, which are not supported"),
        ("data/img", {"compressor": {"id": "pickle"}}, "data/img is compressed with pickle, which is not supported"),
        ("data/img", {"compressor": {"id": ["zlib"]}}, "is compressed with"),
        ("data/img", {"dtype": [["x", "|O"]]}, "has no images"),
        ("data/img", {"chunks": [10**9, 16, 16, 3]}, "a chunk of data/img decompresses to more than"),
        ("data/img", {"chunks": [1, 10**9, 16, 3]}, "a chunk of data/img decompresses to more than"),
        ("data/img", {"shape": [12, 10**6, 10**6, 3]}, "a row of data/img has 12000000000000 bytes"),
        ("data/img", {"shape": [12, 0, 16, 3], "chunks": [10**30, 1, 1, 1]}, "a row of data/img has 0 bytes"),
        ("data/img", {"chunks": [1, 1, 1, 1], "shape": [12, 99, 99, 3]}, "more than 1024 chunks per row"),
        ("data/img", {"chunks": [5, 16, 16]}, "4 dimensions, its chunks 3"),
        ("data/img", {"chunks": [0, 16, 16, 3]}, "is not Zarr v2 metadata"),
        ("data/img", {"fill_value": [1]}, "a fill value that is not a number"),
        ("data/img", {"zarr_format": 3}, "is not Zarr v2 metadata"),
        ("data/img", {"shape": [11, 16, 16, 3]}, "img has 11 rows, but the episode ends at 12"),
        ("data/img", {"dtype": "<f8"}, "cannot be decompressed"),
        ("data/action", {"shape": [10**15, 99], "chunks": [1, 99]}, "is missing"),
        (
            "data/action",
            {"shape": [12, 2, 2], "chunks": [7, 2, 2]},
            "chunk 0.0.0 of data/action|chunk data/action/0.0.0",
        ),
        ("meta/episode_ends", {"shape": [10**12], "chunks": [10**6]}, "is not a list of steps"),
        ("meta/episode_ends", {"shape": [9]}, "is missing"),
        ("meta/episode_ends", {"dtype": "<f8"}, "is not a list of steps"),
        ("meta/episode_ends", {"shape": [0]}, "is not a list of steps"),
        ("meta/episode_ends", {"dtype": ">i8"}, "does not ascend"),
    ],
)
def test_hostile_metadata(tmp_path, monkeypatch, name, changes, says):
    monkeypatch.chdir(tmp_path)
    path, _ = pusht(numbered(12, 16), [12], tmp_path / "a.zarr")
    (path / "data/img/0.0.0.0").write_bytes(pickle.dumps(Exploit())) if "pickle" in str(changes) else None
    mend(path, name, **changes)
    tracemalloc.start()
    with pytest.raises(BadEpisode, match=says):
        read_all(path)
        raise BadEpisode("nothing was wrong")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert not (tmp_path / "executed").exists()


def read_all(path: Path) -> None:
    for ref in refs_of(path):
        episode = load(ref)
        for camera in episode.cameras.values():
            for chunk in camera.frames(None):
                assert chunk.dtype == np.uint8 and chunk.ndim == 4 and chunk.shape[3] == 3 and len(chunk) <= 64


@pytest.mark.parametrize("ends", [[6, 6, 12], [8, 4, 12], [-3, 12], [10**9]])
def test_invalid_episodes(tmp_path, ends):
    path, _ = pusht(numbered(12, 16), ends, tmp_path / "a.zarr")
    problems = [ref.problem for ref in refs_of(path)]
    if ends == [6, 6, 12]:
        assert problems == [None, "holds no step", None]
    else:
        assert len(problems) == 1 and "does not ascend" in str(problems)


READ = """
import json, resource, sys
from preprocessing.errors import BadEpisode
from preprocessing.sources import find, load, scan
import preprocessing.sources.replay_buffer.reader, imagecodecs
imagecodecs.jpegxl_decode(imagecodecs.jpegxl_encode(__import__("numpy").zeros((16, 16, 3), "u1")))  # loads the library
before, said = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
for format, path in find(sys.argv[1]):
    for ref in scan(format, path):
        try:
            for chunk in load(ref).cameras["img"].frames(None):
                pass
            said[path.name] = "nothing"
        except BadEpisode as error:
            said[path.name] = str(error)
print(json.dumps([said, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


def test_chunks_that_decompress_to_more(tmp_path):
    """48 MB of zeros in a few kB, where an image of 768 bytes is expected. Resident memory is measured."""
    zeros = np.zeros((4096, 4096, 3), np.uint8)
    codecs = [numcodecs.Blosc(), numcodecs.Zstd(), numcodecs.LZ4(), numcodecs.Zlib(), numcodecs.GZip(), numcodecs.BZ2()]
    for codec in [*codecs, numcodecs.LZMA(preset=0), Jpegxl(), None]:
        name = codec.codec_id if codec else "none"
        if name == "imagecodecs_jpegxl":
            packed = imagecodecs.jpegxl_encode(zeros, effort=1)
        else:
            packed = bytes(codec.encode(zeros.ravel())) if codec else bytes(2**20)
        path = tmp_path / f"{name}.zarr"
        write_buffer(path, {"img": numbered(2, 16)}, [2], {"img": (1, 16, 16, 3)}, {"img": codec})
        (path / "data/img/1.0.0.0").write_bytes(packed)
    command = [sys.executable, "-c", READ, str(tmp_path)]
    reasons, kilobytes = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert len(reasons) == 9 and kilobytes < 2**14
    for name, reason in reasons.items():
        assert "1.0.0.0 of data/img cannot be decompressed" in reason or "1.0.0.0 has " in reason, name


def test_chunks_that_are_not_stored(tmp_path):
    path, _ = pusht(numbered(12, 16), [6, 12], tmp_path / "a.zarr")
    (path / "data/state/2.0").unlink()  # rows 8 to 11
    first, second = episodes_of(path)
    assert not second.signals["state"][2:].any() and first.signals["state"].all()
    text = "1 chunks of state are not stored; read as its fill value, as Zarr specifies"
    assert text in said(second) and text not in said(first)
    (path / "data/action/1.0").unlink()  # rows 7 to 11
    assert [ref.problem for ref in refs_of(path)] == [None, "chunk data/action/1.0 is missing"]


def test_values_that_are_not_colours(tmp_path):
    for number, (values, says) in enumerate([(300.0, "from 300 to 300"), (np.nan, "nan"), (-1.0, "from -1 to")]):
        img = np.full((3, 16, 16, 3), values, np.float32)
        with pytest.raises(BadEpisode, match=says):
            read_all(write_buffer(tmp_path / f"{number}.zarr", {"img": img}, [3]))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A few valid buffers, and the bytes of each of their files."""
    folder = tmp_path_factory.mktemp("small")
    frames = np.stack([quadrants(16)] * 6)
    first, _ = pusht(frames, [2, 6], folder / "a.zarr")
    second, _ = umi(frames, [2, 6], folder / "b.zarr")
    zips = [repacked(second, folder / "c.zarr.zip"), repacked(first, folder / "d.zarr.zip", "x/", zipfile.ZIP_DEFLATED)]
    files = [(path, file) for path in (first, second) for file in sorted(path.rglob("*")) if file.is_file()]
    return [(path, file, file.read_bytes()) for path, file in [*files, *((path, path) for path in zips)]]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_bytes_are_read_or_refused(small, data):
    kind = data.draw(st.sampled_from([".zarray", "chunk", ".zip"]))
    kinds = {".zarray": lambda f: f.name == ".zarray", "chunk": lambda f: f.name[0].isdigit()}
    chosen = kinds.get(kind, lambda f: f.suffix == ".zip")
    path, file, content = data.draw(st.sampled_from([entry for entry in small if chosen(entry[1])]))
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(changed) - 1))
        new = data.draw(st.binary(max_size=4))
        changed[at : at + data.draw(st.integers(0, 4))] = new
    file.write_bytes(changed)
    tracemalloc.start()
    try:
        for ref in refs_of(path):
            with contextlib.suppress(BadEpisode):
                assert digest(ref)
            with contextlib.suppress(BadEpisode):
                for camera in load(ref).cameras.values():
                    for chunk in camera.frames(None):
                        assert chunk.dtype == np.uint8
    except UserError:
        pass  # no longer recognised as a buffer
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        file.write_bytes(content)
    assert peak < 2**26
