"""LeRobot v2 and v3: tables, videos and metadata, intact, out of order and broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.formats import REAL, as_lerobot_v3, numbered, quadrants, renamed, rlds_episode, write_lerobot, write_video
from helpers.readers import episodes_of, frames_of, real, refs_of, said, sizes

from preprocessing.episode import Episode
from preprocessing.errors import BadEpisode
from preprocessing.sources import digest, load
from preprocessing.sources.rlds.tfrecord import parse_example
from preprocessing.video.decode import open_video
from preprocessing.video.excerpts import excerpt, excerpt_digests


def test_lerobot(tmp_path):
    first, second = episodes_of(write_lerobot(tmp_path / "x"))
    assert list(first.cameras) == ["top"] and frames_of(first, "top").shape == (12, 64, 64, 3)
    rng = np.random.default_rng(1)
    assert np.allclose(second.proprio["state"], rng.normal(size=(12, 2)).astype(np.float32))
    assert np.array_equal(second.action, rng.normal(size=(12, 7)).astype(np.float32))
    assert sizes(first.action_layout) == {"position": 3, "rotation": 3, "gripper": 1}
    assert (first.instruction, first.fps, first.embodiment) == ("push the cube", 20, "so100-follower")
    assert said(first) == [] and first.success is None
    assert first.id != second.id


def test_lerobot_columns_by_the_names_of_other_tools(tmp_path):
    """openpi's converters write state and actions; without either, an episode says what it has."""
    plain = episodes_of(write_lerobot(tmp_path / "plain"))[0]
    names = {"observation.state": "state", "action": "actions", "observation.images.top": "top"}
    folder = renamed(write_lerobot(tmp_path / "other"), names)
    (folder / "videos" / "chunk-000" / "observation.images.top").rename(folder / "videos" / "chunk-000" / "top")
    [other, _] = episodes_of(folder)
    assert np.array_equal(other.action, plain.action) and other.action_layout == plain.action_layout
    assert np.array_equal(other.proprio["state"], plain.proprio["state"]) and list(other.cameras) == ["top"]
    assert said(other) == [
        "no column observation.*; state is read as proprioception",
        "no column action; actions is read as the action",
    ]
    [strange, _] = episodes_of(renamed(write_lerobot(tmp_path / "strange"), {"action": "commands"}))
    assert strange.action is None and list(strange.signals) == ["commands", "timestamp"]
    assert said(strange) == [
        "no action was found; a contract's key `action` names the columns it is made of. "
        "Recorded vectors: commands, state; to read: `action: [commands]`"
    ]


