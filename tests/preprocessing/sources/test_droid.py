"""Raw DROID. Without a public sample at hand, real Bridge episodes are written in DROID's layout: real frames and
numbers, but not DROID's. The writers here follow DROID's own (``TrajectoryWriter``, ``svo2mp4.py``, ``schema.py``)."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
from helpers.formats import REAL, numbered, quadrants, write_aloha, write_demos
from helpers.readers import frames_of, refs_of, said
from scipy.spatial.transform import Rotation

from preprocessing.contracts.contract import DataContract
from preprocessing.episode import Episode
from preprocessing.errors import BadEpisode
from preprocessing.sources import digest, droid, find, load
from uwm_model.metrics import psnr

SERIALS = {"wrist": "31177322", "ext1": "13062452", "ext2": "22246076"}  # exterior cameras sort first
CAMERAS = {"wrist": "wrist", "exterior_1": "ext1", "exterior_2": "ext2"}
UUID = "IRIS+ef107c48+2023-03-02-15h-14m-31s"
SENTENCES = {
    "language_instruction1": "Put the marker in the pot",
    "language_instruction2": "Move the marker into the pot",
    "language_instruction3": "",
}
TASK = "Move object into or out of container (ex: drawer, clothes hamper, sink, trashcan, microwave)"


# --------------------------------------------------------------------------------------------------------- writing


@dataclass
class RawEpisode:
    """The files that a robot's computer writes for one episode."""

    videos: dict[str, np.ndarray]  # by role
    rows: dict[str, np.ndarray]  # by path in trajectory.h5
    uuid: str = UUID
    metadata: dict[str, object] = field(default_factory=dict)  # besides what every episode has

    def write(self, folder: Path) -> Path:
        videos = folder / "recordings" / "MP4"
        videos.mkdir(parents=True)
        (folder / "recordings" / "SVO").mkdir()
        for role, frames in self.videos.items():
            write_mp4(videos / f"{SERIALS[role]}.mp4", frames)
            stereo = np.concatenate([frames, frames[:, :, ::-1]], axis=2)
            write_mp4(videos / f"{SERIALS[role]}-stereo.mp4", stereo)
            (folder / "recordings" / "SVO" / f"{SERIALS[role]}.svo").write_bytes(b"ZED")
        with h5py.File(folder / "trajectory.h5", "w") as file:
            file.attrs["user"], file.attrs["success"] = "Somebody", True
            for name, values in self.rows.items():
                file.create_dataset(name, data=values, maxshape=(None, *values.shape[1:]))
        metadata = {"uuid": self.uuid, "lab": "IRIS", "current_task": TASK, "success": True}
        metadata |= {"left_mp4_path": "LAB/x.mp4"}
        metadata |= {f"{role}_cam_serial": serial for role, serial in SERIALS.items()}
        metadata |= {f"{role}_mp4_path": f"success/elsewhere/{serial}.mp4" for role, serial in SERIALS.items()}
        metadata |= {"trajectory_length": len(next(iter(self.rows.values())))} | self.metadata
        (folder / f"metadata_{self.uuid}.json").write_text(json.dumps(metadata))
        return folder


