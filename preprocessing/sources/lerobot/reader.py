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
from preprocessing.sources.lerobot.meta import CameraVideo, Files, Meta, instruction_key, matrix, read_meta, texts_of
from preprocessing.sources.lerobot.v2 import FilesV2
from preprocessing.sources.lerobot.v3 import FilesV3
from preprocessing.video.frames import first_frames, frames_to_use, images_video

ACTION, STATE = "action", "observation."
# Other names of the two, in the order of preference: openpi's converters write `actions` and `state`.
ACTIONS, STATES = ("actions",), ("state", "states", "proprio", "qpos")
SIMULATED = {"observation.environment_state"}  # object poses, which no robot observes
SLACK = 0.05  # relative to a rate: float32 seconds of a long episode are imprecise
PLACES = {"index", "episode_index", "frame_index", "task_index"}  # columns that locate a row


def detect(path: Path) -> bool:
    return (path / "meta" / "info.json").is_file()


def scan(path: Path) -> Iterator[EpisodeRef]:
    _, files = _dataset(path.absolute())
    yield from files.scan()


def digest(ref: EpisodeRef) -> str:
    _, files = _above(Path(ref.uri))
    return files.digest(ref)


def load(ref: EpisodeRef) -> Episode:
    meta, files = _above(Path(ref.uri))
    videos = files.videos(ref.index)
    try:
        table = files.rows(ref)
    except (OSError, pa.ArrowException) as error:
        raise BadEpisode(f"{Path(ref.uri).name} cannot be read: {' '.join(str(error).split())}") from None
    if table.num_rows == 0:
        raise BadEpisode(f"{Path(ref.uri).name} has no rows")

    table, ordered, skips = _in_order(table)
    declared = {camera: video.frames for camera, video in videos.items()}
    frames, mismatch = frames_to_use(declared, table.num_rows, "the table")
    if mismatch and skips:
        raise BadEpisode(f"{mismatch}, and frame_index skips: rows are lost in the middle")
    cut = [Repair("frames", f"{mismatch}; cut to {frames}")] if mismatch else []
    cameras: dict[str, Video] = {
        camera: first_frames(video.video, frames) if cut else video.video for camera, video in videos.items()
    }
    for key, camera in meta.cameras("image"):
        if key in table.column_names:
            images = table[key].to_pylist()[:frames]
            cameras[camera] = images_video([(image or {}).get("bytes") or b"" for image in images])

    texts = texts_of(table, files.tasks())
    chosen = instruction_key(texts)
    seen = [
        key
        for key, feature in sorted(meta.features.items())
        if key.startswith(STATE) and key not in SIMULATED and key in table.column_names
        if str(feature.get("dtype")).startswith("float")
    ]
    aliases = list[Repair]()
    if not seen and (alias := _vector(table, STATES)):
        seen = [alias]
        aliases.append(Repair("proprio", f"no column observation.*; {alias} is read as proprioception"))
    commands = _vector(table, (ACTION, *ACTIONS))
    if commands not in (None, ACTION):
        aliases.append(Repair("action", f"no column action; {commands} is read as the action"))
    proprio = {key.removeprefix(STATE): matrix(table, key)[:frames] for key in seen}
    signals, left_out = _signals(table, {*PLACES, *seen, *([commands] if commands else [])})
    action = matrix(table, commands)[:frames] if commands else None
    found = _repairs(meta, videos, table, signals.get("timestamp"), chosen)
    return Episode(
        ref=ref,
        fps=meta.fps,
        cameras=cameras,
        proprio=proprio,
        action=action,
        action_layout=() if action is None else meta.action_layout(action.shape[1]),
        instruction=texts[chosen] if chosen else None,
        success=_success(signals),
        embodiment=str(meta.info.get("robot_type") or "unknown"),
        repairs=(*files.repairs(ref.index), *found, *aliases, *ordered, *cut, *left_out),
        signals={name: values[:frames] for name, values in signals.items()},
        texts=texts,
        split=meta.split(ref.index),
    )


def _vector(table: pa.Table, names: Iterable[str]) -> str | None:
    """The first of these columns that the table has and that holds numbers."""
    there = (name for name in names if name in table.column_names)
    return next((name for name in there if _holds_numbers(table.schema.field(name))), None)


def _holds_numbers(field: pa.Field) -> bool:
    is_list = pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type)
    kind = field.type.value_type if is_list else field.type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _signals(table: pa.Table, others: set[str]) -> tuple[dict[str, np.ndarray], list[Repair]]:
    """All other columns of numbers or vectors, and a repair for each that has gaps or is ragged."""
    signals, repairs = dict[str, np.ndarray](), list[Repair]()
    for field in table.schema:
        if field.name in others or not _holds_numbers(field):
            continue
        try:
            signals[field.name] = matrix(table, field.name)
        except BadEpisode as error:
            repairs.append(Repair("streams", f"{error}; left out"))
    return signals, repairs


def _repairs(
    meta: Meta, videos: dict[str, CameraVideo], table: pa.Table, times: np.ndarray | None, chosen: str | None
) -> Iterator[Repair]:
    for _, camera in meta.cameras("video"):
        if camera not in videos:
            yield Repair("streams", f"camera {camera} is named in info.json, but has no file; dropped")
    if "frame_index" not in table.column_names:
        yield Repair("steps", "no frame_index; rows are read in order")
    if times is not None and (start := float(times[0, 0])) != 0:
        yield Repair("steps", f"timestamps start at {start:.3f} s; frames and rows are paired by order")
    step = float(np.median(np.diff(times[:, 0].astype(np.float64)))) if times is not None and len(times) > 1 else 0.0
    if step > 0 and abs(step * meta.fps - 1) > SLACK:
        text = f"info.json says {meta.fps:g} Hz, the timestamps {1 / step:.3g} Hz; the former is used"
        yield Repair("fps", text)
    column = "task_index" if chosen == "task" else chosen
    if column and pc.count_distinct(table[column], mode="all").as_py() > 1:
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
    match str(meta.info["codebase_version"])[:3]:
        case "v2.":
            return meta, FilesV2(meta)
        case "v3.":
            return meta, FilesV3(meta)
    raise UserError(
        f"{root}: LeRobot {meta.info['codebase_version']} is not supported; convert it to v3.0 with LeRobot's scripts"
    )
