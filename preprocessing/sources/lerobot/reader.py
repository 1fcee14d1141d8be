"""LeRobot data sets, v2.0 to v3.0: tables of steps in parquet, cameras in MP4 files or in image columns.

``meta/info.json`` names the features, and ``meta/modality.json`` (Isaac-GR00T's addition) the parts of the state and
action vectors: https://github.com/NVIDIA/Isaac-GR00T/blob/main/getting_started/data_preparation.md. The versions differ
in their files: :mod:`preprocessing.sources.lerobot.v2`, :mod:`preprocessing.sources.lerobot.v3`.

info.json often contradicts the files on disk: a template may name no file, or a camera may not exist. The files take
precedence. An episode's index is its ``episode_index``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.episode import Episode, EpisodeRef, Repair, Video
from preprocessing.errors import BadEpisode, UserError
from preprocessing.sources.lerobot.meta import (
    SLACK,
    Files,
    Meta,
    dtype_of,
    instruction_key,
    is_depth,
    is_picture,
    is_text,
    matrix,
    read_meta,
    recorded,
    short,
    texts_of,
)
from preprocessing.sources.lerobot.pictures import picture_video, pixels_of, pixels_video
from preprocessing.sources.lerobot.v2 import FilesV2
from preprocessing.sources.lerobot.v3 import FilesV3
from preprocessing.sources.untrusted.files import contents
from preprocessing.sources.vectors import as_vectors
from preprocessing.video.frames import first_frames, frames_to_use

ACTION, STATE = "action", "observation."
# Other names of the two, in the order of preference: openpi's converters write `actions` and `state`.
ACTIONS, STATES = ("actions",), ("state", "states", "proprio", "qpos")
SIMULATED = {"observation.environment_state"}  # object poses, which no robot observes
BESIDE = ("meta/episodes.jsonl", "meta/episodes", "meta/tasks.jsonl", "meta/tasks.parquet")
MAX_INFO = 2**26  # bytes; published files have 10**4
PLACES = {"index", "episode_index", "frame_index", "task_index"}  # columns that locate a row


def detect(path: Path) -> bool:
    """Whether ``meta/info.json`` is LeRobot's; other programs write a file of that name, too, but not beside tables."""
    try:
        text = contents(path / "meta" / "info.json", MAX_INFO)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, BadEpisode):
        text = b""
    said = b"codebase_version" in text.replace(b"\0", b"")  # of UTF-16, too
    return said or any((path / name).exists() for name in BESIDE) or any(path.glob("data/*/*.parquet"))


def scan(path: Path) -> Iterator[EpisodeRef]:
    _, files = _dataset(path.absolute())
    yield from files.scan()


def digest(ref: EpisodeRef) -> str:
    _, files = _above(Path(ref.uri))
    return files.digest(ref)


def load(ref: EpisodeRef) -> Episode:
    meta, files = _above(Path(ref.uri))
    try:
        table = files.rows(ref)
    except (OSError, pa.ArrowException) as error:
        raise BadEpisode(f"{Path(ref.uri).name} cannot be read: {' '.join(str(error).split())}") from None
    if table.num_rows == 0:
        raise BadEpisode(f"{Path(ref.uri).name} has no rows")

    table, ordered, skips = _in_order(table)
    cameras, frames, of_cameras = _cameras(ref.index, meta, files, table, skips)
    tasks, told = files.tasks(), list[Repair]()
    texts = texts_of(table, tasks)
    is_listed = "task_index" in table.column_names and table["task_index"][0].as_py() in tasks
    if not is_listed and not instruction_key(texts) and (own := files.own_tasks(ref.index)):
        texts["task"] = own[0]
        told.append(Repair("instruction", "the table of tasks lacks this one; read from the list of episodes"))
    chosen = instruction_key(texts)
    commands = _vector(table, (ACTION, *ACTIONS))
    if commands not in (None, ACTION):
        told.append(Repair("action", f"no column action; {commands} is read as the action"))
    action = matrix(table, commands) if commands else None
    shown = {key for key, _ in _picture_columns(meta, table)}
    proprio, lost, of_proprio = _proprio(meta, table.drop_columns([*shown]))
    used = {*PLACES, *proprio, *([commands] if commands else []), *shown}
    signals, left_out = _signals(table, {*used, *lost})
    layout, of_layout = meta.action_layout(action.shape[1]) if action is not None else ((), [])
    found = [*_repairs(meta, table, signals.get("timestamp"), chosen)]
    if any(repair.field == "fps" for repair in found):  # once is enough
        of_cameras = [repair for repair in of_cameras if repair.field != "fps"]
    repairs = (*meta.repairs, *files.repairs(ref.index), *found, *of_proprio, *told, *of_layout, *ordered)
    return Episode(
        ref=ref,
        fps=meta.fps,
        cameras=cameras,
        proprio={key.removeprefix(STATE): values[:frames] for key, values in proprio.items()},
        action=None if action is None else action[:frames],
        action_layout=layout,
        instruction=texts[chosen] if chosen else None,
        success=_success(signals),
        embodiment=str(meta.info.get("robot_type") or "unknown"),
        repairs=(*repairs, *of_cameras, *left_out),
        signals={name: values[:frames] for name, values in signals.items()},
        texts=texts,
        split=meta.split(ref.index),
    )


