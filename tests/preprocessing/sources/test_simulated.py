"""Simulators' recordings in HDF5: ManiSkill, Minari, RoboTwin."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
from helpers.formats import moving, numbered, write_aloha, write_demos, write_maniskill, write_minari, write_robotwin
from helpers.readers import episodes_of, frames_of, refs_of, said, sizes

from preprocessing.contracts.contract import DataContract
from preprocessing.errors import BadEpisode
from preprocessing.sources import digest, find, load

LENGTH = 6  # pictures


def test_each_file_is_recognised_by_its_content(tmp_path):
    write_demos(tmp_path / "a.hdf5")
    write_aloha(tmp_path / "b.hdf5", numbered(LENGTH))
    write_maniskill(tmp_path / "c.hdf5", numbered(LENGTH))
    write_minari(tmp_path / "minari", numbered(LENGTH)).joinpath("data/main_data.hdf5").rename(tmp_path / "d.hdf5")
    write_robotwin(tmp_path / "robotwin", numbered(LENGTH)).joinpath("data/episode0.hdf5").rename(tmp_path / "e")
    assert sorted(format for format, _ in find(tmp_path)) == ["aloha", "hdf5", "maniskill", "minari", "robotwin"]
    assert len(episodes_of(tmp_path)) == 6


def test_maniskill(tmp_path):
    path = write_maniskill(tmp_path / "trajectory.rgb.pd_ee_delta_pose.h5", moving(LENGTH), trajectories=12)
    refs = refs_of(path)
    first, second = load(refs[0]), load(refs[1])
    assert list(first.cameras) == ["base_camera"] and np.array_equal(
        frames_of(first, "base_camera"), moving(LENGTH)[:-1]
    )
    assert np.array_equal(first.proprio["qpos"], np.arange(45.0).reshape(5, 9)) and list(first.proprio) == [
        "qpos",
        "qvel",
    ]
    assert load(refs[10]).proprio["qpos"][0, 0] == 10  # traj_10 comes after traj_9
    assert {"obs/extra/goal_pos", "env_states/actors/cube", "terminated"} <= set(first.signals)
    assert first.signals["obs/sensor_param/base_camera/intrinsic_cv"].shape == (5, 9)
    assert [(block.kind, block.mode) for block in first.action_layout] == [
        ("position", "delta"), ("rotation", "delta"), ("gripper", "absolute")
    ]  # fmt: skip
    assert first.action_layout[-1].gripper_one_means == "open"
    assert (first.success, second.success, first.embodiment, first.fps) == (True, False, "panda", 20)
    assert first.dataset == "PickCube-v1" and first.instruction is None
    assert any("base_camera/depth is uint16" in text and "single channel" in text for text in said(first))
    assert digest(refs[0]) == refs[0].digest
    path.with_suffix(".json").write_text(json.dumps({"env_info": {"env_kwargs": {"robot_uids": "fetch", "sim_config": {
        "control_freq": 50}}}}))  # fmt: skip
    renamed = load(refs_of(path)[0])
    assert digest(refs[0]) != refs[0].digest
    assert (renamed.embodiment, renamed.fps, sizes(renamed.action_layout)) == ("fetch", 50, {"actions": 7})
    path.with_suffix(".json").write_text("{broken")
    assert load(refs_of(path)[0]).embodiment == "panda"


@pytest.mark.parametrize("held, says", [(None, "no observations"), ("obs", "only vectors of the simulator's state")])
def test_maniskill_without_pictures_says_how_to_render_them(tmp_path, held, says):
    path = write_maniskill(tmp_path / "trajectory.h5", moving(LENGTH))
    with h5py.File(path, "a") as file:
        del file["traj_0/obs"]
        if held:
            file["traj_0/obs"] = np.ones((LENGTH, 42), np.float32)
    (ref,) = refs_of(path)
    with pytest.raises(BadEpisode, match=f"has no camera: traj_0 holds {says}.*replay_trajectory"):
        load(ref)


def test_minari(tmp_path):
    folder = write_minari(tmp_path / "reach", moving(LENGTH), episodes=2)
    (first, second) = refs_of(folder)
    episode = load(second)
    assert np.array_equal(frames_of(episode, "pixels"), moving(LENGTH)[:-1])
    assert np.array_equal(episode.proprio["robot/joints"], np.arange(30.0).reshape(5, 6))
    assert sizes(episode.action_layout) == {"action": 4} and {"rewards", "infos/success"} <= set(episode.signals)
    assert (episode.instruction, episode.success, episode.dataset) == ("go to the ball", True, "toy/reach/expert-v0")
    assert {"control rate unknown; 20 Hz assumed", "robot unknown"} <= {*said(episode)}
    assert "the instruction is taken from observations/mission" in said(episode)
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        group = file["episode_0"]
        del group["observations"], group["actions"], group["infos"]
        group["observations"], group["actions/_index_0"] = numbered(LENGTH), np.ones((5, 2))
        group["actions/_index_1"], group.attrs["total_steps"] = np.ones(5, int), 9
        group.create_dataset("infos", data=["{}"] * LENGTH, dtype=h5py.string_dtype())
    assert digest(first) != first.digest and digest(second) == second.digest
    tuples = load(refs_of(folder)[0])
    assert np.array_equal(frames_of(tuples, "observations"), numbered(LENGTH)[:-1]) and tuples.action.shape == (5, 3)
    order = "actions is a group; the action is its parts in this order: actions/_index_0, actions/_index_1"
    assert {order, "total_steps is 9, but there are 5 actions", "infos are JSON texts; left out"} <= {*said(tuples)}
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        del file["episode_0/observations"]
        file["episode_0/observations"] = np.ones((LENGTH, 17))
    with pytest.raises(BadEpisode, match="has no camera"):
        load(refs_of(folder)[0])


def test_robotwin(tmp_path):
    images = numbered(LENGTH)
    images[:, :32, :32] = 220, 30, 30
    folder = write_robotwin(tmp_path / "beat_block_hammer", images)
    (ref,) = refs_of(folder)
    episode = load(ref)
    assert list(episode.cameras) == ["head_camera", "left_camera"]
    assert np.abs(frames_of(episode, "head_camera").astype(int) - images).mean() < 2
    targets = np.arange(LENGTH * 14.0).reshape(LENGTH, 14)
    assert np.array_equal(episode.proprio["joint_action/vector"], targets)
    assert np.array_equal(episode.action, np.concatenate([targets[1:], targets[-1:]]))
    assert [(b.name, b.size, b.kind) for b in episode.action_layout] == [
        ("left_arm", 6, "joint"), ("left_gripper", 1, "gripper"),
        ("right_arm", 6, "joint"), ("right_gripper", 1, "gripper"),
    ]  # fmt: skip
    assert episode.texts == {"seen": "Grab the hammer.", "unseen": "Lift the tool."}
    assert (episode.instruction, episode.fps, episode.embodiment) == ("Grab the hammer.", 16.67, "unknown")
    assert "endpose/left_endpose" in episode.proprio and "observation/head_camera/intrinsic_cv" in episode.signals
    assert any("pointcloud is (1024, 6) numbers per step" in text for text in said(episode))
    swapped = "RoboTwin writes JPEG files with red and blue swapped; swapped back"
    assert swapped in said(episode) and swapped not in said(load(ref, DataContract(bgr=())))
    assert digest(ref) == ref.digest
    (folder / "instructions" / "episode0.json").write_text('{"seen": ["Hit the block."]}')
    assert digest(ref) != ref.digest and load(ref).instruction == "Hit the block."
    (folder / "instructions" / "episode0.json").unlink()
    with h5py.File(folder / "data" / "episode0.hdf5", "a") as file:
        del file["joint_action/vector"]
    (parts,) = episodes_of(folder)
    assert parts.instruction is None and np.array_equal(parts.action, episode.action)


@pytest.mark.parametrize("write", [write_maniskill, write_minari, write_robotwin])
def test_one_camera_of_the_wrong_length_costs_only_itself(tmp_path, write):
    write(tmp_path / ("a.h5" if write is write_maniskill else "a"), moving(LENGTH))
    [file] = [path for path in tmp_path.rglob("*") if path.suffix in (".h5", ".hdf5")]
    with h5py.File(file, "a") as opened:
        above = {"robotwin": "observation", "minari": "episode_0/observations"}.get(write.__name__[6:], "traj_0/obs")
        opened[f"{above}/side"] = numbered(3)
    (episode,) = episodes_of(tmp_path)
    assert "side" not in episode.cameras and any("side has 3 rows" in text for text in said(episode))


@pytest.mark.parametrize("damage", ["{broken", "[]", '\ufeff{"dataset_id": ['])
@pytest.mark.parametrize("write", [write_maniskill, write_minari, write_robotwin])
def test_a_json_file_beside_that_cannot_be_read_is_named(tmp_path, write, damage):
    write(tmp_path / ("a.h5" if write is write_maniskill else "a"), moving(LENGTH))
    [file] = tmp_path.rglob("*.json")
    assert not any(file.name in text for text in said(episodes_of(tmp_path)[0]))
    file.write_text(damage)
    (ref,) = refs_of(tmp_path)
    assert digest(ref) == ref.digest
    assert any(f"{file.name} cannot be read" in text for text in said(load(ref)))
