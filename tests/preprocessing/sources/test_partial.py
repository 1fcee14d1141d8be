"""What a robot's log holds is read, or named with the contract's line that would read it; one bad stream is left out.

LeRobot's data sets have their own module, test_lerobot_partial.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from helpers.formats import jpeg, numbered, quadrants, write_calvin, write_pictures, write_tfds, write_video
from helpers.readers import episodes_of, refs_of, said
from test_lerobot import edit_table
from test_replay_buffer import write_buffer
from test_webdataset import shard

from preprocessing.contracts.contract import DataContract
from preprocessing.errors import BadEpisode
from preprocessing.sources import digest, load


def line_of(text: str) -> dict:
    """The contract's line in a repair."""
    return yaml.safe_load(text.split("`")[-2])


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (["action.arm", "action.gripper"], "action"),
        (["left_arm_action", "cmd_vel"], "action"),
        (["observation.tactile"], "proprio"),
        (["effort", "wrist/force"], "proprio"),
    ],
)
def test_what_a_table_holds_besides_is_named_with_the_line_that_reads_it(tmp_path: Path, names: list, key: str) -> None:
    folder = write_pictures(tmp_path)
    values = pa.array([[i, 1, 2] for i in range(6)])
    for name in names:
        edit_table(folder, lambda table, name=name: table.append_column(name, values))
    [ref] = refs_of(folder)
    [text] = said(load(ref))
    assert all(name in text for name in names)
    contract = DataContract.model_validate(line_of(text))
    episode = load(ref, contract)
    assert said(episode) == []
    if key == "action":
        assert episode.action.shape[1] == 2 + 3 * len(names)
    else:
        assert sum(rows.shape[1] for rows in episode.proprio.values()) == 2 + 3 * len(names)


def test_books_and_simulators_are_not_worth_a_word(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path)
    for name in ("next.reward", "next.done", "index", "is_first", "annotation.human.x"):
        edit_table(folder, lambda table, name=name: table.append_column(name, pa.array([1.0] * 6)))
    edit_table(folder, lambda table: table.append_column("observation.environment_state", pa.array([[1.0] * 9] * 6)))
    assert said(episodes_of(folder)[0]) == []


# -------------------------------------------------------------------------------------------------------- RLDS


def tfds(folder: Path, fields: dict, values: dict, without: str = "") -> Path:
    usual = {
        "steps/observation/image": ("jpeg", [jpeg(quadrants(32))] * 3),
        "steps/observation/state": ("float32 2", np.ones((3, 2))),
        "steps/action": ("float32 2", np.ones((3, 2))),
    }
    usual = {name: found for name, found in usual.items() if name != without}
    kinds = {name: kind for name, (kind, _) in usual.items()} | fields
    return write_tfds(folder, "toy", kinds, [{name: value for name, (_, value) in usual.items()} | values])


def test_rlds_actions_and_observations_by_other_names(tmp_path: Path) -> None:
    fields = {"steps/actions/arm": "float32 2", "steps/actions/grip": "float32 1", "steps/wrist": "jpeg"}
    values = {"steps/actions/arm": np.zeros((3, 2)), "steps/actions/grip": np.ones((3, 1))}
    [episode] = episodes_of(tfds(tmp_path, fields, values | {"steps/wrist": [jpeg(quadrants(32))] * 3}, "steps/action"))
    assert episode.action.tolist() == [[0, 0, 1]] * 3 and list(episode.cameras) == ["image", "wrist"]
    assert "no steps/action; steps/actions is read as the action" in said(episode)


@pytest.mark.parametrize(
    ("fields", "values", "told"),
    [
        ({"steps/observation/wrist": "jpeg"}, {"steps/observation/wrist": [jpeg(quadrants(32))] * 2}, "2 images for 3"),
        ({"steps/observation/wrist": "jpeg"}, {"steps/observation/wrist": [b"\xff\xd8no"] * 3}, "wrist is dropped"),
        ({"steps/goal_image": "jpeg"}, {"steps/goal_image": [jpeg(quadrants(32))] * 3}, "it is not an observation"),
        ({"steps/observation/tact": "float32 2"}, {"steps/observation/tact": np.ones((2, 2))}, "has 2 of 3 steps"),
        ({"steps/cloud": "float32 300 3"}, {"steps/cloud": np.ones((3, 300, 3))}, "has 900 numbers a step"),
        ({}, {"steps/tactile": np.ones((3, 2))}, "steps/tactile is recorded, but not in features.json"),
        ({"steps/arm": "float32 7"}, {"steps/arm": np.ones((3, 7))}, "to read: `proprio: {state: state, arm: arm}`"),
    ],
)  # fmt: skip
def test_rlds_one_unusable_or_unread_stream(tmp_path: Path, fields: dict, values: dict, told: str) -> None:
    [episode] = episodes_of(tfds(tmp_path, fields, values))
    assert list(episode.cameras) == ["image"] and list(episode.proprio) == ["state"]
    assert any(told in text for text in said(episode)), said(episode)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_rlds_metadata_in_any_unicode_encoding(tmp_path: Path, encoding: str) -> None:
    folder = tfds(tmp_path, {}, {})
    for file in folder.glob("*.json"):
        file.write_bytes(file.read_text().encode(encoding))
    [episode] = episodes_of(folder)
    assert (episode.dataset, list(episode.cameras)) == ("toy", ["image"])


