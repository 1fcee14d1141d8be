from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
import pytest

from preprocessing import sources

if find_spec("metaworld") is None:  # importorskip would import it before the module below selects the renderer
    pytest.skip("the extra 'sim' is not installed", allow_module_level=True)

from infra.simulators.metaworld import CAMERAS, HORIZON, MetaWorld
from pipelines.record import record


def test_a_reset_is_a_function_of_the_seed() -> None:
    one, other = MetaWorld("drawer-close", 32), MetaWorld("drawer-close", 32)
    other.reset(seed=5)
    (first, _), (again, _) = one.reset(seed=4), other.reset(seed=4)
    np.testing.assert_array_equal(first["proprio"]["state"], again["proprio"]["state"])
    np.testing.assert_array_equal(first["images"]["agentview"], again["images"]["agentview"])
    assert (one.reset(seed=5)[0]["images"]["agentview"] != first["images"]["agentview"]).any()
    assert set(first["images"]) == set(CAMERAS) and first["images"]["agentview"].shape == (32, 32, 3)


@pytest.mark.parametrize("task", ["drawer-close", "button-press-topdown", "door-open"])
def test_the_expert_succeeds_and_standing_still_does_not(task: str) -> None:
    simulator = MetaWorld(task, 32)
    simulator.rendering = False
    simulator.reset(seed=0)
    assert any(simulator.step(simulator.expert_action())[4]["success"] for _ in range(HORIZON))
    simulator.reset(seed=0)
    stood = [simulator.step(np.zeros(4)) for _ in range(HORIZON)]
    assert not any(info["success"] for *_, info in stood)
    assert [truncated for *_, truncated, _ in stood] == [False] * (HORIZON - 1) + [True]


def test_recordings_are_read_back_upright_and_alike_from_both_formats(tmp_path: Path) -> None:
    summary = record(tmp_path / "raw", ["drawer-close"], episodes=2, videos=1, image_size=64)
    assert "2 demonstrations and 1 videos" in summary
    assert "already recorded" in record(tmp_path / "raw", ["drawer-close"], episodes=2, videos=1, image_size=64)
    found = dict(sources.find(tmp_path / "raw"))
    assert set(found) == {"hdf5", "lerobot", "video"}
    episodes = {format: sources.load(next(sources.scan(format, path))) for format, path in found.items()}
    first = {
        format: {name: next(video.frames(None))[0].astype(int) for name, video in episode.cameras.items()}
        for format, episode in episodes.items()
    }
    # Two episodes of one task start alike, so a camera's first frames differ little unless one is upside down.
    for camera in CAMERAS:
        upright = np.abs(first["hdf5"][camera] - first["lerobot"][camera]).mean()
        assert upright * 2 < np.abs(first["hdf5"][camera][::-1] - first["lerobot"][camera]).mean()
    with h5py.File(next((tmp_path / "raw" / "hdf5").glob("*.hdf5"))) as file:
        stored = np.asarray(file["data/demo_0/obs/agentview_rgb"][0])
        assert json.loads(file["data"].attrs["problem_info"])["language_instruction"] == "close the drawer"
    np.testing.assert_array_equal(stored[::-1], first["hdf5"]["agentview"])
    for format in ("hdf5", "lerobot"):
        episode = episodes[format]
        assert episode.embodiment == "sawyer" and episode.instruction == "close the drawer"
        assert episode.action is not None and episode.action.shape[1] == 4
        assert episode.proprio["state"].shape == (len(episode.action), 4)
    assert episodes["video"].action is None
