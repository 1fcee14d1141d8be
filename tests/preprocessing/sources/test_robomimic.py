"""Demonstrations in HDF5: robomimic, robosuite, LIBERO, Isaac Lab; and ALOHA."""

from __future__ import annotations

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.formats import jpeg, moving, numbered, write_aloha, write_demos
from helpers.readers import episodes_of, frames_of, refs_of, said, sizes

from preprocessing.contracts.contract import DataContract
from preprocessing.errors import BadEpisode
from preprocessing.inspect.check import measure
from preprocessing.inspect.infer import contract_yaml
from preprocessing.sources import digest, find, load, scan


@pytest.mark.parametrize("opengl", [True, False])
def test_hdf5_images_are_upright(tmp_path, opengl):
    first, second = episodes_of(write_demos(tmp_path / "a.hdf5", opengl=opengl))
    assert np.array_equal(frames_of(first, "agentview"), moving(5))
    assert any("bottom-up" in repair for repair in said(first)) == opengl
    rng = np.random.default_rng(1)
    assert np.allclose(second.action, rng.normal(size=(5, 7)))
    assert np.allclose(second.proprio["joint_states"], rng.normal(size=(5, 7)))
    assert second.proprio["height"].shape == (5, 1)
    assert (first.instruction, first.embodiment, first.success, first.fps) == ("open the drawer", "panda", True, 20)
    assert [block.kind for block in first.action_layout] == ["position", "rotation", "gripper"]
    assert "control rate unknown; 20 Hz assumed" in said(first)


def test_natural_order_and_repacked_files(tmp_path):
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
def test_an_environment_without_metadata(tmp_path, kwargs):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_kwargs": kwargs})
    (episode,) = episodes_of(path)
    assert (episode.fps, episode.embodiment) == (20, "unknown") and "robot unknown" in said(episode)


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
def test_the_controller_determines_the_layout(tmp_path, env, modes, gripper):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = json.dumps(env)
    (episode,) = episodes_of(path)
    assert [block.mode for block in episode.action_layout] == modes
    assert episode.action_layout[-1].gripper_one_means == gripper
    assert {b.unit for b in episode.action_layout if b.kind == "position"} <= {
        "m" if modes[0] == "absolute" else "scaled"
    }


def test_replayed_libero_without_an_image_convention(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=1, opengl=False)
    with h5py.File(path, "a") as file:
        file["data/demo_0/obs/eye_in_hand_rgb"] = moving(5)
    (ref,) = refs_of(path)
    assert any("this one does not say" in repair for repair in said(load(ref)))
    told = load(ref, DataContract(flip=("agentview", "eye_in_hand")))
    assert not any("this one does not say" in repair for repair in said(told))
    assert np.array_equal(frames_of(told, "agentview"), moving(5)[:, ::-1])