def write_mp4(path: Path, frames: np.ndarray) -> None:
    """MPEG-4 at the camera's 60 frames a second, like OpenCV's ``mp4v``, but of better quality."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=60)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 20_000_000
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def rows(steps: int, velocity: np.ndarray, state: np.ndarray) -> dict[str, np.ndarray]:
    """All names in DROID's ``to_tfrecord.py``, made of these velocities ``[T, 7]`` and states ``[T, 7]``."""
    rng = np.random.default_rng(steps)
    robot = {
        "cartesian_position": state[:, :6].astype(np.float64),
        "gripper_position": state[:, 6].astype(np.float64),
        "prev_command_successful": np.ones(steps, bool),
        "prev_controller_latency_ms": rng.uniform(0, 1, steps),
    }
    for name in (
        "joint_positions",
        "joint_velocities",
        "joint_torques_computed",
        "motor_torques_measured",
        "prev_joint_torques_computed",
        "prev_joint_torques_computed_safened",
    ):
        robot[name] = rng.normal(size=(steps, 7))
    action = {
        "cartesian_position": np.concatenate([rng.normal(size=(steps, 3)), rng.uniform(-1.5, 1.5, (steps, 3))], axis=1),
        "cartesian_velocity": velocity[:, :6].astype(np.float64),
        "gripper_position": velocity[:, 6].astype(np.float64),
        "gripper_velocity": rng.normal(size=steps),
        "joint_position": rng.normal(size=(steps, 7)),
        "joint_velocity": rng.normal(size=(steps, 7)),
        "target_cartesian_position": rng.normal(size=(steps, 6)),
        "target_gripper_position": rng.normal(size=steps),
    }
    enabled = np.arange(steps) % 3 > 0
    return (
        {f"action/{name}": values for name, values in action.items()}
        | {f"action/robot_state/{name}": values for name, values in robot.items()}
        | {f"observation/robot_state/{name}": values for name, values in robot.items()}
        | {f"observation/camera_type/{serial}": np.full(steps, role != "wrist") for role, serial in SERIALS.items()}
        | {f"observation/camera_extrinsics/{SERIALS['ext1']}_left": rng.normal(size=(steps, 6))}
        | {
            "observation/controller_info/controller_on": np.ones(steps, bool),
            "observation/controller_info/failure": np.zeros(steps, bool),
            "observation/controller_info/movement_enabled": enabled,
            "observation/controller_info/success": np.arange(steps) == steps - 1,
            "observation/timestamp/control/step_start": np.arange(steps) * 66 + 1_677_798_871_000,
            "observation/timestamp/skip_action": ~enabled,
        }
    )


def toy(steps: int = 6, frames: int | None = None, size: int = 32, **metadata: object) -> RawEpisode:
    rng = np.random.default_rng(0)
    pictures = numbered(steps if frames is None else frames, size)
    videos = {role: pictures + 40 * index for index, role in enumerate(SERIALS)}
    return RawEpisode(
        videos, rows(steps, rng.uniform(-1, 1, (steps, 7)), rng.normal(size=(steps, 7))), metadata=metadata
    )


def place(top: Path, name: str = "Thu_Mar__2_15:14:31_2023", outcome: str = "success") -> Path:
    """The path of an episode's folder in the data set's folder."""
    return top / "IRIS" / outcome / "2023-03-02" / name


def annotate(
    top: Path, instructions: dict[str, dict[str, str]], name: str = "aggregated-annotations-030724.json"
) -> Path:
    top.mkdir(parents=True, exist_ok=True)
    (top / name).write_text(json.dumps(instructions))
    return top / name


def one(path: Path, contract: DataContract | None = None) -> Episode:
    [ref] = refs_of(path)
    assert ref.problem is None and digest(ref) == ref.digest
    return load(ref, contract)


def problem_of(path: Path) -> str:
    """The problem of the only episode, from ``scan`` or from ``load`` and its frames."""
    [ref] = refs_of(path)
    try:
        for video in load(ref).cameras.values():
            for _ in video.frames(None):
                pass
    except BadEpisode as error:
        return str(error)
    return "none"


# --------------------------------------------------------------------------------------------------- real episodes