def test_lerobot_keeps_other_columns_as_signals(tmp_path):
    folder = write_lerobot(tmp_path / "x", frames=11, splits={"train": "0:1", "val": "1:2", "odd": 3})
    (folder / "meta" / "tasks.jsonl").write_text(
        '{"task_index": 0, "task": "push the cube"}\n{"task_index": 1, "task": "slowly"}\n'
    )
    for file in folder.glob("data/*/*.parquet"):
        table = pq.read_table(file)
        more = {
            "next.reward": pa.array(np.arange(12.0)),
            "next.done": pa.array([False] * 11 + [True]),
            "annotation.human.style": pa.array([1] * 12),
            "language_instruction_2": pa.array(["shove it"] * 12),
            "observation.touched": pa.array([[i, 0] for i in range(12)]),
            "action.joints": pa.array([[0.5, i] for i in range(12)], pa.list_(pa.float64(), 2)),
            "ragged": pa.array([[1.0]] * 11 + [[1.0, 2.0]]),
            "holes": pa.array([1.0] * 11 + [None]),
        }
        for name, column in more.items():
            table = table.append_column(name, column)
        pq.write_table(table.append_column("index", pa.array(range(12))), file)
    first, second = episodes_of(folder)
    widths = {name: values.shape for name, values in first.signals.items()}
    assert widths == {
        "timestamp": (11, 1), "next.reward": (11, 1), "next.done": (11, 1), "annotation.human.style": (11, 1),
        "observation.touched": (11, 2), "action.joints": (11, 2),
    }  # fmt: skip
    assert first.signals["action.joints"].tolist() == [[0.5, i] for i in range(11)]
    assert first.signals["next.reward"].ravel().tolist() == list(range(11))
    assert first.texts == {
        "annotation.human.style": "slowly", "language_instruction_2": "shove it", "task": "push the cube"
    }  # fmt: skip
    assert (first.split, second.split, first.dataset) == ("train", "val", None)
    assert first.instruction == "push the cube"
    assert "column ragged has rows of different lengths; left out" in said(first)
    assert "column holes has 1 empty rows; left out" in said(first)


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        ("x y z roll pitch yaw gripper", {"position": 3, "rotation": 3, "gripper": 1}),
        (
            "main_shoulder_pan main_shoulder_lift main_elbow_flex main_wrist_flex main_wrist_roll main_gripper second",
            {"joint": 5, "gripper": 1, "other": 1},
        ),
        ("left_waist left_shoulder left_elbow left_forearm_roll left_wrist_angle left_wrist_rotate left_gripper",
         {"joint": 6, "gripper": 1}),
        ("shoulder_pan.pos shoulder_lift.pos elbow_flex.pos wrist_flex.pos wrist_roll.pos gripper.pos x",
         {"joint": 5, "gripper": 1, "position": 1}),
        ("pos_x pos_y pos_z rot_x rot_y rot_z gripper_position", {"position": 3, "rotation": 3, "gripper": 1}),
        ("ee.x ee.y ee.z ee.wx ee.wy ee.wz ee.gripper_pos", {"position": 3, "rotation": 3, "gripper": 1}),
    ],
)  # fmt: skip
def test_kinds_by_column_names(tmp_path, names, kinds):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"]["action"]["names"] = {"motors": names.split()}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    (episode,) = episodes_of(folder)
    assert {block.kind: block.size for block in episode.action_layout} == kinds


@pytest.mark.parametrize(
    ("names", "representation"),
    [
        ("roll pitch yaw", "euler_xyz"),
        ("yaw pitch roll", None),
        ("rx ry rz", None),
        ("ee_roll ee_pitch ee_yaw", "euler_xyz"),
    ],
)
def test_angles_in_another_order_are_not_euler_xyz(tmp_path, names, representation):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"]["action"]["names"] = ["x", "y", "z", *names.split(), "gripper"]
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    (episode,) = episodes_of(folder)
    assert (episode.action_layout[1].kind, episode.action_layout[1].representation) == ("rotation", representation)


def test_one_frame_more_or_less_is_cut(tmp_path):
    for frames, steps in ((13, 12), (11, 11)):
        (episode,) = episodes_of(write_lerobot(tmp_path / str(frames), frames=frames, episodes=1))
        assert len(episode.action) == len(episode.proprio["state"]) == len(frames_of(episode, "top")) == steps
        assert said(episode) == [f"the table has 12 rows, top has {frames} frames; cut to {steps}"]
    for frames in (10, 14):
        (ref,) = refs_of(write_lerobot(tmp_path / str(frames), frames=frames, episodes=1))
        with pytest.raises(BadEpisode, match=f"top declares {frames} frames, the table has 12 rows"):
            load(ref)


def test_files_override_info_json(tmp_path):
    folder = write_lerobot(tmp_path / "x", data_path="data/{episode_index}.parquet", video_path="{nonsense}/a.mp4")
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"]["observation.images.wrist"] = {"dtype": "video", "shape": [8, 8, 3]}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    first, _ = episodes_of(folder)
    assert said(first) == [
        "data_path in info.json names no file; found by searching",
        "video_path in info.json names no file; found by searching",
        "camera wrist is named in info.json, but has no file; dropped",
    ]


def test_lost_and_broken_files_cost_their_episode_only(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=4)
    (folder / "videos/chunk-000/observation.images.top/episode_000001.mp4").unlink()
    (folder / "data/chunk-000/episode_000002.parquet").unlink()
    table = folder / "data/chunk-000/episode_000003.parquet"
    table.write_bytes(table.read_bytes()[:500])
    refs = refs_of(folder)
    assert [ref.problem for ref in refs] == [
        None,
        "camera top has no video for episode 1",
        "episode 2 is listed, but episode_000002.parquet is missing",
        None,
    ]
    assert load(refs[0]).action is not None
    with pytest.raises(BadEpisode, match=r"episode_000003.parquet cannot be read"):
        load(refs[3])


