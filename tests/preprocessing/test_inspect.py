"""``uwm contract infer`` and ``check`` on data with known mistakes, real robots' included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from helpers.command import Uwm
from helpers.formats import REAL, moving, quadrants, write_calvin, write_demos, write_video

from preprocessing.contracts.contract import DataContract
from preprocessing.episode import Episode
from preprocessing.inspect.check import Lag, Measured, check, find_lag, measure, spread
from preprocessing.inspect.contact_sheet import contact_sheet
from preprocessing.sources import find, scan

needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="real robot logs are not beside the checkout")


def measured(path: Path, contract: DataContract | None = None) -> Measured:
    refs = [ref for kind, place in find(path) for ref in scan(kind, place)]
    return measure(refs, contract, spread(refs, 32))


def lines(found: Measured) -> str:
    return "\n".join(f"{'WRONG' if remark.wrong else 'look'}: {remark.line}" for remark in check(found))


def write_moving(
    path: Path, shift: int = 0, absolute: bool = False, demos: int = 3, picture: np.ndarray | None = None
) -> Path:
    """Demonstrations of an arm that follows its commands, with actions recorded ``shift`` rows late."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = quadrants() if picture is None else picture
    with h5py.File(path, "w") as file:
        for index in range(demos):
            rng = np.random.default_rng([index, *path.stem.encode()])
            moves = rng.normal(size=(40, 3)).clip(-2.5, 2.5) / 2.5
            places = np.concatenate([np.zeros((1, 3)), np.cumsum(moves, axis=0)])  # move t leads to position t+1
            actions = (places[1:] if absolute else moves)[np.clip(np.arange(40) - shift, 0, 39)]
            demo = file.create_group(f"data/demo_{index}")
            demo["actions"] = np.concatenate([actions, np.sign(rng.normal(size=(40, 1)))], axis=1)
            demo["obs/eef_pos"] = places[:-1]
            demo["obs/front_image"] = np.broadcast_to(picture, (40, *picture.shape))
    return path


def test_the_contact_sheet_shows_frames_and_gripper_commands(tmp_path: Path, uwm: Uwm) -> None:
    path = write_demos(tmp_path / "a.hdf5", demos=9, steps=20)
    with h5py.File(path, "a") as file:
        grippers = file["data/demo_8/actions"][:, 6]
    figure = contact_sheet(measured(path))
    shown = [axis for axis in figure.axes if axis.images]
    assert [axis.texts[0].get_text() for axis in shown[::6]] == [f"a.hdf5 #{i}: open the drawer" for i in (0, 4, 8)]
    numbers = (0, 4, 8, 11, 15, 19)
    for axis, number in zip(shown[12:], numbers, strict=True):
        assert axis.get_xlabel() == f"{number}, gripper {grippers[number]:.2f} (1 is closed)"
        assert np.array_equal(axis.images[0].get_array(), moving(20)[number])
    sheet = tmp_path / "sheet.png"
    said = uwm("contract", "check", path, "--picture", sheet)[2]
    assert f"written to {sheet}" in said and sheet.read_bytes().startswith(b"\x89PNG")
    for wrong in (tmp_path / "sheet.txt", tmp_path / "nowhere" / "sheet.png"):
        assert uwm("contract", "check", path, "--picture", wrong)[0] == 2
    film = write_video(tmp_path / "b.mp4", moving(3))
    assert [axis.get_xlabel() for axis in contact_sheet(measured(film)).axes] == ["0", "1", "2", "", "", ""]
    film.write_bytes(film.read_bytes()[:900])
    assert not any(axis.images for axis in contact_sheet(measured(film)).axes)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("shift", [-2, 0, 1, 3])
def test_a_shift_of_the_actions_is_measured(tmp_path: Path, shift: int, absolute: bool) -> None:
    found = measured(write_moving(tmp_path / "a.hdf5", shift, absolute))
    lag = find_lag(found.episodes)
    assert lag and (lag.steps, lag.mode, lag.proprio) == (-shift, "absolute" if absolute else "delta", "eef_pos")
    assert lag.correlation > 0.9
    assert ("too early" in lines(found)) == (shift > 0)
    assert [remark.wrong for remark in check(found) if "follows" in remark.line] == [True] * (shift > 0)


@needs_real
def test_the_lags_of_real_robots() -> None:
    bridge, gr1 = (measured(REAL / name) for name in ("bridge_rlds", "gr1_lerobot_v2"))
    for found, mode in ((bridge, "delta"), (gr1, "absolute")):
        lag = find_lag(found.episodes)
        assert isinstance(lag, Lag) and lag.steps == 0 and lag.mode == mode and lag.correlation > 0.6
    assert lines(bridge).splitlines() == [
        "look: camera image_3 is black in 25 of 25 episodes",
        "look: is_last is not set at the end of 25 of 25 episodes",
    ]
    assert "that never change: left_hand, left_leg, neck, right_hand[5], right_leg, waist" in lines(gr1)


def test_an_upside_down_camera_is_found(tmp_path: Path) -> None:
    for number in range(4):
        write_moving(tmp_path / f"{number}.hdf5", demos=1, picture=quadrants()[:: -1 if number == 2 else 1])
    assert (
        lines(measured(tmp_path))
        == f"look: {tmp_path}/2.hdf5 #0: camera front looks upside down compared with other episodes"
    )


