"""LeRobot data sets, v2.0 and v2.1: a parquet table an episode, an MP4 file an episode and camera.

``meta/info.json`` names the features and two path templates, ``meta/tasks.jsonl`` holds the sentences that rows refer
to by number, and ``meta/modality.json`` (Isaac-GR00T's addition) names the parts of the state and action vectors. The
layout: https://github.com/huggingface/lerobot/blob/v0.3.3/lerobot/common/datasets/lerobot_dataset.py and
https://github.com/NVIDIA/Isaac-GR00T/blob/main/getting_started/data_preparation.md.

What info.json says and what is on disk often differ: a template may lead nowhere and a camera may not exist. The files
are believed. An episode's index is its ``episode_index``; its digest covers the parquet file and every MP4 file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocessing.episode import ActionBlock, BadEpisode, Episode, EpisodeRef, UserError, Video
from preprocessing.sources.memory import Finding, file_digest, findings
from preprocessing.video import first_frames, images_video, open_video, probe_video

STATE = "observation."
TABLES = "data/*/episode_*.parquet"  # where they are by default, whatever info.json says
FILMS = "videos/*/{}/*.mp4"
NOT_AN_INSTRUCTION = {"valid", "invalid", ""}  # GR00T annotates validity through the same table of sentences


def detect(path: Path) -> bool:
    return (path / "meta" / "info.json").is_file()


def scan(path: Path) -> Iterator[EpisodeRef]:
    dataset = _dataset(path.absolute())
    episodes: list[tuple[int, list[Path], str]] = []
    for index in dataset.indices():
        try:
            episodes.append((index, dataset.files(index), ""))
        except BadEpisode as error:
            episodes.append((index, [], str(error)))
    found = findings("lerobot", (file for _, files, _ in episodes for file in files), _read)
    for index, files, missing in episodes:
        if missing:
            uri = str(dataset.root / "data" / f"episode_{index:06d}.parquet")
            nothing = hashlib.sha256(f"{dataset.root.name} {index} {missing}".encode()).hexdigest()  # no bytes to hash
            yield EpisodeRef(uri, "lerobot", index, nothing, missing)
        else:
            parts = [part for _, [part] in islice(found, len(files))]
            problem = next((part.problem for part in parts if part.problem), None)
            yield EpisodeRef(str(files[0]), "lerobot", index, _joined(part.digest for part in parts), problem)


def digest(ref: EpisodeRef) -> str:
    return _joined(map(file_digest, _above(Path(ref.uri)).files(ref.index)))


def load(ref: EpisodeRef) -> Episode:
    path = Path(ref.uri)
    dataset = _above(path)
    found = dataset.videos(ref.index)
    try:
        table = pq.read_table(path, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise BadEpisode(f"{path.name} cannot be read: {' '.join(str(error).split())}") from None
    rows = table.num_rows
    if rows == 0:
        raise BadEpisode(f"{path.name} has no row")

    repairs = dataset.repairs(ref.index, table)
    frames, counted = _frames_to_use(found, rows)
    repairs += counted
    cameras: dict[str, Video] = {}
    for camera, file in found.items():
        cameras[camera] = first_frames(open_video(file.path), frames) if counted else open_video(file.path)
    for key, camera in dataset.cameras("image"):
        if key in table.column_names:
            cameras[camera] = images_video([(image or {}).get("bytes") or b"" for image in table[key].to_pylist()])

    proprio = {
        key.removeprefix(STATE): _matrix(table, key)[:frames]
        for key, feature in sorted(dataset.features.items())
        if key.startswith(STATE) and key in table.column_names and feature["dtype"].startswith("float")
    }
    action = _matrix(table, "action")[:frames] if "action" in table.column_names else None
    return Episode(
        ref=ref,
        fps=dataset.fps,
        cameras=cameras,
        proprio=proprio,
        action=action,
        action_layout=() if action is None else dataset.action_layout(action.shape[1]),
        instruction=dataset.instruction(ref.index, table),
        success=_success(table),
        embodiment=str(dataset.info.get("robot_type") or "unknown"),
        repairs=tuple(repairs),
    )


def _frames_to_use(videos: dict[str, Found], rows: int) -> tuple[int, list[str]]:
    """One frame more or less than rows is a recorder's slip at the end, and mended; more is another recording.

    The counts are those of the containers, so nothing is decoded here; a container without one is left to whoever
    decodes it.
    """
    counts = {camera: probe_video(found.path).declared_frames or rows for camera, found in videos.items()}
    for camera, count in counts.items():
        if abs(count - rows) > 1:
            raise BadEpisode(f"camera {camera} declares {count} frames, the table has {rows} rows")
    frames = min([rows, *counts.values()])
    slips = [f"{camera} has {count}" for camera, count in counts.items() if count != rows]
    return frames, [f"the table has {rows} rows, {', '.join(slips)} frames; cut to {frames}"] if slips else []


def _matrix(table: pa.Table, key: str) -> np.ndarray:
    """A column of lists (or of numbers) as float32 ``[T, D]``."""
    column = table[key].combine_chunks()
    if column.null_count:
        raise BadEpisode(f"column {key} has {column.null_count} empty rows")
    values = column
    if pa.types.is_nested(values.type):
        if pc.count_distinct(pc.list_value_length(values)).as_py() != 1:
            raise BadEpisode(f"column {key} has rows of different lengths")
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), -1)


def _success(table: pa.Table) -> bool | None:
    """A reward that reaches 1 means success; one that does not means nothing, for many data sets write only zeros."""
    if "next.success" in table.column_names:
        return bool(_matrix(table, "next.success").any())
    if "next.reward" in table.column_names and (_matrix(table, "next.reward") >= 1).any():
        return True
    return None


@dataclass(frozen=True)
class Found:
    """A file, and whether the template in info.json leads to it."""

    path: Path
    as_templated: bool


@dataclass(frozen=True)
class _Dataset:
    root: Path
    info: dict[str, Any]
    _listings: dict[str, dict[str, Path]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        return self.info["features"]

    @property
    def fps(self) -> float:
        return float(self.info["fps"])

    def cameras(self, dtype: str) -> list[tuple[str, str]]:
        """(feature, camera name), in the order that digests use."""
        keys = sorted(
            key for key, feature in self.features.items() if feature.get("dtype") == dtype and not _is_depth(feature)
        )
        return [(key, re.sub(r"^observation\.(images?\.)?", "", key)) for key in keys]

    def indices(self) -> list[int]:
        """The episodes that episodes.jsonl names, and those that have a table all the same."""
        listed = {int(row["episode_index"]) for row in self.lines("episodes.jsonl") if "episode_index" in row}
        numbers = (Path(name).stem.removeprefix("episode_") for name in self._listing(TABLES))
        return sorted(listed | {int(number) for number in numbers if number.isdecimal()})

    def files(self, index: int) -> list[Path]:
        """What an episode's digest covers, in its order: the table, then the cameras. Raises BadEpisode."""
        return [self.table(index).path, *(film.path for film in self.videos(index).values())]

    def table(self, index: int) -> Found:
        file = self._find("data_path", TABLES, f"episode_{index:06d}.parquet", index, "")
        if file is None:
            raise BadEpisode(f"episode {index} is listed, but there is no episode_{index:06d}.parquet")
        return file

    def videos(self, index: int) -> dict[str, Found]:
        """The cameras of one episode. One without any file in the whole data set does not exist."""
        found = {}
        for key, camera in self.cameras("video"):
            file = self._find("video_path", FILMS.format(key), f"episode_{index:06d}.mp4", index, key)
            if file is not None:
                found[camera] = file
            elif self._listing(FILMS.format(key)):
                raise BadEpisode(f"camera {camera} has no video for episode {index}")
        return found

    def _find(self, template: str, pattern: str, file: str, index: int, key: str) -> Found | None:
        chunk = index // int(self.info.get("chunks_size") or 1000)
        try:
            name = self.info[template].format(episode_chunk=chunk, episode_index=index, video_key=key)
        except (KeyError, IndexError, ValueError, AttributeError):
            name = ""
        if name and ".." not in Path(name).parts and (self.root / name).is_file():
            return Found(self.root / name, as_templated=True)
        searched = self._listing(pattern).get(file)
        return Found(searched, as_templated=False) if searched and searched.is_file() else None

    def _listing(self, pattern: str) -> dict[str, Path]:
        """The first file of each name that a pattern leads to: folders of thousands are listed once, not each time."""
        if pattern not in self._listings:
            files = sorted(self.root.glob(pattern), reverse=True)
            self._listings[pattern] = {file.name: file for file in files}
        return self._listings[pattern]

    def repairs(self, index: int, table: pa.Table) -> list[str]:
        notes = []
        videos = self.videos(index)
        found = [("data_path", self.table(index)), *(("video_path", file) for file in videos.values())]
        for template in dict.fromkeys(name for name, file in found if not file.as_templated):
            notes.append(f"{template} in info.json leads to no file; found by searching")
        for _, camera in self.cameras("video"):
            if camera not in videos:
                notes.append(f"camera {camera} is named in info.json, but has no file; dropped")
        if "frame_index" not in table.column_names:
            notes.append("no frame_index; rows are taken in order")
        if "timestamp" in table.column_names and (start := float(_matrix(table, "timestamp")[0, 0])) != 0:
            notes.append(f"timestamps start at {start:.3f} s; frames and rows are paired by order")
        return notes

    def instruction(self, index: int, table: pa.Table) -> str | None:
        """What a person asked for: the task description annotated, else the task, else another annotation."""
        tasks = {int(row["task_index"]): str(row["task"]) for row in self.lines("tasks.jsonl")}
        annotations = sorted(name for name in table.column_names if name.startswith("annotation."))
        described = [name for name in annotations if name.endswith("task_description")]
        for column in [*described, "task_index", *annotations]:
            if column in table.column_names:
                value = table[column][0].as_py()
                text = value if isinstance(value, str) else tasks.get(value, "")
                if text.strip() not in NOT_AN_INSTRUCTION:
                    return text.strip()
        return None

    def action_layout(self, width: int) -> tuple[ActionBlock, ...]:
        return self._modality_layout(width) or self._named_layout(width) or (ActionBlock(name="action", size=width),)

    def _modality_layout(self, width: int) -> tuple[ActionBlock, ...]:
        try:
            parts = json.loads((self.root / "meta" / "modality.json").read_text())["action"]
        except (OSError, ValueError, KeyError):
            return ()
        own = [(n, p) for n, p in parts.items() if p.get("original_key", "action") == "action"]
        own.sort(key=lambda item: item[1]["start"])
        edges = [0, *(part["end"] for _, part in own)]
        if [part["start"] for _, part in own] != edges[:-1] or edges[-1] != width:
            return ()  # parts that overlap or leave gaps are no layout
        blocks = []
        for name, part in own:
            rotation = part.get("rotation_type")
            blocks.append(
                ActionBlock(
                    name=name,
                    size=part["end"] - part["start"],
                    kind="rotation" if rotation else _kind(name),
                    representation=rotation,
                    mode="unknown" if "absolute" not in part else "absolute" if part["absolute"] else "delta",
                )
            )
        return tuple(blocks)

    def _named_layout(self, width: int) -> tuple[ActionBlock, ...]:
        """One block for each run of columns of a kind: x y z, roll pitch yaw, gripper."""
        names = self.features.get("action", {}).get("names")
        while isinstance(names, dict) and names:  # {"motors": [...]}
            names = next(iter(names.values()))
        if not isinstance(names, list) or len(names) != width:
            return ()
        blocks: list[ActionBlock] = []
        for kind, run in groupby(names, lambda name: _kind(str(name))):
            size = len(list(run))
            before = sum(block.kind == kind for block in blocks)
            euler = "euler_xyz" if kind == "rotation" and size == 3 else None
            name = f"{kind}_{before + 1}" if before else kind
            blocks.append(ActionBlock(name=name, size=size, kind=kind, representation=euler))
        return tuple(blocks)

    def lines(self, name: str) -> list[dict[str, Any]]:
        try:
            text = (self.root / "meta" / name).read_text()
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise UserError(
                f"{self.root / 'meta' / name}: not JSON lines ({error}); mend or restore the file"
            ) from None


