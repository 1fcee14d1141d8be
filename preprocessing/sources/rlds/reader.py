"""RLDS: episodes as TFDS writes them, read without TensorFlow.

A folder holds ``features.json`` and shards ``NAME-SPLIT.tfrecord-00000-of-00004``. Each record of a shard is one
episode: names such as ``steps/observation/image_0`` with flat lists over all steps, whose shapes are in
``features.json``. The convention: https://github.com/google-research/rlds; the accompanying files:
:mod:`preprocessing.sources.rlds.tfds`; the bytes: :mod:`preprocessing.sources.rlds.tfrecord`.

RLDS records neither robot nor control rate nor the meaning of an action's numbers: contracts do.

An episode's index is its record's number in the shard; its digest covers the record's bytes.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from preprocessing.episode import ActionBlock, Episode, EpisodeRef, Repair, Video
from preprocessing.errors import BadEpisode
from preprocessing.sources.rlds.tfds import (
    SHARD,
    Leaf,
    dataset_and_split,
    describes_episodes,
    missing_shards,
    read_leaves,
)
from preprocessing.sources.rlds.tfrecord import Feature, is_tfrecord, parse_example, read_record, records
from preprocessing.sources.scan_cache import findings
from preprocessing.sources.untrusted.files import files_in
from preprocessing.sources.vectors import as_vectors
from preprocessing.video.arrays import array_video
from preprocessing.video.frames import decode_image, images_video

BLACK = 8  # JPEG noise around zero stays below this level
WIDEST = 256  # wider vectors are embeddings or encoded text
INSTRUCTION_NAMES = ("language_instruction", "natural_language_instruction", "instruction")
OBSERVATIONS = ("steps/observation/", "steps/observations/", "steps/obs/")  # RLDS's name, and others
ACTIONS = ("steps/action", "steps/actions")
NOT_SEEN = re.compile(r"goal|depth|mask|segment", re.IGNORECASE)  # pictures that are no camera's view of the step


def detect(path: Path) -> bool:
    """Whether there are shards: by their names beside RLDS's ``features.json``, else by how they begin, too."""
    if path.is_dir():
        with os.scandir(path) as entries:  # a folder of another format may hold millions of files
            if not any(SHARD.search(entry.name) for entry in entries):
                return False
    shards = _shards(path)
    return bool(shards) and (describes_episodes(shards[0].parent) or any(map(is_tfrecord, shards)))


def encloses(path: Path) -> bool:
    """Whether everything below a folder belongs to its data set."""
    return path.is_dir() and describes_episodes(path)


def scan(path: Path) -> Iterator[EpisodeRef]:
    shards = _shards(path)
    for shard, found in findings("rlds", shards, lambda shard: list(records(shard))):
        missing = None if (shard.parent / "features.json").is_file() else "no features.json next to the shard"
        for index, record in enumerate(found):
            yield EpisodeRef(str(shard.absolute()), "rlds", index, record.digest, record.problem or missing)
    for shard, problem in missing_shards(shards) if path.is_dir() else ():
        yield EpisodeRef(str(shard.absolute()), "rlds", 0, hashlib.sha256(problem.encode()).hexdigest(), problem)


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
    return _episode(ref, features, read_leaves(shard.parent / "features.json"))


