"""LeRobot data sets of which a part is lost, misplaced or unusable: the rest is read, and what is lost is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.formats import PICTURES, as_lerobot_v3, numbered, png, write_lerobot, write_pictures, write_video
from helpers.readers import episodes_of, frames_of, refs_of, said
from test_lerobot import edit_listed, edit_table

from preprocessing.errors import BadEpisode
from preprocessing.sources import digest, load

TOP = "observation.images.top"
INFO, LIST, TASKS = "meta/info.json", "meta/episodes.jsonl", "meta/tasks.jsonl"


def edit_info(folder: Path, change: Callable[[dict], object]) -> None:
    info = json.loads((folder / INFO).read_text())
    change(info)
    (folder / INFO).write_text(json.dumps(info))


def with_column(name: str, values: object) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.append_column(name, values)


# ---------------------------------------------------------------------------------------------------- metadata


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_metadata_in_any_unicode_encoding(tmp_path, encoding):
    folder = write_pictures(tmp_path)
    (folder / TASKS).write_text('{"task_index": 0, "task": "heb den Würfel"}\r\n')
    for file in (folder / "meta").iterdir():
        file.write_bytes(file.read_text().encode(encoding))
    [episode] = episodes_of(folder)
    assert (episode.instruction, episode.embodiment, said(episode)) == ("heb den Würfel", "panda", [])


def test_what_is_whole_of_a_list_is_read(tmp_path):
    """A cut last line, blanks and NULs after it, one line that is not UTF-8, a half surrogate pair, a wrong type."""
    folder = write_pictures(tmp_path)
    (folder / LIST).write_bytes(b'{"episode_index": 0, "tasks": ["lift"]}\r\n\r\n{"episode_ind\n \0\0')
    lines = [b'{"task_index": 0, "task": "heb\xff den\\ud800"}', b"7", b'{"task_index": 1e400, "task": 3}', b"[" * 9999]
    (folder / TASKS).write_bytes(b"\n".join(lines))
    [episode] = episodes_of(folder)
    assert episode.instruction == "heb\ufffd den\ufffd"
    assert said(episode) == [
        "meta/episodes.jsonl: not readable and left out: line 3",
        "meta/tasks.jsonl: not readable and left out: line 2, 4",
    ]


@pytest.mark.parametrize("lost", ["", "{", '{"task_index": 1, "task": "push"}', None])
def test_an_instruction_that_the_tasks_lack_is_in_the_list_of_episodes(tmp_path, lost):
    folder = write_pictures(tmp_path)
    (folder / TASKS).unlink() if lost is None else (folder / TASKS).write_text(lost)
    [episode] = episodes_of(folder)
    assert episode.instruction == episode.texts["task"] == "lift"
    assert said(episode)[-1] == "the table of tasks lacks this one; read from the list of episodes"


@pytest.mark.parametrize("break_it", [Path.unlink, lambda file: file.write_bytes(b"PAR1")])
def test_v3_without_its_table_of_tasks(tmp_path, break_it):
    folder = as_lerobot_v3(write_lerobot(tmp_path / "v2", episodes=1), tmp_path / "v3")
    break_it(folder / "meta/tasks.parquet")
    [episode] = episodes_of(folder)
    assert episode.instruction == "push the cube"
    assert "the table of tasks lacks this one; read from the list of episodes" in said(episode)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda info: info.pop("codebase_version"), "info.json names no version; its files are those of v2"),
        (lambda info: info.update(codebase_version=2.1), None),
        (lambda info: info.update(fps="10"), None),
        (lambda info: info.pop("fps"), "info.json names no rate; 10 Hz by the timestamps"),
        (lambda info: info.update(fps=float("inf")), "info.json names no rate; 10 Hz by the timestamps"),
        (lambda info: info.update(fps=True), "info.json names no rate; 10 Hz by the timestamps"),
        (lambda info: info.update(fps=10**400), "info.json names no rate; 10 Hz by the timestamps"),
        (lambda info: info.update(chunks_size="many", total_episodes=None, more={"a": []}), None),
        (lambda info: info.update(chunks_size=-5, splits={"train": "0:" + "9" * 5000}), None),
        (lambda info: info.pop("features"), "info.json names no features; the columns of the tables are taken"),
        (lambda info: info["features"].update(action=None, odd=[1]), None),
        (lambda info: info["features"].pop(TOP), "camera top is not named in info.json, but has a column; read"),
        (lambda info: info["features"].pop("observation.state"), None),
        (lambda info: info["features"][TOP].update(info="none", video_info=[1]), None),
    ],
)
def test_info_json_lacks_or_garbles_a_key(tmp_path, change, told):
    folder = write_pictures(tmp_path)
    edit_info(folder, change)
    [episode] = episodes_of(folder)
    assert said(episode) == ([told] if told else [])
    assert (episode.fps, episode.action.shape, list(episode.proprio)) == (10, (6, 2), ["state"])
    assert frames_of(episode, "top")[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 80, 100]


def test_a_garbled_modality_json_is_named(tmp_path):
    folder = write_pictures(tmp_path)
    for wrong in ("{", "[]", '{"action": [1]}', '{"action": {"x": {"start": "0", "end": null}}}'):
        (folder / "meta/modality.json").write_text(wrong)
        [episode] = episodes_of(folder)
        assert said(episode)[0].startswith("meta/modality.json does not name the action's parts (")
        assert [block.size for block in episode.action_layout] == [2]


def test_one_broken_part_of_the_list_of_v3_episodes(tmp_path):
    folder = as_lerobot_v3(write_lerobot(tmp_path / "v2", episodes=2), tmp_path / "v3")
    (folder / "meta/episodes/chunk-000/file-001.parquet").write_bytes(b"PAR1")
    assert [ref.problem for ref in refs_of(folder)] == [None, None]


# ---------------------------------------------------------------------------------- films and pictures elsewhere


@pytest.mark.parametrize(
    ("usual", "there"),
    [
        (f"videos/{TOP}/chunk-000", f"video/{TOP}/chunk-000"),
        (f"videos/{TOP}/chunk-000", f"Videos/chunk-000/{TOP}"),
        (f"videos/{TOP}/chunk-000", f"videos/{TOP}"),
        (f"videos/{TOP}/chunk-000", "films/top/chunk-000"),
        (f"videos/chunk-000/{TOP}", f"video/chunk-000/{TOP}"),
        (f"videos/chunk-000/{TOP}", "videos/top"),
    ],
)
def test_films_in_another_folder(tmp_path, usual, there):
    folder = write_lerobot(tmp_path / "v2", rows=6, episodes=1)
    if usual.endswith("chunk-000"):
        folder = as_lerobot_v3(folder, tmp_path / "v3")
    [before] = episodes_of(folder)
    frames = frames_of(before, "top")
    (folder / there).parent.mkdir(parents=True, exist_ok=True)
    if there == f"videos/{TOP}":
        (folder / usual / "file-000.mp4").rename(folder / there / "file-000.mp4")
    else:
        (folder / usual).rename(folder / there)
    [episode] = episodes_of(folder)
    assert np.array_equal(frames_of(episode, "top"), frames)
    assert episode.id == before.id and digest(episode.ref) == episode.ref.digest
    [text] = said(episode)
    assert "video_path in info.json" in text


def test_films_that_info_json_does_not_name_are_read(tmp_path):
    folder = write_lerobot(tmp_path, rows=6, episodes=1)
    edit_info(folder, lambda info: info["features"].pop(TOP))
    [episode] = episodes_of(folder)
    assert list(episode.cameras) == ["top"]
    assert said(episode)[-1] == "camera top is not named in info.json, but has films; read"


@pytest.mark.parametrize("prefix", ["", "/home/me/{}/", "C:\\data\\{}\\"])
@pytest.mark.parametrize("plain", [True, False])
def test_pictures_named_by_path(tmp_path, prefix, plain):
    """Paths inside of the data set, plain or as Hugging Face writes them, from whichever machine."""
    folder = write_pictures(tmp_path / "set")
    names = [f"images/{TOP}/episode_000000/frame_{i:06d}.png" for i in range(6)]
    for name, data in zip(names, PICTURES, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    paths = [prefix.format("set") + name for name in names]
    column = pa.array(paths) if plain else pa.array([{"bytes": None, "path": path} for path in paths])
    kind = pa.string() if plain else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    edit_table(folder, lambda table: table.drop_columns(TOP).append_column(TOP, column.cast(kind)))
    [episode] = episodes_of(folder)
    assert frames_of(episode, "top")[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 80, 100] and said(episode) == []
    (folder / names[3]).write_bytes(PICTURES[0])
    assert digest(episode.ref) != episode.ref.digest, "the pictures belong to the episode's bytes"


def test_no_picture_is_read_from_outside(tmp_path):
    (tmp_path / "secret.png").write_bytes(PICTURES[0])
    folder = write_pictures(tmp_path / "set", TOP, "wrist")
    for name in (str(tmp_path / "secret.png"), "../secret.png", "images/../../secret.png", "\0", "x" * 9000):
        column = pa.array(
            [{"bytes": None, "path": name}] * 6, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        )
        edit_table(folder, lambda table, c=column: table.drop_columns("wrist").append_column("wrist", c))
        [episode] = episodes_of(folder)
        assert list(episode.cameras) == ["top"]
        assert said(episode) == ["camera wrist: 6 of its 6 rows hold no picture; left out"]


# ------------------------------------------------------------------------------------ one stream that is of no use


DEEP = [{"bytes": png(np.full((16, 16), 900 + i, np.uint16)), "path": "x"} for i in range(6)]


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("observation.images.depth", DEEP, "camera depth: an image is 16-bit greyscale: depth; left out"),
        ("wrist", [{"bytes": b"\x89PNG", "path": ""}] * 6, "camera wrist: an image of 4 bytes is neither JPEG nor PNG"),
        ("wrist", [{"bytes": PICTURES[0], "path": ""}] * 5 + [None], "camera wrist: 1 of its 6 rows hold no picture"),
        ("observation.cloud", [[[0.0] * 3] * 500] * 6, "column observation.cloud has 1500 numbers a step"),
        ("observation.touch", [[0.0]] * 5 + [[0.0, 1.0]], "column observation.touch has rows of different lengths"),
        ("observation.effort", [[0.0]] * 5 + [None], "column observation.effort has 1 empty rows"),
        ("observation.words", [["a"]] * 6, "column observation.words holds neither numbers nor pictures nor text"),
        ("observation.note", ["a"] * 6, None),
        ("stamp", [{"secs": 1, "nsecs": 2}] * 6, "column stamp holds neither numbers nor pictures nor text"),
    ],
)
@pytest.mark.parametrize("dtype", ["image", "float32", "string", None])
def test_one_unusable_stream_is_left_out(tmp_path, name, values, told, dtype):
    folder = write_pictures(tmp_path)
    if dtype:
        edit_info(folder, lambda info: info["features"].update({name: {"dtype": dtype, "shape": [1]}}))
    edit_table(folder, with_column(name, pa.array(values)))
    [episode] = episodes_of(folder)
    assert list(episode.cameras) == ["top"] and list(episode.proprio) == ["state"]
    assert not told or any(text.startswith(told) and text.endswith("left out") for text in said(episode))


def two_cameras(folder: Path, episodes: int = 1) -> Path:
    folder = write_lerobot(folder, rows=6, episodes=episodes)
    edit_info(folder, lambda info: info["features"].update(wrist=info["features"][TOP]))
    (folder / "videos/chunk-000/wrist").mkdir()
    for index in range(episodes):
        write_video(folder / f"videos/chunk-000/wrist/episode_{index:06d}.mp4", numbered(6) + 9)
    return folder


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_a_camera_without_a_usable_film_is_left_out(tmp_path, version):
    for name, spoil, told in (
        ("cut", lambda file: file.write_bytes(file.read_bytes()[:600]), "camera wrist: "),
        ("gone", Path.unlink, "camera wrist has no video for episode 0; left out"),
        ("short", lambda file: write_video(file, numbered(3)), "camera wrist"),
    ):
        folder = two_cameras(tmp_path / name / "v2", episodes=1)
        write_video(folder / "videos/chunk-000/wrist/episode_000007.mp4", numbered(6))  # the camera exists
        if version == "v3":
            (folder / "videos/chunk-000/wrist/episode_000007.mp4").unlink()
            folder = as_lerobot_v3(folder, tmp_path / name / "v3")
            [file] = folder.rglob("wrist/chunk-000/file-000.mp4")
            if name == "gone":
                file.with_name("file-001.mp4").write_bytes(file.read_bytes())
        else:
            file = folder / "videos/chunk-000/wrist/episode_000000.mp4"
        spoil(file)
        [ref, *_] = refs_of(folder)
        assert ref.problem is None and digest(ref) == ref.digest, (name, ref)
        episode = load(ref)
        assert list(episode.cameras) == ["top"] and frames_of(episode, "top").shape[0] == 6
        assert any(text.startswith(told) and text.endswith("left out") for text in said(episode)), said(episode)


def test_both_rates_are_said(tmp_path):
    v2 = write_lerobot(tmp_path / "v2", rows=20, episodes=1)
    v3 = as_lerobot_v3(v2, tmp_path / "v3")
    edit_info(v3, lambda info: info.update(fps=10))
    [ref] = refs_of(v3)
    assert "it has 20 frames a second, and info.json says 10" in ref.problem
    edit_info(v2, lambda info: info.update(fps=10))
    edit_table(v2, lambda table: table.slice(0, 10))
    [ref] = refs_of(v2)
    with pytest.raises(BadEpisode, match="top declares 20 frames at 20 Hz, the table has 10 rows at 10 Hz"):
        load(ref)


# -------------------------------------------------------------------------------- two episodes that claim the same


@pytest.mark.parametrize(
    ("spans", "refused"),
    [
        ([(0, 6), (6, 12), (12, 18)], {}),
        ([(0, 8), (6, 12), (12, 18)], {0: 1, 1: 0}),
        ([(0, 6), (0, 6), (12, 18)], {0: 1, 1: 0}),
        ([(0, 18), (6, 12), (12, 18)], {0: 1, 1: 0, 2: 0}),
        ([(12, 18), (6, 12), (2, 7)], {1: 2, 2: 1}),
    ],
)
@pytest.mark.parametrize("what", ["frames", "rows"])
def test_two_episodes_that_claim_the_same_are_both_refused(tmp_path, spans, refused, what):
    folder = as_lerobot_v3(write_lerobot(tmp_path / "v2", rows=6, episodes=3), tmp_path / "v3")

    def claim(rows: list[dict]) -> None:
        for row, (first, stop) in zip(rows, spans, strict=True):
            if what == "frames":
                row[f"videos/{TOP}/from_timestamp"], row[f"videos/{TOP}/to_timestamp"] = first / 20, stop / 20
            else:
                row["dataset_from_index"], row["dataset_to_index"] = first, stop

    edit_listed(folder, claim)
    for ref in refs_of(folder):
        if ref.index in refused:
            assert f"episode {refused[ref.index]} claims the same {what}" in str(ref.problem)
        else:
            assert ref.problem is None


# ----------------------------------------------------------------------------------------- pictures as numbers


def with_pixels(folder: Path, values: np.ndarray, told: list[int] | None, flat: bool = False) -> Path:
    """Add the pictures [T, ...] as lists in lists, or as one flat list a row."""
    kind = pa.from_numpy_dtype(values.dtype)
    for _ in range(1 if flat else values.ndim - 1):
        kind = pa.list_(kind)
    rows = [row.ravel().tolist() if flat else row.tolist() for row in values]
    edit_table(folder, with_column("observation.wrist", pa.array(rows, kind)))
    if told:
        feature = {"dtype": str(values.dtype), "shape": told}
        edit_info(folder, lambda info: info["features"].update({"observation.wrist": feature}))
    return folder


@pytest.mark.parametrize(
    ("stored", "flat", "mended"),
    [
        (lambda pictures: pictures, False, []),
        (lambda pictures: pictures, True, []),
        (lambda pictures: pictures.transpose(0, 3, 1, 2), False, ["wrist has its channels first; moved last"]),
        (lambda pictures: pictures / np.float32(255), True, ["wrist is recorded from 0 to 1; scaled to 0 to 255"]),
    ],
)
def test_pictures_in_a_column_of_numbers(tmp_path, stored, flat, mended):
    pictures = np.random.default_rng(0).integers(0, 256, (12, 16, 24, 3)).astype(np.uint8)
    pictures[0, 0, 0] = 0, 128, 255
    values = stored(pictures)
    folder = with_pixels(write_lerobot(tmp_path / "x", episodes=1), values, [*values.shape[1:]], flat)
    [episode] = episodes_of(folder)
    assert set(episode.cameras) == {"top", "wrist"} and np.array_equal(frames_of(episode, "wrist"), pictures)
    assert said(episode) == mended


def test_a_column_of_numbers_that_are_no_colours_is_left_out_with_the_reason(tmp_path):
    folder = with_pixels(write_lerobot(tmp_path / "x", episodes=1), np.full((12, 40, 40, 1), 7, np.uint16), None)
    [episode] = episodes_of(folder)
    assert set(episode.cameras) == {"top"}
    assert any("a single channel (depth, a mask or grey), not colours; left out" in line for line in said(episode))


def test_a_small_table_of_numbers_is_proprioception_and_no_picture(tmp_path):
    touch = np.random.default_rng(0).normal(size=(12, 16, 16)).astype(np.float32)
    folder = with_pixels(write_lerobot(tmp_path / "x", episodes=1), touch, [16, 16])
    [episode] = episodes_of(folder)
    assert set(episode.cameras) == {"top"} and np.array_equal(episode.proprio["wrist"], touch.reshape(12, -1))
    assert said(episode) == []