@cache
def bridge() -> list[Episode]:
    if not REAL.exists():
        pytest.skip(f"no real data at {REAL}")
    return [load(ref) for ref in refs_of(REAL / "bridge_rlds")[:3]]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_real_episodes_round_trip(tmp_path, number):
    source = bridge()[number]
    assert source.action is not None
    roles = {"wrist": "image_2", "ext1": "image_0", "ext2": "image_1"}
    videos = {role: frames_of(source, camera).copy() for role, camera in roles.items()}
    for frames in videos.values():  # the arm may stand still, so a corner marks each frame
        frames[:, -16:, -16:] = 10 + 20 * np.arange(len(frames))[:, None, None, None]
    recorded = RawEpisode(videos, rows(len(source.action), source.action, source.proprio["state"]))
    annotate(tmp_path, {UUID: {**SENTENCES, "language_instruction1": source.instruction or ""}})
    recorded.write(place(tmp_path))
    episode = one(tmp_path)

    assert list(episode.cameras) == ["wrist", "exterior_1", "exterior_2"]
    for camera, role in CAMERAS.items():
        frames = frames_of(episode, camera)
        quality = psnr(frames[:, None], videos[role][None])  # each frame against each original
        assert np.diag(quality).min() > 32
        assert quality.argmax(axis=1).tolist() == list(range(len(frames)))
        others = [other for other in videos if other != role]
        assert max(psnr(frames, videos[other]).max() for other in others) < 20
        assert psnr(frames, frames[:, ::-1]).max() < 20 and psnr(frames, videos[role][..., ::-1]).max() < 32

    assert np.array_equal(episode.action, source.action)
    state = source.proprio["state"]
    assert list(episode.proprio) == ["cartesian_position", "gripper_position", "joint_positions", "joint_velocities"]
    assert np.array_equal(episode.proprio["cartesian_position"], state[:, :6])
    assert np.array_equal(episode.proprio["gripper_position"], state[:, 6:])
    assert (episode.instruction, episode.fps, episode.embodiment) == (source.instruction, 15, "panda")
    assert episode.texts == {
        "language_instruction1": source.instruction,
        "language_instruction2": "Move the marker into the pot",
        "current_task": TASK,
    }
    assert episode.success is True and said(episode) == []


def test_everything_recorded_per_step_is_a_signal(tmp_path):
    recorded = toy()
    episode = one(recorded.write(place(tmp_path)))
    read = {
        name: values.reshape(6, -1).astype(np.float32)
        for name, values in recorded.rows.items()
        if name.startswith("action/") or "robot_state" in name or "controller_info" in name or "skip_action" in name
    }
    kept = episode.signals | {f"observation/robot_state/{name}": rows for name, rows in episode.proprio.items()}
    assert sorted(kept) == sorted(read)
    assert all(np.array_equal(kept[name], values) and kept[name].dtype == np.float32 for name, values in read.items())
    assert episode.signals["observation/controller_info/movement_enabled"][:, 0].tolist() == [0, 1, 1, 0, 1, 1]
    assert episode.signals["observation/timestamp/skip_action"][:, 0].tolist() == [1, 0, 0, 1, 0, 0]
    assert [(block.name, block.size, block.mode, block.frame, block.unit) for block in episode.action_layout] == [
        ("position", 3, "velocity", "base", "scaled"),
        ("rotation", 3, "velocity", "base", "scaled"),
        ("gripper", 1, "absolute", "unknown", "unknown"),
    ]
    assert episode.action_layout[2].gripper_one_means == "closed"
    assert episode.action_layout[1].representation == "euler_xyz"


# -------------------------------------------------------------------------------------------------------- contract


def test_contract_for_the_papers_ten_columns(tmp_path):
    recorded = toy()
    folder = recorded.write(place(tmp_path))
    episode = one(folder, DataContract.load("droid_raw"))
    pose = recorded.rows["action/cartesian_position"]
    matrices = Rotation.from_euler("xyz", pose[:, 3:]).as_matrix()
    wanted = [pose[:, :3], matrices[:, 0], matrices[:, 1], recorded.rows["action/gripper_position"][:, None]]
    assert episode.action is not None and episode.action.shape == (6, 10)
    assert np.allclose(episode.action, np.concatenate(wanted, axis=1), atol=1e-6)
    assert [(block.name, block.size) for block in episode.action_layout] == [
        ("position", 3),
        ("rotation", 6),
        ("gripper", 1),
    ]
    assert "action" in episode.signals  # the reader's own choice is kept
    plain = one(folder)
    assert plain.action is not None and plain.action.shape == (6, 7)


def test_contracts_for_other_commands(tmp_path):
    recorded = toy()
    folder = recorded.write(place(tmp_path))
    joints = one(folder, DataContract(action=("action/joint_velocity", "action/gripper_position")))
    parts = [recorded.rows["action/joint_velocity"], recorded.rows["action/gripper_position"][:, None]]
    assert np.array_equal(joints.action, np.concatenate(parts, axis=1).astype(np.float32))


