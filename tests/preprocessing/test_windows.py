from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.rows import commit, fill, write_episode

from pipelines.recipe import load_recipe
from preprocessing.dataset.embodiment import describe
from preprocessing.dataset.loader import LatentDataset, WindowShape
from preprocessing.dataset.normalizer import Normalizer
from preprocessing.dataset.selection import is_validation, left_out, source_names
from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore

SHAPE = WindowShape(cameras=2, observed_frames=2, future_frames=2, action_chunk=4, action_dim=5, proprio_dim=6)


@pytest.fixture
def mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LatentDataset:
    """An arm with 3 action columns and 2 cameras, and a video without actions; frame t of each holds the number t."""
    monkeypatch.setenv("UWM_CACHE", str(tmp_path / "cache"))
    store = LatentStore.create(str(tmp_path / "store"))
    fork, fork_video = store.fork(), store.fork()
    count = np.arange(10)
    latents = np.broadcast_to(count[:, None, None, None], (10, 4, 8, 8)).astype(np.float16)
    steps = np.stack([count, -count, count * 0 + 7, count * 2, count * 3], axis=1).astype(np.float32)
    arm = write_episode(fork, "arm-1", {"front": latents, "wrist": latents + 100}, steps, 3)
    nothing = np.zeros((10, 0), np.float32)
    video = write_episode(fork_video, "video-1", {"video": latents}, nothing, 0, embodiment="video")
    commit(store, [(fork, *arm), (fork_video, *video)])
    rows = store.snapshot().rows("e" * 16)
    embodiments = {
        "arm": describe("arm", [rows[0]], 0, SHAPE.cameras),
        "video": describe("video", [rows[1]], 1, SHAPE.cameras),
    }
    return LatentDataset(store.snapshot(), rows, embodiments, SHAPE)


def test_a_window_holds_the_frames_and_actions_it_should(mixed: LatentDataset) -> None:
    batch = mixed.gather(np.array([0]), np.array([3]))
    assert batch["current_latents"].shape == (1, 2, 2, 4, 8, 8)
    np.testing.assert_array_equal(batch["current_latents"][0, 0, :, 0, 0, 0], [2, 3])
    np.testing.assert_array_equal(batch["current_latents"][0, 1, :, 0, 0, 0], [102, 103])
    np.testing.assert_array_equal(batch["future_latents"][0, 0, :, 0, 0, 0], [7, 8])
    # column 0 ranges from 0 to 9, so x becomes (x - 4.5) / 4.5
    np.testing.assert_allclose(batch["action"][0, :, 0], (np.array([3, 4, 5, 6]) - 4.5) / 4.5, rtol=1e-6)
    np.testing.assert_allclose(batch["action"][0, :, 1], -batch["action"][0, :, 0], rtol=1e-6)
    np.testing.assert_array_equal(batch["action"][0, :, 2], 0)  # a column that never moves
    np.testing.assert_array_equal(batch["action_mask"][0], [[True, True, True, False, False]] * 4)
    mean, std = np.arange(10).mean() * 2, np.arange(10).std() * 2
    np.testing.assert_allclose(batch["proprio"][0, :, 0], (np.array([4, 6]) - mean) / std, rtol=1e-5)
    np.testing.assert_array_equal(batch["proprio_mask"][0], [True, True, False, False, False, False])


def test_the_ends_of_an_episode_repeat_frames_and_mask_actions(mixed: LatentDataset) -> None:
    batch = mixed.gather(np.array([0, 0]), np.array([0, 8]))
    np.testing.assert_array_equal(batch["current_latents"][0, 0, :, 0, 0, 0], [0, 0])
    np.testing.assert_array_equal(batch["future_latents"][1, 0, :, 0, 0, 0], [9, 9])
    np.testing.assert_array_equal(batch["action_mask"][1, :, 0], [True, True, False, False])
    np.testing.assert_array_equal(batch["action"][1, 2:], 0)


def test_video_without_actions_and_missing_cameras_are_masked(mixed: LatentDataset) -> None:
    batch = mixed.gather(np.array([1]), np.array([5]))
    np.testing.assert_array_equal(batch["camera_mask"], [[True, False]])
    np.testing.assert_array_equal(batch["current_latents"][0, 0, :, 0, 0, 0], [4, 5])
    assert not batch["current_latents"][0, 1].any() and not batch["future_latents"][0, 1].any()
    assert not batch["action_mask"].any() and not batch["action"].any() and not batch["proprio_mask"].any()
    assert batch["embodiment"] == [1]


