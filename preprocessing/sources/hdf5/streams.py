"""What an HDF5 file recorded at each step of an episode, at any depth: cameras, vectors, texts.

Readers of HDF5 formats know where actions and observations are; what each data set below them holds is decided here,
once for all. A data set that is none of these is left out with a reason.

Streams have their path as a name, so that a contract can address them. Of ``images/top_image`` and ``top/rgb`` the part
that only says "picture" is dropped from a camera's name, unless two would be called the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from preprocessing.episode import Repair, Video
from preprocessing.errors import BadEpisode
from preprocessing.limits import limits
from preprocessing.sources.hdf5.texts import SAYS, short_text
from preprocessing.sources.untrusted.hdf5 import datasets, members, own
from preprocessing.sources.vectors import as_vectors
from preprocessing.video.arrays import array_video, is_picture, rows_at_once
from preprocessing.video.frames import colours_exchanged, decode_image, sliced_video

ENCODED = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # how JPEG and PNG files begin
PICTURES = ("rgb", "color", "colour", "image", "rgb_image")  # names that say no more than "picture"
SMALL = 256  # numbers of a matrix or list of vectors that is kept as one vector


@dataclass
class Streams:
    """The streams of one episode, by path. ``vectors`` are float32 ``[T, D]``; ``tables`` are, too, and were recorded
    as a matrix or as several vectors per step."""

    cameras: dict[str, Video] = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    tables: dict[str, np.ndarray] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    repairs: list[Repair] = field(default_factory=list)
    has_jpeg: bool = False
    lengths: Counter[int] = field(default_factory=Counter)  # rows of the cameras and vectors, fitting or not


def read_streams(
    path: Path,
    group: h5py.Group,
    steps: int,
    above: str = "",
    *,
    skip: Callable[[str], bool] = lambda _: False,
    last_too: bool = False,
    bgr: bool = False,
    name_of: Callable[[str], str] | None = None,
) -> Streams:
    """Read all data sets below a group that have a row for each of the steps.

    ``above`` precedes names in repairs. ``skip`` tells which paths are read elsewhere. One row more than steps is cut
    off; ``last_too`` says that the format records the state after the last action, so that this is no repair. ``bgr``
    says that the format's JPEG files have red and blue exchanged. ``name_of`` maps a path to its camera's name.
    """
    found, pictures, fitting, surplus = Streams(), dict[str, h5py.Dataset](), 0, list[str]()
    for name, dataset in members(group):
        label = f"{above}{name}"
        if skip(name):
            continue
        if dataset is None:
            found.repairs.append(Repair("streams", f"{label} is a link and is not followed"))
        if not isinstance(dataset, h5py.Dataset) or not dataset.shape:  # single values belong to no step
            continue
        encoded = _is_encoded(dataset)
        picture = encoded or is_picture(dataset.shape[1:], dataset.dtype)
        numeric = dataset.dtype.kind in "fiub" and not encoded
        if not (picture or numeric):
            if texts := _texts_per_step(name, dataset):
                found.texts[name], changes = texts
                if changes:
                    change = f"{label} changes within the episode; its first text is kept"
                    found.repairs.append(Repair("instruction", change))
            else:
                found.repairs.append(Repair("streams", f"{label} holds {_kind(dataset)}, not numbers; left out"))
            continue
        found.lengths[len(dataset)] += 1
        if len(dataset) not in (steps, steps + 1):
            misfit = f"{label} has {len(dataset)} rows for {steps} actions; left out"
            found.repairs.append(Repair("streams", misfit))
            continue
        fitting += 1
        if len(dataset) > steps:
            surplus.append(label)
        if picture:
            pictures[name] = dataset
            continue
        width = int(np.prod(dataset.shape[1:], dtype=np.float64))
        if dataset.ndim > 2 and width > SMALL:
            wide = f"{label} is {dataset.shape[1:]} numbers per step, neither colour images nor a vector; left out"
            found.repairs.append(Repair("streams", wide))
        elif width and 4 * dataset.size <= limits().array_bytes:
            rows, mended = as_vectors(dataset[:steps], label)
            found.repairs += mended
            (found.vectors if dataset.ndim <= 2 else found.tables)[name] = rows
        else:
            odd = f"{label} has {width} numbers per step, none or more than limits.array_bytes; left out"
            found.repairs.append(Repair("streams", odd))
    if above and surplus and len(surplus) == fitting and not last_too:
        text = "one frame more than actions; the last one, from after the last action, is dropped"
        found.repairs.append(Repair("frames", text))
    elif not last_too:
        one_more = "has one row more than actions; its last row is dropped"
        found.repairs += [Repair("steps", f"{label} {one_more}") for label in surplus]
    names = camera_names(pictures, name_of or short_name)
    for name, dataset in pictures.items():
        try:
            video, mended, is_jpeg = _camera(path, dataset, steps, f"{above}{name}")
        except BadEpisode as error:
            found.repairs.append(Repair("streams", f"{error}; left out"))
            continue
        found.has_jpeg |= is_jpeg
        found.cameras[names[name]] = colours_exchanged(video) if is_jpeg and bgr else video
        found.repairs += mended
        if is_jpeg and not bgr:
            guess = f"{above}{name} holds JPEG files, read as RGB; writers that use OpenCV often swap red and blue"
            found.repairs.append(Repair("bgr", guess))
    return found


def common_length(group: h5py.Group) -> int:
    """The number of rows that most data sets below a group have, 0 if there are none: without actions, the steps."""
    lengths = Counter(len(dataset) for _, dataset in datasets(group) if dataset.ndim)
    return max(lengths, key=lambda length: (lengths[length], length), default=0)


def camera_names(paths: Iterable[str], name_of: Callable[[str], str]) -> dict[str, str]:
    """Each path's name as a camera: the whole path if another would be called the same."""
    short = {path: name_of(path) for path in paths}
    times = Counter(short.values())
    return {path: name if times[name] == 1 else path for path, name in short.items()}