def test_a_changed_video_is_another_episode(tmp_path):
    folder = write_lerobot(tmp_path / "x")
    before = refs_of(folder)
    write_video(folder / "videos/chunk-000/observation.images.top/episode_000001.mp4", numbered(12) + 50)
    after = refs_of(folder)
    assert before[0].id == after[0].id and before[1].id != after[1].id


def test_validity_annotations_are_not_instructions(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    (ref,) = refs_of(folder)
    (folder / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "valid"}\n')
    assert load(ref).instruction is None


def edit_table(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change the table of the first episode."""
    file = folder / "data/chunk-000/episode_000000.parquet"
    pq.write_table(change(pq.read_table(file)), file)


def test_rows_out_of_order_are_sorted(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    (sorted_,) = episodes_of(folder)
    edit_table(folder, lambda table: table.take([*range(6, 12), *range(6)]))
    (episode,) = episodes_of(folder)
    assert np.array_equal(episode.action, sorted_.action)
    assert np.array_equal(episode.proprio["state"], sorted_.proprio["state"])
    assert "rows are out of order; sorted by frame_index" in said(episode)
    edit_table(folder, lambda table: table.drop_columns("frame_index").append_column("frame_index", [[0] * 12]))
    (episode,) = episodes_of(folder)
    assert "frame_index repeats; rows are read in order" in said(episode)


def test_a_row_lost_in_the_middle_is_refused(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    edit_table(folder, lambda table: table.take([*range(5), *range(6, 12)]))
    (ref,) = refs_of(folder)
    with pytest.raises(BadEpisode, match="has 11 rows, top has 12 frames, and frame_index skips: rows are lost"):
        load(ref)


def test_a_changing_instruction_is_reported(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    (folder / "meta" / "tasks.jsonl").write_text(
        '{"task_index": 0, "task": "push"}\n{"task_index": 1, "task": "lift"}\n'
    )
    edit_table(folder, lambda t: t.drop_columns("task_index").append_column("task_index", [[0] * 6 + [1] * 6]))
    (episode,) = episodes_of(folder)
    assert episode.instruction == "push"
    assert said(episode) == ["the instruction changes within the episode; the first one is kept"]


def test_object_poses_are_not_proprio(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"]["observation.environment_state"] = {"dtype": "float32", "shape": [2]}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    objects = pa.array([[float(i), 0.0] for i in range(12)])
    edit_table(folder, lambda table: table.append_column("observation.environment_state", objects))
    (episode,) = episodes_of(folder)
    assert list(episode.proprio) == ["state"]
    assert episode.signals["observation.environment_state"][:, 0].tolist() == list(range(12))


def test_success_with_holes_is_unknown(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    edit_table(folder, lambda table: table.append_column("next.success", pa.array([None] + [True] * 11)))
    (episode,) = episodes_of(folder)
    assert episode.success is None
    assert said(episode) == ["column next.success has 1 empty rows; left out"]


def test_timestamps_of_another_rate_are_reported(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1, fps=30)  # its timestamps step by 1 / 20 s
    (episode,) = episodes_of(folder)
    assert episode.fps == 30
    assert said(episode) == ["info.json says 30 Hz, the timestamps 20 Hz; the former is used"]


def test_cameras_with_colliding_short_names_keep_long_ones(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"]["observation.top"] = info["features"]["observation.images.top"]
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    (folder / "videos/chunk-000/observation.top").mkdir()
    write_video(folder / "videos/chunk-000/observation.top/episode_000000.mp4", numbered(12)[::-1])
    (episode,) = episodes_of(folder)
    assert list(episode.cameras) == ["observation.images.top", "observation.top"]
    assert frames_of(episode, "observation.top")[0].mean() > frames_of(episode, "observation.images.top")[0].mean()


def test_an_instruction_with_a_line_separator(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    (folder / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "push\u2028the cube"}\r\n')
    (episode,) = episodes_of(folder)
    assert episode.instruction == "push\u2028the cube"


def test_the_described_task_comes_before_the_task(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    (folder / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "a"}\n{"task_index": 1, "task": "b"}\n')
    told = "annotation.human.action.task_description"
    edit_table(folder, lambda table: table.append_column(told, pa.array([1] * 12)))
    assert [episode.instruction for episode in episodes_of(folder)] == ["b"]


def test_action_parts_from_modality_json(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    parts = {
        "gripper": {"start": 6, "end": 7, "absolute": True},
        "place": {"start": 0, "end": 3, "absolute": False},
        "turn": {"start": 3, "end": 6, "rotation_type": "axis_angle"},
        "elsewhere": {"start": 0, "end": 2, "original_key": "action.other"},
    }
    (folder / "meta" / "modality.json").write_text(json.dumps({"action": parts}))
    (episode,) = episodes_of(folder)
    found = [(block.name, block.size, block.mode, block.representation) for block in episode.action_layout]
    assert found == [
        ("place", 3, "delta", None), ("turn", 3, "unknown", "axis_angle"), ("gripper", 1, "absolute", None)
    ]  # fmt: skip
    parts["turn"]["start"] = 4  # a gap
    (folder / "meta" / "modality.json").write_text(json.dumps({"action": parts}))
    (episode,) = episodes_of(folder)
    assert sizes(episode.action_layout) == {"position": 3, "rotation": 3, "gripper": 1}


def test_depth_is_not_a_camera(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    info = json.loads((folder / "meta" / "info.json").read_text())
    deep = {"dtype": "video", "shape": [64, 64, 3], "info": {"video.is_depth_map": True}}
    info["features"]["observation.images.deep"] = deep
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    videos = folder / "videos/chunk-000"
    shutil.copytree(videos / "observation.images.top", videos / "observation.images.deep")
    assert [list(episode.cameras) for episode in episodes_of(folder)] == [["top"]]


def test_image_columns(tmp_path):
    folder = write_lerobot(tmp_path / "x", rows=3, episodes=1)
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"]["observation.image"] = {"dtype": "image", "shape": [32, 32, 3]}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    file = folder / "data/chunk-000/episode_000000.parquet"
    images = parse_example(rlds_episode(3))["steps/observation/image"]
    table = pq.read_table(file).append_column("observation.image", pa.array([{"bytes": i, "path": ""} for i in images]))
    pq.write_table(table, file)
    (episode,) = episodes_of(folder)
    assert np.abs(frames_of(episode, "image")[2].astype(int) - quadrants(32)).mean() < 4
    write_video(folder / "videos/chunk-000/observation.images.top/episode_000000.mp4", numbered(2))
    (episode,) = episodes_of(folder)  # a video that is one frame short cuts the images, too
    assert [len(frames_of(episode, camera)) for camera in ("image", "top")] == [2, 2]


def test_broken_metadata_is_named_and_costs_only_its_data_set(tmp_path):
    write_video(tmp_path / "clip.mp4", numbered(5))
    write_lerobot(tmp_path / "x", episodes=1, codebase_version="v1.6")
    write_lerobot(tmp_path / "y", episodes=1, codebase_version="v3.0")
    write_lerobot(tmp_path / "z", episodes=1)
    (tmp_path / "z" / "meta" / "info.json").write_text("{")
    clip, *broken = refs_of(tmp_path)
    assert clip.format == "video" and clip.problem is None
    reasons = ("LeRobot v1.6 is not supported; convert", "no table of episodes", "not a LeRobot info.json")
    assert len(broken) == 3 and len({ref.id for ref in broken}) == 3
    for ref, reason in zip(broken, reasons, strict=True):
        assert ref.format == "lerobot" and reason in str(ref.problem)


def same(one: Episode, other: Episode) -> bool:
    """Whether episodes are equal except for their location."""
    assert one.cameras.keys() == other.cameras.keys() and one.proprio.keys() == other.proprio.keys()
    assert np.array_equal(one.action, other.action)
    assert all(np.array_equal(values, other.proprio[name]) for name, values in one.proprio.items())
    assert all(np.array_equal(frames_of(one, camera), frames_of(other, camera)) for camera in one.cameras)
    names = ("fps", "action_layout", "instruction", "success", "embodiment")
    return [getattr(one, name) for name in names] == [getattr(other, name) for name in names]


def test_many_episodes_in_a_file(tmp_path):
    apart = episodes_of(write_lerobot(tmp_path / "v2", rows=70, episodes=5))
    joined = episodes_of(as_lerobot_v3(tmp_path / "v2", tmp_path / "v3", per_file=3))
    assert all(same(one, other) for one, other in zip(apart, joined, strict=True))
    assert [said(episode) for episode in joined] == [[]] * 5
    assert all(digest(episode.ref) == episode.ref.digest for episode in joined)


def test_merging_data_sets_keeps_episode_ids(tmp_path):
    write_lerobot(tmp_path / "two", rows=70, episodes=2)
    write_lerobot(tmp_path / "five", rows=70, episodes=5)
    two = refs_of(as_lerobot_v3(tmp_path / "two", tmp_path / "a", per_file=2))
    five = refs_of(as_lerobot_v3(tmp_path / "five", tmp_path / "b", per_file=4, shift=7))
    assert [ref.id for ref in two] == [ref.id for ref in five[:2]]
    assert len({ref.id for ref in five}) == 5


def test_a_two_dimensional_state(tmp_path):
    folder = write_lerobot(tmp_path / "x", episodes=1)
    (file,) = folder.glob("data/*/*.parquet")
    table = pq.read_table(file)
    poses = np.arange(12 * 6, dtype=np.float32).reshape(12, 2, 3)
    at = table.column_names.index("observation.state")
    column = pa.array(poses.tolist(), pa.list_(pa.list_(pa.float32())))
    pq.write_table(table.set_column(at, "observation.state", column), file)
    (episode,) = episodes_of(folder)
    assert np.array_equal(episode.proprio["state"], poses.reshape(12, 6))


def test_instructions_written_by_newer_pandas(tmp_path):
    folder = as_lerobot_v3(write_lerobot(tmp_path / "v2", episodes=1), tmp_path / "v3")
    tasks = pa.table({"task_index": [0], "task": pa.array(["push the cube"], pa.large_string())})
    pq.write_table(tasks, folder / "meta" / "tasks.parquet")
    assert [episode.instruction for episode in episodes_of(folder)] == ["push the cube"]


def test_path_templates_of_v3_files(tmp_path):
    folder = as_lerobot_v3(write_lerobot(tmp_path / "v2", episodes=1), tmp_path / "v3")
    info = json.loads((folder / "meta" / "info.json").read_text())
    for wrong in ("{chunk_index:9999999999d}.parquet", "{chunk_index.real}.parquet", "../v2/meta/info.json", None):
        (folder / "meta" / "info.json").write_text(json.dumps(info | {"data_path": wrong}))
        (episode,) = episodes_of(folder)
        assert said(episode) == ["data_path in info.json names no file; found by default"]


def test_lying_v3_files_cost_only_their_episodes(tmp_path):
    folder = as_lerobot_v3(write_lerobot(tmp_path / "v2", rows=40, episodes=6), tmp_path / "v3", per_file=2)
    (folder / "videos/observation.images.top/chunk-000/file-001.mp4").unlink()
    video_file = folder / "videos/observation.images.top/chunk-000/file-002.mp4"
    listed = folder / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(listed).to_pylist()
    rows[4]["videos/observation.images.top/from_timestamp"] = 1.0
    pq.write_table(pa.Table.from_pylist(rows[:5]), listed)
    refs = refs_of(folder)
    assert [(ref.index, ref.problem) for ref in refs[:4]] == [
        (0, None),
        (1, None),
        (2, "camera top has no video for episode 2"),
        (3, "camera top has no video for episode 3"),
    ]
    with pytest.raises(BadEpisode, match="top declares 20 frames, the table has 40 rows"):
        load(refs[4])
    assert refs[5].index == 5 and "does not list it" in refs[5].problem
    video_file.write_bytes(video_file.read_bytes()[: video_file.stat().st_size // 2])
    assert "file-002.mp4" in refs_of(folder)[4].problem


def edit_listed(folder: Path, change: Callable[[list[dict]], None]) -> None:
    listed = folder / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(listed).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), listed)


def test_a_video_holds_its_episodes_in_any_order(tmp_path):
    folder = as_lerobot_v3(write_lerobot(tmp_path / "v2", rows=12, episodes=3), tmp_path / "v3", per_file=3)
    before = [frames_of(episode, "top") for episode in episodes_of(folder)]
    ends = [f"videos/observation.images.top/{end}_timestamp" for end in ("from", "to")]

    def swap(rows: list[dict]) -> None:
        for end in ends:
            rows[0][end], rows[2][end] = rows[2][end], rows[0][end]

    edit_listed(folder, swap)
    after = episodes_of(folder)
    for number, episode in enumerate(after):
        assert np.array_equal(frames_of(episode, "top"), before[2 - number])
        assert digest(episode.ref) == episode.ref.digest
    edit_listed(folder, lambda rows: rows[1].update({ends[1]: rows[1][ends[0]]}))
    assert [ref.problem for ref in refs_of(folder)] == [None, "camera top has no video for episode 1", None]


def test_another_instruction_is_another_episode(tmp_path):
    folder = as_lerobot_v3(write_lerobot(tmp_path / "v2", episodes=2), tmp_path / "v3")
    before = refs_of(folder)
    edit_listed(folder, lambda rows: rows[1].update(tasks=["lift the cube"]))
    after = refs_of(folder)
    assert before[0].id == after[0].id and before[1].id != after[1].id


def test_an_excerpt_checks_its_frames_timestamps(tmp_path):
    video_file = write_video(tmp_path / "a.mp4", numbered(30))
    late = tmp_path / "late.mp4"
    with av.open(str(video_file)) as source, av.open(str(late), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                moved = round(0.5 / packet.time_base)  # the video begins half a second after its clock
                packet.pts, packet.dts, packet.stream = packet.pts + moved, packet.dts + moved, stream
                container.mux(packet)
    whole = np.concatenate(list(open_video(video_file).frames(None)))
    for path in (video_file, late):
        assert np.array_equal(np.concatenate(list(excerpt(path, 7, 9, 20).frames(None))), whole[7:16])
        assert [excerpt_digests(path, [(0, count)], 20)[0][1] for count in range(1, 31)] == list(range(1, 31))
    with pytest.raises(BadEpisode, match="has an unexpected timestamp"):
        list(excerpt(video_file, 0, 30, 19).frames(None))
    with pytest.raises(BadEpisode, match="ends 1 frames before its episode"):
        list(excerpt(video_file, 25, 6, 20).frames(None))


@real
def test_real_gr1():
    episodes = episodes_of(REAL / "gr1_lerobot_v2")
    assert len(episodes) == 5
    assert sum(len(frames_of(episode, "ego_view", 32)) for episode in episodes) == 2096
    for episode in episodes:
        assert list(episode.cameras) == ["ego_view"]
        assert episode.action.shape[1] == episode.proprio["state"].shape[1] == 44
        assert episode.action.dtype == np.float32
        assert episode.instruction.startswith("pick the ") and episode.instruction.endswith("in the plate")
        assert (episode.fps, episode.embodiment, episode.success) == (20, "gr1-arms-only", True)
        assert sizes(episode.action_layout) | {"waist": 3, "left_arm": 7} == sizes(episode.action_layout)
        assert "camera egoview is named in info.json, but has no file; dropped" in said(episode)
        assert "no frame_index; rows are read in order" in said(episode)
        assert "timestamps start at 0.050 s; frames and rows are paired by order" in said(episode)
    assert "video_path in info.json names no file; found by searching" in said(episodes[1])


@real
def test_real_gr1_as_v3(tmp_path):
    """The real episodes in the layout of v3.0, their videos concatenated without re-encoding."""
    joined = episodes_of(as_lerobot_v3(REAL / "gr1_lerobot_v2", tmp_path / "v3"))
    assert all(same(one, other) for one, other in zip(episodes_of(REAL / "gr1_lerobot_v2"), joined, strict=True))