# --------------------------------------------------------------------------------------------- what is mended


@pytest.mark.parametrize("frames", [5, 6, 7])
def test_one_frame_more_or_less_is_cut(tmp_path, frames):
    recorded = toy(frames=frames)
    episode = one(recorded.write(place(tmp_path)))
    count = min(frames, 6)
    levels = [frames_of(episode, camera).mean(axis=(1, 2, 3)) for camera in episode.cameras]
    for index, level in enumerate(levels):
        assert np.allclose(level, 20 + 40 * index + 2 * np.arange(count), atol=1.2)
    assert episode.action is not None
    assert np.array_equal(episode.action[:, :6], recorded.rows["action/cartesian_velocity"][:count].astype(np.float32))
    assert {len(values) for values in (*episode.signals.values(), *episode.proprio.values())} == {count}
    for kept, name in ((episode.signals, "action/"), (episode.proprio, "observation/robot_state/")):
        joints = name + "joint_velocity" if name == "action/" else "joint_positions"
        recorded_rows = recorded.rows[joints if name == "action/" else name + joints]
        assert np.array_equal(kept[joints], recorded_rows[:count].astype(np.float32))
    slips = f"wrist has {frames}, exterior_1 has {frames}, exterior_2 has {frames}"
    mended = [f"the trajectory has 6 rows, {slips} frames; cut to {count}"]
    assert said(episode) == ([] if frames == 6 else mended)


@pytest.mark.parametrize("frames", [4, 8])
def test_larger_frame_mismatch_is_refused(tmp_path, frames):
    folder = toy(frames=frames).write(place(tmp_path))
    assert problem_of(folder) == f"camera wrist declares {frames} frames, the trajectory has 6 rows"


def test_a_missing_camera_is_dropped_with_a_repair(tmp_path):
    folder = toy(ext2_cam_serial=None).write(place(tmp_path))
    (folder / "recordings" / "MP4" / f"{SERIALS['wrist']}.mp4").unlink()
    episode = one(folder)
    assert list(episode.cameras) == ["exterior_1"]
    assert np.allclose(frames_of(episode, "exterior_1")[0], 60, atol=1.2)
    assert said(episode) == [
        "camera wrist has no video for its wrist_cam_serial, 31177322; dropped",
        "camera exterior_2 has no video for its ext2_cam_serial, which is missing; dropped",
    ]
    shutil.rmtree(folder / "recordings" / "MP4")
    assert problem_of(folder).startswith("holds no video in recordings/MP4")


@pytest.mark.parametrize("serial", ["../../../secret", "/etc/passwd", f"{SERIALS['ext2']}-stereo", 7, ["x"], "a\0b"])
def test_a_serial_cannot_be_a_path(tmp_path, serial):
    folder = toy(ext2_cam_serial=serial).write(place(tmp_path))
    write_mp4(folder.parent / "secret.mp4", numbered(6))
    assert list(one(folder).cameras) == ["wrist", "exterior_1"]


def test_misfits_are_left_out_with_a_repair(tmp_path):
    recorded = toy()
    recorded.rows["observation/controller_info/success"] = np.zeros(4, bool)
    recorded.rows["action/note"] = np.array([b"words"] * 6, "S5")
    episode = one(recorded.write(place(tmp_path)))
    assert said(episode) == [
        "action/note is (6,) of |S5, not a number or a vector for each of 6 steps; left out",
        "observation/controller_info/success is (4,) of bool, not a number or a vector for each of 6 steps; left out",
    ]
    assert "observation/controller_info/success" not in episode.signals


@pytest.mark.parametrize(
    "outcome, metadata, success",
    [
        ("success", {}, True),
        ("success", {"success": False}, False),
        ("success", {"success": None}, True),
        ("failure", {"success": None}, False),
        ("elsewhere", {"success": None}, None),
        ("elsewhere", {"success": "yes"}, None),
    ],
)
def test_success(tmp_path, outcome, metadata, success):
    assert one(toy(**metadata).write(place(tmp_path, outcome=outcome))).success is success


