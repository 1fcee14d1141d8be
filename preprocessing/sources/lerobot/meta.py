"""The ``meta`` folder of a LeRobot data set of any version: features, rates, names, instructions.

What it lacks is taken from the files where they tell it, and noted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocessing.episode import ActionBlock, EpisodeRef, Repair, RepairField, Representation, Video
from preprocessing.errors import BadEpisode, UserError
from preprocessing.sources.lerobot.films import FilmFolders
from preprocessing.sources.untrusted.files import leads_out
from preprocessing.sources.untrusted.metadata import read_table

NOT_AN_INSTRUCTION = {"valid", "invalid", ""}  # GR00T stores validity annotations in the table of tasks

# Isaac-GR00T's names. Its quaternions are left out: it does not document where the real part is.
ROTATIONS: dict[str, Representation] = {
    "axis_angle": "axis_angle",
    "euler_angles_rpy": "euler_xyz",
    "matrix": "matrix",
    "rotation_6d": "rotation_6d",
}


ANGLES = ("roll", "pitch", "yaw")  # euler_xyz, if in this order
WIDEST = 1024  # numbers a step of a vector; point clouds and depth maps have more
MAX_RATE = 1000.0  # Hz, as in a contract
SLACK = 0.05  # relative to a rate: float32 seconds of a long episode are imprecise


@dataclass(frozen=True)
class CameraVideo:
    """One camera of one episode: its frames, how many its container declares, if it does, and their rate in Hz."""

    video: Video
    frames: int | None
    fps: float | None = None


class Files(Protocol):
    """The files of a data set, whose layout depends on its version."""

    def scan(self) -> Iterator[EpisodeRef]: ...

    def digest(self, ref: EpisodeRef) -> str: ...

    def rows(self, ref: EpisodeRef) -> pa.Table: ...

    def videos(self, index: int) -> tuple[dict[str, CameraVideo], dict[str, str]]:
        """The episode's videos, by camera, and for each camera whose video cannot be used, why, as a sentence.

        A camera without any file in the whole data set is in neither.
        """
        ...

    def tasks(self) -> dict[int, str]: ...

    def own_tasks(self, index: int) -> list[str]:
        """The instructions that the list of episodes has for this one."""
        ...

    def repairs(self, index: int) -> list[Repair]: ...


TEMPLATE = re.compile(r"([^{}]|\{\w+(:0\dd)?\})*")  # bounded: a width of a billion would produce a billion characters


@dataclass(frozen=True)
class Meta:
    """What ``meta/info.json`` says, completed from the files. ``repairs`` names what it lacks."""

    root: Path
    info: dict[str, Any]
    version: str  # v2 or v3, with its minor number
    fps: float
    features: dict[str, dict[str, Any]]
    repairs: tuple[Repair, ...] = ()

    def file(self, template: str | None, **values: Any) -> Path | None:
        """The file that a path template names; None if it does not exist or is outside of the data set."""
        try:
            return self.inside(template.format(**values)) if template and TEMPLATE.fullmatch(template) else None
        except (LookupError, ValueError, TypeError):
            return None

    def inside(self, name: str) -> Path | None:
        """The file of this name in the data set; None if it does not exist or is outside of it."""
        path = Path(name)
        try:
            there = name and ".." not in path.parts and not path.is_absolute() and (self.root / path).is_file()
            return self.root / path if there and not leads_out(self.root / path) else None
        except (OSError, ValueError):  # longer than any file's name
            return None

    @cached_property
    def films(self) -> FilmFolders:
        return FilmFolders.of(self.root, self._short)

    @cached_property
    def _short(self) -> dict[str, str]:
        """Names of cameras by feature; depth maps are none."""
        return {key: short(key) for key, feature in sorted(self.features.items()) if _is_camera(feature)}

    def cameras(self, dtype: str) -> list[tuple[str, str]]:
        """(feature, camera name) pairs of this dtype, in the order that digests use.

        Folders of films that info.json does not list are cameras, too, and come last.
        """
        unlisted = {name: short(name) for name in self.films.unlisted(self.features)}
        names = [*self._short.values(), *unlisted.values()]
        found = [key for key in self._short if self.features[key]["dtype"] == dtype]
        return [
            (key, key if names.count(name) > 1 else name)
            for key, name in (self._short | unlisted).items()
            if key in found or (dtype == "video" and key in unlisted)
        ]

    @property
    def chunks_size(self) -> int:
        size = self.info.get("chunks_size")
        return size if isinstance(size, int) and size > 0 else 1000

    def split(self, index: int) -> str | None:
        """The episode's split; ``{"train": "0:90", "val": "90:100"}`` are ranges of episodes."""
        splits = self.info.get("splits")
        for name, span in splits.items() if isinstance(splits, dict) else ():
            if (ends := re.fullmatch(r"(\d{1,18}):(\d{1,18})", str(span))) and int(ends[1]) <= index < int(ends[2]):
                return str(name)
        return None

    def action_layout(self, width: int) -> tuple[tuple[ActionBlock, ...], list[Repair]]:
        """The meaning of the action's columns, and a repair if modality.json does not tell it."""
        layout: tuple[ActionBlock, ...] = ()
        told = list[Repair]()
        try:
            layout = _modality_layout(read_table(self.root / "meta" / "modality.json"), width)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            text = f"meta/modality.json does not name the action's parts ({' '.join(str(error).split())[:200]})"
            told.append(Repair("action_layout", f"{text}; not used"))
        return layout or self._named_layout(width) or (ActionBlock(name="action", size=width),), told

    def _named_layout(self, width: int) -> tuple[ActionBlock, ...]:
        """One block per run of columns of one kind: x y z, roll pitch yaw, gripper."""
        names = (self.features.get("action") or self.features.get("actions") or {}).get("names")
        while isinstance(names, dict) and names:  # {"motors": [...]}
            names = next(iter(names.values()))
        if not isinstance(names, list) or len(names) != width:
            return ()
        blocks: list[ActionBlock] = []
        for kind, run in groupby(names, lambda name: _kind(str(name))):
            columns = [str(name).lower() for name in run]
            size = len(columns)
            before = sum(block.kind == kind for block in blocks)
            angles = size == 3 and all(map(str.endswith, columns, ANGLES))  # rx, ry, rz may be axis-angle
            euler: Representation | None = "euler_xyz" if kind == "rotation" and angles else None
            name = f"{kind}_{before + 1}" if before else kind
            blocks.append(ActionBlock(name=name, size=size, kind=kind, representation=euler))
        return tuple(blocks)


