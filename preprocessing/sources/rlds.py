"""RLDS: episodes as TFDS writes them, read without TensorFlow.

A folder holds ``features.json`` and shards ``NAME-SPLIT.tfrecord-00000-of-00004``. Each record of a shard is one
episode: names such as ``steps/observation/image_0`` with flat lists over all steps, to which ``features.json`` gives
their shapes back. The convention: https://github.com/google-research/rlds; the files:
https://www.tensorflow.org/datasets/external_tfrecord; the bytes: :mod:`preprocessing.sources.tfrecord`.

An episode's index is its record's number in the shard; its digest covers the record's bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.episode import ActionBlock, BadEpisode, Episode, EpisodeRef, Video
from preprocessing.sources.memory import findings
from preprocessing.sources.tfrecord import Feature, parse_example, read_record, records
from preprocessing.video import decode_image, images_video

SHARD = re.compile(r"\.tfrecord(-\d+-of-\d+)?$")
BLACK = 8  # JPEG noise around zero stays below this level

# Robot and control rate by a part of the data set's name: RLDS itself records neither. Rates as published in the
# Open X-Embodiment overview (arXiv 2310.08864).
KNOWN = (
    ("bridge", "widowx", 5.0),
    ("fractal", "google-robot", 3.0),
    ("rt_1", "google-robot", 3.0),
    ("droid", "panda", 15.0),
    ("taco_play", "panda", 15.0),
    ("jaco_play", "jaco", 10.0),
    ("kuka", "kuka-iiwa", 10.0),
    ("berkeley_autolab_ur5", "ur5", 5.0),
    ("language_table", "xarm", 10.0),
    ("libero", "panda", 20.0),
)
INSTRUCTION_NAMES = ("language_instruction", "natural_language_instruction")


def detect(path: Path) -> bool:
    return bool(_shards(path))


def scan(path: Path) -> Iterator[EpisodeRef]:
    for shard, found in findings("rlds", _shards(path), lambda shard: list(records(shard))):
        missing = None if (shard.parent / "features.json").is_file() else "no features.json beside the shard"
        for index, record in enumerate(found):
            yield EpisodeRef(str(shard.absolute()), "rlds", index, record.digest, record.problem or missing)


def digest(ref: EpisodeRef) -> str:
    return hashlib.sha256(read_record(Path(ref.uri), ref.index)).hexdigest()


def load(ref: EpisodeRef) -> Episode:
    shard = Path(ref.uri)
    data = read_record(shard, ref.index)
    if hashlib.sha256(data).hexdigest() != ref.digest:
        raise BadEpisode("the record has changed since it was listed")
    try:
        features = parse_example(data)
    except ValueError as error:
        raise BadEpisode(f"the record is not a tf.train.Example: {error}") from None
    return _episode(ref, features, _leaves(shard.parent / "features.json"), _dataset_name(shard))


@dataclass(frozen=True)
class Leaf:
    """What features.json says about one flat list of the Example."""

    kind: str  # the TFDS class: Tensor, Scalar, Image, Text
    shape: tuple[int, ...] | None  # of one step; None where it varies
    dtype: str
    encoding: str


def _episode(ref: EpisodeRef, features: dict[str, Feature], leaves: dict[str, Leaf], name: str) -> Episode:
    repairs: list[str] = []
    steps = _count_steps(features, leaves)
    images, dropped = _images(features, leaves, steps)
    repairs += [f"camera {camera} is dropped: {why}" for camera, why in dropped.items()]
    black = {camera for camera, files in images.items() if _is_black(files)}
    repairs += [f"camera {camera} is black in every frame" for camera in sorted(black)]
    for camera in sorted(images.keys() - black):
        said = features.get(f"episode_metadata/has_{camera}")
        if isinstance(said, np.ndarray) and said.size and not said.any():
            repairs.append(f"has_{camera} is 0 although images exist; camera kept")
    is_last = features.get("steps/is_last")
    if isinstance(is_last, np.ndarray) and not is_last.any():
        repairs.append("is_last is never 1; the last step is taken to be the end")

    observation = "steps/observation/"
    proprio = {
        key.removeprefix(observation).replace("/", "_"): _tensor(features, key, steps)
        for key, leaf in sorted(leaves.items())
        if key.startswith(observation) and _is_vector(leaf) and leaf.dtype.startswith("float") and "embed" not in key
    }
    embodiment, fps = next(((robot, rate) for part, robot, rate in KNOWN if part in name), (name, None))
    if fps is None:
        fps = 10.0
        repairs.append("control rate unknown; 10 Hz assumed")
    action, layout = _action(features, leaves, steps, name)
    instruction, changes = _instruction(features)
    if changes:
        repairs.append("the instruction changes within the episode; the first one is kept")
    cameras: dict[str, Video] = {camera: images_video(files) for camera, files in images.items()}
    return Episode(
        ref=ref,
        fps=fps,
        cameras=cameras,
        proprio=proprio,
        action=action,
        action_layout=layout,
        instruction=instruction,
        success=None,
        embodiment=embodiment,
        repairs=tuple(repairs),
    )


def _count_steps(features: dict[str, Feature], leaves: dict[str, Leaf]) -> int:
    """Every list that holds something per step must agree on how many steps there are."""
    counts: dict[int, str] = {}
    for key, leaf in sorted(leaves.items()):
        if key.startswith("steps/") and leaf.shape is not None and key in features:
            width = math.prod(leaf.shape) if leaf.kind in ("Tensor", "Scalar") else 1
            if width == 0 or (leaf.encoding != "none" and leaf.kind == "Tensor"):
                continue
            steps, rest = divmod(len(features[key]), width)
            if rest:
                raise BadEpisode(f"{key} holds {len(features[key])} values, not a multiple of {width}")
            counts.setdefault(steps, key)
    if len(counts) > 1:
        raise BadEpisode("step counts differ: " + ", ".join(f"{key} has {n}" for n, key in sorted(counts.items())))
    if not counts or 0 in counts:
        raise BadEpisode("holds no step")
    return next(iter(counts))


def _images(
    features: dict[str, Feature], leaves: dict[str, Leaf], steps: int
) -> tuple[dict[str, list[bytes]], dict[str, str]]:
    images: dict[str, list[bytes]] = {}
    dropped: dict[str, str] = {}
    for key, leaf in sorted(leaves.items()):
        if leaf.kind != "Image" or not key.startswith("steps/observation/"):
            continue
        camera = key.removeprefix("steps/observation/").replace("/", "_")
        files = features.get(key, [])
        if leaf.dtype != "uint8" or (leaf.shape and leaf.shape[-1] != 3):
            dropped[camera] = f"{leaf.dtype} with {leaf.shape[-1] if leaf.shape else '?'} channels is no colour image"
        elif isinstance(files, np.ndarray) or not any(files):
            dropped[camera] = "it holds no image"
        elif len(files) != steps:
            raise BadEpisode(f"camera {camera} has {len(files)} images for {steps} steps")
        else:
            images[camera] = files
    return images, dropped


def _is_black(files: Sequence[bytes]) -> bool:
    """A camera that was not there is recorded as the same black JPEG again and again: one decode tells."""
    return all(decode_image(data).max() <= BLACK for data in dict.fromkeys(files))


def _is_vector(leaf: Leaf) -> bool:
    return (
        leaf.kind in ("Tensor", "Scalar")
        and leaf.encoding == "none"
        and leaf.shape is not None
        and (len(leaf.shape) <= 1)
    )


def _tensor(features: dict[str, Feature], key: str, steps: int) -> np.ndarray:
    values = features.get(key)
    if not isinstance(values, np.ndarray):
        raise BadEpisode(f"{key} holds no numbers")
    return values.reshape(steps, -1).astype(np.float32)


def _action(
    features: dict[str, Feature], leaves: dict[str, Leaf], steps: int, name: str
) -> tuple[np.ndarray | None, tuple[ActionBlock, ...]]:
    if "steps/action" in leaves:
        if not _is_vector(leaves["steps/action"]):
            raise BadEpisode("steps/action is not one vector a step")
        action = _tensor(features, "steps/action", steps)
        if "bridge" in name and action.shape[1] == 7:
            return action, (
                ActionBlock(name="position", size=3, kind="position", mode="delta"),
                ActionBlock(name="rotation", size=3, kind="rotation", representation="euler_xyz", mode="delta"),
                ActionBlock(name="gripper", size=1, kind="gripper", mode="absolute", gripper_one_means="open"),
            )
        return action, (ActionBlock(name="action", size=action.shape[1]),)
    keys = sorted(key for key, leaf in leaves.items() if key.startswith("steps/action/") and _is_vector(leaf))
    if not keys:
        return None, ()
    parts = [_tensor(features, key, steps) for key in keys]
    names = [key.removeprefix("steps/action/") for key in keys]
    layout = tuple(ActionBlock(name=n, size=p.shape[1]) for n, p in zip(names, parts, strict=True))
    return np.concatenate(parts, axis=1), layout


def _instruction(features: dict[str, Feature]) -> tuple[str | None, bool]:
    for key in sorted(features):
        values = features[key]
        if key.rsplit("/", 1)[-1] in INSTRUCTION_NAMES and not isinstance(values, np.ndarray):
            texts = [text for text in (value.decode(errors="replace").strip() for value in values) if text]
            if texts:
                return texts[0], len(set(texts)) > 1
    return None, False


def _leaves(path: Path) -> dict[str, Leaf]:
    """features.json, flattened to the names that the Example uses."""
    try:
        root = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadEpisode(f"features.json cannot be read: {error}") from None
    leaves: dict[str, Leaf] = {}

    def walk(node: dict[str, Any], name: str, sequences: int) -> None:
        if "featuresDict" in node:
            for key, child in node["featuresDict"].get("features", {}).items():
                walk(child, f"{name}/{key}" if name else key, sequences)
        elif "sequence" in node:
            walk(node["sequence"]["feature"], name, sequences + 1)
        else:
            kind = node.get("pythonClassName", "").rsplit(".", 1)[-1]
            spec = node.get("tensor") or node.get("image") or {}
            sizes = [int(size) for size in spec.get("shape", {}).get("dimensions", [])]
            ragged = sequences > 1 or any(size < 0 for size in sizes)  # a list within each step has no fixed length
            leaves[name] = Leaf(
                kind, None if ragged else tuple(sizes), spec.get("dtype", ""), spec.get("encoding", "none")
            )

    walk(root, "", 0)
    return leaves


def _dataset_name(shard: Path) -> str:
    try:
        name = json.loads((shard.parent / "dataset_info.json").read_text())["name"]
    except (OSError, ValueError, KeyError, TypeError):
        name = shard.name.split(".tfrecord")[0].rsplit("-", 1)[0]
    return str(name)


def _shards(path: Path) -> list[Path]:
    """The shards of every split of a folder, or the one that is named."""
    candidates = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return [p for p in candidates if SHARD.search(p.name) and not p.name.startswith(".")]