def short_name(path: str) -> str:
    """The path without what only says "picture": ``agentview_rgb`` (LIBERO), ``agentview_image`` (robomimic),
    ``head_camera/rgb``."""
    above, _, last = path.rpartition("/")
    if above and last in PICTURES:
        return above
    return f"{above}/" * bool(above) + re.sub(r"_(rgb|image)$", "", last)


def action_of(group: h5py.Group, names: Iterable[str]) -> tuple[str | None, dict[str, np.ndarray], list[Repair]]:
    """The first of these members that is there, its parts as float32 ``[T, D]`` by path, and repairs.

    It is a data set, whose only part has its own name, or a group of data sets. Raises BadEpisode if it holds no
    numbers per step, or parts of different lengths.
    """
    for number, name in enumerate(names):
        member = own(group, name)
        if member is None:
            continue
        repairs = list[Repair]()
        parts = dict[str, np.ndarray]()
        alone = isinstance(member, h5py.Dataset)
        for key, dataset in [("", member)] if alone else datasets(member):
            part = name if alone else f"{name}/{key}"
            if dataset.dtype.kind not in "fiub" or dataset.ndim not in (1, 2, 3) or not dataset.size:
                if alone:
                    raise BadEpisode(f"{name} have shape {dataset.shape} of {dataset.dtype}, not one vector per step")
                repairs.append(Repair("streams", f"{part} holds {_kind(dataset)}, not a vector per step; left out"))
                continue
            if 4 * dataset.size > limits().array_bytes:
                raise BadEpisode(f"{part} is {dataset.shape}, more than limits.array_bytes")
            if alone and dataset.ndim == 3:
                raise BadEpisode(f"{name} have shape {dataset.shape}, not one vector per step")
            parts[part], mended = as_vectors(dataset[()], part)
            repairs += mended
        if not parts:
            continue
        if len({len(rows) for rows in parts.values()}) > 1:
            lengths = ", ".join(f"{part} {len(rows)}" for part, rows in parts.items())
            raise BadEpisode(f"the parts of {name} differ in length: {lengths}")
        if len(parts) > 1 or name not in parts:
            order = ", ".join(parts)
            repairs.append(Repair("action", f"{name} is a group; the action is its parts in this order: {order}"))
        elif number:
            repairs.append(Repair("action", f"no data set {next(iter(names))}; {name} is read as the action"))
        return name, parts, repairs
    return None, {}, []


def _texts_per_step(name: str, dataset: h5py.Dataset) -> tuple[str, bool] | None:
    """The first text of a data set of texts whose name says instruction, and whether others follow."""
    if not SAYS.search(name) or dataset.ndim != 1 or dataset.dtype.kind not in "SO" or not len(dataset):
        return None
    first, last = short_text(dataset[0]), short_text(dataset[len(dataset) - 1])
    return (first, first != last) if first else None


def _kind(dataset: h5py.Dataset) -> str:
    if dataset.dtype.names:
        return f"records of {', '.join(dataset.dtype.names[:4])}"
    if dataset.dtype.kind in "SO" or h5py.check_string_dtype(dataset.dtype):
        return "texts" if h5py.check_vlen_dtype(dataset.dtype) in (None, str, bytes) else "rows of different lengths"
    return f"{dataset.dtype} of shape {dataset.shape}"


def _is_encoded(dataset: h5py.Dataset) -> bool:
    """Whether each row is a JPEG or PNG file: padded bytes, or bytes of any length."""
    padded = dataset.ndim == 2 and dataset.dtype == np.uint8 and dataset.shape[1] > len(ENCODED[1])
    loose = dataset.ndim == 1 and dataset.dtype.kind in "SVO" and not dataset.dtype.names
    return (padded or loose) and len(dataset) > 0 and _file(dataset[0]).startswith(ENCODED)


def _file(row: Any) -> bytes:
    if isinstance(row, str):
        return row.encode("latin-1", errors="replace")
    return row if isinstance(row, bytes) else np.asarray(row).tobytes()


def _camera(path: Path, dataset: h5py.Dataset, steps: int, label: str) -> tuple[Video, list[Repair], bool]:
    """The camera, repairs, and whether it is made of JPEG files. Raises BadEpisode if it holds no colours."""
    place = str(dataset.name)
    if _is_encoded(dataset):
        try:
            decode_image(_file(dataset[0]))
        except BadEpisode as error:
            raise BadEpisode(f"{label}: {error}") from None
        return sliced_video(steps, _decoder(path, place)), [], _file(dataset[0]).startswith(ENCODED[0])
    at_once = rows_at_once(dataset.shape[1:], dataset.dtype)

    def pieces() -> Iterator[np.ndarray]:
        for start in range(0, steps, at_once):
            yield _rows(path, place, start, min(start + at_once, steps))

    return *array_video(label, dataset.shape[1:], dataset.dtype, pieces), False


def _decoder(path: Path, name: str) -> Callable[[int, int], np.ndarray]:
    def frames(start: int, stop: int) -> np.ndarray:
        images = [decode_image(_file(row)) for row in _rows(path, name, start, stop)]
        if len({image.shape for image in images}) > 1:
            raise BadEpisode(f"the images of {name} differ in size")
        return np.stack(images)

    return frames


def _rows(path: Path, name: str, start: int, stop: int) -> np.ndarray:
    """Rows of a data set. Opens the file each time: an open handle would outlive its consumer and cannot be pickled."""
    try:
        with h5py.File(path, "r") as file:
            return file[name][start:stop]
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise BadEpisode(f"{name} cannot be read from frame {start}: {error}") from None
