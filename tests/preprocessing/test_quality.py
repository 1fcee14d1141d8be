"""Filters on real episodes, which pass, and on synthetic ones, each caught by the intended filter."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from helpers.formats import REAL, write_video
from helpers.readers import real
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from preprocessing.contracts.rotations import convert_rotation
from preprocessing.episode import ActionBlock, Episode, EpisodeRef
from preprocessing.quality.duplicates import Fingerprints
from preprocessing.quality.filters import Filters, Inspector, Verdict, idle_steps
from preprocessing.sources import find, load, scan
from preprocessing.video.decode import open_video

ALL = Filters(idle=7, shots=3, near_duplicates=4)
NONE = Filters(min_frames=None, black=None, frozen=None)
SIZE = 128


@pytest.fixture(scope="module")
def robots() -> list[tuple[Episode, dict[str, np.ndarray], Verdict]]:
    """25 episodes of Bridge and 5 of GR1, with their frames by camera and the verdict of all filters."""
    found = [ref for folder in ("bridge_rlds", "gr1_lerobot_v2") for f, p in find(REAL / folder) for ref in scan(f, p)]
    episodes = [load(ref) for ref in found]
    frames = [{c: np.concatenate(list(v.frames(SIZE))) for c, v in episode.cameras.items()} for episode in episodes]
    return [(e, cameras, judged(ALL, e, **cameras)) for e, cameras in zip(episodes, frames, strict=True)]


@pytest.fixture(scope="module")
def films() -> dict[str, np.ndarray]:
    names = {"pancake": "flipping_a_pancake.mkv", "nasa": "nasa_13013.mp4", "trailer": "test_clip_10s.mp4"}
    return {name: frames_of(REAL / "video" / file) for name, file in names.items()}


def frames_of(path: Path) -> np.ndarray:
    return np.concatenate(list(open_video(path).frames(SIZE)))


def film(action: np.ndarray | None = None, *layout: ActionBlock, fps: float = 24) -> Episode:
    ref = EpisodeRef("/film.mp4", "video", 0, "0")
    return Episode(ref, fps, {}, {}, action, layout, None, None, "video")


def judged(filters: Filters, episode: Episode, *chunks: int, **cameras: np.ndarray) -> Verdict:
    inspector = Inspector(filters, episode)
    for camera, frames in cameras.items():
        for part in np.split(frames, chunks or range(64, len(frames), 64)):
            inspector.frames(camera, part)
    return inspector.verdict()


def recoded(path: Path, frames: np.ndarray, size: tuple[int, int] = (240, 320), crf: int = 30) -> np.ndarray:
    """The frames encoded at another size and decoded again."""
    scaled = [np.asarray(Image.fromarray(frame).resize(size[::-1])) for frame in frames]
    return frames_of(write_video(path, np.stack(scaled), crf=str(crf)))


def noisy(frames: np.ndarray, level: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, level, frames.shape)
    return (frames + noise).clip(0, 255).astype(np.uint8)


def moving(count: int, size: int = 64) -> np.ndarray:
    """A small bright square that moves one pixel per frame over a grey background."""
    frames = np.full((count, size, size, 3), 90, np.uint8)
    for number, frame in enumerate(frames):
        at = number % (size - 8)
        frame[20:28, at : at + 8] = 200
    return frames


# ------------------------------------------------------------------------------------------------- what passes


@real
def test_real_episodes_pass_whole(robots, films):
    for episode, cameras, verdict in robots:
        assert (verdict.filter, verdict.reason, verdict.cuts) == (None, None, [])
        assert verdict.spans == [(0, len(episode.action))]
        assert verdict.dead == ["image_3"] * ("image_3" in cameras)
        black = "camera image_3 is black in every frame; left out (quality.black=false keeps it)"
        assert verdict.notes == [black] * ("image_3" in cameras)
    for frames in films.values():
        assert judged(Filters(), film(), video=frames).reason is None


def test_without_filters_nothing_is_refused():
    verdict = judged(NONE, film(), video=np.zeros((1, 64, 64, 3), np.uint8))
    assert verdict == Verdict(None, None, [], None, [(0, 1)], [], [], None)


def test_false_switches_a_filter_off_and_true_is_refused():
    assert Filters.model_validate({"frozen": False, "black": False, "min_frames": False}) == NONE
    for wrong in ({"frozen": True}, {"frozen": 1.5}, {"blck": 0.9}, {"idle": 0}):
        with pytest.raises(ValidationError):
            Filters.model_validate(wrong)


def test_opencv_is_not_imported_unless_shots_are_searched():
    code = (
        "import sys, numpy as np; from test_quality import *;"
        "judged(Filters(near_duplicates=4), film(), video=moving(5));"
        "judged(ALL, film(np.zeros((5, 1))), video=moving(5));"
        "assert not {'cv2', 'scenedetect'} & set(sys.modules)"
    )
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {paths}; {code}"], check=True)


# ---------------------------------------------------------------------------------------- short, black, frozen


def test_too_short():
    verdict = judged(Filters(min_frames=6), film(), video=moving(5))
    assert verdict.filter == "min_frames" and verdict.spans == []
    assert verdict.reason == "too short: 5 frames, at least 6 are required"
    assert judged(Filters(min_frames=6), film(), video=moving(6)).reason is None
    assert judged(Filters(), film()).reason == "too short: 0 frames, at least 2 are required"


def test_black_with_the_noise_of_a_covered_lens(tmp_path):
    black = noisy(np.zeros((40, 128, 128, 3)), 12)
    black = recoded(tmp_path / "a.mp4", np.concatenate([black, moving(2, 128)]))
    verdict = judged(Filters(), film(), front=black, wrist=np.zeros_like(black))
    front, wrist = "camera front is black in 95% of its frames", "camera wrist is black in every frame"
    assert verdict.filter == "black" and verdict.spans == []
    assert verdict.reason == f"{front}; {wrist} (more than 90% is refused)"
    good = judged(Filters(), film(), front=moving(42), wrist=black)
    assert good.reason is None and good.notes == ["camera wrist is black in 95% of its frames"] and not good.dead
    assert judged(Filters(black=0.96, frozen=None), film(), front=black).reason is None


def test_a_dead_camera_beside_a_good_one_is_left_out():
    good, dark = moving(30), np.zeros((30, 64, 64, 3), np.uint8)
    still = good[:1].repeat(30, axis=0)
    for dead, name, said in (
        (dark, "black", "black in every frame"),
        (still, "frozen", "frozen in every frame, 29 in a row"),
    ):
        verdict = judged(Filters(), film(), front=good, wrist=dead)
        assert (verdict.reason, verdict.dead) == (None, ["wrist"])
        assert verdict.notes == [f"camera wrist is {said}; left out (quality.{name}=false keeps it)"]
    assert judged(NONE, film(), front=good, wrist=dark).dead == []
    assert judged(Filters(), film(), front=still, wrist=dark).filter == "frozen", "nothing usable remains"


@real
@pytest.mark.parametrize("noise, crf", [(0, 28), (3, 18), (5, 23), (8, 28)])
def test_a_still_video_is_frozen(tmp_path, films, noise, crf):
    still = noisy(np.repeat(films["pancake"][50:51], 60, axis=0), noise)
    frames = recoded(tmp_path / "a.mp4", still, size=(256, 256), crf=crf)
    verdict = judged(Filters(), film(), video=frames)
    assert verdict.filter == "frozen" and "camera video is frozen in " in str(verdict.reason)


@real
def test_a_video_that_freezes_half_way(tmp_path, films):
    moves, stands = films["pancake"][100:150], np.repeat(films["pancake"][149:150], 50, axis=0)
    frames = recoded(tmp_path / "a.mp4", np.concatenate([moves, stands]), crf=23)
    assert judged(Filters(), film(), video=frames).reason is None
    verdict = judged(Filters(frozen=0.45), film(), video=frames)
    assert verdict.filter == "frozen"
    share, row = map(int, re.findall(r"\d+", str(verdict.reason))[:2])  # the player showed some other frames twice
    assert 50 <= share < 70 and 48 <= row <= 51
    beside = judged(Filters(frozen=0.45), film(), video=frames, wrist=films["pancake"][100:200])
    assert beside.reason is None and [note.split()[:4] for note in beside.notes] == [
        ["camera", "video", "is", "frozen"]
    ]


def test_slow_and_small_motion_is_not_frozen():
    slow = np.repeat(moving(50), 4, axis=0)  # one pixel of 64 per four frames; 3 of 4 frames are repeated
    assert judged(Filters(frozen=0.8), film(), video=slow).reason is None
    brighter = 90 + np.arange(200) / 5  # by less than a grey level per frame
    brighter = np.broadcast_to(brighter[:, None, None, None], (200, 64, 64, 3)).astype(np.uint8)
    assert judged(Filters(frozen=0.94), film(), video=brighter).reason is None
    twice = np.concatenate([np.repeat(moving(1), 10, axis=0), 255 - np.repeat(moving(1), 5, axis=0)])
    reason = "camera video is frozen in 93% of its frames, 9 in a row (more than 90% is refused)"  # 9 + 4 of 14
    assert judged(Filters(), film(), video=twice).reason == reason


@pytest.mark.parametrize("size", [8, 16, 100, 128])
def test_frames_of_any_size(size):
    still = np.repeat(noisy(np.full((1, size, size, 3), 90), 30), 20, axis=0)
    assert judged(Filters(), film(), video=still).filter == "frozen"
    assert judged(Filters(), film(), video=still // 10).filter == "black"
    assert judged(Filters(), film(), video=np.concatenate([still, 255 - still])[np.arange(40) * 21 % 40]).reason is None


# --------------------------------------------------------------------------------------------------------- idle

ARM = ActionBlock(name="arm", size=3, kind="position", mode="delta", unit="m")
HAND = ActionBlock(name="hand", size=1, kind="gripper", mode="absolute")


def arm(moves: np.ndarray) -> np.ndarray:
    action = np.random.default_rng(0).uniform(0.01, 0.1, (len(moves), 4)).astype(np.float32)
    action[:, 3] = 1
    action[~moves, :3] = 1e-5
    return action


def test_idle_runs_at_both_ends_and_in_the_middle():
    moves = np.ones(100, bool)
    for first, end in ((0, 10), (30, 36), (50, 57), (90, 100)):  # the second is shorter than seven
        moves[first:end] = False
    verdict = judged(Filters(idle=7), film(arm(moves), ARM, HAND), video=moving(100))
    assert verdict.reason is None and verdict.spans == [(10, 50), (57, 90)]
    moves[30:36] = True
    assert verdict.idle is not None and (verdict.idle == ~moves).all()
    assert verdict.notes == ["idle: nothing is commanded at 27 of 100 steps; they are left out"]
    assert judged(Filters(), film(arm(moves), ARM, HAND), video=moving(100)).spans == [(0, 100)]


def test_short_spans_between_idle_runs_are_counted():
    moves = np.zeros(100, bool)
    moves[20:25] = moves[40:44] = moves[60:80] = True
    verdict = judged(Filters(idle=7, min_frames=10), film(arm(moves), ARM, HAND), video=moving(100))
    assert verdict.spans == [(60, 80)]
    assert verdict.notes[-1] == "2 of 3 spans are shorter than 10 frames and left out, 9 frames in total"
    refused = judged(Filters(idle=7, min_frames=30), film(arm(moves), ARM, HAND), video=moving(100))
    assert (refused.filter, refused.spans, refused.notes) == ("idle", [], [])
    assert refused.reason == "idle: nothing is commanded at 71 of 100 steps; the others are never 30 in a row"


def test_an_episode_in_which_nothing_is_commanded():
    verdict = judged(Filters(idle=7), film(arm(np.zeros(20, bool)), ARM, HAND), video=moving(20))
    assert verdict.filter == "idle" and verdict.reason == "idle: nothing is commanded at 20 of 20 steps"
    assert judged(Filters(idle=7), film(), video=moving(20)).idle is None


def test_a_gripper_that_closes_is_not_idle():
    action = arm(np.zeros(20, bool))
    action[8:, 3] = 0
    assert np.flatnonzero(~idle_steps(action, (ARM, HAND))).tolist() == [8]
    speed = HAND.model_copy(update={"mode": "velocity"})
    assert np.flatnonzero(~idle_steps(action, (ARM, speed))).tolist() == list(range(8))


@pytest.mark.parametrize("count", [15, 25])
def test_a_wrong_number_of_actions_passes_the_filters(count):
    moves = np.arange(20) < 10
    verdict = judged(Filters(idle=7), film(arm(moves), ARM, HAND), video=moving(count))
    assert verdict.reason is None and verdict.spans == [(0, 10)] + [(20, 25)] * (count == 25)


def test_idle_for_each_kind_of_action():
    turn = np.random.default_rng(0).normal(size=(20, 3))
    for representation in ("quaternion_xyzw", "quaternion_wxyz", "rotation_6d", "matrix", "euler_xyz", "axis_angle"):
        values = convert_rotation(np.where(np.arange(20)[:, None] < 10, turn, 0), "axis_angle", representation)
        block = ActionBlock(
            name="turn", size=values.shape[1], kind="rotation", representation=representation, mode="delta"
        )
        assert idle_steps(values, (block,)).tolist() == [False] * 10 + [True] * 10
    joints = np.concatenate([np.arange(10), [9] * 10])[:, None] / 10  # goes to 0.9 and stays there
    for mode in ("absolute", "unknown"):
        block = ActionBlock(name="joints", size=1, kind="joint", mode=mode)
        assert np.flatnonzero(idle_steps(joints, (block,))).tolist() == [0, *range(10, 20)]
    speed = ActionBlock(name="joints", size=1, kind="joint", mode="velocity")
    assert np.flatnonzero(idle_steps(joints, (speed,))).tolist() == [0]
    degrees = ActionBlock(name="joints", size=1, kind="joint", mode="absolute", unit="deg")
    assert idle_steps(joints / 2, (degrees,)).all()


# --------------------------------------------------------------------------------------------------------- shots

SHOTS = Filters(shots=3)


@real
def test_cuts_between_videos_are_found_to_the_frame(tmp_path, films, robots):
    gr1 = robots[-1][1]["ego_view"]
    joined = np.concatenate([films["trailer"][:60], films["pancake"][20:110], gr1[:77]])
    for frames in (joined, recoded(tmp_path / "a.mp4", joined)):
        verdict = judged(SHOTS, film(), video=frames)
        assert verdict.cuts == [60, 150]
        assert verdict.spans == [(0, 60), (60, 150), (150, 227)] and verdict.reason is None
    assert judged(SHOTS, film(np.zeros((227, 1)), HAND), video=joined).cuts == []  # a robot's camera is not cut
    assert judged(SHOTS, replace(film(), proprio={"x": np.zeros((227, 1))}), video=joined).cuts == []
    assert judged(Filters(), film(), video=joined).spans == [(0, 227)]
    assert [len(judged(SHOTS, film(), video=films[name]).cuts) for name in ("nasa", "trailer")] == [1, 1]


@real
def test_a_frame_of_another_shot_at_either_end(films):
    frames = np.concatenate([films["nasa"][:1], films["pancake"][20:60], films["nasa"][:2]])
    verdict = judged(Filters(shots=3, min_frames=3), film(), video=frames)
    assert verdict.cuts == [1, 41] and verdict.spans == [(1, 41)]
    assert verdict.notes == ["2 of 3 spans are shorter than 3 frames and left out, 3 frames in total"]


@real
def test_a_scene_that_only_moves_is_not_cut(robots):
    for episode, cameras, _ in robots[-5:]:
        assert judged(SHOTS, film(fps=episode.fps), video=cameras["ego_view"]).cuts == []


@real
def test_a_video_of_nothing_but_cuts(films):
    shots = [films["nasa"][:8], films["pancake"][20:28], films["trailer"][40:48], films["nasa"][300:308]]
    verdict = judged(Filters(shots=3, min_frames=10), film(), video=np.concatenate(shots))
    assert (verdict.filter, verdict.spans, verdict.cuts) == ("shots", [], [8, 16, 24])
    assert verdict.reason == "cut up: 4 shots in 32 frames, each shorter than 10"


# ---------------------------------------------------------------------------------------------------- duplicates

COPIES = Filters(near_duplicates=4)


def distance(one: bytes, other: bytes) -> float:
    """Bits of 64 in which two fingerprints differ, averaged over frames; infinite if their actions disagree."""
    known = Fingerprints()
    known.add("one", one)
    found = known.nearest(other, 64)
    return found[1] if found else np.inf


@real
def test_different_episodes_of_one_fixed_camera_are_no_duplicates(robots, films):
    marks = [verdict.fingerprint for _, _, verdict in robots]
    marks += [judged(COPIES, film(), video=frames).fingerprint for frames in films.values()]
    marks += [judged(COPIES, film(), video=cameras["ego_view"]).fingerprint for _, cameras, _ in robots[-5:]]
    assert None not in marks
    assert min(distance(a, b) for a, b in combinations(marks, 2)) > 8
    # The first episode again, then its frames with other actions, then without: only the first is a copy.
    (episode, cameras, _), (other, _, _) = robots[:2]
    rounded = episode.action * 1.0006  # float16's largest rounding error, also in a column that stays at 1
    for action, far in ((rounded, 0), (other.action, np.inf), (None, np.inf)):
        again = judged(COPIES, replace(episode, action=action), **cameras)
        assert distance(again.fingerprint, marks[0]) == far


@real
def test_copies_are_found(tmp_path, robots, films):
    known = Fingerprints()
    for number, (_, _, verdict) in enumerate(robots):
        known.add(str(number), verdict.fingerprint)
    for number, size, crf in ((0, (240, 320), 35), (4, (96, 96), 30), (9, (240, 320), 35), (29, (96, 96), 35)):
        episode, cameras, _ = robots[number]
        copy = {min(cameras): recoded(tmp_path / "a.mp4", cameras[min(cameras)], size, crf)}
        name, far = known.nearest(judged(COPIES, episode, **copy).fingerprint, 4)
        assert name == str(number) and far < 4
    for name, frames in films.items():
        known.add(name, judged(COPIES, film(), video=frames[:150]).fingerprint)
    for name, frames in films.items():  # at half the rate, and darker
        copy = (recoded(tmp_path / "a.mp4", frames[:150:2]) * 0.9).astype(np.uint8)
        assert known.nearest(judged(COPIES, film(), video=copy).fingerprint, 4)[0] == name


@real
def test_videos_that_begin_alike_are_no_duplicates(films):
    one, other = (np.concatenate([films["pancake"][:60], films[name][:60]]) for name in ("nasa", "trailer"))
    marks = [judged(COPIES, film(), video=frames).fingerprint for frames in (one, other)]
    assert 10 < distance(*marks) < 20


def test_flat_frames_have_no_fingerprint():
    flat = noisy(np.full((20, 64, 64, 3), 90), 5)
    assert judged(COPIES, film(), video=flat).fingerprint is None
    both = judged(COPIES, film(), a=flat, b=moving(20)).fingerprint  # of the first camera that has one
    assert both == judged(COPIES, film(), video=moving(20)).fingerprint is not None


def test_the_nearest_of_many_is_the_nearest_of_all():
    rng = np.random.default_rng(0)

    def mark(width: int) -> bytes:
        actions = rng.choice([0.0, 1.0], (1, width)) + np.arange(16)[:, None]
        hashes = np.bitwise_or.reduce(1 << rng.integers(0, 40, (3, 16), dtype=np.uint64), axis=0)
        return hashes.tobytes() + actions.astype(np.float16).tobytes()

    known, marks = Fingerprints(), [mark(width) for width in rng.integers(0, 3, 200)]
    for number, one in enumerate(marks):
        assert known.nearest(one, 64) == nearest_of(marks[:number], one)
        known.add(str(number), one)
    assert known.nearest(marks[7], 0) == ("7", 0.0) and known.nearest(mark(9), 64) is None


def nearest_of(marks: list[bytes], one: bytes) -> tuple[str, float] | None:
    far = [distance(one, other) for other in marks]
    return (str(int(np.argmin(far))), min(far)) if far and min(far) < np.inf else None


# ----------------------------------------------------------------------------------------------------- streaming


FRAMES = noisy(
    np.concatenate(
        [moving(30), 255 - moving(25), np.repeat(moving(1), 20, axis=0), np.zeros((15, 64, 64, 3), np.uint8)]
    ),
    2,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, len(FRAMES)), max_size=20), st.booleans())
def test_chunk_size_does_not_change_the_verdict(ends, robot):
    filters = Filters(shots=3, frozen=0.1, near_duplicates=4)
    episode = film(np.zeros((len(FRAMES), 1)), HAND) if robot else film()
    whole = judged(filters, episode, len(FRAMES), video=FRAMES)
    assert whole.cuts == ([] if robot else [30, 55, 75]) and whole.filter == "frozen"
    assert judged(filters, episode, *sorted(ends), video=FRAMES) == whole