# -------------------------------------------------------------------------------------------------------- language


def test_instructions_by_uuid_from_the_nearest_list(tmp_path):
    folder = toy().write(place(tmp_path / "a" / "b"))
    annotate(tmp_path, {UUID: {"language_instruction1": "of another data set, farther up"}})
    assert (one(folder).instruction, list(one(folder).texts)) == (None, ["current_task"])
    annotate(tmp_path / "a" / "b", {"IRIS+other": SENTENCES})
    assert one(folder).instruction is None
    file = annotate(tmp_path / "a" / "b", {"IRIS+other": {"language_instruction1": "no"}, UUID: SENTENCES})
    assert one(folder).instruction == "Put the marker in the pot"
    file.write_text("[1]")
    [broken] = refs_of(folder)
    assert "aggregated-annotations-030724.json: not a table of annotations (not a JSON" in str(broken.problem)


def test_the_later_and_fuller_list_is_preferred(tmp_path):
    folder = toy().write(place(tmp_path))
    later = annotate(tmp_path, {UUID: {"language_instruction1": "later"}}, "droid_language_annotations.json")
    assert one(folder).instruction == "later"
    annotate(tmp_path, {UUID: SENTENCES})
    assert one(folder).instruction == "later"
    later.unlink()
    assert one(folder).instruction == "Put the marker in the pot"


def test_a_huge_list_is_not_read(tmp_path, monkeypatch):
    folder = toy().write(place(tmp_path))
    annotate(tmp_path, {UUID: SENTENCES})
    monkeypatch.setattr(droid, "MAX_ANNOTATIONS", 100)
    [broken] = refs_of(folder)
    assert re.search(r"not a table of annotations .* bytes, more than 100", str(broken.problem))


# ----------------------------------------------------------------------------------------------- finding, digests


def test_an_episode_folder_is_closed_and_other_files_are_found(tmp_path):
    for name in ("a", "b"):
        toy(3).write(place(tmp_path / "droid", name))
    write_aloha(tmp_path / "aloha" / "episode_0.hdf5", np.stack([quadrants()] * 3))
    write_demos(tmp_path / "hdf5" / "trajectory.h5")
    found = [(name, str(path.relative_to(tmp_path))) for name, path in find(tmp_path)]
    day = "droid/IRIS/success/2023-03-02"
    assert found == [("aloha", "aloha"), ("droid", f"{day}/a"), ("droid", f"{day}/b"), ("hdf5", "hdf5")]
    direct = place(tmp_path / "droid", "a") / "trajectory.h5"
    assert find(direct) == [("droid", direct)]
    assert refs_of(direct) == refs_of(direct.parent)


def test_digests(tmp_path):
    recorded = toy()
    folder = recorded.write(place(tmp_path / "one"))
    file = annotate(tmp_path / "one", {UUID: SENTENCES})
    [first] = refs_of(folder)
    assert digest(first) == first.digest

    moved = place(tmp_path / "two", "renamed", outcome="failure")
    shutil.copytree(folder, moved)
    (moved / f"metadata_{UUID}.json").rename(moved / "metadata_x.json")
    shutil.copy(file, tmp_path / "two")
    with h5py.File(moved / "trajectory.h5", "w") as repacked:
        for name, values in recorded.rows.items():
            repacked.create_dataset(name, data=values, compression="gzip")
    assert refs_of(moved)[0].id == first.id

    def changed() -> bool:
        [ref] = refs_of(moved)
        return ref.digest != first.digest and digest(first) == first.digest

    saved = moved.with_name("saved")
    shutil.copytree(moved, saved)

    def restore() -> None:
        shutil.rmtree(moved)
        shutil.copytree(saved, moved)
        assert not changed()

    with h5py.File(moved / "trajectory.h5", "r+") as opened:
        opened["action/joint_velocity"][2, 3] += 1e-9
    assert changed()
    restore()
    write_mp4(moved / "recordings" / "MP4" / f"{SERIALS['ext1']}.mp4", numbered(6, 32))
    assert changed()
    restore()
    metadata = json.loads((moved / "metadata_x.json").read_text())
    swapped = {"wrist_cam_serial": SERIALS["ext1"], "ext1_cam_serial": SERIALS["wrist"]}
    for other in (swapped, {"success": False}, {"current_task": "Press button"}):
        (moved / "metadata_x.json").write_text(json.dumps(metadata | other))
        assert changed()
    restore()
    (moved / "recordings" / "MP4" / f"{SERIALS['ext1']}-stereo.mp4").unlink()
    (moved / "metadata_x.json").write_text(json.dumps(metadata | {"building": "moved"}))
    assert not changed()
    annotate(tmp_path / "two", {UUID: {**SENTENCES, "language_instruction3": "Pot!"}})
    assert changed()