def _is_depth(feature: dict[str, Any]) -> bool:
    """Depth is stored as video too, but is no picture of colours."""
    return any((feature.get(key) or {}).get("video.is_depth_map") for key in ("info", "video_info"))


def _kind(name: str) -> Any:
    name = name.lower()
    if re.fullmatch(r"(.*_)?(x|y|z)", name) or ("position" in name and "joint" not in name):
        return "position"
    if re.fullmatch(r"(.*_)?(roll|pitch|yaw|rx|ry|rz)", name) or "rotation" in name:
        return "rotation"
    if "gripper" in name:
        return "gripper"
    if re.search(r"joint|motor|arm|leg|hand|neck|waist|shoulder|elbow|wrist|finger", name):
        return "joint"
    return "other"


def _read(file: Path) -> list[Finding]:
    return [Finding(file_digest(file))]


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def _above(table: Path) -> _Dataset:
    """The data set that a table belongs to."""
    root = next((parent for parent in table.parents if detect(parent)), None)
    if root is None:
        raise BadEpisode("no meta/info.json above the table")
    return _dataset(root)


def _dataset(root: Path) -> _Dataset:
    file = root / "meta" / "info.json"
    try:
        info = json.loads(file.read_text())
        version = str(info["codebase_version"])
        if not isinstance(info["features"], dict) or not float(info["fps"]) > 0:
            raise ValueError("features is no table, or fps is not positive")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a LeRobot info.json ({error}); mend or restore the file") from None
    if not version.startswith("v2."):
        raise UserError(
            f"{root}: LeRobot {version} is not read yet; convert the data set to v2.1, "
            "with LeRobot's own scripts from an older version, or any4lerobot's from v3.0"
        )
    return _Dataset(root, info)