def test_an_episode_in_two_splits_is_found(tmp_path: Path) -> None:
    frames = np.broadcast_to(quadrants(), (12, 64, 64, 3))
    write_calvin(tmp_path / "training", frames)
    write_calvin(tmp_path / "validation", frames)
    found = lines(measured(tmp_path))
    assert "WRONG: 1 episodes are in training and in validation" in found and "1 episodes occur twice" in found


def test_reencoded_copies_are_found(tmp_path: Path) -> None:
    write_calvin(tmp_path / "training", moving(12))
    write_calvin(tmp_path / "validation", moving(12) // 2 + 64)
    found = lines(measured(tmp_path))
    assert "WRONG: 1 episodes are in training and in validation" in found and "twice" not in found
    assert "look: 1 episodes have the frames and actions of another one" in found


def test_columns_that_contradict_their_declaration(tmp_path: Path) -> None:
    path = write_demos(tmp_path / "a.hdf5", demos=2, steps=20)
    with h5py.File(path, "a") as file:
        for name in ("demo_0", "demo_1"):
            file[f"data/{name}/actions"][:, 3:6] = 90.0
            file[f"data/{name}/actions"][:, 0] = 1.5
            file[f"data/{name}/dones"][:] = False
    layout = [
        {"name": "position", "size": 3, "kind": "position", "unit": "scaled"},
        {"name": "turn", "size": 3, "kind": "rotation", "representation": "euler_xyz"},
        {"name": "gripper", "size": 1, "kind": "gripper"},
    ]
    found = lines(measured(path, DataContract.model_validate({"action_layout": layout})))
    assert "look: columns of the action that never change: position[0], turn" in found
    assert "WRONG: action turn reaches 90: not an angle in radians" in found
    assert "though it is scaled to +-1" in found
    assert "dones is not set at the end of 2 of 2 episodes" in found


def test_an_unreadable_episode_is_reported(tmp_path: Path) -> None:
    (tmp_path / "broken.hdf5").write_bytes(b"\x89HDF\r\n\x1a\nnothing")
    write_moving(tmp_path / "whole.hdf5")
    assert "WRONG: " in lines(measured(tmp_path)) and "broken.hdf5 #0" in lines(measured(tmp_path))


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda folder: write_moving(folder / "a.hdf5"), id="moving"),
        pytest.param(lambda folder: write_demos(folder / "a.hdf5"), id="libero"),
        pytest.param(lambda folder: REAL / "bridge_rlds", id="bridge", marks=needs_real),
        pytest.param(lambda folder: REAL / "gr1_lerobot_v2", id="gr1", marks=needs_real),
    ],
)
def test_an_inferred_contract_changes_nothing(tmp_path: Path, uwm: Uwm, source: Callable[[Path], Path]) -> None:
    path = source(tmp_path)
    code, _, _ = uwm("contract", "infer", path, "--output", tmp_path / "contract.yaml")
    assert code == 0
    assert yaml.safe_load((tmp_path / "contract.yaml").read_text())["cameras"]
    found, again = measured(path), measured(path, DataContract.load(tmp_path / "contract.yaml"))
    for one, other in zip(found.episodes, again.episodes, strict=True):
        assert same(one, other)
    code, answer, err = uwm("contract", "check", path, "--contract", tmp_path / "contract.yaml", "--json")
    assert code == 0 and answer["episodes"] == len(found.episodes), err
    code, _, err = uwm("contract", "infer", path, "--output", tmp_path / "contract.yaml")
    assert code == 2 and "already exists" in err


def test_a_contract_is_inferred_for_one_format(tmp_path: Path, uwm: Uwm) -> None:
    write_demos(tmp_path / "a.hdf5", demos=1, steps=3)
    write_demos(tmp_path / "b.hdf5", demos=1, steps=4)
    (tmp_path / "films").mkdir()
    write_video(tmp_path / "films" / "c.mp4", moving(3))
    code, _, err = uwm("contract", "infer", tmp_path)
    assert code == 2 and f"holds hdf5 in {tmp_path}, video in {tmp_path}/films" in err
    assert "a contract is for one of them: give its path, or --format NAME" in err
    code, _, _ = uwm("contract", "infer", tmp_path, "--format", "hdf5", "--output", tmp_path / "hdf5.yaml")
    assert code == 0 and f"# {tmp_path} (hdf5 in {tmp_path.name}): " in (tmp_path / "hdf5.yaml").read_text()


def same(one: Episode, other: Episode) -> bool:
    assert one.action is not None and other.action is not None
    return (
        (one.fps, one.embodiment, one.instruction, one.success)
        == (other.fps, other.embodiment, other.instruction, other.success)
        and np.array_equal(one.action, other.action)
        and one.action_layout == other.action_layout
        and one.proprio.keys() == other.proprio.keys()
        and {name: video.turned for name, video in one.cameras.items()}
        == {name: video.turned for name, video in other.cameras.items()}
    )


def test_shipped_contracts_are_listed_and_printed(uwm: Uwm) -> None:
    code, listed, err = uwm("contract", "list", "--json")
    assert code == 0
    for contract in listed:
        assert contract["name"] in err
        assert uwm("contract", "show", contract["name"])[0] == 0
    code, _, err = uwm("contract", "show", "nobody")
    assert code == 2 and "not one of the shipped" in err