def _episode(ref: EpisodeRef, features: dict[str, Feature], leaves: dict[str, Leaf]) -> Episode:
    name, split = dataset_and_split(Path(ref.uri))
    repairs = [
        Repair("fps", "control rate unknown; 10 Hz assumed"),
        Repair("embodiment", "robot unknown; the data set's name is used instead"),
    ]
    steps, misfits = _count_steps(features, leaves)
    features = {key: values for key, values in features.items() if key not in misfits}
    repairs += [Repair("streams", f"{text}; left out") for text in misfits.values()]
    images, dropped = _images(features, leaves, steps)
    arrays, mended, no_cameras = _arrays(features, leaves, steps)
    dropped |= no_cameras
    repairs += [Repair("streams", f"camera {camera} is dropped: {why}") for camera, why in dropped.items()]
    repairs += mended
    repairs += _unread(features, leaves)
    for camera, files in sorted(images.items()):
        flag = features.get(f"episode_metadata/has_{camera}")
        if isinstance(flag, np.ndarray) and flag.size and not flag.any() and not _is_black(files):
            repairs.append(Repair("cameras", f"has_{camera} is 0 although images exist; camera kept"))
    is_last = features.get("steps/is_last")
    if isinstance(is_last, np.ndarray) and not is_last.any():
        repairs.append(Repair("steps", "is_last is never 1; the last step is taken as the end"))

    action, layout, told = _action(features, leaves, steps)
    proprio, signals, mended = _vectors(features, leaves, steps)
    repairs += [*told, *mended]
    every_text = _texts(features, leaves)
    instruction, changes = _instruction(every_text)
    if changes:
        repairs.append(Repair("instruction", "the instruction changes within the episode; the first one is kept"))
    cameras = {camera: images_video(files) for camera, files in images.items()} | arrays
    return Episode(
        ref=ref,
        fps=10.0,
        cameras=cameras,
        proprio=proprio,
        action=action,
        action_layout=layout,
        instruction=instruction,
        success=_success(features, every_text),
        embodiment=name,
        repairs=tuple(repairs),
        signals=signals,
        texts=_first_texts(every_text),
        dataset=name,
        split=split,
    )


def _count_steps(features: dict[str, Feature], leaves: dict[str, Leaf]) -> tuple[int, dict[str, str]]:
    """The number of steps, and what does not have that many, with the reason, if most have and the action does.

    Raises BadEpisode if it cannot be told.
    """
    counts, misfits = dict[str, int](), dict[str, str]()
    for key, leaf in sorted(leaves.items()):
        if key.startswith("steps/") and leaf.shape is not None and key in features:
            width = math.prod(leaf.shape) if leaf.kind in ("Tensor", "Scalar") else 1
            if width == 0 or (leaf.encoding != "none" and leaf.kind == "Tensor"):
                continue
            steps, rest = divmod(len(features[key]), width)
            if rest:
                misfits[key] = f"{key} holds {len(features[key])} values, not a multiple of {width}"
            else:
                counts[key] = steps
    if misfits and any(_is_action(key) for key in misfits):
        raise BadEpisode(next(iter(misfits.values())))
    acted = next((count for key, count in counts.items() if _is_action(key)), None)
    usual = Counter(count for count in counts.values() if count).most_common(2)
    if not usual:
        raise BadEpisode("holds no step")
    even = len(usual) > 1 and usual[0][1] == usual[1][1]
    if (acted is None and even) or acted not in (None, usual[0][0], *([usual[1][0]] if even else [])):
        some = {count: key for key, count in reversed(counts.items())}
        raise BadEpisode("step counts differ: " + ", ".join(f"{key} has {n}" for n, key in sorted(some.items())))
    steps = usual[0][0] if acted is None else acted
    misfits |= {key: f"{key} has {count} of {steps} steps" for key, count in counts.items() if count != steps}
    return steps, misfits


def _is_action(key: str) -> bool:
    return any(key == action or key.startswith(f"{action}/") for action in ACTIONS)


def _name(key: str) -> str:
    """A recorded name without the path to the observations."""
    above = next((above for above in OBSERVATIONS if key.startswith(above)), "steps/")
    return key.removeprefix(above).replace("/", "_")


def _images(
    features: dict[str, Feature], leaves: dict[str, Leaf], steps: int
) -> tuple[dict[str, list[bytes]], dict[str, str]]:
    images: dict[str, list[bytes]] = {}
    dropped: dict[str, str] = {}
    for key, leaf in sorted(leaves.items()):
        if leaf.kind != "Image" or not key.startswith("steps/"):
            continue
        camera = _name(key)
        files = features.get(key, [])
        if leaf.dtype != "uint8" or (leaf.shape and leaf.shape[-1] != 3):
            dropped[camera] = (
                f"{leaf.dtype} with {leaf.shape[-1] if leaf.shape else '?'} channels is not a colour image"
            )
        elif isinstance(files, np.ndarray) or not any(files):
            dropped[camera] = "it holds no image"
        elif len(files) != steps:
            dropped[camera] = f"it has {len(files)} images for {steps} steps"
        elif not key.startswith(OBSERVATIONS) and NOT_SEEN.search(camera):
            dropped[camera] = "it is not an observation"
        else:
            try:
                decode_image(next(data for data in files if data))
                images[camera] = files
            except BadEpisode as error:
                dropped[camera] = str(error)
    return images, dropped