def test_the_order_is_a_function_of_seed_and_step_on_any_number_of_workers(mixed: LatentDataset) -> None:
    alone = mixed.batches(3, 8)
    parts = [mixed.batches(3, 8, rank=rank, world=2) for rank in range(2)]
    for _ in range(3):
        whole, one, two = next(alone).arrays, next(parts[0]).arrays, next(parts[1]).arrays
        np.testing.assert_array_equal(whole["current_latents"][0::2], one["current_latents"])
        np.testing.assert_array_equal(whole["current_latents"][1::2], two["current_latents"])
    resumed = mixed.batches(3, 8, first_step=3)
    np.testing.assert_array_equal(next(resumed).arrays["current_latents"], next(alone).arrays["current_latents"])


def test_a_mixture_names_sources_by_folder_folder_name_or_embodiment() -> None:
    places = [("/data/kitchen", "franka"), ("/data/lab", "franka"), ("/data/web", "video"), (None, "video")]
    rows = [{"source": source, "embodiment": embodiment} for source, embodiment in places]
    assert source_names(rows, {}) == ["franka", "franka", "video", "video"]
    mixture = {"/data/kitchen": 3.0, "web": 0.5, "franka": 0.0, "video": 1.0}
    assert source_names(rows, mixture) == ["/data/kitchen", "franka", "web", "video"]
    assert [left_out(row, mixture) for row in rows] == [False, True, False, False]
    with pytest.raises(UserError, match=r"names neither /data/lab nor its embodiment franka.*mixture.franka=0.5"):
        source_names(rows, {"kitchen": 1, "video": 1})
    with pytest.raises(UserError, match=r"mixture: labs is no source or embodiment .* /data/lab, .*, franka"):
        source_names(rows, {"franka": 1, "video": 1, "labs": 1})


def test_shares_follow_the_mixture_or_else_the_number_of_windows(mixed: LatentDataset) -> None:
    snapshot, rows = mixed._copy._snapshot, mixed.rows
    embodiments = {
        name: describe(name, [row], i, 2) for i, (name, row) in enumerate(zip(("arm", "video"), rows, strict=True))
    }
    for mixture, share in (({}, 10), ({"video": 3, "arm": 1}, 5), ({"arm": 0.0, "video": 1.0}, 0)):
        data = LatentDataset(snapshot, rows, embodiments, SHAPE, mixture=mixture)
        batches = data.batches(0, 10)
        samples = [next(batches) for _ in range(2)]
        assert sum((each.episode == 0).sum() for each in samples) == share
        assert all((each.arrays["embodiment"] == data.embodiment[each.episode]).all() for each in samples)
    assert data.source_names == ["arm", "video"] and data.source.tolist() == [0, 1]
    second = next(data.batches(0, 10, rank=1, world=3))
    np.testing.assert_array_equal(second.position, [1, 4, 7])
    np.testing.assert_array_equal(second.arrays["current_latents"], samples[0].arrays["current_latents"][1::3])
    with pytest.raises(UserError, match="names neither"):
        LatentDataset(snapshot, rows, embodiments, SHAPE, mixture={"arm": 1})
    for wrong, why in (("{arm: 0}", "one source a share above 0"), ("{arm: -1}", "greater than or equal to 0")):
        with pytest.raises(UserError, match=why):
            load_recipe("small", [f"mixture={wrong}"])


def test_a_held_out_episode_stays_held_out_and_the_share_is_met() -> None:
    names = [f"episode-{i}" for i in range(4000)]
    held = [name for name in names if is_validation(name, 0.1)]
    assert abs(len(held) / len(names) - 0.1) < 0.02
    assert all(is_validation(name, 0.2) for name in held)


def test_episodes_of_one_embodiment_that_disagree_are_refused(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    fill(store, ["a", "b"])
    rows = store.snapshot().rows("e" * 16)
    rows[1]["action_dim"] = 2
    with pytest.raises(UserError, match="actions have 2 columns, not 3"):
        describe("arm", rows, 0, 1)


def test_a_misfit_of_model_and_data_names_both_values(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    fill(store, ["a"])
    known = describe("arm", store.snapshot().rows(), 0, 2)
    assert known.misfits(known) == []
    (offset, *offsets), (scale, *scales) = known.action_normalizer.offset, known.action_normalizer.scale
    millimetres = Normalizer((1000 * offset, *offsets), (1000 * scale, *scales))
    [unit] = known.misfits(replace(known, action_normalizer=millimetres))
    assert unit.startswith("action[0] is ") and unit.count(" ± ") == 2 and ", not " in unit
    [cameras] = known.misfits(replace(known, cameras=("elsewhere",)))
    assert cameras == f"cameras are elsewhere, not {', '.join(known.cameras)}"
    [columns] = known.misfits(replace(known, action_dim=known.action_dim + 1))
    assert columns == f"actions have {known.action_dim + 1} columns, not {known.action_dim}"
