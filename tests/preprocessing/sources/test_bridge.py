"""Raw BridgeData. Real episodes of its RLDS release are written back into their original layout."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.formats import REAL, jpeg, moving, write_video
from helpers.readers import frames_of, refs_of, said

from preprocessing.contracts.contract import DataContract
from preprocessing.episode import Episode
from preprocessing.errors import BadEpisode
from preprocessing.sources import bridge, digest, find, load
from uwm_model.metrics import psnr

DATED = "rss/toykitchen2/set_table/00/2022-01-01_00-00-00"


def write(
    top: Path,
    cameras: dict[int, np.ndarray],
    action: np.ndarray,
    state: np.ndarray,
    instructions: str | None = "put the spoon in the pot\nconfidence: 1\nmove the spoon\n",
    dated: str = DATED,
    name: str = "traj0",
    protocol: int = 4,
) -> Path:
    """``cameras`` and ``state`` have one row more than ``action``."""
    folder = top / dated / "raw" / "traj_group0" / name
    for number, frames in cameras.items():
        (folder / f"images{number}").mkdir(parents=True)
        for index, frame in enumerate(frames):
            (folder / f"images{number}" / f"im_{index}.jpg").write_bytes(jpeg(frame))
    (folder / "depth_images0").mkdir()
    steps = len(action)
    observed = {
        "full_state": state,
        "qpos": np.arange(6.0 * (steps + 1)).reshape(-1, 6),
        "eef_transform": np.broadcast_to(np.eye(4), (steps + 1, 4, 4)).copy(),
        "time_stamp": [1_640_995_200 + 0.2 * index for index in range(steps + 1)],
        "high_bound": np.ones((steps + 1, 5)),
        "task_stage": "none",
    }
    commanded = [
        {"actions": row, "delta_robot_transform": np.eye(4) * index, "policy_type": "VRTeleopPolicy"}
        for index, row in enumerate(action)
    ]
    (folder / "obs_dict.pkl").write_bytes(pickle.dumps(observed, protocol))
    (folder / "policy_out.pkl").write_bytes(pickle.dumps(commanded, protocol))
    (folder / "agent_data.pkl").write_bytes(pickle.dumps({"camera_info": "x"}))
    if instructions is not None:
        (folder / "lang.txt").write_text(instructions)
    return folder


def toy(top: Path, steps: int = 11, **more: object) -> Path:
    random = np.random.default_rng(steps)
    action, state = random.normal(size=(steps, 7)), random.normal(size=(steps + 1, 7))
    return write(top, {0: moving(steps + 1), 2: moving(steps + 1)[:, ::-1]}, action, state, **more)  # type: ignore[arg-type]


def one(path: Path) -> Episode:
    [ref] = refs_of(path)
    assert ref.format == "bridge" and ref.problem is None and digest(ref) == ref.digest
    return load(ref)


@pytest.mark.skipif(not REAL.exists(), reason=f"no real data at {REAL}")
@pytest.mark.parametrize("number", [0, 7])
def test_real_episodes_equal_rlds(tmp_path, number):
    source = load(refs_of(REAL / "bridge_rlds")[number])
    frames = {camera: frames_of(source, camera) for camera in ("image_0", "image_1")}
    assert source.action is not None
    steps = len(source.action) - 1  # RLDS lacks the frame after the last action
    cameras = {int(camera[-1]): rows for camera, rows in frames.items()}
    action, state = source.action[:steps], source.proprio["state"]
    episode = one(write(tmp_path, cameras, action, state, instructions=f"{source.instruction}\nconfidence: 1\n"))
    assert list(episode.cameras) == ["image_0", "image_1"]
    for camera, wanted in frames.items():
        quality = psnr(frames_of(episode, camera)[:, None], wanted[None])  # each frame against each original
        assert quality.shape == (steps, steps + 1) and np.diag(quality).min() > 32
        others = np.where(np.eye(steps, steps + 1, dtype=bool), 0, quality)
        moved = [np.diag(quality)[t] > others[t].max() for t in range(steps)]
        assert np.mean(moved) > 0.8  # while the arm stands still, neighbours match as well
    assert np.array_equal(episode.action, action) and np.array_equal(episode.proprio["state"], state[:steps])
    assert (episode.instruction, episode.fps, episode.embodiment) == (source.instruction, 5, "widowx")
    shipped = DataContract.load("bridge")
    for block, known in zip(episode.action_layout, shipped.action_layout or (), strict=True):
        told = known.model_dump(exclude_defaults=True)
        assert {name: getattr(block, name) for name in told} == told


def test_images_are_sorted_by_number_and_paired_with_rows(tmp_path):
    folder = toy(tmp_path)
    episode = one(tmp_path)
    wanted = moving(12)[:11]
    for camera, source in (("image_0", wanted), ("image_2", wanted[:, ::-1])):
        quality = psnr(frames_of(episode, camera)[:, None], source[None])
        assert quality.argmax(axis=1).tolist() == list(range(11)) and np.diag(quality).min() > 28
    with (folder / "policy_out.pkl").open("rb") as file:
        actions = np.stack([entry["actions"] for entry in pickle.load(file)])
    assert np.array_equal(episode.action, actions.astype(np.float32))
    assert list(episode.signals) == ["qpos", "eef_transform", "time_stamp", "high_bound", "delta_robot_transform"]
    assert episode.signals["qpos"][3].tolist() == [18, 19, 20, 21, 22, 23]
    assert np.allclose(episode.signals["time_stamp"].ravel(), 0.2 * np.arange(11))
    assert episode.signals["eef_transform"].shape == (11, 16)
    assert episode.signals["delta_robot_transform"][2, 0] == 2
    assert episode.texts == {"lang_0": "put the spoon in the pot", "lang_1": "move the spoon"}
    assert episode.instruction == "put the spoon in the pot" and said(episode) == []
    position, rotation, gripper = episode.action_layout
    assert [(block.size, block.mode, block.frame, block.unit) for block in (position, rotation)] == [
        (3, "delta", "base", "m"),
        (3, "delta", "base", "rad"),
    ]
    assert rotation.representation == "euler_xyz"
    assert (gripper.size, gripper.mode, gripper.gripper_one_means) == (1, "absolute", "open")
    thin = load(episode.ref, fps=2)  # a robot log keeps its rate
    assert thin.fps == 5


def test_lagging_cameras(tmp_path):
    late = one(toy(tmp_path, dated="rss/toykitchen2/set_table/00/2021-07-22_23-59-59"))
    in_time = one(toy(tmp_path, dated="rss/toykitchen2/set_table/00/2021-07-23_00-00-00"))
    assert late.action is not None and in_time.action is not None
    assert np.array_equal(late.action, in_time.action[:10])
    assert np.array_equal(frames_of(late, "image_0"), frames_of(in_time, "image_0")[1:])
    assert np.array_equal(late.proprio["state"], in_time.proprio["state"][1:])
    assert np.array_equal(late.signals["qpos"], in_time.signals["qpos"][1:])
    assert np.array_equal(late.signals["delta_robot_transform"], in_time.signals["delta_robot_transform"][:10])
    assert said(one(toy(tmp_path / "2021-01-01_00-00-00"))) == []  # the date of a copy, not of the recording
    assert late.id != in_time.id and "lagged by one frame" in said(late)[0] and said(in_time) == []


def test_a_folder_without_a_date(tmp_path):
    episode = one(toy(tmp_path, dated="mine"))
    assert len(episode.action) == 11
    assert said(episode) == ["no folder name has a date; cameras assumed not to lag, as since 2021-07-23"]


def test_only_numbers_are_signals(tmp_path):
    folder = toy(tmp_path)
    observed = pickle.loads((folder / "obs_dict.pkl").read_bytes())
    observed |= {"mixed": [1.0, "2"] * 6, "words": ["1"] * 12, "none": [None] * 12, "huge": [10**400] * 12, 7: [1] * 12}
    observed |= {"flags": [True, False] * 6, "pairs": [[1, 2.5]] * 12, "nested": np.array([np.float32(3)] * 12, object)}
    (folder / "obs_dict.pkl").write_bytes(pickle.dumps({key: value for key, value in observed.items() if key != 7}))
    signals = one(tmp_path).signals
    assert {"mixed", "words", "none", "huge"}.isdisjoint(signals)
    assert signals["flags"][:2].tolist() == [[1], [0]] and signals["pairs"][4].tolist() == [1, 2.5]
    assert signals["nested"].shape == (11, 1)
    (folder / "obs_dict.pkl").write_bytes(pickle.dumps(observed))
    with pytest.raises(BadEpisode, match="keys that are not strings"):
        load(refs_of(tmp_path)[0])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_bare_actions_no_instruction_and_every_protocol(tmp_path, protocol):
    folder = toy(tmp_path, instructions=None, protocol=protocol)
    rows = [np.full(7, index / 2) for index in range(11)]
    (folder / "policy_out.pkl").write_bytes(pickle.dumps(rows, protocol))
    episode = one(tmp_path)
    assert np.array_equal(episode.action, np.stack(rows)) and (episode.instruction, episode.texts) == (None, {})


def test_digests(tmp_path, monkeypatch):
    folder = toy(tmp_path / "a")
    [ref] = refs_of(tmp_path)
    moved = shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert refs_of(moved)[0].id == ref.id
    monkeypatch.setattr("time.time_ns", lambda: 2**62)  # all files are old enough to be cached
    assert refs_of(tmp_path / "a")[0].id == ref.id
    read: list[Path] = []
    whole = bridge.file_digest
    monkeypatch.setattr(bridge, "file_digest", lambda file: read.append(file) or whole(file))
    assert refs_of(tmp_path / "a")[0].id == ref.id and not read
    for name in ("images2/im_10.jpg", "obs_dict.pkl", "policy_out.pkl", "lang.txt"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before[:-1] + b"!")
        assert digest(ref) != ref.digest and refs_of(tmp_path / "a")[0].id != ref.id
        (folder / name).write_bytes(before)
    assert digest(ref) == ref.digest
    (folder / "images2" / "im_3.jpg").rename(folder / "images2" / "im_99.jpg")
    assert digest(ref) != ref.digest


def test_an_episode_folder_is_closed(tmp_path):
    toy(tmp_path)
    toy(tmp_path, name="traj1")
    write_video(tmp_path / "clip.mp4", moving(4))
    write_video(tmp_path / DATED / "raw" / "traj_group0" / "traj1" / "preview.mp4", moving(4))
    assert [format for format, _ in find(tmp_path)] == ["video", "bridge", "bridge"]


class Hostile:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return __import__, ("antigravity",)


def change(name: str, data: object) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else pickle.dumps(data))


@pytest.mark.parametrize(
    "break_it, says",
    [
        (lambda folder: (folder / "policy_out.pkl").unlink(), "has no policy_out.pkl"),
        (lambda folder: (folder / "obs_dict.pkl").unlink(), "has no obs_dict.pkl"),
        (
            lambda folder: (folder / "images2/im_5.jpg").unlink(),
            "images2 holds 11 images; 11 actions need images 0 to 11",
        ),
        (lambda folder: (folder / "images0/im_5.jpg").write_bytes(b"x"), "an image of 1 bytes is neither JPEG nor PNG"),
        (change("policy_out.pkl", b"\x80"), "the pickle cannot be read"),
        (change("policy_out.pkl", Hostile()), "it asks for builtins.__import__"),
        (change("obs_dict.pkl", {"full_state": Hostile()}), "it asks for builtins.__import__"),
        (change("policy_out.pkl", []), "does not hold a list of actions"),
        (change("policy_out.pkl", [{"policy": 1}]), "does not hold one action vector per step"),
        (change("policy_out.pkl", [np.zeros(7), np.zeros(6)]), "does not hold one action vector per step"),
        (change("policy_out.pkl", [np.zeros(7)] * 9), "images0 holds 12 images; 9 actions need images 0 to 9"),
        (change("obs_dict.pkl", [1]), "obs_dict.pkl does not hold a table"),
        (change("obs_dict.pkl", {"full_state": np.zeros((5, 7))}), "no full_state with a row per frame"),
        (change("obs_dict.pkl", b"x" * (2**25 + 1)), "obs_dict.pkl has 33554433 bytes, more than"),
    ],
)
def test_broken_parts_are_named_and_cost_only_their_episode(tmp_path, break_it, says):
    folder = toy(tmp_path)
    toy(tmp_path, name="traj1")
    break_it(folder)
    broken, whole = refs_of(tmp_path)
    assert load(whole).action is not None
    with pytest.raises(BadEpisode, match=says):
        for video in load(broken).cameras.values():
            list(video.frames(None))
