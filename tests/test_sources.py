"""Every reader on files written here, on the real pieces beside the checkout, and on files that lie or are broken."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import pickle
import re
import shutil
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import av
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from formats import (
    REAL,
    as_lerobot_v3,
    encode_example,
    jpeg,
    moving,
    numbered,
    quadrants,
    rlds_episode,
    write_aloha,
    write_calvin,
    write_demos,
    write_lerobot,
    write_rlds,
    write_tfds,
    write_video,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing import limits
from preprocessing.contract import DataContract
from preprocessing.episode import ActionBlock, BadEpisode, Episode, EpisodeRef, UserError
from preprocessing.excerpts import excerpt, excerpt_digests
from preprocessing.sources import digest, find, load, scan
from preprocessing.sources.pickles import read_npy, read_pickle
from preprocessing.sources.tfrecord import parse_example
from preprocessing.video import open_video

real = pytest.mark.skipif(not REAL.exists(), reason=f"no real data at {REAL}")


def refs_of(path: Path) -> list[EpisodeRef]:
    return [ref for format, found in find(path) for ref in scan(format, found)]


def episodes_of(path: Path) -> list[Episode]:
    return [load(pickle.loads(pickle.dumps(ref))) for ref in refs_of(path)]


def frames_of(episode: Episode, camera: str, size: int | None = None) -> np.ndarray:
    return np.concatenate(list(episode.cameras[camera].frames(size)))


def sizes(layout: tuple[ActionBlock, ...]) -> dict[str, int]:
    return {block.name: block.size for block in layout}


# --------------------------------------------------------------------------------------------------------- finding


def test_a_folder_of_everything(tmp_path):
    write_demos(tmp_path / "hdf5" / "a.hdf5")
    write_lerobot(tmp_path / "lerobot")
    (tmp_path / "videos" / "deeper").mkdir(parents=True)
    write_video(tmp_path / "videos" / "deeper" / "a.mp4", numbered(3))
    write_rlds(tmp_path / "rlds" / "1.0.0", [rlds_episode()])
    (tmp_path / "videos" / ".hidden.mp4").write_bytes(b"half a download")
    (tmp_path / "README.md").write_text("raw logs")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [(name, str(path.relative_to(tmp_path))) for name, path in find(tmp_path)] == [
        ("hdf5", "hdf5"),
        ("lerobot", "lerobot"),
        ("rlds", "rlds/1.0.0"),
        ("video", "videos/deeper"),
    ]
    assert len(episodes_of(tmp_path)) == 2 + 2 + 1 + 1
    assert find(f"file://{tmp_path}") == find(tmp_path)
    assert [name for name, _ in find(tmp_path, "hdf5")] == ["hdf5"]


def test_content_tells_where_the_name_does_not(tmp_path):
    shutil.move(write_video(tmp_path / "a.mp4", numbered(3)), tmp_path / "clip")
    shutil.move(write_demos(tmp_path / "a.hdf5"), tmp_path / "demos")
    assert find(tmp_path / "clip")[0][0] == "video"
    assert find(tmp_path / "demos")[0][0] == "hdf5"


@pytest.mark.parametrize(
    "name, format, says",
    [
        ("missing", "auto", "no such file or folder"),
        ("empty", "auto", "empty folder"),
        ("text", "auto", "no known format; expected one of rlds, lerobot, .*, video"),
        ("text/a.txt", "auto", "no known format"),
        ("text", "hdf5", "holds nothing of format hdf5"),
        ("text", "rosbag", "no such format; one of auto, rlds, lerobot, calvin, droid, bridge, aloha"),
    ],
)
def test_one_line_for_a_wrong_path(tmp_path, name, format, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("hello")
    with pytest.raises(UserError, match=says) as raised:
        find(tmp_path / name, format)
    assert "\n" not in str(raised.value)


def test_other_schemes_are_named():
    with pytest.raises(UserError, match="local paths and file:// only"):
        find("s3://bucket/raw")


def test_a_copy_under_another_name_is_the_same_episode(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_video(tmp_path / "a" / "film.mp4", numbered(3))
    write_demos(tmp_path / "a" / "demos.hdf5")
    write_rlds(tmp_path / "a" / "rlds", [rlds_episode()])
    write_lerobot(tmp_path / "a" / "robot")
    shutil.copy(tmp_path / "a" / "film.mp4", tmp_path / "b" / "other.mov")
    shutil.copy(tmp_path / "a" / "demos.hdf5", tmp_path / "b" / "other.h5")
    shutil.copytree(tmp_path / "a" / "robot", tmp_path / "b" / "elsewhere")
    write_rlds(tmp_path / "b" / "shards", [rlds_episode(seed=9), rlds_episode()], name="renamed")
    before, after = {ref.id for ref in refs_of(tmp_path / "a")}, {ref.id for ref in refs_of(tmp_path / "b")}
    assert before < after and len(after) == len(before) + 1


def test_a_digest_covers_the_bytes_of_its_episode_and_no_others(tmp_path):
    def sha(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    film = write_video(tmp_path / "a.mp4", numbered(3))
    assert [ref.digest for ref in refs_of(film)] == [sha(film.read_bytes())]
    records = [rlds_episode(seed=seed) for seed in range(3)]
    assert [ref.digest for ref in refs_of(write_rlds(tmp_path / "rlds", records))] == list(map(sha, records))
    robot = write_lerobot(tmp_path / "robot")
    tables, films = sorted(robot.rglob("*.parquet")), sorted(robot.rglob("*.mp4"))
    for ref, parts in zip(refs_of(robot), zip(tables, films, strict=True), strict=True):
        assert ref.uri == str(parts[0])
        assert ref.digest == sha(b"".join(hashlib.sha256(part.read_bytes()).digest() for part in parts))
    assert [ref.digest for ref in refs_of(write_demos(tmp_path / "a.hdf5", demos=2))] == [
        "f2a5ec8750b49a74638268edb00bb94e0dea92b17ba53efabaf6d2100382aa66",
        "0ffd32f349ffdb67bf794163de2e7b5dedf10819df37c58b2a02135cbbfa09e3",
    ]


def test_a_digest_is_read_anew(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(3))
    write_demos(tmp_path / "a.hdf5")
    write_lerobot(tmp_path / "robot")
    write_rlds(tmp_path / "rlds", [rlds_episode(), rlds_episode(seed=1)])
    refs = {ref.format: ref for ref in refs_of(tmp_path)}  # the last one of each
    assert refs.keys() == {"video", "hdf5", "lerobot", "rlds"}
    assert {format: digest(ref) for format, ref in refs.items()} == {f: ref.digest for f, ref in refs.items()}

    write_video(tmp_path / "a.mp4", numbered(3) + 1)
    write_video(tmp_path / "robot/videos/chunk-000/observation.images.top/episode_000001.mp4", numbered(12) + 90)
    write_rlds(tmp_path / "rlds", [rlds_episode(), rlds_episode(seed=2)])
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        file["data/demo_1/dones"][0] = True
    for ref in refs.values():
        assert digest(ref) != ref.digest

    (tmp_path / "robot/videos/chunk-000/observation.images.top/episode_000001.mp4").unlink()
    write_rlds(tmp_path / "rlds", [rlds_episode()])
    write_demos(tmp_path / "a.hdf5", demos=1)
    for format, says in (("lerobot", "camera top has no video for episode 1"), ("rlds", "no readable record 1")):
        with pytest.raises(BadEpisode, match=says):
            digest(refs[format])
    with pytest.raises(BadEpisode, match="the file has 1 demonstrations now"):
        digest(refs["hdf5"])
    (tmp_path / "a.hdf5").write_text("no longer HDF5")
    with pytest.raises(BadEpisode, match="cannot be read again: OSError"):
        digest(refs["hdf5"])
    for ref in refs.values():
        Path(ref.uri).unlink()
        with pytest.raises(BadEpisode, match=r"has gone since|there is no episode_000001\.parquet"):
            digest(ref)


# ------------------------------------------------------------------------------------------------------------ RLDS


def test_rlds(tmp_path):
    first, second = episodes_of(write_rlds(tmp_path / "x", [rlds_episode(4), rlds_episode(6, seed=1)]))
    assert first.instruction == "lift the blöck"
    assert (first.proprio["state"].shape, first.action.shape, first.action.dtype) == ((4, 3), (4, 2), np.float32)
    rng = np.random.default_rng(1)
    assert np.allclose(second.proprio["state"], rng.normal(size=(6, 3)))
    assert np.allclose(second.action, rng.normal(size=(6, 2)))
    assert np.abs(frames_of(second, "image")[5].astype(int) - quadrants(32)).mean() < 4
    assert (first.embodiment, first.fps) == ("toy", 10)
    assert "control rate unknown; 10 Hz assumed" in first.repairs


TOY = {
    "episode_metadata/file_path": "text",
    "episode_metadata/success": "bool",
    "steps/observation/image": "jpeg",
    "steps/observation/state": "float32 3",
    "steps/observation/contact": "bool",
    "steps/observation/image_embedding": "float32 512",
    "steps/observation/box": "float32 2 2",
    "steps/observation/natural_language_instruction": "string",
    "steps/action": "float32 2",
    "steps/action_dict/joint_velocity": "float64 7",
    "steps/wide": "int32 300",
    "steps/reward": "float32",
    "steps/is_last": "bool",
    "steps/language_instruction": "text",
    "steps/language_instruction_2": "text",
}


def toy_episode(steps: int = 3, **changed: object) -> dict:
    rng = np.random.default_rng(0)
    sizes = {name: [int(size) for size in kind.split()[1:]] for name, kind in TOY.items()}
    numbers = {
        name: rng.integers(2, size=(steps, *sizes[name])) if kind.startswith(("bool", "int")) else rng.normal(
            size=(steps, *sizes[name])
        )
        for name, kind in TOY.items()
        if name.startswith("steps/") and kind.split()[0] not in ("jpeg", "text", "string")
    }  # fmt: skip
    return numbers | {
        "episode_metadata/file_path": "/a/b.npy",
        "episode_metadata/success": np.array([True]),
        "steps/observation/image": [jpeg(quadrants(32))] * steps,
        "steps/observation/natural_language_instruction": ["", "wipe", "wipe"],
        "steps/language_instruction": ["lift"] * steps,
        "steps/language_instruction_2": [""] * steps,
        **changed,
    }


def test_rlds_keeps_what_is_recorded_beside_the_action(tmp_path):
    said = toy_episode()
    (episode,) = episodes_of(write_tfds(tmp_path, "toy_set", TOY, [said], split="val"))
    assert (episode.dataset, episode.split, episode.success) == ("toy_set", "val", True)
    assert list(episode.proprio) == ["state"]
    expected = {"observation/contact": 1, "action_dict/joint_velocity": 7, "reward": 1, "is_last": 1}
    assert {name: values.shape[1] for name, values in episode.signals.items()} == expected
    for name, values in episode.signals.items():
        assert values.dtype == np.float32
        assert np.allclose(values, said[f"steps/{name}"].reshape(3, -1)), name
    assert episode.texts == {
        "file_path": "/a/b.npy",
        "language_instruction": "lift",
        "language_instruction_2": "",
        "observation/natural_language_instruction": "wipe",
    }
    assert episode.instruction == "lift"
    assert "robot unknown; the data set's name stands for it" in episode.repairs


@pytest.mark.parametrize(
    "fields, changed, old, new, says",
    [
        ({}, {"steps/observation/image": [jpeg(quadrants(32))] * 2}, "", "", "camera image has 2 images for 3 steps"),
        ({"steps/action": "float32 2 2"}, {"steps/action": np.ones((3, 2, 2))}, "", "", "is not one vector a step"),
        ({}, {}, '"uint8"', '"uint16"', "has no camera"),
        ({}, {}, '["-1", "-1", "3"]', '["32", "32", "1"]', "has no camera"),
    ],
)
def test_rlds_pictures_and_actions_of_another_kind(tmp_path, fields, changed, old, new, says):
    file = write_tfds(tmp_path, "toy", TOY | fields, [toy_episode(**changed)]) / "features.json"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(BadEpisode, match=says):
        episodes_of(tmp_path)


def test_rlds_says_that_an_instruction_changes(tmp_path):
    said = toy_episode(**{"steps/language_instruction": ["lift", "lift", "drop"]})
    (episode,) = episodes_of(write_tfds(tmp_path, "toy", TOY, [said]))
    assert episode.instruction == "lift"
    assert "the instruction changes within the episode; the first one is kept" in episode.repairs


@pytest.mark.parametrize(
    "field, more, success",
    [
        ("success", {}, False),
        ("aspects/success", {"aspects/has_aspects": 1}, False),
        ("aspects/success", {"aspects/has_aspects": 0}, None),
        ("aspects/feasible", {}, None),
    ],
)
def test_rlds_success_where_it_was_judged(tmp_path, field, more, success):
    fields = {name: kind for name, kind in TOY.items() if name != "episode_metadata/success"}
    judged = {field: np.array([0]), **{name: np.array([value]) for name, value in more.items()}}
    said = {name: values for name, values in toy_episode().items() if name in fields} | judged
    (episode,) = episodes_of(write_tfds(tmp_path, "toy", fields | dict.fromkeys(judged, "bool"), [said]))
    assert episode.success is success


def test_a_name_and_a_split_from_the_shard_alone(tmp_path):
    folder = write_rlds(tmp_path / "a", [rlds_episode()], name="some-robot")
    assert [(e.dataset, e.split) for e in episodes_of(folder)] == [("some-robot", "train")]
    shutil.move(folder / "some-robot-train.tfrecord-00000-of-00001", folder / "mine.tfrecord")
    assert [(e.dataset, e.split) for e in episodes_of(folder)] == [("mine", None)]
    (folder / "dataset_info.json").write_text("[1]")
    assert [(e.dataset, e.split) for e in episodes_of(folder)] == [("mine", None)]


def test_shards_that_are_missing_are_listed_once(tmp_path):
    write_rlds(tmp_path, [rlds_episode()])
    shard = tmp_path / "toy-train.tfrecord-00000-of-00001"
    for name in ("train.tfrecord-00000-of-00004", "train.tfrecord-00002-of-00004", "train.tfrecord-00003-of-00004"):
        shutil.copy(shard, tmp_path / f"toy-{name}")
    shutil.copy(shard, tmp_path / "toy-val.tfrecord-00003-of-99999999999999")
    problems = {Path(ref.uri).name: ref.problem for ref in refs_of(tmp_path) if ref.problem}
    assert problems == {
        "toy-train.tfrecord-00001-of-00004": "toy-train.tfrecord-00001-of-00004 is missing",
        "toy-val.tfrecord-00000000000000-of-99999999999999": "toy-val.tfrecord-00000000000000-of-99999999999999 "
        "is missing, and 99999999999997 more of its 99999999999999 shards",
    }
    (missing, _) = [ref for ref in refs_of(tmp_path) if ref.problem]
    with pytest.raises(BadEpisode, match="00001-of-00004 is missing"):
        load(missing)
    assert not [ref for ref in refs_of(tmp_path / "toy-train.tfrecord-00003-of-00004") if ref.problem]


def test_features_json_may_say_anything(tmp_path):
    file = write_tfds(tmp_path, "toy", TOY, [toy_episode()]) / "features.json"
    whole = file.read_bytes()
    (ref,) = refs_of(tmp_path)

    @settings(max_examples=150, deadline=None)
    @given(st.integers(0, len(whole)), st.binary(max_size=4), st.booleans())
    def damage(at: int, noise: bytes, inserted: bool) -> None:
        file.write_bytes(whole[:at] + noise + whole[at if inserted else at + len(noise) :])
        with contextlib.suppress(BadEpisode, UserError):
            episode = load(ref)
            for camera in episode.cameras:
                frames_of(episode, camera)

    damage()


@pytest.mark.parametrize("written", ["[]", "3", '{"featuresDict": 1}', '{"sequence": {"feature": [1]}}', "[" * 100_000])
def test_features_json_of_another_kind(tmp_path, written):
    (ref,) = refs_of(write_rlds(tmp_path, [rlds_episode()]))
    (tmp_path / "features.json").write_text(written)
    with pytest.raises(BadEpisode):
        load(ref)


def test_actions_in_parts_are_joined_in_the_order_of_their_names(tmp_path):
    def tensor(size: int) -> dict:
        return {"pythonClassName": "t.Tensor", "tensor": {"shape": {"dimensions": [str(size)]}, "dtype": "float32"}}

    def record(images: list[bytes]) -> bytes:
        return encode_example(
            {
                "steps/observation/image": images,
                "steps/observation/state": [0.0] * 6,
                "steps/action/world": [1.0, 2.0, 3.0, 4.0],
                "steps/action/gripper": [8.0, 9.0],
                "steps/language_instruction": [b"", b""],
            }
        )

    parts = {"featuresDict": {"features": {"world": tensor(2), "gripper": tensor(1)}}}
    broken, good = refs_of(
        write_rlds(tmp_path, [record([b"x", b"x"]), record([jpeg(quadrants(32))] * 2)], action=parts)
    )
    with pytest.raises(BadEpisode, match="neither JPEG nor PNG"):
        load(broken)
    episode = load(good)
    assert episode.action.tolist() == [[8, 1, 2], [9, 3, 4]]
    assert sizes(episode.action_layout) == {"gripper": 1, "world": 2}
    assert episode.signals["action/world"].tolist() == [[1, 2], [3, 4]]
    assert episode.signals["action/gripper"].tolist() == [[8], [9]]
    assert episode.instruction is None


def test_a_cut_off_shard_keeps_what_is_whole(tmp_path):
    folder = write_rlds(tmp_path, [rlds_episode(seed=i) for i in range(3)])
    whole = refs_of(folder)
    shard = Path(whole[0].uri)
    shard.write_bytes(shard.read_bytes()[:-100])
    cut = refs_of(folder)
    assert cut[:2] == whole[:2]
    assert "record 2 at byte" in cut[2].problem and "cut off" in cut[2].problem
    with pytest.raises(BadEpisode, match="record 2"):
        load(cut[2])
    shard.write_bytes(b"")
    assert [ref.problem for ref in refs_of(folder)] == ["the shard is empty"]


@pytest.mark.parametrize(
    "at, what, kept",
    [(200, "bytes were damaged", 2), (0, "its length has a wrong checksum", 1)],
    ids=["data", "length"],
)
def test_a_flipped_bit_in_a_shard_is_found(tmp_path, at, what, kept):
    folder = write_rlds(tmp_path, [rlds_episode(seed=i) for i in range(3)])
    shard = Path(refs_of(folder)[0].uri)
    data = bytearray(shard.read_bytes())
    second = struct.unpack("<Q", data[:8])[0] + 16
    data[second + at] ^= 4
    shard.write_bytes(data)
    refs = refs_of(folder)
    assert what in refs[1].problem and f"record 1 at byte {second}" in refs[1].problem
    assert [ref.problem is None for ref in refs].count(True) == kept


def test_a_record_that_changed_after_the_scan_is_refused(tmp_path):
    (ref,) = refs_of(write_rlds(tmp_path, [rlds_episode()]))
    write_rlds(tmp_path, [rlds_episode(seed=5)])
    with pytest.raises(BadEpisode, match="changed since"):
        load(ref)


def test_records_that_do_not_fit_features_json(tmp_path):
    ragged = parse_example(rlds_episode())
    short = encode_example(
        {k: (v if isinstance(v, list) else v[:-1].tolist()) for k, v in ragged.items()}  # one number short
    )
    refs = refs_of(write_rlds(tmp_path, [short, b"\x0a\xff", rlds_episode()]))
    with pytest.raises(BadEpisode, match="not a multiple of"):
        load(refs[0])
    with pytest.raises(BadEpisode, match=r"not a tf.train.Example"):
        load(refs[1])
    assert load(refs[2]).action is not None
    (tmp_path / "features.json").unlink()
    assert all("no features.json" in ref.problem for ref in refs_of(tmp_path))


names = st.text(min_size=1, max_size=12)
int64 = st.integers(-(2**63), 2**63 - 1)
values = st.one_of(
    st.lists(st.binary(max_size=40), min_size=1, max_size=5),
    st.lists(st.floats(width=32), min_size=1, max_size=8),
    st.lists(st.one_of(st.integers(0, 1), int64), max_size=20),
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names, values, max_size=5), st.booleans())
def test_any_example_is_read_as_it_was_written(features, packed):
    parsed = parse_example(encode_example(features, packed))
    assert parsed.keys() == features.keys()
    for key, written in features.items():
        read = parsed[key] if isinstance(parsed[key], list) else parsed[key].tolist()
        assert len(read) == len(written)
        assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(read, written, strict=True))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2**31))
def test_no_bytes_break_the_parser_in_another_way(noise, at):
    damaged = bytearray(encode_example({"a": [1, 300, -1], "b": [1.0, 2.0], "c": [b"xyz"]}))
    damaged[at % len(damaged) :] = noise
    for data in (noise, bytes(damaged)):
        with contextlib.suppress(ValueError):
            parse_example(data)


@real
def test_real_bridge():
    episodes = episodes_of(REAL / "bridge_rlds")
    assert len(episodes) == len({episode.id for episode in episodes}) == 25
    for episode in episodes:
        assert sorted(episode.cameras) == ["image_0", "image_1", "image_2", "image_3"]
        assert all(frames_of(episode, camera, 32).shape == (10, 32, 32, 3) for camera in episode.cameras)
        assert episode.action.shape == episode.proprio["state"].shape == (10, 7)
        assert episode.instruction
        assert (episode.embodiment, episode.fps) == ("widowx", 5)
        assert sizes(episode.action_layout) == {"position": 3, "rotation": 3, "gripper": 1}
        assert "camera image_3 is black in every frame" in episode.repairs
        assert "has_image_0 is 0 although images exist; camera kept" in episode.repairs
        assert any("is_last is never 1" in repair for repair in episode.repairs)
        assert not [repair for repair in episode.repairs if "unknown" in repair]
        assert episode.action_layout[2].gripper_one_means == "open"
        assert 0 <= episode.action[:, 6].min() <= episode.action[:, 6].max() <= 1
        assert set(episode.signals) == {"discount", "is_first", "is_last", "is_terminal", "reward"}
        assert (episode.dataset, episode.split, episode.success) == ("bridge_dataset", "train", None)
        assert episode.texts["language_instruction"] == episode.instruction
    assert episodes[0].instruction == "put cup from counter or drying rack into sink"


# --------------------------------------------------------------------------------------------------------- LeRobot


def test_lerobot(tmp_path):
    first, second = episodes_of(write_lerobot(tmp_path / "x"))
    assert list(first.cameras) == ["top"] and frames_of(first, "top").shape == (12, 64, 64, 3)
    rng = np.random.default_rng(1)
    assert np.allclose(second.proprio["state"], rng.normal(size=(12, 2)).astype(np.float32))
    assert np.array_equal(second.action, rng.normal(size=(12, 7)).astype(np.float32))
    assert sizes(first.action_layout) == {"position": 3, "rotation": 3, "gripper": 1}
    assert (first.instruction, first.fps, first.embodiment) == ("push the cube", 20, "so100-follower")
    assert first.repairs == () and first.success is None
    assert first.id != second.id


def test_lerobot_keeps_what_is_recorded_beside_the_action(tmp_path):
    folder = write_lerobot(tmp_path / "x", frames=11, splits={"train": "0:1", "val": "1:2", "odd": 3})
    (folder / "meta" / "tasks.jsonl").write_text(
        '{"task_index": 0, "task": "push the cube"}\n{"task_index": 1, "task": "slowly"}\n'
    )
    for file in folder.glob("data/*/*.parquet"):
        table = pq.read_table(file)
        more = {
            "next.reward": pa.array(np.arange(12.0)),
            "next.done": pa.array([False] * 11 + [True]),
            "annotation.human.style": pa.array([1] * 12),
            "language_instruction_2": pa.array(["shove it"] * 12),
            "observation.touched": pa.array([[i, 0] for i in range(12)]),
            "action.joints": pa.array([[0.5, i] for i in range(12)], pa.list_(pa.float64(), 2)),
            "ragged": pa.array([[1.0]] * 11 + [[1.0, 2.0]]),
            "holes": pa.array([1.0] * 11 + [None]),
        }
        for name, column in more.items():
            table = table.append_column(name, column)
        pq.write_table(table.append_column("index", pa.array(range(12))), file)
    first, second = episodes_of(folder)
    widths = {name: values.shape for name, values in first.signals.items()}
    assert widths == {
        "timestamp": (11, 1), "next.reward": (11, 1), "next.done": (11, 1), "annotation.human.style": (11, 1),
        "observation.touched": (11, 2), "action.joints": (11, 2),
    }  # fmt: skip
    assert first.signals["action.joints"].tolist() == [[0.5, i] for i in range(11)]
    assert first.signals["next.reward"].ravel().tolist() == list(range(11))
    assert first.texts == {
        "annotation.human.style": "slowly", "language_instruction_2": "shove it", "task": "push the cube"
    }  # fmt: skip
    assert (first.split, second.split, first.dataset) == ("train", "val", None)
    assert first.instruction == "push the cube"
    assert "column ragged has rows of different lengths; left out" in first.repairs
    assert "column holes has 1 empty rows; left out" in first.repairs


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        ("x y z roll pitch yaw gripper", {"position": 3, "rotation": 3, "gripper": 1}),
        (
            "main_shoulder_pan main_shoulder_lift main_elbow_flex main_wrist_flex main_wrist_roll main_gripper second",
            {"joint": 5, "gripper": 1, "other": 1},
        ),
        ("left_waist left_shoulder left_elbow left_forearm_roll left_wrist_angle left_wrist_rotate left_gripper",
         {"joint": 6, "gripper": 1}),
        ("shoulder_pan.pos shoulder_lift.pos elbow_flex.pos wrist_flex.pos wrist_roll.pos gripper.pos x",
         {"joint": 5, "gripper": 1, "position": 1}),
        ("pos_x pos_y pos_z rot_x rot_y rot_z gripper_position", {"position": 3, "rotation": 3, "gripper": 1}),
        ("ee.x ee.y ee.z ee.wx ee.wy ee.wz ee.gripper_pos", {"position": 3, "rotation": 3, "gripper": 1}),
    ],
)  # fmt: skip
def test_kinds_by_the_names_of_columns(tmp_path, names, kinds):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"]["action"]["names"] = {"motors": names.split()}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    (episode,) = episodes_of(folder)
    assert {block.kind: block.size for block in episode.action_layout} == kinds


@pytest.mark.parametrize(
    ("names", "representation"),
    [
        ("roll pitch yaw", "euler_xyz"),
        ("yaw pitch roll", None),
        ("rx ry rz", None),
        ("ee_roll ee_pitch ee_yaw", "euler_xyz"),
    ],
)
def test_angles_in_another_order_are_not_taken_for_euler_xyz(tmp_path, names, representation):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"]["action"]["names"] = ["x", "y", "z", *names.split(), "gripper"]
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    (episode,) = episodes_of(folder)
    assert (episode.action_layout[1].kind, episode.action_layout[1].representation) == ("rotation", representation)


def test_one_frame_too_many_or_few_is_cut(tmp_path):
    for frames, steps in ((13, 12), (11, 11)):
        (episode,) = episodes_of(write_lerobot(tmp_path / str(frames), frames=frames, episodes=1))
        assert len(episode.action) == len(episode.proprio["state"]) == len(frames_of(episode, "top")) == steps
        assert episode.repairs == (f"the table has 12 rows, top has {frames} frames; cut to {steps}",)
    for frames in (10, 14):
        (ref,) = refs_of(write_lerobot(tmp_path / str(frames), frames=frames, episodes=1))
        with pytest.raises(BadEpisode, match=f"top declares {frames} frames, the table has 12 rows"):
            load(ref)


def test_files_are_believed_over_info_json(tmp_path):
    folder = write_lerobot(tmp_path / "x", data_path="data/{episode_index}.parquet", video_path="{nonsense}/a.mp4")
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"]["observation.images.wrist"] = {"dtype": "video", "shape": [8, 8, 3]}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    first, _ = episodes_of(folder)
    assert first.repairs == (
        "data_path in info.json leads to no file; found by searching",
        "video_path in info.json leads to no file; found by searching",
        "camera wrist is named in info.json, but has no file; dropped",
    )


def test_lost_and_broken_files_cost_their_episode_only(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=4)
    (folder / "videos/chunk-000/observation.images.top/episode_000001.mp4").unlink()
    (folder / "data/chunk-000/episode_000002.parquet").unlink()
    table = folder / "data/chunk-000/episode_000003.parquet"
    table.write_bytes(table.read_bytes()[:500])
    refs = refs_of(folder)
    assert [ref.problem for ref in refs] == [
        None,
        "camera top has no video for episode 1",
        "episode 2 is listed, but there is no episode_000002.parquet",
        None,
    ]
    assert load(refs[0]).action is not None
    with pytest.raises(BadEpisode, match=r"episode_000003.parquet cannot be read"):
        load(refs[3])


def test_a_changed_film_is_another_episode(tmp_path):
    folder = write_lerobot(tmp_path / "x")
    before = refs_of(folder)
    write_video(folder / "videos/chunk-000/observation.images.top/episode_000001.mp4", numbered(12) + 50)
    after = refs_of(folder)
    assert before[0].id == after[0].id and before[1].id != after[1].id


def test_a_mark_of_validity_is_no_instruction(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    (ref,) = refs_of(folder)
    (folder / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "valid"}\n')
    assert load(ref).instruction is None


def edit_table(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Of the first episode."""
    file = folder / "data/chunk-000/episode_000000.parquet"
    pq.write_table(change(pq.read_table(file)), file)


