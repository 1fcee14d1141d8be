"""HDF5 files from outside: which kind of recording they are, what is in them, and its digest.

A file decides nothing beyond itself: soft and external links, external storage and virtual data sets are not followed.
A digest covers values, not bytes, so that a repacked file is the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from preprocessing.episode import FRAMES_PER_CHUNK
from preprocessing.errors import BadEpisode
from preprocessing.limits import limits

SIGNATURE = b"\x89HDF\r\n\x1a\n"
SUFFIXES = (".hdf5", ".h5")
PIECE_BYTES = 2**24
MAX_UNWRITTEN = 2**16  # chunks: they cost a file nothing, but whoever reads them time
MAX_PACKED = 4096  # times smaller than unpacked; Deflate's best is 1032
MAX_MEMBERS = 2**16  # of one episode; links among groups may make any number of few

Kind = Literal["aloha", "droid", "demonstrations"]


def hdf5_files(path: Path, kind: Kind) -> Iterator[Path]:
    """The file itself, or the files directly in a folder: by name, or by the signature where the name says nothing.

    What nobody else knows is taken for demonstrations, whose reader says what is wrong with it.
    """
    for file in [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file()):
        named = file.suffix.lower() in SUFFIXES
        if not file.name.startswith(".") and (named or _is_hdf5(file)) and _kind(file) == kind:
            yield file


def _is_hdf5(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(SIGNATURE)) == SIGNATURE


def _kind(path: Path) -> Kind:
    try:
        with h5py.File(path, "r") as file:
            if isinstance(own(file, "observations"), h5py.Group) and isinstance(own(file, "action"), h5py.Dataset):
                return "aloha"
            groups = [own(file, "observation"), own(file, "action")]
            if path.name == "trajectory.h5" and all(isinstance(group, h5py.Group) for group in groups):
                return "droid"
    except (OSError, RuntimeError, BadEpisode):
        pass
    return "demonstrations"


def child(group: h5py.Group, name: str, kind: type) -> Any:
    """A member of this kind; BadEpisode where there is none."""
    member = own(group, name)
    if not isinstance(member, kind):
        raise BadEpisode(f"no {'group' if kind is h5py.Group else 'data set'} {name!r} in {group.name}")
    return member


def own(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset | None:
    """A member stored in this very file; None for one that is absent or lies, or may lie, in another."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        return None
    try:
        member = group[name]
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise BadEpisode(f"{name} in {group.name} cannot be opened: {error}") from None
    if isinstance(member, h5py.Dataset) and (member.is_virtual or member.external):
        return None
    return member


def numbers(dataset: h5py.Dataset) -> np.ndarray:
    """Its values, unless it claims to hold more than memory does."""
    if dataset.dtype.kind not in "fiub" or 4 * dataset.size > limits().array_bytes:
        raise BadEpisode(f"{dataset.name} is {dataset.shape} of {dataset.dtype}, not a number or a vector a step")
    return dataset[()].astype(np.float32)


def check_claims(dataset: h5py.Dataset) -> None:
    """BadEpisode where it claims to hold what no file of its size does, or in larger pieces than memory may hold."""
    most, is_picture = limits(), dataset.ndim == 4
    if is_picture and dataset.shape[1] * dataset.shape[2] > most.picture_pixels:
        raise BadEpisode(f"{dataset.name} holds pictures of {dataset.shape[1:3]}, more than limits.picture_pixels")
    if math.prod(dataset.chunks or ()) * dataset.dtype.itemsize > most.array_bytes:
        raise BadEpisode(f"{dataset.name} comes in pieces of {dataset.chunks}, more than limits.array_bytes")
    unwritten = 0
    if dataset.chunks:
        parts = (math.ceil(size / part) for size, part in zip(dataset.shape, dataset.chunks, strict=True))
        unwritten = math.prod(parts) - dataset.id.get_num_chunks()
    stored = dataset.id.get_storage_size()
    if unwritten > MAX_UNWRITTEN or dataset.nbytes > max(most.array_bytes, MAX_PACKED * stored):
        raise BadEpisode(f"{dataset.name} claims to hold {dataset.nbytes} bytes, but only {stored} are there")


def text(value: Any) -> str:
    """HDF5 strings come as str, bytes or arrays of one; LIBERO also writes lists of words or of one sentence."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    elif isinstance(value, np.ndarray | list | tuple):
        value = " ".join(text(part) for part in value)
    return value.strip().strip('"') if isinstance(value, str) else ""


def json_of(value: Any) -> dict[str, Any]:
    try:
        parsed = json.loads(text(value) or "{}")
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def digest_of(group: h5py.Group, attributes: dict[str, Any]) -> str:
    """Of the values of all data sets below a group, and of these attributes, which change what they mean."""
    sha = hashlib.sha256()
    for name, value in attributes.items():
        if value is not None:
            sha.update(f"{name}={text(value) or value};".encode())
    for key, dataset in datasets(group):
        check_claims(dataset)
        sha.update(f"{key} {dataset.dtype.str} {dataset.shape};".encode())
        rows = max(1, PIECE_BYTES // max(1, dataset.nbytes // max(1, len(dataset) if dataset.ndim else 1)))
        for start in range(0, len(dataset) if dataset.ndim else 1, rows):
            piece = dataset[start : start + rows] if dataset.ndim else dataset[()]
            if not dataset.dtype.hasobject:
                sha.update(np.ascontiguousarray(piece).tobytes())
                continue
            for value in np.ravel(piece):  # text, or rows of different lengths
                data = value if isinstance(value, bytes) else np.asarray(value).tobytes()
                sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()


def datasets(group: h5py.Group) -> Iterator[tuple[str, h5py.Dataset]]:
    """All below a group, by name."""
    for number, (name, member) in enumerate(_members(group, "")):
        if number == MAX_MEMBERS:
            raise BadEpisode(f"{group.name} has more than {MAX_MEMBERS} members")
        if isinstance(member, h5py.Dataset) and member.shape is not None:
            yield name, member


def _members(group: h5py.Group, prefix: str) -> Iterator[tuple[str, h5py.Group | h5py.Dataset | None]]:
    for key in sorted(group):
        member = own(group, key)
        yield f"{prefix}{key}", member
        if isinstance(member, h5py.Group):
            yield from _members(member, f"{prefix}{key}/")


def at_once(pictures: h5py.Dataset) -> int:
    """How many raw pictures to hold."""
    return max(1, min(FRAMES_PER_CHUNK, limits().array_bytes // max(1, math.prod(pictures.shape[1:]))))


def frames_reader(path: Path, name: str) -> Callable[[int, int], np.ndarray]:
    """The file is opened for each slice: an open handle would outlive the consumer and cannot be sent anywhere."""

    def read(start: int, stop: int) -> np.ndarray:
        try:
            with h5py.File(path, "r") as file:
                return file[name][start:stop]
        except (OSError, KeyError) as error:
            raise BadEpisode(f"{name} cannot be read from frame {start}: {error}") from None

    return read
