"""The ``meta`` folder of a LeRobot data set of any version: features, rates, names, instructions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.episode import ActionBlock, EpisodeRef, Repair, RepairField, Representation, Video
from preprocessing.errors import BadEpisode, UserError

NOT_AN_INSTRUCTION = {"valid", "invalid", ""}  # GR00T stores validity annotations in the table of tasks

# Isaac-GR00T's names. Its quaternions are left out: it does not document where the real part is.
ROTATIONS: dict[str, Representation] = {
    "axis_angle": "axis_angle",
    "euler_angles_rpy": "euler_xyz",
    "matrix": "matrix",
    "rotation_6d": "rotation_6d",
}


ANGLES = ("roll", "pitch", "yaw")  # euler_xyz, if in this order


@dataclass(frozen=True)
class CameraVideo:
    """One camera of one episode: its frames, and how many its container declares, if it does."""

    video: Video
    frames: int | None


class Files(Protocol):
    """The files of a data set, whose layout depends on its version."""

    def scan(self) -> Iterator[EpisodeRef]: ...

    def digest(self, ref: EpisodeRef) -> str: ...

    def rows(self, ref: EpisodeRef) -> pa.Table: ...

    def videos(self, index: int) -> dict[str, CameraVideo]:
        """The episode's videos, by camera. A camera without any file in the whole data set is left out."""
        ...

    def tasks(self) -> dict[int, str]: ...

    def repairs(self, index: int) -> list[Repair]: ...


TEMPLATE = re.compile(r"([^{}]|\{\w+(:0\dd)?\})*")  # bounded: a width of a billion would produce a billion characters


@dataclass(frozen=True)
class Meta:
    root: Path
    info: dict[str, Any]

    def file(self, template: str | None, **values: Any) -> Path | None:
        """The file that a path template names; None if it does not exist or is outside of the data set."""
        try:
            name = template.format(**values) if template and TEMPLATE.fullmatch(template) else ""
        except (KeyError, ValueError, TypeError):
            return None
        inside = name and ".." not in Path(name).parts and (self.root / name).is_file()
        return self.root / name if inside else None

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        return self.info["features"]

    @property
    def fps(self) -> float:
        return float(self.info["fps"])

    def cameras(self, dtype: str) -> list[tuple[str, str]]:
        """(feature, camera name) pairs of this dtype, in the order that digests use."""
        short = {
            key: re.sub(r"^observation\.(images?\.)?", "", key)
            for key, feature in sorted(self.features.items())
            if feature.get("dtype") in ("video", "image") and not _is_depth(feature)
        }
        names = list(short.values())
        return [
            (key, key if names.count(name) > 1 else name)
            for key, name in short.items()
            if self.features[key]["dtype"] == dtype
        ]

    def split(self, index: int) -> str | None:
        """The episode's split; ``{"train": "0:90", "val": "90:100"}`` are ranges of episodes."""
        splits = self.info.get("splits")
        for name, span in splits.items() if isinstance(splits, dict) else ():
            if (ends := re.fullmatch(r"(\d+):(\d+)", str(span))) and int(ends[1]) <= index < int(ends[2]):
                return str(name)
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
            return ()  # the parts overlap or leave gaps
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
    file = root / "meta" / "info.json"
    try:
        info = json.loads(file.read_text())
        if not isinstance(info["features"], dict) or not float(info["fps"]) > 0 or not info["codebase_version"]:
            raise ValueError("features is not a table, or fps is not positive")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a LeRobot info.json ({error}); mend or restore the file") from None
    return Meta(root, info)


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
    column = table[key].combine_chunks()
    if column.null_count:
        raise BadEpisode(f"column {key} has {column.null_count} empty rows")
    values = column
    while pa.types.is_nested(values.type):
        if pc.count_distinct(pc.list_value_length(values)).as_py() != 1:
            raise BadEpisode(f"column {key} has rows of different lengths")
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), -1)


def _is_depth(feature: dict[str, Any]) -> bool:
    """Whether a video feature is a depth map."""
    return any((feature.get(key) or {}).get("video.is_depth_map") for key in ("info", "video_info"))


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