def test_observations_that_are_no_camera_or_vector_are_reported(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    with h5py.File(path, "a") as file:
        obs = file["data/demo_0/obs"]
        obs["agentview_depth"], obs["touches"] = np.zeros((5, 8, 8, 1), np.float32), np.arange(5)
        obs["serial_number"] = np.arange(12)
    (episode,) = episodes_of(path)
    depth = (
        "obs/agentview_depth is float32 of shape (T, 8, 8, 1): a single channel (depth, a mask or grey), not colours"
    )
    assert {f"{depth}; left out", "obs/serial_number has 12 rows for 5 actions; left out"} <= {*said(episode)}
    assert episode.proprio["touches"].ravel().tolist() == [0, 1, 2, 3, 4]


def test_object_poses_are_not_proprio(tmp_path):
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
    assert any("one frame more than actions" in repair for repair in said(episode))
    (ref,) = refs_of(write_demos(tmp_path / "b.hdf5", demos=1, frames=9))
    with pytest.raises(BadEpisode, match=r"5 actions, but observations of lengths \[9\]"):
        load(ref)


def test_libero_observations_follow_their_actions(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=1, steps=6)
    images = numbered(6)[:, ::-1]  # image i is from after action i, state i from before it
    with h5py.File(path, "a") as file:
        file["data"].attrs["bddl_file_name"] = "libero/bddl_files/libero_90/KITCHEN_SCENE1_open_the_drawer.bddl"
        demo = file["data/demo_0"]
        del demo["obs/agentview_rgb"]
        demo["obs/agentview_rgb"], demo["robot_states"] = images, np.arange(6.0)[:, None]
        demo["states"], demo["rewards"] = np.arange(6.0)[:, None], np.arange(6) == 5
        actions, joints = demo["actions"][()].astype(np.float32), demo["obs/joint_states"][()].astype(np.float32)
    (episode,) = episodes_of(path)
    assert np.array_equal(episode.action, actions[1:]) and np.array_equal(episode.proprio["joint_states"], joints[:5])
    assert np.array_equal(frames_of(episode, "agentview"), numbered(6)[:5])
    assert episode.signals["states"].ravel().tolist() == [1, 2, 3, 4, 5]  # the states before actions 1, 2, ...
    assert episode.signals["robot_states"].ravel().tolist() == [0, 1, 2, 3, 4]
    assert episode.signals["rewards"].ravel().tolist() == [0, 0, 0, 0, 1] and episode.success
    assert "LIBERO stores the observation after each action; actions are shifted by one row" in said(episode)
    assert (episode.dataset, episode.fps, episode.embodiment) == ("libero_90", 20, "panda")
    assert not [repair for repair in said(episode) if "unknown" in repair]  # known by LIBERO's contract
    assert [block.unit for block in episode.action_layout[:2]] == ["scaled", "scaled"]


def test_other_numbers_per_step_are_signals(tmp_path):
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
    assert set(first.signals) == {"action_dict/rel_pos", "actions_abs", "dones", "matrices", "rewards", "states"}
    assert np.array_equal(first.signals["states"], states[:5].astype(np.float32))
    assert np.array_equal(first.signals["actions_abs"], absolute.astype(np.float32))
    assert first.signals["rewards"].ravel().tolist() == [0, 0, 0, 1, 0]
    assert "states has one row more than actions; its last row is dropped" in said(first)
    assert {"short has 3 rows for 5 actions; left out", "names holds texts, not numbers; left out"} <= {*said(first)}
    assert [episode.split for episode in (first, second, third)] == ["train", "valid", "train"]
    assert first.texts == {"problem_info/language_instruction": "open the drawer", "ep_meta/lang": "open it"}


def test_groups_below_observations_and_actions(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=1, opengl=False)
    rng = np.random.default_rng(1)
    with h5py.File(path, "a") as file:
        del file["data"].attrs["problem_info"]
        demo = file["data/demo_0"]
        demo.attrs["task_description"], demo.attrs["success"] = "stack the cups", False
        demo["obs/cams/wrist"], demo["obs/cams/front/rgb"] = numbered(5), moving(5)
        demo["obs/robot/eef_pos"], demo["obs/robot/pose"] = np.arange(15.0).reshape(5, 3), np.ones((5, 4, 4))
        demo["obs/datagen_info/object_pose"] = np.ones((5, 7))
        demo["initial_state/robot/joints"], demo["states/robot/joints"] = np.ones((1, 9)), np.ones((5, 9))
        demo["images/side"], demo["poses"] = numbered(5, 32), np.zeros(5, [("x", "f4"), ("y", "f4")])
        del demo["actions"]
        demo["actions/gripper"], demo["actions/arm"] = rng.normal(size=5), rng.normal(size=(5, 6))
    (ref,) = refs_of(path)
    episode = load(ref)
    assert list(episode.cameras) == ["images/side", "agentview", "cams/front", "cams/wrist"]
    assert np.array_equal(frames_of(episode, "cams/wrist"), numbered(5))
    assert np.array_equal(frames_of(episode, "cams/front"), moving(5))
    assert episode.proprio["robot/eef_pos"][4].tolist() == [12, 13, 14]
    assert episode.signals["obs/robot/pose"].shape == (5, 16) and "obs/datagen_info/object_pose" in episode.signals
    assert "states/robot/joints" in episode.signals and "initial_state/robot/joints" not in episode.signals
    assert sizes(episode.action_layout) == {"actions/arm": 6, "actions/gripper": 1} and episode.action.shape == (5, 7)
    assert (episode.instruction, episode.success) == ("stack the cups", False)
    order = "actions is a group; the action is its parts in this order: actions/arm, actions/gripper"
    told = {
        order,
        "the instruction is taken from task_description",
        "poses holds records of x, y, not numbers; left out",
    }
    assert told <= {*said(episode)}
    contract = DataContract(
        action=("actions/gripper",), cameras={"cams/wrist": "wrist"}, proprio={"robot/eef_pos": "hand"}, instruction="x"
    )
    under = load(ref, contract)
    assert under.action.shape == (5, 1) and [*under.cameras, *under.proprio] == ["wrist", "hand"]
    assert not any("actions is a group" in text or "taken from" in text for text in said(under))
    inferred = contract_yaml(measure([ref], None, [ref]), "a.hdf5")
    assert all(name in inferred for name in ("cams/wrist", "robot/eef_pos", "obs/robot/pose (16)", "actions/arm (6)"))
    with h5py.File(path, "a") as file:
        file["data/demo_0"].attrs["task_description"] = "stack the plates"
    assert digest(ref) != ref.digest


@pytest.mark.parametrize(
    "pictures, reason",
    [
        (numbered(5).transpose(0, 3, 1, 2), "has its channels first; moved last"),
        ((numbered(5) / np.float32(255)), "is recorded from 0 to 1; scaled to 0 to 255"),
        ((numbered(5) / 255).transpose(0, 3, 1, 2), "has its channels first; moved last"),
        (numbered(5).astype(np.float64), None),
        (numbered(5).astype(np.int64), None),
        (np.concatenate([numbered(5), numbered(5)[..., :1]], axis=3), "has an alpha channel; dropped"),
    ],
)
def test_images_stored_in_other_ways(tmp_path, pictures, reason):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    with h5py.File(path, "a") as file:
        file["data/demo_0/obs/top"] = pictures
    (episode,) = episodes_of(path)
    assert np.array_equal(frames_of(episode, "top"), numbered(5)[:, ::-1])
    assert [text for text in said(episode) if text.startswith("obs/top")][:1] == (
        [f"obs/top {reason}"] if reason else []
    )


@pytest.mark.parametrize(
    "pictures, reason",
    [
        (np.full((5, 64, 64), 900, np.uint16), r"uint16 of shape \(T, 64, 64\): a single channel"),
        (np.ones((5, 1, 64, 64), np.float32), "a single channel"),
        (np.full((5, 64, 64, 3), 900, np.uint16), "it ranges from 900 to 900, which are not colours"),
        (np.full((5, 64, 64, 3), -1.0), "it ranges from -1 to -1"),
        (np.full((5, 64, 64, 3), np.nan), "it ranges from nan to nan"),
        (np.ones((5, 64, 64, 2), np.uint8), "neither its last axis nor its first has three channels"),
        (np.ones((5, 64, 64, 3), bool), "not colour images"),
        (numbered(3), "has 3 rows for 5 actions"),
        (np.array([b"\xff\xd8\xff broken"] * 5, "S"), "an image cannot be decoded|neither JPEG nor PNG"),
    ],
)
def test_what_looks_like_a_camera_is_left_out_with_a_reason(tmp_path, pictures, reason):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    with h5py.File(path, "a") as file:
        file["data/demo_0/obs/top"] = pictures
    (whole,) = episodes_of(path)
    assert list(whole.cameras) == ["agentview"]
    assert any(re.search(rf"obs/top.*({reason}).*left out", text) for text in said(whole))
    with h5py.File(path, "a") as file:
        del file["data/demo_0/obs/agentview_rgb"]
    (ref,) = refs_of(path)
    with pytest.raises(BadEpisode, match=rf"^has no camera: .*obs/top.*({reason})"):
        load(ref)


@pytest.mark.parametrize("rows", ["padded", "fixed", "loose"])
def test_observed_images_as_jpeg_files(tmp_path, rows):
    path, files = write_demos(tmp_path / "a.hdf5", demos=1), [jpeg(picture) for picture in numbered(5)]
    with h5py.File(path, "a") as file:
        if rows == "loose":
            stored = file.create_dataset("data/demo_0/obs/top", (5,), h5py.vlen_dtype(np.uint8))
            for row, data in enumerate(files):
                stored[row] = np.frombuffer(data, np.uint8)
        else:
            padded = np.array(files, f"S{max(map(len, files))}")
            file["data/demo_0/obs/top"] = padded if rows == "fixed" else padded[:, None].view(np.uint8)
    (episode,) = episodes_of(path)
    assert np.abs(frames_of(episode, "top").astype(int) - numbered(5)[:, ::-1]).max() <= 1
    assert "obs/top holds JPEG files, read as RGB; writers that use OpenCV often swap red and blue" in said(episode)


def test_a_demonstration_without_actions_is_told(tmp_path):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    with h5py.File(path, "a") as file:
        del file["data/demo_0/actions"]
        file["data/demo_0/command/arm"] = np.ones((5, 6))
    (episode,) = episodes_of(path)
    assert episode.action is None and len(frames_of(episode, "agentview")) == 5
    assert any("no action was found" in text and "command/arm" in text for text in said(episode))


@pytest.mark.parametrize(
    "clock, recorded",
    [
        (1.7e9 + np.arange(5) / 20, np.arange(5) / 20),
        (np.arange(5, dtype=np.int64) * 50_000_000 + 1_700_000_000_000_000_001, np.arange(5) * 5e7),
        (np.arange(5, dtype=np.uint64) * 50_000 + 1_700_000_000_000_000, np.arange(5) * 5e4),
        ((np.arange(5) * 50 + 1_700_000_000_000)[:, None], np.arange(5) * 50),
        (np.array([1.7e9, np.nan, 1.7e9 + 0.1, 1.7e9 + 0.05, 1.7e9 + 0.2]), [0, np.nan, 0.1, 0.05, 0.2]),
        (np.arange(5) + 170_000, np.arange(5) + 170_000),
        (np.arange(5) + 0.125, np.arange(5) + 0.125),
        (np.full(5, 1.7e9), np.full(5, np.float32(1.7e9))),
    ],
)
def test_clocks_count_from_the_first_step(tmp_path, clock, recorded):
    path = write_demos(tmp_path / "a.hdf5", demos=1)
    with h5py.File(path, "a") as file:
        file["data/demo_0/clock/hardware"], file["data/demo_0/obs/clock"] = clock, clock
    (episode,) = episodes_of(path)
    mended = recorded[0] == 0
    for name, rows in (("clock/hardware", episode.signals["clock/hardware"]), ("obs/clock", episode.proprio["clock"])):
        assert np.allclose(rows[:, 0], recorded, rtol=1e-6, atol=1e-6, equal_nan=True)
        assert any(text.startswith(f"{name} now counts from the first step") for text in said(episode)) == mended


@pytest.mark.parametrize(
    "write, says",
    [
        (lambda file: file.create_group("data/demo_0/states"), "no group 'obs' in /data/demo_0; it has only"),
        (lambda file: file.create_group("puppet"), "looks like RoboMIND's"),
        (lambda file: file.update({"observations": np.ones((5, 3)), "actions": np.ones((5, 3))}), "looks like D4RL's"),
        (lambda file: file.create_group("observations/images"), "looks like ALOHA's or RoboTwin's, but has no action"),
        (lambda file: file.create_group("traj_0/obs"), "traj_0 is neither below a group data"),
        (lambda file: file.update({"x": 1, "y": 2}), "of no known format .*; it holds x, y"),
        (lambda file: file.create_group("a" + "/a" * 100), "of no known format"),
    ],
)
def test_an_unknown_file_is_refused_with_what_it_looks_like(tmp_path, write, says):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        write(file)
    (ref,) = refs_of(tmp_path / "a.hdf5")
    with pytest.raises(BadEpisode, match=says):
        load(ref)


def test_endless_members_texts_and_depth_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("preprocessing.sources.untrusted.hdf5.MAX_MEMBERS", 64)
    path = write_demos(tmp_path / "a.hdf5", demos=4)
    with h5py.File(path, "a") as file:
        file.create_dataset("data/demo_0/log", (10**7,), h5py.string_dtype())
        for number in range(65):
            file["data/demo_1/obs"].create_group(f"{number}")
        file["data/demo_2"].create_group("a" + "/a" * 100)
    *problems, whole = refs_of(path)
    says = [
        "log holds 10000000 values of variable length",
        "obs has 68 members, more than 64",
        "more than 32 groups deep",
    ]
    assert all(say in str(ref.problem) for say, ref in zip(says, problems, strict=True))
    assert load(whole).action is not None


@pytest.mark.parametrize(
    "claim, says",
    [
        ({"shape": (5, 2**30), "chunks": (1, 1024)}, r"huge claims to hold 21474836480 bytes, but stores only 0"),
        ({"shape": (5, 2**20), "chunks": (1, 8)}, r"huge claims to hold 20971520 bytes, but stores only 0"),
        ({"shape": (2**29,), "chunks": (2**29,)}, r"huge has chunks of \(536870912,\), more than limits.array"),
        ({"shape": (5, 2**14, 2**14, 3), "dtype": "u1"}, r"holds images of \(16384, 16384\), more than limits.pic"),
        ({"shape": (2**40, 3)}, r"huge claims to hold 13194139533312 bytes, but stores only 0"),
    ],
)
def test_a_data_set_that_claims_too_much_is_refused(tmp_path, claim, says):
    path = write_demos(tmp_path / "a.hdf5", demos=2)
    with h5py.File(path, "a") as file:
        file["data/demo_0"].create_dataset("huge", **claim)
    broken, whole = refs_of(path)
    assert re.search(says, str(broken.problem)) and load(whole).action is not None


def test_cyclic_groups(tmp_path):
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
    assert "obs/secret is a link and is not followed" in said(episode)


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


@pytest.mark.parametrize("compress", [True, False])
def test_aloha(tmp_path, compress):
    images = numbered(70)
    images[:, :32, :32] = 220, 30, 30
    more = {"base_action": np.ones((70, 2)), "rewards": np.arange(70.0), "goal": np.zeros(3)}
    write_aloha(tmp_path / "episode_0.hdf5", images, compress, **more)
    write_demos(tmp_path / "demos.hdf5")
    [(kind, _), (other, _)] = find(tmp_path)
    assert (kind, other) == ("aloha", "hdf5")
    [ref] = scan("aloha", tmp_path)
    episode = load(ref)
    assert np.abs(frames_of(episode, "cam_high").astype(int) - images).mean() < 2
    rng = np.random.default_rng(0)
    assert np.array_equal(episode.action[:, :14], rng.normal(size=(70, 14)).astype(np.float32))
    assert np.array_equal(episode.proprio["qpos"], rng.normal(size=(70, 14)).astype(np.float32))
    assert sizes(episode.action_layout) == {
        "left_joints": 6, "left_gripper": 1, "right_joints": 6, "right_gripper": 1, "base": 2
    }  # fmt: skip
    assert episode.action_layout[1].gripper_one_means == episode.action_layout[3].gripper_one_means == "open"
    assert (episode.fps, episode.embodiment) == (50, "aloha")
    assert list(episode.signals) == ["rewards"] and episode.signals["rewards"][69] == 69
    assert not [r for r in said(load(ref, DataContract(fps=25))) if "control rate" in r]
    assert any("red and blue swapped" in repair for repair in said(episode)) == compress
    assert digest(ref) == ref.digest


def test_aloha_observations_besides_joints(tmp_path):
    more = {"observations/time": np.arange(5.0), "observations/depth": np.zeros((5, 4, 4), np.uint16)}
    path = write_aloha(tmp_path / "episode_0.hdf5", numbered(5), **more)
    with h5py.File(path, "r+") as file:
        file["observations/note"] = np.array(["x"] * 5, "S")
    (episode,) = episodes_of(path)
    assert list(episode.proprio) == ["qpos", "qvel", "time"]
    assert episode.proprio["time"].ravel().tolist() == [0, 1, 2, 3, 4]
    assert episode.signals["observations/depth"].shape == (5, 16)
    left_out = [repair for repair in said(episode) if "left out" in repair]
    assert left_out == ["observations/note holds texts, not numbers; left out"]


def test_aloha_with_mismatched_lengths(tmp_path):
    path = write_aloha(tmp_path / "episode_0.hdf5", numbered(5))
    with h5py.File(path, "r+") as file:
        del file["action"]
        file["action"] = np.zeros((6, 14))
    with pytest.raises(BadEpisode, match=r"6 actions, but observations of lengths \[5\]"):
        load(*scan("aloha", path))
    path = write_aloha(tmp_path / "episode_1.hdf5", numbered(5), base_action=np.ones((6, 2)))
    with pytest.raises(BadEpisode, match="5 actions, but 6 rows of base_action"):
        load(*scan("aloha", path))


def test_aloha_images_that_are_not_rgb(tmp_path):
    more = {
        "observations/images/first": numbered(5, 8).transpose(0, 3, 1, 2),
        "observations/images/deep": np.zeros((5, 16, 16)),
        "observations/images/short": numbered(4),
    }
    (episode,) = episodes_of(write_aloha(tmp_path / "episode_0.hdf5", numbered(5), **more))
    assert list(episode.cameras) == ["cam_high", "first"]
    assert np.array_equal(frames_of(episode, "first"), numbered(5, 8))
    above = "observations/images/"
    alone = "is float64 of shape (T, 16, 16): a single channel (depth, a mask or grey), not colours; left out"
    short = "short has 4 rows for 5 actions; left out"
    told = {f"{above}deep {alone}", f"{above}{short}", f"{above}first has its channels first; moved last"}
    assert told <= {*said(episode)}