# ---------------------------------------------------------------------------------------------------------- broken


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without(name: str) -> object:
    def remove(folder: Path) -> None:
        with h5py.File(folder / "trajectory.h5", "r+") as file:
            del file[name]

    return remove


def linked(folder: Path) -> None:
    shutil.move(folder / "trajectory.h5", folder / "other.h5")
    with h5py.File(folder / "trajectory.h5", "w") as file:
        file["action/cartesian_velocity"] = h5py.ExternalLink("other.h5", "/action/cartesian_velocity")
        file["action/gripper_position"] = np.zeros(6)
        file.create_group("observation")


def vast(folder: Path) -> None:
    with h5py.File(folder / "trajectory.h5", "r+") as file:
        file.create_dataset("action/more", (2**40, 7), chunks=(2**16, 7), compression="gzip")


def hollow(folder: Path) -> None:
    with h5py.File(folder / "trajectory.h5", "r+") as file:
        file["observation/controller_info/success"].resize(9_000_000, axis=0)  # in chunks of six


def widened(folder: Path) -> None:
    with h5py.File(folder / "trajectory.h5", "r+") as file:
        del file["action/cartesian_velocity"]
        file["action/cartesian_velocity"] = np.zeros((6, 7))


def shortened(folder: Path) -> None:
    with h5py.File(folder / "trajectory.h5", "r+") as file:
        file["observation/robot_state/joint_positions"].resize(4, axis=0)


@pytest.mark.parametrize(
    "break_it, says",
    [
        (lambda folder: cut(folder / "trajectory.h5"), "trajectory.h5 cannot be read: .*truncated file"),
        (lambda folder: cut(folder / "recordings" / "MP4" / "31177322.mp4"), "31177322.mp4 holds no video stream"),
        (
            lambda folder: (folder / f"metadata_{UUID}.json").unlink(),
            "has no metadata_.*which maps cameras to their videos",
        ),
        (lambda folder: cut(folder / f"metadata_{UUID}.json"), "metadata_IRIS.* cannot be read: "),
        (lambda folder: (folder / f"metadata_{UUID}.json").write_text("[" * 100_000), "metadata_IRIS.* cannot be read"),
        (lambda folder: (folder / f"metadata_{UUID}.json").write_text(" " * 2**21 + "{}"), "2097154 bytes, more than"),
        (without("action/cartesian_velocity"), "trajectory.h5 has no action/cartesian_velocity"),
        (without("action/gripper_position"), "trajectory.h5 has no action/gripper_position"),
        (linked, "trajectory.h5 has no action/cartesian_velocity"),
        (vast, "claims to hold 30786325"),
        (hollow, "success claims to hold 9000000 bytes, but stores only 6"),
        (widened, "have 8 columns, not 7"),
        (shortened, r"joint_positions is \(4, 7\) of float64, not a number or a vector"),
    ],
)
def test_broken_parts_are_named_and_cost_only_their_episode(tmp_path, break_it, says):
    folder = toy().write(place(tmp_path, "a"))
    toy().write(place(tmp_path, "b"))
    break_it(folder)
    broken, whole = refs_of(tmp_path)
    assert (broken.format, whole.problem) == ("droid", None) and load(whole).action is not None
    with pytest.raises(BadEpisode, match=says):
        load(broken)