def _arrays(
    features: dict[str, Feature], leaves: dict[str, Leaf], steps: int
) -> tuple[dict[str, Video], list[Repair], dict[str, str]]:
    """Pictures that are stored as numbers, what was mended of them, and those that are left out, with the reason."""
    cameras, repairs, dropped = dict[str, Video](), list[Repair](), dict[str, str]()
    for key, leaf in sorted(leaves.items()):
        if not (leaf.is_picture and key.startswith("steps/") and len(features.get(key, []))):
            continue
        if 0 < leaf.size <= WIDEST:  # a vector: a small table, of touch for instance
            continue
        camera = _name(key)
        if not key.startswith(OBSERVATIONS) and NOT_SEEN.search(camera):
            dropped[camera] = "it is not an observation"
            continue
        try:
            rows = _pixels(features[key], leaf, steps)
            cameras[camera], mended = array_video(camera, rows.shape[1:], rows.dtype, partial(list, (rows,)))
            repairs += mended
        except BadEpisode as error:
            dropped[camera] = str(error)
    return cameras, repairs, dropped


def _pixels(values: Feature, leaf: Leaf, steps: int) -> np.ndarray:
    """The pictures ``[T, *shape]``, from a list of numbers or from the bytes of each."""
    shape = (steps, *(leaf.shape or ()))
    try:
        numbers = np.frombuffer(b"".join(values), leaf.dtype) if isinstance(values, list) else values
        return numbers.reshape(shape)
    except ValueError:
        raise BadEpisode(f"it does not hold the numbers of {steps} pictures {leaf.shape}") from None


def _unread(features: dict[str, Feature], leaves: dict[str, Leaf]) -> Iterator[Repair]:
    """What a record holds for each step that is neither a picture nor a vector nor text."""
    for key, values in sorted(features.items()):
        if not key.startswith("steps/") or not len(values):
            continue
        leaf = leaves.get(key)
        if leaf is None:
            yield Repair("streams", f"{key} is recorded, but not in features.json; left out")
        elif leaf.kind == "Image" or leaf.is_picture or leaf.is_text or "embed" in key or key.endswith("/instruction"):
            continue
        elif not leaf.size:
            yield Repair("streams", f"{key} is {leaf.dtype or 'unknown'}, not numbers of one shape; left out")
        elif leaf.size > WIDEST and not _is_action(key):
            yield Repair("streams", f"{key} has {leaf.size} numbers a step: neither a picture nor a vector; left out")


def _is_black(files: Sequence[bytes]) -> bool:
    """Whether all images are black. A missing camera repeats one black JPEG, so identical files are decoded once."""
    return all(decode_image(data).max() <= BLACK for data in dict.fromkeys(files))


def _vectors(
    features: dict[str, Feature], leaves: dict[str, Leaf], steps: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[Repair]]:
    """Observed floats are proprio; all other numbers per step, except the action, are signals."""
    proprio, signals, repairs = dict[str, np.ndarray](), dict[str, np.ndarray](), list[Repair]()
    for key, leaf in sorted(leaves.items()):
        if not key.startswith("steps/") or not 0 < leaf.size <= WIDEST or "embed" in key or key not in features:
            continue
        if key.startswith(OBSERVATIONS) and leaf.dtype.startswith("float") and leaf.width:
            name = _name(key)
            proprio[name], mended = as_vectors(_tensor(features, key, steps), name)
            repairs += mended
        elif key not in ACTIONS:
            name = key.removeprefix("steps/")
            signals[name], mended = as_vectors(_tensor(features, key, steps), name)
            repairs += mended
    return proprio, signals, repairs


