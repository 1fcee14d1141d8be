"""RLDS: TFRecord shards and features.json, valid and broken."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from helpers.formats import REAL, encode_example, jpeg, quadrants, rlds_episode, write_rlds, write_tfds
from helpers.readers import episodes_of, frames_of, real, refs_of, said, sizes
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing.errors import BadEpisode, UserError
from preprocessing.sources import load
from preprocessing.sources.rlds.tfrecord import parse_example


def test_rlds(tmp_path):
    first, second = episodes_of(write_rlds(tmp_path / "x", [rlds_episode(4), rlds_episode(6, seed=1)]))
    assert first.instruction == "lift the blöck"
    assert (first.proprio["state"].shape, first.action.shape, first.action.dtype) == ((4, 3), (4, 2), np.float32)
    rng = np.random.default_rng(1)
    assert np.allclose(second.proprio["state"], rng.normal(size=(6, 3)))
    assert np.allclose(second.action, rng.normal(size=(6, 2)))
    assert np.abs(frames_of(second, "image")[5].astype(int) - quadrants(32)).mean() < 4
    assert (first.embodiment, first.fps) == ("toy", 10)
    assert "control rate unknown; 10 Hz assumed" in said(first)


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


def test_rlds_keeps_other_numbers_as_signals(tmp_path):
    record = toy_episode()
    (episode,) = episodes_of(write_tfds(tmp_path, "toy_set", TOY, [record], split="val"))
    assert (episode.dataset, episode.split, episode.success) == ("toy_set", "val", True)
    assert list(episode.proprio) == ["state"]
    expected = {
        "observation/contact": 1,
        "observation/box": 4,
        "action_dict/joint_velocity": 7,
        "reward": 1,
        "is_last": 1,
    }
    assert {name: values.shape[1] for name, values in episode.signals.items()} == expected
    for name, values in episode.signals.items():
        assert values.dtype == np.float32
        assert np.allclose(values, record[f"steps/{name}"].reshape(3, -1)), name
    assert episode.texts == {
        "file_path": "/a/b.npy",
        "language_instruction": "lift",
        "language_instruction_2": "",
        "observation/natural_language_instruction": "wipe",
    }
    assert episode.instruction == "lift"
    assert "robot unknown; the data set's name is used instead" in said(episode)


@pytest.mark.parametrize(
    "fields, changed, old, new, says",
    [
        ({}, {"steps/observation/image": [jpeg(quadrants(32))] * 2}, "", "", "has 2 images for 3 steps"),
        ({"steps/action": "float32 2 2"}, {"steps/action": np.ones((3, 2, 2))}, "", "", "is not one vector per step"),
        ({}, {}, '"uint8"', '"uint16"', "has no camera"),
        ({}, {}, '["-1", "-1", "3"]', '["32", "32", "1"]', "has no camera"),
    ],
)
def test_rlds_images_and_actions_of_other_kinds(tmp_path, fields, changed, old, new, says):
    file = write_tfds(tmp_path, "toy", TOY | fields, [toy_episode(**changed)]) / "features.json"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(BadEpisode, match=says):
        episodes_of(tmp_path)


@pytest.mark.parametrize(
    ("kind", "stored", "mended"),
    [
        ("uint8 32 32 3", lambda pictures: pictures, ""),
        ("uint8 3 32 32", lambda pictures: pictures.transpose(0, 3, 1, 2), "has its channels first; moved last"),
        ("float32 32 32 3", lambda pictures: pictures / 255, "is recorded from 0 to 1; scaled to 0 to 255"),
        ("uint8 32 32 3 bytes", lambda pictures: [picture.tobytes() for picture in pictures], ""),
    ],
)
def test_rlds_pictures_stored_as_numbers(tmp_path, kind, stored, mended):
    pictures = np.stack([quadrants(32), quadrants(32)[::-1], quadrants(32)[:, ::-1]])
    *kind, encoded = kind.partition(" bytes")[:2]
    changed = {"steps/observation/wrist": stored(pictures), "steps/observation/image": [jpeg(quadrants(32))] * 3}
    file = write_tfds(tmp_path, "toy", TOY | {"steps/observation/wrist": kind[0]}, [toy_episode(**changed)])
    if encoded:
        table = json.loads((file / "features.json").read_text())
        steps = table["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
        steps["observation"]["featuresDict"]["features"]["wrist"]["tensor"]["encoding"] = "bytes"
        (file / "features.json").write_text(json.dumps(table))
    (episode,) = episodes_of(tmp_path)
    assert set(episode.cameras) == {"image", "wrist"} and np.array_equal(frames_of(episode, "wrist"), pictures)
    told = " ".join(said(episode))
    assert f"wrist {mended}".strip() in told if mended else "wrist" not in told


def test_rlds_small_tables_of_numbers_are_signals_and_no_pictures(tmp_path):
    touch = np.arange(3 * 256.0).reshape(3, 16, 16)
    fields = TOY | {"steps/observation/touch": "float32 16 16"}
    (episode,) = episodes_of(write_tfds(tmp_path, "toy", fields, [toy_episode(**{"steps/observation/touch": touch})]))
    assert np.array_equal(episode.signals["observation/touch"], touch.reshape(3, -1))
    assert "touch is dropped" not in " ".join(said(episode))


def test_rlds_pictures_that_are_no_colours_are_left_out_by_name(tmp_path):
    fields = TOY | {"steps/observation/depth": "uint16 32 32 1", "steps/observation/odd": "float32 32 32 3"}
    changed = {
        "steps/observation/depth": np.ones((3, 32, 32, 1)),
        "steps/observation/odd": np.full((3, 32, 32, 3), -1.0),
    }
    (episode,) = episodes_of(write_tfds(tmp_path, "toy", fields, [toy_episode(**changed)]))
    assert set(episode.cameras) == {"image"}
    told = " ".join(said(episode))
    assert "camera depth is dropped: depth is" in told and "a single channel" in told
    assert "camera odd is dropped: " in told and "ranges from -1 to -1" in told


def test_rlds_reports_a_changing_instruction(tmp_path):
    record = toy_episode(**{"steps/language_instruction": ["lift", "lift", "drop"]})
    (episode,) = episodes_of(write_tfds(tmp_path, "toy", TOY, [record]))
    assert episode.instruction == "lift"
    assert "the instruction changes within the episode; the first one is kept" in said(episode)


@pytest.mark.parametrize(
    "field, more, success",
    [
        ("success", {}, False),
        ("aspects/success", {"aspects/has_aspects": 1}, False),
        ("aspects/success", {"aspects/has_aspects": 0}, None),
        ("aspects/feasible", {}, None),
    ],
)
def test_rlds_success_if_judged(tmp_path, field, more, success):
    fields = {name: kind for name, kind in TOY.items() if name != "episode_metadata/success"}
    judged = {field: np.array([0]), **{name: np.array([value]) for name, value in more.items()}}
    record = {name: values for name, values in toy_episode().items() if name in fields} | judged
    (episode,) = episodes_of(write_tfds(tmp_path, "toy", fields | dict.fromkeys(judged, "bool"), [record]))
    assert episode.success is success


def test_name_and_split_from_the_shard_name(tmp_path):
    folder = write_rlds(tmp_path / "a", [rlds_episode()], name="some-robot")
    assert [(e.dataset, e.split) for e in episodes_of(folder)] == [("some-robot", "train")]
    shutil.move(folder / "some-robot-train.tfrecord-00000-of-00001", folder / "mine.tfrecord")
    assert [(e.dataset, e.split) for e in episodes_of(folder)] == [("mine", None)]
    (folder / "dataset_info.json").write_text("[1]")
    assert [(e.dataset, e.split) for e in episodes_of(folder)] == [("mine", None)]


def test_missing_shards_are_listed_once(tmp_path):
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


def test_any_features_json_is_read_or_refused(tmp_path):
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
def test_invalid_features_json(tmp_path, written):
    (ref,) = refs_of(write_rlds(tmp_path, [rlds_episode()]))
    (tmp_path / "features.json").write_text(written)
    with pytest.raises(BadEpisode):
        load(ref)


def test_action_parts_are_joined_by_name(tmp_path):
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


def test_a_truncated_shard_keeps_complete_episodes(tmp_path):
    folder = write_rlds(tmp_path, [rlds_episode(seed=i) for i in range(3)])
    whole = refs_of(folder)
    shard = Path(whole[0].uri)
    shard.write_bytes(shard.read_bytes()[:-100])
    cut = refs_of(folder)
    assert cut[:2] == whole[:2]
    assert "record 2 at byte" in cut[2].problem and "truncated" in cut[2].problem
    with pytest.raises(BadEpisode, match="record 2"):
        load(cut[2])
    shard.write_bytes(b"")
    assert [ref.problem for ref in refs_of(folder)] == ["the shard is empty"]


@pytest.mark.parametrize(
    "at, what, kept",
    [(200, "bytes are damaged", 2), (0, "its length has a wrong checksum", 1)],
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


def test_records_that_contradict_features_json(tmp_path):
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
def test_any_example_round_trips(features, packed):
    parsed = parse_example(encode_example(features, packed))
    assert parsed.keys() == features.keys()
    for key, written in features.items():
        read = parsed[key] if isinstance(parsed[key], list) else parsed[key].tolist()
        assert len(read) == len(written)
        assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(read, written, strict=True))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2**31))
def test_any_bytes_are_parsed_or_refused(noise, at):
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
        assert "has_image_0 is 0 although images exist; camera kept" in said(episode)
        assert any("is_last is never 1" in repair for repair in said(episode))
        assert not [repair for repair in said(episode) if "unknown" in repair]
        assert episode.action_layout[2].gripper_one_means == "open"
        assert 0 <= episode.action[:, 6].min() <= episode.action[:, 6].max() <= 1
        assert set(episode.signals) == {"discount", "is_first", "is_last", "is_terminal", "reward"}
        assert (episode.dataset, episode.split, episode.success) == ("bridge_dataset", "train", None)
        assert episode.texts["language_instruction"] == episode.instruction
    assert episodes[0].instruction == "put cup from counter or drying rack into sink"