def test_rows_out_of_order_are_sorted(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    (sorted_,) = episodes_of(folder)
    edit_table(folder, lambda table: table.take([*range(6, 12), *range(6)]))
    (episode,) = episodes_of(folder)
    assert np.array_equal(episode.action, sorted_.action)
    assert np.array_equal(episode.proprio["state"], sorted_.proprio["state"])
    assert "rows are out of order; sorted by frame_index" in episode.repairs
    edit_table(folder, lambda table: table.drop_columns("frame_index").append_column("frame_index", [[0] * 12]))
    (episode,) = episodes_of(folder)
    assert "frame_index repeats; rows are taken in order" in episode.repairs


def test_a_row_lost_in_the_middle_is_no_slip_at_the_end(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    edit_table(folder, lambda table: table.take([*range(5), *range(6, 12)]))
    (ref,) = refs_of(folder)
    with pytest.raises(BadEpisode, match="has 11 rows, top has 12 frames, and frame_index skips: rows are lost"):
        load(ref)


def test_an_instruction_that_changes_is_told(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    (folder / "meta" / "tasks.jsonl").write_text(
        '{"task_index": 0, "task": "push"}\n{"task_index": 1, "task": "lift"}\n'
    )
    edit_table(folder, lambda t: t.drop_columns("task_index").append_column("task_index", [[0] * 6 + [1] * 6]))
    (episode,) = episodes_of(folder)
    assert episode.instruction == "push"
    assert episode.repairs == ("the instruction changes within the episode; the first one is kept",)


def test_where_objects_are_is_not_proprioception(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"]["observation.environment_state"] = {"dtype": "float32", "shape": [2]}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    objects = pa.array([[float(i), 0.0] for i in range(12)])
    edit_table(folder, lambda table: table.append_column("observation.environment_state", objects))
    (episode,) = episodes_of(folder)
    assert list(episode.proprio) == ["state"]
    assert episode.signals["observation.environment_state"][:, 0].tolist() == list(range(12))


def test_success_with_holes_is_unknown(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    edit_table(folder, lambda table: table.append_column("next.success", pa.array([None] + [True] * 11)))
    (episode,) = episodes_of(folder)
    assert episode.success is None
    assert episode.repairs == ("column next.success has 1 empty rows; left out",)


def test_timestamps_of_another_rate_are_told(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1, fps=30)  # its timestamps step by 1 / 20 s
    (episode,) = episodes_of(folder)
    assert episode.fps == 30
    assert episode.repairs == ("info.json says 30 Hz, the timestamps 20 Hz; the former is taken",)


def test_cameras_whose_short_names_are_one_keep_their_own(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"]["observation.top"] = info["features"]["observation.images.top"]
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    (folder / "videos/chunk-000/observation.top").mkdir()
    write_video(folder / "videos/chunk-000/observation.top/episode_000000.mp4", numbered(12)[::-1])
    (episode,) = episodes_of(folder)
    assert list(episode.cameras) == ["observation.images.top", "observation.top"]
    assert frames_of(episode, "observation.top")[0].mean() > frames_of(episode, "observation.images.top")[0].mean()


def test_a_sentence_with_a_line_separator(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    (folder / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "push\u2028the cube"}\r\n')
    (episode,) = episodes_of(folder)
    assert episode.instruction == "push\u2028the cube"


def test_the_described_task_comes_before_the_task(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    (folder / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "a"}\n{"task_index": 1, "task": "b"}\n')
    told = "annotation.human.action.task_description"
    edit_table(folder, lambda table: table.append_column(told, pa.array([1] * 12)))
    assert [episode.instruction for episode in episodes_of(folder)] == ["b"]


def test_parts_of_the_action_by_modality_json(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    parts = {
        "gripper": {"start": 6, "end": 7, "absolute": True},
        "place": {"start": 0, "end": 3, "absolute": False},
        "turn": {"start": 3, "end": 6, "rotation_type": "axis_angle"},
        "elsewhere": {"start": 0, "end": 2, "original_key": "action.other"},
    }
    (folder / "meta" / "modality.json").write_text(json.dumps({"action": parts}))
    (episode,) = episodes_of(folder)
    found = [(block.name, block.size, block.mode, block.representation) for block in episode.action_layout]
    assert found == [
        ("place", 3, "delta", None), ("turn", 3, "unknown", "axis_angle"), ("gripper", 1, "absolute", None)
    ]  # fmt: skip
    parts["turn"]["start"] = 4  # a gap
    (folder / "meta" / "modality.json").write_text(json.dumps({"action": parts}))
    (episode,) = episodes_of(folder)
    assert sizes(episode.action_layout) == {"position": 3, "rotation": 3, "gripper": 1}


def test_depth_is_no_camera(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    info = json.loads((folder / "meta" / "info.json").read_text())
    deep = {"dtype": "video", "shape": [64, 64, 3], "info": {"video.is_depth_map": True}}
    info["features"]["observation.images.deep"] = deep
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    films = folder / "videos/chunk-000"
    shutil.copytree(films / "observation.images.top", films / "observation.images.deep")
    assert [list(episode.cameras) for episode in episodes_of(folder)] == [["top"]]


def test_images_inside_the_table(tmp_path):
    folder = write_lerobot(tmp_path / "x", rows=3, episodes=1)
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"]["observation.image"] = {"dtype": "image", "shape": [32, 32, 3]}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    file = folder / "data/chunk-000/episode_000000.parquet"
    images = parse_example(rlds_episode(3))["steps/observation/image"]
    table = pq.read_table(file).append_column("observation.image", pa.array([{"bytes": i, "path": ""} for i in images]))
    pq.write_table(table, file)
    (episode,) = episodes_of(folder)
    assert np.abs(frames_of(episode, "image")[2].astype(int) - quadrants(32)).mean() < 4
    write_video(folder / "videos/chunk-000/observation.images.top/episode_000000.mp4", numbered(2))
    (episode,) = episodes_of(folder)  # a film that is a frame short cuts the images too
    assert [len(frames_of(episode, camera)) for camera in ("image", "top")] == [2, 2]


def test_broken_metadata_is_named_and_costs_only_its_data_set(tmp_path):
    write_video(tmp_path / "clip.mp4", numbered(5))
    write_lerobot(tmp_path / "x", episodes=1, codebase_version="v1.6")
    write_lerobot(tmp_path / "y", episodes=1, codebase_version="v3.0")
    write_lerobot(tmp_path / "z", episodes=1)
    (tmp_path / "z" / "meta" / "info.json").write_text("{")
    clip, *broken = refs_of(tmp_path)
    assert clip.format == "video" and clip.problem is None
    reasons = ("LeRobot v1.6 is not read; convert", "no table of episodes", "not a LeRobot info.json")
    assert len(broken) == 3 and len({ref.id for ref in broken}) == 3
    for ref, reason in zip(broken, reasons, strict=True):
        assert ref.format == "lerobot" and reason in str(ref.problem)


def same(one: Episode, other: Episode) -> bool:
    """But for where they are."""
    assert one.cameras.keys() == other.cameras.keys() and one.proprio.keys() == other.proprio.keys()
    assert np.array_equal(one.action, other.action)
    assert all(np.array_equal(values, other.proprio[name]) for name, values in one.proprio.items())
    assert all(np.array_equal(frames_of(one, camera), frames_of(other, camera)) for camera in one.cameras)
    names = ("fps", "action_layout", "instruction", "success", "embodiment")
    return [getattr(one, name) for name in names] == [getattr(other, name) for name in names]


def test_many_episodes_in_a_file(tmp_path):
    apart = episodes_of(write_lerobot(tmp_path / "v2", rows=70, episodes=5))
    joined = episodes_of(as_lerobot_v3(tmp_path / "v2", tmp_path / "v3", per_file=3))
    assert all(same(one, other) for one, other in zip(apart, joined, strict=True))
    assert [episode.repairs for episode in joined] == [()] * 5
    assert all(digest(episode.ref) == episode.ref.digest for episode in joined)


def test_an_episode_stays_itself_whatever_it_is_joined_with(tmp_path):
    write_lerobot(tmp_path / "two", rows=70, episodes=2)
    write_lerobot(tmp_path / "five", rows=70, episodes=5)
    two = refs_of(as_lerobot_v3(tmp_path / "two", tmp_path / "a", per_file=2))
    five = refs_of(as_lerobot_v3(tmp_path / "five", tmp_path / "b", per_file=4, shift=7))
    assert [ref.id for ref in two] == [ref.id for ref in five[:2]]
    assert len({ref.id for ref in five}) == 5


def test_a_state_of_two_dimensions(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    (file,) = folder.glob("data/*/*.parquet")
    table = pq.read_table(file)
    poses = np.arange(12 * 6, dtype=np.float32).reshape(12, 2, 3)
    at = table.column_names.index("observation.state")
    column = pa.array(poses.tolist(), pa.list_(pa.list_(pa.float32())))
    pq.write_table(table.set_column(at, "observation.state", column), file)
    (episode,) = episodes_of(folder)
    assert np.array_equal(episode.proprio["state"], poses.reshape(12, 6))


def test_sentences_as_newer_pandas_writes_them(tmp_path):
    folder = as_lerobot_v3(write_lerobot(tmp_path / "v2", episodes=1), tmp_path / "v3")
    sentences = pa.table({"task_index": [0], "task": pa.array(["push the cube"], pa.large_string())})
    pq.write_table(sentences, folder / "meta" / "tasks.parquet")
    assert [episode.instruction for episode in episodes_of(folder)] == ["push the cube"]


def test_path_templates_of_joined_files(tmp_path):
    folder = as_lerobot_v3(write_lerobot(tmp_path / "v2", episodes=1), tmp_path / "v3")
    info = json.loads((folder / "meta" / "info.json").read_text())
    for wrong in ("{chunk_index:9999999999d}.parquet", "{chunk_index.real}.parquet", "../v2/meta/info.json", None):
        (folder / "meta" / "info.json").write_text(json.dumps(info | {"data_path": wrong}))
        (episode,) = episodes_of(folder)
        assert episode.repairs == ("data_path in info.json leads to no file; found by default",)


def test_joined_files_that_lie_cost_their_episodes_only(tmp_path):
    folder = as_lerobot_v3(write_lerobot(tmp_path / "v2", rows=40, episodes=6), tmp_path / "v3", per_file=2)
    (folder / "videos/observation.images.top/chunk-000/file-001.mp4").unlink()
    film = folder / "videos/observation.images.top/chunk-000/file-002.mp4"
    listed = folder / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(listed).to_pylist()
    rows[4]["videos/observation.images.top/from_timestamp"] = 1.0
    pq.write_table(pa.Table.from_pylist(rows[:5]), listed)
    refs = refs_of(folder)
    assert [(ref.index, ref.problem) for ref in refs[:4]] == [
        (0, None),
        (1, None),
        (2, "camera top has no video for episode 2"),
        (3, "camera top has no video for episode 3"),
    ]
    with pytest.raises(BadEpisode, match="top declares 20 frames, the table has 40 rows"):
        load(refs[4])
    assert refs[5].index == 5 and "does not list it" in refs[5].problem
    film.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    assert "file-002.mp4" in refs_of(folder)[4].problem


def edit_listed(folder: Path, change: Callable[[list[dict]], None]) -> None:
    listed = folder / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(listed).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), listed)


def test_a_film_holds_its_episodes_in_any_order(tmp_path):
    folder = as_lerobot_v3(write_lerobot(tmp_path / "v2", rows=12, episodes=3), tmp_path / "v3", per_file=3)
    before = [frames_of(episode, "top") for episode in episodes_of(folder)]
    ends = [f"videos/observation.images.top/{end}_timestamp" for end in ("from", "to")]

    def swap(rows: list[dict]) -> None:
        for end in ends:
            rows[0][end], rows[2][end] = rows[2][end], rows[0][end]

    edit_listed(folder, swap)
    after = episodes_of(folder)
    for number, episode in enumerate(after):
        assert np.array_equal(frames_of(episode, "top"), before[2 - number])
        assert digest(episode.ref) == episode.ref.digest
    edit_listed(folder, lambda rows: rows[1].update({ends[1]: rows[1][ends[0]]}))
    assert [ref.problem for ref in refs_of(folder)] == [None, "camera top has no video for episode 1", None]


def test_another_sentence_is_another_episode(tmp_path):
    folder = as_lerobot_v3(write_lerobot(tmp_path / "v2", episodes=2), tmp_path / "v3")
    before = refs_of(folder)
    edit_listed(folder, lambda rows: rows[1].update(tasks=["lift the cube"]))
    after = refs_of(folder)
    assert before[0].id == after[0].id and before[1].id != after[1].id


def test_an_excerpt_is_of_the_frames_that_its_numbers_say(tmp_path):
    film = write_video(tmp_path / "a.mp4", numbered(30))
    late = tmp_path / "late.mp4"
    with av.open(str(film)) as source, av.open(str(late), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                moved = round(0.5 / packet.time_base)  # the film begins half a second after its clock
                packet.pts, packet.dts, packet.stream = packet.pts + moved, packet.dts + moved, stream
                container.mux(packet)
    whole = np.concatenate(list(open_video(film).frames(None)))
    for path in (film, late):
        assert np.array_equal(np.concatenate(list(excerpt(path, 7, 9, 20).frames(None))), whole[7:16])
        assert [excerpt_digests(path, [(0, count)], 20)[0][1] for count in range(1, 31)] == list(range(1, 31))
    with pytest.raises(BadEpisode, match="is not where its time says"):
        list(excerpt(film, 0, 30, 19).frames(None))
    with pytest.raises(BadEpisode, match="ends 1 frames before its episode"):
        list(excerpt(film, 25, 6, 20).frames(None))


@real
def test_real_gr1():
    episodes = episodes_of(REAL / "gr1_lerobot_v2")
    assert len(episodes) == 5
    assert sum(len(frames_of(episode, "ego_view", 32)) for episode in episodes) == 2096
    for episode in episodes:
        assert list(episode.cameras) == ["ego_view"]
        assert episode.action.shape[1] == episode.proprio["state"].shape[1] == 44
        assert episode.action.dtype == np.float32
        assert episode.instruction.startswith("pick the ") and episode.instruction.endswith("in the plate")
        assert (episode.fps, episode.embodiment, episode.success) == (20, "gr1-arms-only", True)
        assert sizes(episode.action_layout) | {"waist": 3, "left_arm": 7} == sizes(episode.action_layout)
        assert "camera egoview is named in info.json, but has no file; dropped" in episode.repairs
        assert "no frame_index; rows are taken in order" in episode.repairs
        assert "timestamps start at 0.050 s; frames and rows are paired by order" in episode.repairs
    assert "video_path in info.json leads to no file; found by searching" in episodes[1].repairs


@real
def test_real_gr1_joined(tmp_path):
    """The real episodes in the layout of v3.0, their films joined without encoding again."""
    joined = episodes_of(as_lerobot_v3(REAL / "gr1_lerobot_v2", tmp_path / "v3"))
    assert all(same(one, other) for one, other in zip(episodes_of(REAL / "gr1_lerobot_v2"), joined, strict=True))


# ------------------------------------------------------------------------------------------------------------ HDF5


@pytest.mark.parametrize("opengl", [True, False])
def test_hdf5_comes_out_upright(tmp_path, opengl):
    first, second = episodes_of(write_demos(tmp_path / "a.hdf5", opengl=opengl))
    assert np.array_equal(frames_of(first, "agentview"), moving(5))
    assert any("bottom-up" in repair for repair in first.repairs) == opengl
    rng = np.random.default_rng(1)
    assert np.allclose(second.action, rng.normal(size=(5, 7)))
    assert np.allclose(second.proprio["joint_states"], rng.normal(size=(5, 7)))
    assert second.proprio["height"].shape == (5, 1)
    assert (first.instruction, first.embodiment, first.success, first.fps) == ("open the drawer", "panda", True, 20)
    assert [block.kind for block in first.action_layout] == ["position", "rotation", "gripper"]
    assert "control rate unknown; 20 Hz assumed" in first.repairs


def test_demonstrations_in_natural_order_and_repacked(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=11)
    refs = refs_of(path)
    assert np.allclose(load(refs[10]).action, np.random.default_rng(10).normal(size=(5, 7)))
    with h5py.File(path) as old, h5py.File(tmp_path / "b.hdf5", "w") as new:
        data = new.create_group("data")
        data.attrs.update(dict(old["data"].attrs))
        for index in range(11):
            demo = data.create_group(f"demo_{index}")
            demo.create_group("obs")
            for name in ("actions", "dones", "obs/agentview_rgb", "obs/joint_states", "obs/height"):
                demo.create_dataset(name, data=old[f"data/demo_{index}/{name}"][()], compression="gzip", chunks=True)
    assert [ref.id for ref in refs_of(tmp_path / "b.hdf5")] == [ref.id for ref in refs]


@pytest.mark.parametrize("kwargs", [None, [], "x"])
def test_an_environment_that_tells_nothing(tmp_path, kwargs):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_kwargs": kwargs})
    (episode,) = episodes_of(path)
    assert (episode.fps, episode.embodiment) == (20, "unknown") and "robot unknown" in episode.repairs


@pytest.mark.parametrize(
    ("env", "modes", "gripper"),
    [
        ({"type": 1, "env_kwargs": {"controller_configs": {"type": "OSC_POSE", "control_delta": True}}},
         ["delta", "delta", "absolute"], "closed"),
        ({"type": 1, "env_kwargs": {"controller_configs": {"type": "OSC_POSE", "control_delta": False}}},
         ["absolute"] * 3, "closed"),
        ({"env_kwargs": {"controller_configs": {"type": "BASIC", "body_parts": {
            "right": {"type": "OSC_POSE", "input_type": "absolute"}}}}}, ["absolute"] * 3, "closed"),
        ({"env_kwargs": {"controller_configs": [{"type": "JOINT_VELOCITY"}]}}, ["unknown"], None),
        ({"type": 2, "env_name": "Isaac-Stack-Cube-Franka-IK-Rel-v0"}, ["unknown"], None),
    ],
)  # fmt: skip
def test_what_seven_numbers_mean_is_the_controllers(tmp_path, env, modes, gripper):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = json.dumps(env)
    (episode,) = episodes_of(path)
    assert [block.mode for block in episode.action_layout] == modes
    assert episode.action_layout[-1].gripper_one_means == gripper
    assert {b.unit for b in episode.action_layout if b.kind == "position"} <= {
        "m" if modes[0] == "absolute" else "scaled"
    }


def test_replayed_libero_that_does_not_say_which_way_up(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=1, opengl=False)
    with h5py.File(path, "a") as file:
        file["data/demo_0/obs/eye_in_hand_rgb"] = moving(5)
    (ref,) = refs_of(path)
    assert any("this one does not tell" in repair for repair in load(ref).repairs)
    told = load(ref, DataContract(flip=("agentview", "eye_in_hand")))
    assert not any("this one does not tell" in repair for repair in told.repairs)
    assert np.array_equal(frames_of(told, "agentview"), moving(5)[:, ::-1])


def test_what_is_observed_and_is_no_camera_or_vector_is_told(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    with h5py.File(path, "a") as file:
        obs = file["data/demo_0/obs"]
        obs["agentview_depth"], obs["touches"] = np.zeros((5, 8, 8, 1), np.float32), np.arange(5)
        obs["serial_number"] = np.arange(12)
    (episode,) = episodes_of(path)
    for name in ("agentview_depth", "serial_number"):
        assert f"obs/{name} is neither pictures of colours nor a vector a frame; left out" in episode.repairs
    assert episode.proprio["touches"].ravel().tolist() == [0, 1, 2, 3, 4]


def test_the_poses_of_objects_are_no_proprioception(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    with h5py.File(path, "a") as file:
        file["data/demo_0/obs/object"] = np.arange(10.0).reshape(5, 2)
    (ref,) = refs_of(path)
    episode = load(ref)
    assert list(episode.proprio) == ["height", "joint_states"]
    assert episode.signals["obs/object"].tolist() == np.arange(10.0).reshape(5, 2).tolist()
    assert "object" in load(ref, DataContract(proprio={"obs/object": "object"})).proprio


def test_recorded_rate_robot_and_four_numbers(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    with h5py.File(path, "a") as file:
        data = file["data"]
        data.attrs["fps"], data.attrs["robot"] = 80, "sawyer"
        del data["demo_0/actions"]
        data["demo_0/actions"] = np.zeros((5, 4), np.float32)
    (episode,) = episodes_of(path)
    assert (episode.fps, episode.embodiment) == (80, "sawyer")
    assert [(b.size, b.gripper_one_means) for b in episode.action_layout] == [(3, None), (1, "closed")]


def test_the_frame_after_the_last_action_is_dropped(tmp_path):
    (episode,) = episodes_of(write_demos(tmp_path / "a.hdf5", demos=1, frames=6))
    assert len(frames_of(episode, "agentview")) == len(episode.proprio["height"]) == len(episode.action) == 5
    assert any("one frame more than actions" in repair for repair in episode.repairs)
    (ref,) = refs_of(write_demos(tmp_path / "b.hdf5", demos=1, frames=9))
    with pytest.raises(BadEpisode, match=r"5 actions, but observations of lengths \[9\]"):
        load(ref)


def test_libero_stores_what_is_seen_after_each_action(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=1, steps=6)
    pictures = numbered(6)[:, ::-1]  # the picture after action i is number i, the state before it i
    with h5py.File(path, "a") as file:
        file["data"].attrs["bddl_file_name"] = "libero/bddl_files/libero_90/KITCHEN_SCENE1_open_the_drawer.bddl"
        demo = file["data/demo_0"]
        del demo["obs/agentview_rgb"]
        demo["obs/agentview_rgb"], demo["robot_states"] = pictures, np.arange(6.0)[:, None]
        demo["states"], demo["rewards"] = np.arange(6.0)[:, None], np.arange(6) == 5
        actions, joints = demo["actions"][()].astype(np.float32), demo["obs/joint_states"][()].astype(np.float32)
    (episode,) = episodes_of(path)
    assert np.array_equal(episode.action, actions[1:]) and np.array_equal(episode.proprio["joint_states"], joints[:5])
    assert np.array_equal(frames_of(episode, "agentview"), numbered(6)[:5])
    assert episode.signals["states"].ravel().tolist() == [1, 2, 3, 4, 5]  # from which action 1, 2, ... was taken
    assert episode.signals["robot_states"].ravel().tolist() == [0, 1, 2, 3, 4]
    assert episode.signals["rewards"].ravel().tolist() == [0, 0, 0, 0, 1] and episode.success
    assert "LIBERO stores what is seen after each action; actions are moved up by a row" in episode.repairs
    assert (episode.dataset, episode.fps, episode.embodiment) == ("libero_90", 20, "panda")
    assert not [repair for repair in episode.repairs if "unknown" in repair]  # LIBERO's contract tells
    assert [block.unit for block in episode.action_layout[:2]] == ["scaled", "scaled"]


def test_hdf5_keeps_what_is_recorded_beside_the_action(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=3)
    rng = np.random.default_rng(5)
    states, absolute = rng.normal(size=(6, 40)), rng.normal(size=(5, 10))
    with h5py.File(path, "a") as file:
        data = file["data"]
        data.attrs["ep_meta"] = json.dumps({"lang": "something else"})
        data["demo_0"].attrs["ep_meta"] = json.dumps({"lang": "open it"})
        demo = data["demo_0"]
        demo["states"], demo["actions_abs"] = states, absolute
        demo["rewards"] = np.array([0, 0, 0, 1, 0], np.uint8)
        demo["action_dict/rel_pos"] = absolute[:, :3]
        demo["next_obs/height"], demo["matrices"] = np.zeros(5), np.zeros((5, 4, 4))
        demo["short"], demo["names"] = np.zeros(3), np.array(["x"] * 5, "S")
        file["mask/train"] = np.array(["demo_0", "demo_2"], "S")
        file["mask/valid"] = np.array(["demo_1"], "S")
        file["mask/20_percent"] = np.array(["demo_1"], "S")
    first, second, third = episodes_of(path)
    assert set(first.signals) == {"action_dict/rel_pos", "actions_abs", "dones", "rewards", "states"}
    assert np.array_equal(first.signals["states"], states[:5].astype(np.float32))
    assert np.array_equal(first.signals["actions_abs"], absolute.astype(np.float32))
    assert first.signals["rewards"].ravel().tolist() == [0, 0, 0, 1, 0]
    assert "states has one row more than actions; the last one is dropped" in first.repairs
    assert "short has 3 rows for 5 actions; left out" in first.repairs
    assert [episode.split for episode in (first, second, third)] == ["train", "valid", "train"]
    assert first.texts == {"problem_info/language_instruction": "open the drawer", "ep_meta/lang": "open it"}


@pytest.mark.parametrize(
    "claim, says",
    [
        ({"shape": (5, 2**30), "chunks": (1, 1024)}, r"huge claims to hold 21474836480 bytes, but only 0 are there"),
        ({"shape": (5, 2**20), "chunks": (1, 8)}, r"huge claims to hold 20971520 bytes, but only 0 are there"),
        ({"shape": (2**29,), "chunks": (2**29,)}, r"huge comes in pieces of \(536870912,\), more than limits.array"),
        ({"shape": (5, 2**14, 2**14, 3), "dtype": "u1"}, r"holds pictures of \(16384, 16384\), more than limits.pic"),
        ({"shape": (2**40, 3)}, r"huge claims to hold 13194139533312 bytes, but only 0 are there"),
    ],
)
def test_a_data_set_that_claims_more_than_memory_holds(tmp_path, claim, says):
    path = write_demos(tmp_path / "a.hdf5", demos=2)
    with h5py.File(path, "a") as file:
        file["data/demo_0"].create_dataset("huge", **claim)
    broken, whole = refs_of(path)
    assert re.search(says, str(broken.problem)) and load(whole).action is not None


def test_groups_that_lead_in_circles(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=2)
    with h5py.File(path, "a") as file:
        demo = file["data/demo_0"]
        for name in ("a", "b"):
            demo[name] = demo  # two at each level: 2^n paths
    broken, whole = refs_of(path)
    assert str(broken.problem).startswith("demo_0 cannot be read: ") and load(whole).action is not None


def test_links_to_other_files_are_not_followed(tmp_path):
    other = write_demos(tmp_path / "other.hdf5", demos=1)
    path = write_demos(tmp_path / "raw" / "a.hdf5", demos=1)
    with h5py.File(path, "a") as file:
        file["data/demo_0/obs/secret"] = h5py.ExternalLink(str(other), "data/demo_0/obs/joint_states")
        file["data/demo_9"] = h5py.ExternalLink(str(other), "data/demo_0")
    (episode,) = episodes_of(path)
    assert "secret" not in episode.proprio
    assert "obs/secret is a link and not followed" in episode.repairs


def test_broken_hdf5(tmp_path):
    good = write_demos(tmp_path / "good.hdf5")
    (tmp_path / "cut.hdf5").write_bytes(good.read_bytes()[:3000])
    (tmp_path / "text.h5").write_text("not HDF5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["observations"] = np.zeros(3)
    refs = refs_of(tmp_path)
    assert [Path(ref.uri).name for ref in refs if ref.problem] == ["cut.hdf5", "other.h5", "text.h5"]
    assert len([load(ref) for ref in refs if not ref.problem]) == 2
    with pytest.raises(BadEpisode, match="no group 'data'"):
        load(next(ref for ref in refs if ref.uri.endswith("other.h5")))


# ----------------------------------------------------------------------------------------------------------- ALOHA


@pytest.mark.parametrize("compress", [True, False])
def test_aloha(tmp_path, compress):
    pictures = numbered(70)
    pictures[:, :32, :32] = 220, 30, 30
    more = {"base_action": np.ones((70, 2)), "rewards": np.arange(70.0), "goal": np.zeros(3)}
    write_aloha(tmp_path / "episode_0.hdf5", pictures, compress, **more)
    write_demos(tmp_path / "demos.hdf5")
    [(kind, _), (other, _)] = find(tmp_path)
    assert (kind, other) == ("aloha", "hdf5")
    [ref] = scan("aloha", tmp_path)
    episode = load(ref)
    assert np.abs(frames_of(episode, "cam_high").astype(int) - pictures).mean() < 2
    rng = np.random.default_rng(0)
    assert np.array_equal(episode.action[:, :14], rng.normal(size=(70, 14)).astype(np.float32))
    assert np.array_equal(episode.proprio["qpos"], rng.normal(size=(70, 14)).astype(np.float32))
    assert sizes(episode.action_layout) == {
        "left_joints": 6, "left_gripper": 1, "right_joints": 6, "right_gripper": 1, "base": 2
    }  # fmt: skip
    assert episode.action_layout[1].gripper_one_means == episode.action_layout[3].gripper_one_means == "open"
    assert (episode.fps, episode.embodiment) == (50, "aloha")
    assert list(episode.signals) == ["rewards"] and episode.signals["rewards"][69] == 69
    assert not [r for r in load(ref, DataContract(fps=25)).repairs if "control rate" in r]
    assert any("blue for red" in repair for repair in episode.repairs) == compress
    assert digest(ref) == ref.digest


def test_what_aloha_observes_beside_its_joints(tmp_path):
    more = {"observations/time": np.arange(5.0), "observations/depth": np.zeros((5, 4, 4), np.uint16)}
    path = write_aloha(tmp_path / "episode_0.hdf5", numbered(5), **more)
    with h5py.File(path, "r+") as file:
        file["observations/note"] = np.array(["x"] * 5, "S")
    (episode,) = episodes_of(path)
    assert list(episode.proprio) == ["qpos", "qvel", "time"]
    assert episode.proprio["time"].ravel().tolist() == [0, 1, 2, 3, 4]
    left_out = [repair for repair in episode.repairs if "left out" in repair]
    assert left_out == [f"observations/{name} is no vector of numbers; left out" for name in ("depth", "note")]


def test_aloha_that_does_not_fit(tmp_path):
    path = write_aloha(tmp_path / "episode_0.hdf5", numbered(5))
    with h5py.File(path, "r+") as file:
        del file["action"]
        file["action"] = np.zeros((6, 14))
    with pytest.raises(BadEpisode, match="6 actions, but 5 pictures of cam_high"):
        load(*scan("aloha", path))
    path = write_aloha(tmp_path / "episode_1.hdf5", numbered(5), base_action=np.ones((6, 2)))
    with pytest.raises(BadEpisode, match="5 actions, but 6 rows of base_action"):
        load(*scan("aloha", path))


def test_aloha_pictures_that_are_none_of_colours(tmp_path):
    more = {
        "observations/images/first": np.zeros((5, 3, 8, 8), np.uint8),
        "observations/images/deep": np.zeros((5, 8, 8)),
    }
    (episode,) = episodes_of(write_aloha(tmp_path / "episode_0.hdf5", numbered(5), **more))
    assert list(episode.cameras) == ["cam_high"]
    told = [repair for repair in episode.repairs if "no pictures of colours" in repair]
    assert told[0] == "observations/images/deep is (5, 8, 8) of float64, no pictures of colours; left out"
    assert told[1].startswith("observations/images/first is (5, 3, 8, 8) of uint8")


# ---------------------------------------------------------------------------------------------------------- CALVIN


def test_calvin(tmp_path):
    pictures = numbered(100, 32)
    pictures[:, :8, :8] = 220, 30, 30
    folder = write_calvin(tmp_path / "D" / "training", pictures)
    (whole,) = episodes_of(tmp_path)
    assert np.array_equal(frames_of(whole, "static"), pictures)
    assert np.array_equal(frames_of(whole, "gripper"), pictures[:, ::2, ::2])
    rows = [np.load(file) for file in sorted(folder.glob("episode_*.npz"))]
    assert np.array_equal(whole.action, np.stack([row["rel_actions"] for row in rows]).astype(np.float32))
    assert np.array_equal(whole.proprio["robot_obs"], np.stack([row["robot_obs"] for row in rows]).astype(np.float32))
    assert (whole.fps, whole.embodiment, whole.instruction) == (30, "panda", None)
    position, rotation, gripper = whole.action_layout
    for block in (position, rotation):
        assert (block.size, block.mode, block.frame, block.unit) == (3, "delta", "base", "scaled")
    assert rotation.representation == "euler_xyz"
    assert (gripper.size, gripper.mode, gripper.gripper_one_means) == (1, "absolute", "open")
    assert np.array_equal(whole.signals["actions"], np.stack([row["actions"] for row in rows]).astype(np.float32))
    assert np.array_equal(whole.signals["scene_obs"], np.stack([row["scene_obs"] for row in rows]).astype(np.float32))
    assert (whole.split, whole.texts) == ("training", {})
    assert digest(whole.ref) == whole.ref.digest


def test_stretches_with_a_sentence(tmp_path):
    said = {(5, 40): "push the blöck", (30, 94): "open the drawer"}
    episodes = episodes_of(write_calvin(tmp_path / "x", numbered(100, 16), first=0, sentences=said))
    assert [(episode.instruction, len(episode.action)) for episode in episodes] == [
        ("push the blöck", 36),
        ("open the drawer", 65),
    ]
    assert [(e.texts, e.split) for e in episodes] == [({"language/ann": text}, None) for text in said.values()]
    assert np.array_equal(frames_of(episodes[1], "static"), numbered(100, 16)[30:95])
    again = write_calvin(tmp_path / "y", numbered(100, 16), first=0, sentences={**said, (5, 40): "pull"})
    first, second = refs_of(again)
    assert first.digest != episodes[0].ref.digest and second.digest == episodes[1].ref.digest


def test_steps_that_are_gone_or_bombs(tmp_path):
    folder = write_calvin(tmp_path / "x", numbered(9, 16), first=0, sentences={(0, 3): "a", (4, 6): "b", (7, 8): "c"})
    (folder / "episode_0000002.npz").unlink()
    np.savez_compressed(folder / "episode_0000005.npz", rel_actions=np.zeros(2**24), robot_obs=np.zeros(15))
    lost, bomb, whole = refs_of(folder)
    assert "episode_0000002" in lost.problem and load(whole).instruction == "c"
    with pytest.raises(BadEpisode, match=r"rel_actions in episode_0000005.npz unpacks to 134217"):
        load(bomb)
    (folder / "episode_0000007.npz").write_bytes(b"PK\3\4 and no more")
    with pytest.raises(BadEpisode, match=r"episode_0000007.npz cannot be read"):
        load(whole)


def test_sentences_in_the_folder_of_another_language_model(tmp_path):
    folder = write_calvin(tmp_path / "x", numbered(9, 16), first=0, sentences={(0, 3): "push", (2, 8): "pull"})
    (folder / "lang_annotations").rename(folder / "lang_paraphrase-MiniLM-L3-v2")
    assert [(e.instruction, len(e.action)) for e in episodes_of(folder)] == [("push", 4), ("pull", 7)]
    (folder / "lang_paraphrase-MiniLM-L3-v2" / "auto_lang_ann.npy").rename(folder / "auto_lang_ann.npy")
    assert [e.instruction for e in episodes_of(folder)] == ["push", "pull"]
    for name, sentence in (("lang_a", "other words"), ("lang_annotations", "the first of all")):
        (folder / name).mkdir()
        table = {"language": {"ann": [sentence]}, "info": {"indx": [(0, 3)]}}
        np.save(folder / name / "auto_lang_ann.npy", table)  # type: ignore[arg-type]
        assert [e.instruction for e in episodes_of(folder)] == [sentence]


def test_a_list_of_more_steps_than_there_are(tmp_path):
    folder = write_calvin(tmp_path / "x", numbered(9, 16), first=3)
    ranges = [[3, 9_999_999], [3, 7], [0, 4], [12, 2**62], [5, 11]]
    np.save(folder / "ep_start_end_ids.npy", np.array(ranges[:3] + ranges[4:]))
    tracemalloc.start()
    problems = [ref.problem for ref in refs_of(folder)]
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()
    lost = "there is no episode_{:07d}.npz, of steps {} to {}".format
    assert problems == [lost(12, 3, 9_999_999), None, lost(0, 0, 4), None]
    np.save(folder / "ep_start_end_ids.npy", np.array(ranges))
    assert "no list of episodes (steps 12 to 4611686018427387904)" in refs_of(folder)[0].problem


def test_an_array_that_unpacks_to_more_than_is_said(tmp_path):
    folder = write_calvin(tmp_path / "x", numbered(3, 16), first=0)
    step = folder / "episode_0000001.npz"
    bomb = io.BytesIO()
    np.save(bomb, np.zeros(2**22))
    for method, says in (
        (zipfile.ZIP_DEFLATED, "cannot be read: "),
        (zipfile.ZIP_BZIP2, "another method than deflate"),
    ):
        with zipfile.ZipFile(step, "w", method) as file:
            file.writestr("robot_obs.npy", bomb.getvalue())
            file.writestr("rel_actions.npy", bomb.getvalue())
        lie = step.read_bytes().replace(struct.pack("<I", len(bomb.getvalue())), struct.pack("<I", 188))
        step.write_bytes(lie)
        [ref] = refs_of(folder)
        tracemalloc.start()
        with pytest.raises(BadEpisode, match=says):
            load(ref)
        assert tracemalloc.get_traced_memory()[1] < 2**23
        tracemalloc.stop()


def test_a_picture_that_is_encrypted(tmp_path):
    folder = write_calvin(tmp_path / "x", numbered(3, 16), first=0)
    data = bytearray((folder / "episode_0000001.npz").read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1  # the first member in the file's table of contents
    (folder / "episode_0000001.npz").write_bytes(data)
    [episode] = episodes_of(folder)
    with pytest.raises(BadEpisode, match=r"episode_0000001.npz cannot be read: .*encrypted"):
        frames_of(episode, "static")


@pytest.mark.parametrize("sentence", [["push"], 7, b"push", {"a": "push"}])
def test_a_sentence_that_is_no_text(tmp_path, sentence):
    [broken] = refs_of(write_calvin(tmp_path / "x", numbered(3, 16), first=0, sentences={(0, 2): sentence}))
    assert f"a sentence that is a {type(sentence).__name__}" in broken.problem


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_read_as_data(protocol, capsys):
    arrays = [np.arange(6).reshape(2, 3).T, np.array(["a", None, [1]], object), np.zeros((0, 3)), np.array("é")]
    arrays += [np.arange(3, dtype=">f4"), np.array([True])]
    held = {"arrays": arrays, "pair": (1, 2.5), "bytes": b"\xff", "scalar": np.float32(3), "type": np.dtype("<i4")}
    held["again"] = held["arrays"]
    found = read_pickle(pickle.dumps(held, protocol))
    for array, expected in zip(found["arrays"], arrays, strict=True):
        assert array.dtype == expected.dtype and array.shape == expected.shape and np.all(array == expected)
    assert found["again"] is found["arrays"]
    assert [found[key] for key in ("pair", "bytes", "scalar", "type")] == [(1, 2.5), b"\xff", 3, np.dtype("<i4")]
    with pytest.raises(BadEpisode, match=r"it asks for .*print"):
        read_pickle(pickle.dumps({"a": Evil()}, protocol))
    assert not capsys.readouterr().out


TUPLES = b")\x94" + b"".join(b"h%c\x86\x94" % at for at in range(60))  # each holds the one before it twice
LISTS = b"]\x94" + b"".join(b"](h%ch%ce\x94" % (at, at) for at in range(60))
LONG = 2**20
TEXT = b"X" + struct.pack("<I", LONG) + b"a" * LONG
SCALAR = b"cnumpy.core.multiarray\nscalar\n\x940cnumpy\ndtype\nX\x08\0\0\0S1048576\x85R\x940"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n\x940"


@pytest.mark.parametrize(
    "steps, says",
    [
        (b"}" + TUPLES + b"Ns.", "keys that are no text"),  # hashed in 2 ** 60 steps
        (b"}" + b")" + b"\x85" * 300_000 + b"Ns.", "keys that are no text"),  # hashed on the C stack
        (b"(" + TUPLES + b"Nd.", "keys that are no text"),
        (b"}(" + TUPLES + b"Nu.", "keys that are no text"),
        (b"\x8f(" + TUPLES + b"\x90.", "KeyError"),
        (b"(" + TUPLES + b"\x91.", "KeyError"),
        (b"ccollections\nOrderedDict\n](](" + TUPLES + b"Nee\x85R.", "_no_items"),
        (LISTS + b".", "unfolds to more than limits.array_bytes"),
        (b"](" + b"]" * 3_000_000 + b"e.", "takes more than 2097152 steps"),
        (b"]c_codecs\nencode\n\x940" + TEXT + b"\x940" + b"h\0h\1\x85Ra" * 2000 + b".", "more bytes than it holds"),
        (b"]" + SCALAR + b"B" + TEXT[1:] + b"\x940" + b"h\0h\1h\2\x86Ra" * 2000 + b".", "unfolds to more than"),
        (b"]" + RECONSTRUCT + b"](" + b"N" * LONG + b"e\x940" + b"h\0h\1R0" * 99 + b".", "1048576 arguments"),
        (
            RECONSTRUCT + b"h\0)R(K\1X\4\0\0\0aaaaJ\xff\xff\xff\x3f\x86cnumpy\ndtype\nX\2\0\0\0O8\x85R\x89]tb.",
            "TypeError",
        ),
        (b"cnumpy\ndtype\nX\2\0\0\0M8\x85R.", "an array of 'M8'"),
        (b"cnumpy\ndtype\n}X\5\0\0\0dtypeNsb.", "it gives type a state"),
        (b"cnumpy\ndtype\n)\x81.", "KeyError"),
        (b"(cnumpy\ndtype\no.", "KeyError"),
        (b"(inumpy\ndtype\n.", "KeyError"),
        (b"\x82\1.", "KeyError"),
        (b"c" + b"a" * LONG + b"\nb\n.", "it asks for a{188}$"),
    ],
    ids=range(20),
)
def test_a_pickle_that_would_take_all_time_or_memory(monkeypatch, steps, says):
    monkeypatch.setattr(limits, "_limits", limits.Limits(array_bytes=2**27))
    tracemalloc.start()
    with pytest.raises(BadEpisode, match=says):
        read_pickle(b"\x80\4" + steps)
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()


def test_a_header_that_is_too_deep():
    head = b"-" * 9000 + b"1\n"
    with pytest.raises(BadEpisode, match=r"a \.npy file that cannot be read"):
        read_npy(b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head)


@given(st.binary(max_size=60), st.integers(0, 400))
@settings(max_examples=300, deadline=None)
def test_no_pickle_breaks_its_reader_in_another_way(noise, at):
    data = bytearray(pickle.dumps({"a": [np.arange(9.0), np.array([None, "b"], object)], "b": np.int8(1)}, 4))
    data[at : at + len(noise)] = noise
    for broken in (noise, bytes(data)):
        with contextlib.suppress(BadEpisode):
            read_pickle(broken)


# ---------------------------------------------------------------------------------------------------------- videos


@real
def test_real_films_are_episodes_without_actions():
    refs = refs_of(REAL / "video")
    counts = {}
    for ref in refs:
        episode = load(ref)
        assert episode.action is None and episode.action_layout == () and episode.embodiment == "video"
        try:
            counts[Path(ref.uri).name] = len(frames_of(episode, "video", 32))
        except BadEpisode as error:
            counts[Path(ref.uri).name] = str(error).split(":")[0]
    assert counts == {
        "corrupted.mp4": "declares 50 frames, breaks after 28",
        "flipping_a_pancake.mkv": 310,
        "nasa_13013.mp4": 390,
        "test_clip_10s.mp4": 240,
    }


def test_a_film_that_cannot_be_opened_is_listed_with_its_reason(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(3))
    (tmp_path / "b.mp4").write_bytes(b"")
    problems = [ref.problem for ref in refs_of(tmp_path)]
    assert problems[0] is None and "cannot be opened as video" in problems[1]


# ------------------------------------------------------------------------------------------------------- contracts


def test_a_contract_overrides_what_the_reader_found(tmp_path):
    (ref,) = refs_of(write_demos(tmp_path / "a.hdf5", demos=1))
    layout = (ActionBlock(name="joints", size=6, kind="joint"), ActionBlock(name="hand", size=1))
    contract = DataContract(
        embodiment="panda-mobile",
        fps=10,
        cameras={"agentview": "front"},
        flip=(),
        action_layout=layout,
        instruction="close it",
    )
    episode = load(ref, contract)
    assert list(episode.cameras) == ["front"]
    assert np.array_equal(frames_of(episode, "front")[0], quadrants()[::-1])  # as stored: the contract says no flip
    assert (episode.embodiment, episode.fps, episode.instruction) == ("panda-mobile", 10, "close it")
    assert episode.action_layout == layout
    for flip in (None, ("agentview",)):
        assert np.array_equal(frames_of(load(ref, DataContract(flip=flip)), "agentview")[0], quadrants())
    assert load(ref, DataContract(cameras={})).cameras == {}
    assert load(ref, DataContract()).fps == 20


@pytest.mark.parametrize(
    "contract, says",
    [
        ({"cameras": {"wrist": "w"}}, "'wrist' is not in .*; recorded are: agentview"),
        ({"flip": ["wrist"]}, "'wrist' is not in"),
        ({"action_layout": [{"name": "a", "size": 6}]}, "action_layout has 6 columns, the actions of .* have 7"),
    ],
)
def test_a_contract_that_does_not_fit_is_the_users_mistake(tmp_path, contract, says):
    (ref,) = refs_of(write_demos(tmp_path / "a.hdf5", demos=1))
    with pytest.raises(UserError, match=says):
        load(ref, DataContract.model_validate(contract))