def read_meta(root: Path) -> Meta:
    """Read info.json. Raises UserError if it is none, or if neither it nor the files tell what cannot be guessed."""
    file = root / "meta" / "info.json"
    try:
        info = read_table(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a LeRobot info.json ({error}); mend or restore the file") from None
    told = list[Repair]()
    features = info.get("features")
    if not isinstance(features, dict):
        features = _features(_some_table(root))
        told.append(Repair("streams", "info.json names no features; the columns of the tables are taken"))
    version = re.fullmatch(r"v?(\d(?:\.\d+)*)", str(info.get("codebase_version", "")))
    if not version:
        is_v3 = (root / "meta" / "episodes").is_dir() or (root / "meta" / "tasks.parquet").is_file()
        told.append(Repair("steps", f"info.json names no version; its files are those of v{3 if is_v3 else 2}"))
    fps = _rate(info.get("fps"))
    if fps is None:
        fps = _rate_of(_some_table(root))
        if fps is None:
            raise UserError(f"{file}: fps is no rate in Hz, and there are no timestamps; write the rate there")
        told.append(Repair("fps", f"info.json names no rate; {fps:g} Hz by the timestamps"))
    return Meta(
        root,
        info,
        f"v{version[1]}" if version else "v3" if is_v3 else "v2",
        fps,
        {name: feature for name, feature in features.items() if isinstance(feature, dict)},
        tuple(told),
    )


def short(key: str) -> str:
    """A camera's name without what LeRobot puts before it."""
    return re.sub(r"^observation\.(images?\.)?", "", key)


def _some_table(root: Path) -> Path | None:
    return min(root.glob("*/*/*.parquet"), default=None)


def _features(table: Path | None) -> dict[str, dict[str, Any]]:
    """Features as info.json would have them, from a table's columns."""
    try:
        schema = pq.read_schema(table) if table else pa.schema([])
    except (OSError, pa.ArrowException):
        return {}
    return {field.name: {"dtype": "image" if is_picture(field.type) else dtype_of(field.type)} for field in schema}


def dtype_of(kind: pa.DataType) -> str:
    while pa.types.is_nested(kind) and kind.num_fields == 1:
        kind = kind.field(0).type
    return "float32" if pa.types.is_floating(kind) else str(kind)


def is_picture(kind: pa.DataType) -> bool:
    """Whether a column holds JPEG or PNG files, or their paths, as Hugging Face's data sets do."""
    if pa.types.is_struct(kind):
        return {kind.field(i).name for i in range(kind.num_fields)} & {"bytes", "path"} != set()
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _rate(value: Any) -> float | None:
    try:
        rate = 0.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return rate if math.isfinite(rate) and 0 < rate <= MAX_RATE else None


def _rate_of(table: Path | None) -> float | None:
    """The rate of a table's timestamps."""
    try:
        times = pq.read_table(table, columns=["timestamp"])["timestamp"].to_numpy() if table else np.zeros(0)
        step = float(np.median(np.diff(times.astype(np.float64)))) if len(times) > 1 else 0.0
    except (OSError, pa.ArrowException, ValueError, TypeError, LookupError):
        return None
    return _rate(round(1 / step, 2)) if step > 0 else None


def wrong_template(name: str, found: str) -> Repair:
    """The repair for a path template in info.json that names no file, although the file was found."""
    field: RepairField = "frames" if name == "video_path" else "steps"
    return Repair(field, f"{name} in info.json names no file; {found}")


def texts_of(table: pa.Table, tasks: dict[int, str]) -> dict[str, str]:
    """The first text of each column of texts or of task indices; "" if it is not an instruction."""
    found = {}
    for name in sorted(table.column_names):
        first, kind = table[name][0].as_py(), table.schema.field(name).type
        if name == "task_index" or (name.startswith("annotation.") and not isinstance(first, str)):
            text = tasks.get(first) if isinstance(first, int) else None
        elif is_text(kind):
            text = first
        else:
            continue
        text = (text or "").strip()
        found["task" if name == "task_index" else name] = "" if text in NOT_AN_INSTRUCTION else text
    return found


def texts_in(*values: Any) -> list[str]:
    """The sentences among these values, each of which should be a list of some."""
    every = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return [one.strip() for one in every if isinstance(one, str) and one.strip() not in NOT_AN_INSTRUCTION]


def is_text(kind: pa.DataType) -> bool:
    """Whether it is a string type; pandas 3 writes large strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def instruction_key(texts: dict[str, str]) -> str | None:
    """The text that is the instruction: an annotated task description, else the task, else another annotation."""
    annotations = [name for name in texts if name.startswith("annotation.")]
    described = [name for name in annotations if name.endswith("task_description")]
    return next((name for name in [*described, "task", *annotations] if texts.get(name)), None)


def matrix(table: pa.Table, key: str) -> np.ndarray:
    """A column of numbers or of (nested) lists of numbers, as float32 ``[T, D]``. Raises BadEpisode."""
    return recorded(table, key).astype(np.float32)


def recorded(table: pa.Table, key: str) -> np.ndarray:
    """The column ``[T, D]`` in its own type. Raises BadEpisode."""
    column = table[key].combine_chunks()
    if column.null_count:
        raise BadEpisode(f"column {key} has {column.null_count} empty rows")
    values = column
    while pa.types.is_nested(values.type):
        if pc.count_distinct(pc.list_value_length(values)).as_py() != 1:
            raise BadEpisode(f"column {key} has rows of different lengths")
        values = values.flatten()
        if len(values) > WIDEST * len(column):
            width = len(values) // len(column)
            raise BadEpisode(f"column {key} has {width} numbers a step: neither a picture nor a vector")
    return values.to_numpy(zero_copy_only=False).reshape(len(column), -1)


def _is_camera(feature: dict[str, Any]) -> bool:
    return feature.get("dtype") in ("video", "image") and not is_depth(feature)


def is_depth(feature: dict[str, Any]) -> bool:
    """Whether a feature is a depth map, by what LeRobot notes of its film."""
    about = [feature.get(key) for key in ("info", "video_info")]
    return any(isinstance(one, dict) and one.get("video.is_depth_map") for one in about)


def _modality_layout(table: dict[str, Any], width: int) -> tuple[ActionBlock, ...]:
    """The parts of the action. Raises ValueError if they are not its columns, and more on a table of another shape."""
    own = [(name, part) for name, part in table["action"].items() if part.get("original_key", "action") == "action"]
    own.sort(key=lambda item: item[1]["start"])
    edges = [0, *(part["end"] for _, part in own)]
    if [part["start"] for _, part in own] != edges[:-1] or edges[-1] != width:
        raise ValueError(f"its parts leave gaps, overlap, or are not of {width} columns")
    blocks = []
    for name, part in own:
        rotation = part.get("rotation_type")
        blocks.append(
            ActionBlock(
                name=name,
                size=part["end"] - part["start"],
                kind="rotation" if rotation else _kind(name),
                representation=ROTATIONS.get(str(rotation)),
                mode="unknown" if "absolute" not in part else "absolute" if part["absolute"] else "delta",
            )
        )
    return tuple(blocks)


def _kind(name: str) -> Any:
    name = name.lower()
    if re.search(r"shoulder|elbow|wrist|forearm|waist|neck|finger", name):  # wrist_roll is a joint, roll is an angle
        return "joint"
    part = re.sub(r"[.\s-]", "_", name)  # "ee.x" as "ee_x"
    if re.fullmatch(r"(.*_)?(roll|pitch|yaw|[rw][xyz])", part) or re.search(r"rot(_|ation)|quat|orient", part):
        return "rotation"
    if re.fullmatch(r"(.*_)?(x|y|z)", part) or ("position" in part and not re.search("joint|gripper", part)):
        return "position"
    if "gripper" in name:
        return "gripper"
    if re.search(r"joint|motor|arm|leg|hand", name):
        return "joint"
    return "other"