def test_rlds_a_feature_that_is_not_described_is_left_out(tmp_path: Path) -> None:
    folder = tfds(tmp_path, {"steps/odd": "float32 2"}, {"steps/odd": np.ones((3, 2))})
    features = json.loads((folder / "features.json").read_text())
    steps = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    steps["odd"] = {"tensor": {"shape": {"dimensions": ["two"]}}}
    (folder / "features.json").write_text(json.dumps(features))
    assert "steps/odd is unknown, not numbers of one shape; left out" in said(episodes_of(folder)[0])


# ------------------------------------------------------------------------------------------------ other formats


def test_replay_buffers_with_other_names_and_short_or_broken_arrays(tmp_path: Path) -> None:
    frames = numbered(6, 16)
    data = {"cam": frames, "other": frames[:5], "actions": np.ones((6, 2), np.float32)}
    data |= {"robot0_eef_pos": np.ones((6, 3), np.float32), "effort": np.ones((4, 3), np.float32)}
    data |= {"tactile": np.ones((6, 4), np.float32)}
    first, second = refs_of(write_buffer(tmp_path / "a.zarr", data, [3, 6]))
    assert (first.problem, second.problem) == (None, None)
    assert list(load(first).cameras) == ["cam", "other"]
    episode = load(second)
    assert list(episode.cameras) == ["cam"] and list(episode.proprio) == ["robot0_eef_pos"]
    assert episode.action.shape == (3, 2) and digest(second) == second.digest
    told = said(episode)
    assert "other has 5 rows, but the episode ends at 6; left out" in told
    assert "effort has 4 rows, but the episode ends at 6; left out" in told
    assert "no array action; actions is read as the action" in told
    assert any("tactile (4)" in text and "tactile: tactile" in text for text in told)
    [alone] = refs_of(write_buffer(tmp_path / "b.zarr", {"cam": frames[:5], "action": np.ones((6, 2))}, [6]))
    assert alone.problem == "cam has 5 rows, but the episode ends at 6"


def test_webdataset_sidecars_are_named_and_a_broken_film_is_left_out(tmp_path: Path) -> None:
    film = write_video(tmp_path / "v.mp4", numbered(4, 32)).read_bytes()
    members = {
        "a.json": b'\xef\xbb\xbf{"caption": "x", "actions": [[1, 2]]}',
        "a.front.mp4": film,
        "a.wrist.mp4": film[:300],
    }
    shard(tmp_path / "set" / "a.tar", members | {"a.actions.npy": b"\x93NUMPY", "a.state.npy": b"\x93NUMPY"})
    [episode] = episodes_of(tmp_path / "set")
    assert list(episode.cameras) == ["front"] and episode.instruction == "x"
    told = said(episode)
    assert "not read, as clips have no actions here: actions.npy, state.npy" in told
    assert "not read, as clips have no actions here: json: actions" in told
    assert any(text.startswith("camera wrist: ") and text.endswith("left out") for text in told)


def test_calvin_arrays_of_other_names(tmp_path: Path) -> None:
    folder = write_calvin(tmp_path / "training", numbered(3, 16), first=10)
    for step in range(10, 13):
        with np.load(folder / f"episode_{step:07d}.npz") as arrays:
            more = {"tactile": np.full(4, step), "cloud": np.zeros((9, 3)), "words": np.array(["a"])}
            np.savez(folder / f"episode_{step:07d}.npz", **arrays, **more)
    [episode] = episodes_of(folder)
    assert episode.signals["tactile"][:, 0].tolist() == [10, 11, 12]
    assert "cloud is not one vector per step; left out" in said(episode)
    assert any("tactile (4); to read: `proprio: {robot_obs: robot_obs, tactile: tactile}`" in t for t in said(episode))


@pytest.mark.parametrize(
    ("ranges", "refused"),
    [
        ([[10, 12], [13, 15]], {}),
        ([[10, 13], [13, 15]], {0: 1, 1: 0}),
        ([[10, 15], [11, 12]], {0: 1, 1: 0}),
        ([[13, 15], [13, 15]], {0: 1, 1: 0}),
    ],
)
def test_calvin_recordings_that_claim_the_same_steps(tmp_path: Path, ranges: list, refused: dict) -> None:
    folder = write_calvin(tmp_path / "training", numbered(6, 16), first=10)
    np.save(folder / "ep_start_end_ids.npy", np.array(ranges))
    for ref in refs_of(folder):
        if ref.index in refused:
            assert f"episode {refused[ref.index]} claims some of its steps" in str(ref.problem)
            with pytest.raises(BadEpisode):
                load(ref)
        else:
            assert ref.problem is None
