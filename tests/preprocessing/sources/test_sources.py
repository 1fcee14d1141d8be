"""Finding data sets in folders, what digests cover, videos, and contracts that override a reader."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.formats import REAL, numbered, quadrants, rlds_episode, write_demos, write_lerobot, write_rlds, write_video
from helpers.readers import episodes_of, frames_of, real, refs_of

from preprocessing.contracts.contract import DataContract
from preprocessing.episode import ActionBlock
from preprocessing.errors import BadEpisode, UserError
from preprocessing.sources import digest, find, load


def test_a_folder_of_everything(tmp_path):
    write_demos(tmp_path / "hdf5" / "a.hdf5")
    write_lerobot(tmp_path / "lerobot")
    (tmp_path / "videos" / "deeper").mkdir(parents=True)
    write_video(tmp_path / "videos" / "deeper" / "a.mp4", numbered(3))
    write_rlds(tmp_path / "rlds" / "1.0.0", [rlds_episode()])
    (tmp_path / "videos" / ".hidden.mp4").write_bytes(b"half a download")
    (tmp_path / "README.md").write_text("raw logs")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [(name, str(path.relative_to(tmp_path))) for name, path in find(tmp_path)] == [
        ("hdf5", "hdf5"),
        ("lerobot", "lerobot"),
        ("rlds", "rlds/1.0.0"),
        ("video", "videos/deeper"),
    ]
    assert len(episodes_of(tmp_path)) == 2 + 2 + 1 + 1
    assert find(f"file://{tmp_path}") == find(tmp_path)
    assert [name for name, _ in find(tmp_path, "hdf5")] == ["hdf5"]


def test_files_without_suffix_are_detected_by_content(tmp_path):
    shutil.move(write_video(tmp_path / "a.mp4", numbered(3)), tmp_path / "clip")
    shutil.move(write_demos(tmp_path / "a.hdf5"), tmp_path / "demos")
    assert find(tmp_path / "clip")[0][0] == "video"
    assert find(tmp_path / "demos")[0][0] == "hdf5"


@pytest.mark.parametrize(
    "name, format, says",
    [
        ("missing", "auto", "no such file or folder"),
        ("empty", "auto", "the folder is empty"),
        ("text", "auto", "no known format; expected one of rlds, lerobot, .*, video"),
        ("text/a.txt", "auto", "no known format"),
        ("text", "hdf5", "holds nothing of format hdf5"),
        ("text", "rosbag", "no such format; one of auto, rlds, lerobot, calvin, droid, bridge, aloha"),
    ],
)
def test_a_wrong_path_is_explained_in_one_line(tmp_path, name, format, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("hello")
    with pytest.raises(UserError, match=says) as raised:
        find(tmp_path / name, format)
    assert "\n" not in str(raised.value)


def test_other_url_schemes_are_refused():
    with pytest.raises(UserError, match="local paths or file:// URLs"):
        find("s3://bucket/raw")


def test_a_copy_under_another_name_is_the_same_episode(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_video(tmp_path / "a" / "video_file.mp4", numbered(3))
    write_demos(tmp_path / "a" / "demos.hdf5")
    write_rlds(tmp_path / "a" / "rlds", [rlds_episode()])
    write_lerobot(tmp_path / "a" / "robot")
    shutil.copy(tmp_path / "a" / "video_file.mp4", tmp_path / "b" / "other.mov")
    shutil.copy(tmp_path / "a" / "demos.hdf5", tmp_path / "b" / "other.h5")
    shutil.copytree(tmp_path / "a" / "robot", tmp_path / "b" / "elsewhere")
    write_rlds(tmp_path / "b" / "shards", [rlds_episode(seed=9), rlds_episode()], name="renamed")
    before, after = {ref.id for ref in refs_of(tmp_path / "a")}, {ref.id for ref in refs_of(tmp_path / "b")}
    assert before < after and len(after) == len(before) + 1


def test_a_digest_covers_only_its_episodes_bytes(tmp_path):
    def sha(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    video_file = write_video(tmp_path / "a.mp4", numbered(3))
    assert [ref.digest for ref in refs_of(video_file)] == [sha(video_file.read_bytes())]
    records = [rlds_episode(seed=seed) for seed in range(3)]
    assert [ref.digest for ref in refs_of(write_rlds(tmp_path / "rlds", records))] == list(map(sha, records))
    robot = write_lerobot(tmp_path / "robot")
    tables, films = sorted(robot.rglob("*.parquet")), sorted(robot.rglob("*.mp4"))
    for ref, parts in zip(refs_of(robot), zip(tables, films, strict=True), strict=True):
        assert ref.uri == str(parts[0])
        assert ref.digest == sha(b"".join(hashlib.sha256(part.read_bytes()).digest() for part in parts))
    assert [ref.digest for ref in refs_of(write_demos(tmp_path / "a.hdf5", demos=2))] == [
        "f2a5ec8750b49a74638268edb00bb94e0dea92b17ba53efabaf6d2100382aa66",
        "0ffd32f349ffdb67bf794163de2e7b5dedf10819df37c58b2a02135cbbfa09e3",
    ]


def test_digest_reads_the_files_again(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(3))
    write_demos(tmp_path / "a.hdf5")
    write_lerobot(tmp_path / "robot")
    write_rlds(tmp_path / "rlds", [rlds_episode(), rlds_episode(seed=1)])
    refs = {ref.format: ref for ref in refs_of(tmp_path)}  # the last one of each
    assert refs.keys() == {"video", "hdf5", "lerobot", "rlds"}
    assert {format: digest(ref) for format, ref in refs.items()} == {f: ref.digest for f, ref in refs.items()}

    write_video(tmp_path / "a.mp4", numbered(3) + 1)
    write_video(tmp_path / "robot/videos/chunk-000/observation.images.top/episode_000001.mp4", numbered(12) + 90)
    write_rlds(tmp_path / "rlds", [rlds_episode(), rlds_episode(seed=2)])
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        file["data/demo_1/dones"][0] = True
    for ref in refs.values():
        assert digest(ref) != ref.digest

    (tmp_path / "robot/videos/chunk-000/observation.images.top/episode_000001.mp4").unlink()
    write_rlds(tmp_path / "rlds", [rlds_episode()])
    write_demos(tmp_path / "a.hdf5", demos=1)
    for format, says in (("lerobot", "camera top has no video for episode 1"), ("rlds", "no readable record 1")):
        with pytest.raises(BadEpisode, match=says):
            digest(refs[format])
    with pytest.raises(BadEpisode, match="the file now has only 1 demonstrations"):
        digest(refs["hdf5"])
    (tmp_path / "a.hdf5").write_text("no longer HDF5")
    with pytest.raises(BadEpisode, match="cannot be read again: OSError"):
        digest(refs["hdf5"])
    for ref in refs.values():
        Path(ref.uri).unlink()
        with pytest.raises(BadEpisode, match=r"was deleted after|episode_000001\.parquet is missing"):
            digest(ref)


@real
def test_real_videos_are_episodes_without_actions():
    refs = refs_of(REAL / "video")
    counts = {}
    for ref in refs:
        episode = load(ref)
        assert episode.action is None and episode.action_layout == () and episode.embodiment == "video"
        try:
            counts[Path(ref.uri).name] = len(frames_of(episode, "video", 32))
        except BadEpisode as error:
            counts[Path(ref.uri).name] = str(error).split(":")[0]
    assert counts == {
        "corrupted.mp4": "declares 50 frames, breaks after 28",
        "flipping_a_pancake.mkv": 310,
        "nasa_13013.mp4": 390,
        "test_clip_10s.mp4": 240,
    }


def test_a_video_that_cannot_be_opened_is_listed_with_its_problem(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(3))
    (tmp_path / "b.mp4").write_bytes(b"")
    problems = [ref.problem for ref in refs_of(tmp_path)]
    assert problems[0] is None and "cannot be opened as video" in problems[1]


def test_a_contract_overrides_the_reader(tmp_path):
    (ref,) = refs_of(write_demos(tmp_path / "a.hdf5", demos=1))
    layout = (ActionBlock(name="joints", size=6, kind="joint"), ActionBlock(name="hand", size=1))
    contract = DataContract(
        embodiment="panda-mobile",
        fps=10,
        cameras={"agentview": "front"},
        flip=(),
        action_layout=layout,
        instruction="close it",
    )
    episode = load(ref, contract)
    assert list(episode.cameras) == ["front"]
    assert np.array_equal(frames_of(episode, "front")[0], quadrants()[::-1])  # as stored: the contract sets no flip
    assert (episode.embodiment, episode.fps, episode.instruction) == ("panda-mobile", 10, "close it")
    assert episode.action_layout == layout
    for flip in (None, ("agentview",)):
        assert np.array_equal(frames_of(load(ref, DataContract(flip=flip)), "agentview")[0], quadrants())
    assert load(ref, DataContract(cameras={})).cameras == {}
    assert load(ref, DataContract()).fps == 20


@pytest.mark.parametrize(
    "contract, says",
    [
        ({"cameras": {"wrist": "w"}}, "'wrist' is not in .*; recorded are: agentview"),
        ({"flip": ["wrist"]}, "'wrist' is not in"),
        ({"action_layout": [{"name": "a", "size": 6}]}, "action_layout has 6 columns, the actions of .* have 7"),
    ],
)
def test_a_misfitting_contract_is_a_user_error(tmp_path, contract, says):
    (ref,) = refs_of(write_demos(tmp_path / "a.hdf5", demos=1))
    with pytest.raises(UserError, match=says):
        load(ref, DataContract.model_validate(contract))