def _cameras(
    index: int, meta: Meta, files: Files, table: pa.Table, skips: bool
) -> tuple[dict[str, Video], int, list[Repair]]:
    """The cameras that can be used, the steps that they share with the table, and repairs. Raises BadEpisode."""
    videos, lost = files.videos(index)
    pictures, of_pixels = dict[str, Video](), list[Repair]()
    for key, camera in _picture_columns(meta, table):
        try:
            if pixels := pixels_of(table[key], meta.features.get(key, {})):
                pictures[camera], mended = pixels_video(table[key], camera, *pixels)
                of_pixels += mended
            else:
                pictures[camera] = picture_video(table[key], key, meta, index)
        except BadEpisode as error:
            lost[camera] = f"camera {camera}: {error}"
    for camera, video in list(videos.items()):
        if abs((video.frames or table.num_rows) - table.num_rows) > 1:
            rate = f" at {video.fps:g} Hz" if video.fps and abs(video.fps / meta.fps - 1) > SLACK else ""
            hertz = f" at {meta.fps:g} Hz" if rate else ""
            lost[camera] = (
                f"camera {camera} declares {video.frames} frames{rate}, the table has {table.num_rows} rows{hertz}"
            )
            del videos[camera]
    if not (videos or pictures):
        raise BadEpisode(next(iter(lost.values()), "has no camera: no video, and no column of pictures"))
    frames, mismatch = frames_to_use(
        {name: video.frames for name, video in videos.items()}, table.num_rows, "the table"
    )
    if mismatch and skips:
        raise BadEpisode(f"{mismatch}, and frame_index skips: rows are lost in the middle")
    known, repairs = {*videos, *pictures, *lost}, of_pixels
    for key, camera in meta.cameras("video"):
        if camera not in known:
            text = f"camera {camera} is named in info.json, but has no file; dropped"
            repairs.append(Repair("streams", text))
        elif key not in meta.features:
            repairs.append(Repair("cameras", f"camera {camera} is not named in info.json, but has films; read"))
    images = dict(meta.cameras("image"))
    for key, camera in _picture_columns(meta, table):
        if key not in images and key not in meta.features and camera in pictures:
            repairs.append(Repair("cameras", f"camera {camera} is not named in info.json, but has a column; read"))
    for key, camera in images.items():
        if key not in table.column_names:
            repairs.append(Repair("streams", f"camera {camera} is named in info.json, but has no column; dropped"))
    rates = {video.fps for video in videos.values() if video.fps and abs(video.fps / meta.fps - 1) > SLACK}
    repairs += [Repair("fps", f"info.json says {meta.fps:g} Hz, a film {r:g} Hz; the former is used") for r in rates]
    repairs += [Repair("streams", f"{reason}; left out") for reason in lost.values()]
    cameras = {name: video.video for name, video in videos.items()} | pictures
    if mismatch:
        repairs.append(Repair("frames", f"{mismatch}; cut to {frames}"))
        cameras = {name: first_frames(video, frames) for name, video in cameras.items()}
    return cameras, frames, repairs


def _picture_columns(meta: Meta, table: pa.Table) -> list[tuple[str, str]]:
    """(column, camera name) pairs: those that info.json calls images, and others that hold pictures."""
    named = dict(meta.cameras("image"))
    pictures = [field.name for field in table.schema if is_picture(field.type)]
    texts = [field.name for field in table.schema if is_text(field.type)]
    taken = {*named.values(), *(camera for _, camera in meta.cameras("video"))}
    pictures += [key for key in table.column_names if pixels_of(table[key], meta.features.get(key, {}))]
    others = [key for key in pictures if key not in named and not is_depth(meta.features.get(key, {}))]
    return [
        *((key, camera) for key, camera in named.items() if key in (*pictures, *texts)),
        *((key, key if short(key) in taken else short(key)) for key in others),
    ]