def _tensor(features: dict[str, Feature], key: str, steps: int) -> np.ndarray:
    values = features.get(key)
    if not isinstance(values, np.ndarray):
        raise BadEpisode(f"{key} holds no numbers")
    return values.reshape(steps, -1)


def _action(
    features: dict[str, Feature], leaves: dict[str, Leaf], steps: int
) -> tuple[np.ndarray | None, tuple[ActionBlock, ...], list[Repair]]:
    """One vector, or its parts concatenated in the order of their names; a contract can reorder them."""
    for name in ACTIONS:
        told = [Repair("action", "no steps/action; steps/actions is read as the action")] if name != ACTIONS[0] else []
        if name in leaves:
            if not leaves[name].width:
                raise BadEpisode(f"{name} is not one vector per step")
            action = _tensor(features, name, steps).astype(np.float32)
            return action, (ActionBlock(name="action", size=action.shape[1]),), told
        keys = sorted(key for key, leaf in leaves.items() if key.startswith(f"{name}/") and leaf.width)
        if keys:
            parts = [_tensor(features, key, steps).astype(np.float32) for key in keys]
            names = [key.removeprefix(f"{name}/") for key in keys]
            layout = tuple(ActionBlock(name=n, size=p.shape[1]) for n, p in zip(names, parts, strict=True))
            return np.concatenate(parts, axis=1), layout, told
    return None, (), []


def _success(features: dict[str, Feature], every_text: dict[str, list[str]]) -> bool | None:
    """Whether the episode succeeded, None if nobody judged it.

    People judged some of RT-1's episodes, marked by ``has_aspects``. DROID's failures are known only by the recording's
    path.
    """
    judged = features.get("aspects/has_aspects")
    for name in ("success", "episode_metadata/success", "aspects/success", "steps/success"):
        values = features.get(name)
        if name == "aspects/success" and not (isinstance(judged, np.ndarray) and judged.any()):
            continue
        if isinstance(values, np.ndarray) and values.size:
            return bool(values.any())
    if "episode_metadata/recording_folderpath" in every_text:
        folders = {part for path in every_text.get("episode_metadata/file_path", []) for part in path.split("/")}
        if len(flag := folders & {"success", "failure"}) == 1:
            return flag == {"success"}
    return None


def _texts(features: dict[str, Feature], leaves: dict[str, Leaf]) -> dict[str, list[str]]:
    """All texts, by field. Language Table stores instructions as numbers: UTF-8 bytes, padded with zeros."""
    found = {}
    for key, leaf in sorted(leaves.items()):
        values = features.get(key)
        if leaf.is_text and isinstance(values, list):
            found[key] = [value.decode(errors="replace").strip() for value in values]
        elif key.endswith("/instruction") and "int" in leaf.dtype and leaf.width > 1 and isinstance(values, np.ndarray):
            rows = values.reshape(-1, leaf.width).clip(0, 255).astype(np.uint8)
            found[key] = [bytes(row[row > 0]).decode(errors="replace").strip() for row in rows]
    return found


def _first_texts(every_text: dict[str, list[str]]) -> dict[str, str]:
    """The first text of each field that is not empty."""
    return {
        key.removeprefix("steps/").removeprefix("episode_metadata/"): next(filter(None, texts), "")
        for key, texts in every_text.items()
    }


def _instruction(every_text: dict[str, list[str]]) -> tuple[str | None, bool]:
    """The first instruction, and whether it changes within the episode."""
    for name in INSTRUCTION_NAMES:
        for key, every in every_text.items():
            texts = [text for text in every if text]
            if key.rsplit("/", 1)[-1] == name and texts:
                return texts[0], len(set(texts)) > 1
    return None, False


def _shards(path: Path) -> list[Path]:
    """The file itself, or the shards of every split in a folder."""
    return [file for file in files_in(path) if SHARD.search(file.name)]
