"""The metadata that TFDS writes next to its shards and into their names.

``features.json`` has the shapes of an Example's flat lists, ``dataset_info.json`` the data set's name, and a shard is
named ``NAME-SPLIT.tfrecord-00000-of-00004``: https://www.tensorflow.org/datasets/external_tfrecord.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.errors import BadEpisode
from preprocessing.sources.untrusted.files import contents
from preprocessing.sources.untrusted.metadata import read_table, text_of
from preprocessing.video.arrays import is_picture

MAX_METADATA = 2**24  # bytes; published files have 10**4
SHARD = re.compile(r"\.tfrecord(-(\d+)-of-(\d+))?$")


@dataclass(frozen=True)
class Leaf:
    """The description in features.json of one flat list of the Example."""

    kind: str  # the TFDS class: Tensor, Scalar, Image, Text
    shape: tuple[int, ...] | None  # of one step; None if it varies
    dtype: str
    encoding: str

    @property
    def size(self) -> int:
        """How many numbers it has per step; 0 if it holds something else, or lists that vary."""
        numeric = re.match("float|bfloat|u?int|bool", self.dtype) and self.kind in ("Tensor", "Scalar")
        return math.prod(self.shape) if numeric and self.encoding == "none" and self.shape is not None else 0

    @property
    def width(self) -> int:
        """How many numbers it has per step; 0 if it is not one vector of numbers per step."""
        return self.size if len(self.shape or ()) <= 1 else 0

    @property
    def is_picture(self) -> bool:
        """Whether it holds the numbers of a picture per step, one by one or as bytes."""
        if self.kind != "Tensor" or self.encoding not in ("none", "bytes") or self.shape is None:
            return False
        return bool(re.fullmatch("float(16|32|64)|u?int(8|16|32|64)", self.dtype)) and is_picture(
            self.shape, np.dtype(self.dtype)
        )

    @property
    def is_text(self) -> bool:
        return self.kind == "Text" or (self.dtype in ("string", "object") and self.encoding == "none")


UNKNOWN = Leaf("", None, "", "none")


def read_leaves(path: Path) -> dict[str, Leaf]:
    """Read features.json, flattened to the names that the Example uses. Raises BadEpisode.

    What it describes in no known way is a leaf of unknown kind.
    """
    leaves: dict[str, Leaf] = {}

    def walk(node: dict[str, Any], name: str, sequences: int) -> None:
        if "featuresDict" in node:
            for key, child in node["featuresDict"].get("features", {}).items():
                walk(child, f"{name}/{key}" if name else key, sequences)
        elif "sequence" in node:
            walk(node["sequence"]["feature"], name, sequences + 1)
        else:
            leaves[name] = UNKNOWN
            with suppress(ValueError, KeyError, TypeError, AttributeError, OverflowError):
                kind = str(node.get("pythonClassName", "")).rsplit(".", 1)[-1]
                spec = node.get("tensor") or node.get("image") or {}
                sizes = [int(size) for size in spec.get("shape", {}).get("dimensions", [])]
                ragged = sequences > 1 or any(size < 0 for size in sizes)  # a list within a step has no fixed length
                shape = None if ragged else tuple(sizes)
                leaves[name] = Leaf(kind, shape, str(spec.get("dtype", "")), str(spec.get("encoding", "none")))

    try:
        walk(read_table(path, MAX_METADATA), "", 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadEpisode(f"features.json cannot be read: {error}") from None
    return leaves


def describes_episodes(folder: Path) -> bool:
    """Whether a folder has the ``features.json`` of episodes, readable or not."""
    try:
        text = contents(folder / "features.json", MAX_METADATA)
    except FileNotFoundError:
        return False
    except (OSError, BadEpisode):
        return True
    return '"steps"' in text_of(text)


def dataset_and_split(shard: Path) -> tuple[str, str | None]:
    """The data set's name, from dataset_info.json or else from the shard's name, and the shard's split."""
    whole, _, counted = shard.name.partition(".tfrecord")
    name, dash, split = whole.rpartition("-")
    with suppress(OSError, ValueError, KeyError, TypeError):
        name = str(read_table(shard.parent / "dataset_info.json", MAX_METADATA)["name"])
    return name or whole, split if dash and counted else None


def missing_shards(shards: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Yield the first missing shard of each set, and a message that covers all of them."""
    rows: dict[tuple[Path, str], set[int]] = {}
    for shard in shards:
        if (match := SHARD.search(shard.name)) and match[1]:
            whole = shard.with_name(shard.name[: match.start()])
            rows.setdefault((whole, match[3]), set()).add(int(match[2]))
    for (whole, total), there in rows.items():
        if (missing := int(total) - len(there)) > 0:
            first = next(number for number in range(len(there) + 1) if number not in there)
            name = f"{whole.name}.tfrecord-{first:0{len(total)}}-of-{total}"
            others = f", and {missing - 1} more of its {int(total)} shards" if missing > 1 else ""
            yield whole.with_name(name), f"{name} is missing{others}"