def _proprio(meta: Meta, table: pa.Table) -> tuple[dict[str, np.ndarray], list[str], list[Repair]]:
    """The state that the robot observes, by column; columns of it that cannot be used; and repairs."""
    found, lost, repairs = dict[str, np.ndarray](), list[str](), list[Repair]()
    for key in sorted(table.column_names):
        if not key.startswith(STATE) or key in SIMULATED or not _holds_numbers(table.schema.field(key)):
            continue
        kind = meta.features.get(key, {}).get("dtype") or dtype_of(table.schema.field(key).type)
        if str(kind).startswith("float"):
            try:
                found[key], mended = as_vectors(recorded(table, key), key)
                repairs += mended
            except BadEpisode as error:
                lost.append(key)
                repairs.append(Repair("proprio", f"{error}; left out"))
    if not found and (alias := _vector(table, STATES)):
        text = f"no column observation.*; {alias} is read as proprioception"
        return {alias: matrix(table, alias)}, lost, [*repairs, Repair("proprio", text)]
    return found, lost, repairs


def _vector(table: pa.Table, names: Iterable[str]) -> str | None:
    """The first of these columns that the table has and that holds numbers."""
    there = (name for name in names if name in table.column_names)
    return next((name for name in there if _holds_numbers(table.schema.field(name))), None)


def _holds_numbers(field: pa.Field) -> bool:
    kind = field.type
    while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _signals(table: pa.Table, others: set[str]) -> tuple[dict[str, np.ndarray], list[Repair]]:
    """All other columns of numbers or vectors, and a repair for each that cannot be one."""
    signals, repairs = dict[str, np.ndarray](), list[Repair]()
    for field in table.schema:
        if field.name in others or is_text(field.type):
            continue
        try:
            if not _holds_numbers(field):
                raise BadEpisode(f"column {field.name} holds neither numbers nor pictures nor text ({field.type})")
            signals[field.name], mended = as_vectors(recorded(table, field.name), field.name)
            repairs += mended
        except BadEpisode as error:
            repairs.append(Repair("streams", f"{error}; left out"))
    return signals, repairs


def _repairs(meta: Meta, table: pa.Table, times: np.ndarray | None, chosen: str | None) -> Iterator[Repair]:
    if "frame_index" not in table.column_names:
        yield Repair("steps", "no frame_index; rows are read in order")
    if times is not None and (start := float(times[0, 0])) != 0:
        yield Repair("steps", f"timestamps start at {start:.3f} s; frames and rows are paired by order")
    step = float(np.median(np.diff(times[:, 0].astype(np.float64)))) if times is not None and len(times) > 1 else 0.0
    if step > 0 and abs(step * meta.fps - 1) > SLACK:
        text = f"info.json says {meta.fps:g} Hz, the timestamps {1 / step:.3g} Hz; the former is used"
        yield Repair("fps", text)
    column = "task_index" if chosen == "task" else chosen
    if column in table.column_names and pc.count_distinct(table[column], mode="all").as_py() > 1:
        yield Repair("instruction", "the instruction changes within the episode; the first one is kept")


def _in_order(table: pa.Table) -> tuple[pa.Table, list[Repair], bool]:
    """The rows sorted by ``frame_index``, repairs, and whether ``frame_index`` skips numbers."""
    if "frame_index" not in table.column_names or table["frame_index"].null_count:
        return table, [], False
    places = matrix(table, "frame_index")[:, 0]
    if len(np.unique(places)) < len(places):
        return table, [Repair("steps", "frame_index repeats; rows are read in order")], False
    skips = bool(np.ptp(places) != len(places) - 1)
    if (np.diff(places) > 0).all():
        return table, [], skips
    resorted = Repair("steps", "rows are out of order; sorted by frame_index")
    return table.take(np.argsort(places)), [resorted], skips


def _success(signals: dict[str, np.ndarray]) -> bool | None:
    """A reward of 1 means success; one that stays below means nothing, as many data sets write only zeros."""
    if "next.success" in signals:
        return bool(signals["next.success"].any())
    if "next.reward" in signals and (signals["next.reward"] >= 1).any():
        return True
    return None


def _above(table: Path) -> tuple[Meta, Files]:
    """The data set that contains a table."""
    root = next((parent for parent in table.parents if detect(parent)), None)
    if root is None:
        raise BadEpisode("no meta/info.json above the table")
    return _dataset(root)


def _dataset(root: Path) -> tuple[Meta, Files]:
    meta = read_meta(root)
    match meta.version[:2]:
        case "v2":
            return meta, FilesV2(meta)
        case "v3":
            return meta, FilesV3(meta)
    raise UserError(f"{root}: LeRobot {meta.version} is not supported; convert it to v3.0 with LeRobot's scripts")
