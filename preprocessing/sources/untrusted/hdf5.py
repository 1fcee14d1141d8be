"""Untrusted HDF5 files: which kind of recording they hold, their contents and digests.

Nothing outside of a file is read: soft and external links, external storage and virtual data sets are not followed.
A digest covers values, not bytes, so a repacked file keeps it.
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
MAX_UNWRITTEN = 2**16  # chunks: they take no space in a file, but time to read
MAX_PACKED = 4096  # compression ratio; Deflate's best is 1032
MAX_MEMBERS = 2**16  # of one episode; a few linked groups can unfold to any number

Kind = Literal["aloha", "droid", "demonstrations"]


def hdf5_files(path: Path, kind: Kind) -> Iterator[Path]:
    """The file itself, or the files directly in a folder: by suffix, else by signature.

    Unknown files count as demonstrations; their reader reports what is wrong.
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
    """The member of this type. Raises BadEpisode if there is none."""
    member = own(group, name)
    if not isinstance(member, kind):
        raise BadEpisode(f"no {'group' if kind is h5py.Group else 'data set'} {name!r} in {group.name}")
    return member


def own(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset | None:
    """The member if it is stored in this file; None if it is absent, or is or might be in another file."""
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
    """The values as float32. Raises BadEpisode if they are not numbers, or exceed the limits."""
    if dataset.dtype.kind not in "fiub" or 4 * dataset.size > limits().array_bytes:
        raise BadEpisode(f"{dataset.name} is {dataset.shape} of {dataset.dtype}, not a number or a vector per step")
    return dataset[()].astype(np.float32)


def check_claims(dataset: h5py.Dataset) -> None:
    """Raise BadEpisode if the data set claims more than its file can hold, or has chunks beyond the limits."""
    most, is_image = limits(), dataset.ndim == 4
    if is_image and dataset.shape[1] * dataset.shape[2] > most.picture_pixels:
        raise BadEpisode(f"{dataset.name} holds images of {dataset.shape[1:3]}, more than limits.picture_pixels")
    if math.prod(dataset.chunks or ()) * dataset.dtype.itemsize > most.array_bytes:
        raise BadEpisode(f"{dataset.name} has chunks of {dataset.chunks}, more than limits.array_bytes")
    unwritten = 0
    if dataset.chunks:
        parts = (math.ceil(size / part) for size, part in zip(dataset.shape, dataset.chunks, strict=True))
        unwritten = math.prod(parts) - dataset.id.get_num_chunks()
    stored = dataset.id.get_storage_size()
    if unwritten > MAX_UNWRITTEN or dataset.nbytes > max(most.array_bytes, MAX_PACKED * stored):
        raise BadEpisode(f"{dataset.name} claims to hold {dataset.nbytes} bytes, but stores only {stored}")


def text(value: Any) -> str:
    """Return a string that is stored as str, bytes or an array; LIBERO also writes lists of words or of one string."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    elif isinstance(value, np.ndarray | list | tuple):
        value = " ".join(text(part) for part in value)
    return value.strip().strip('"') if isinstance(value, str) else ""


def json_of(value: Any) -> dict[str, Any]:
    """Parse a JSON object; empty if it is none."""
    try:
        parsed = json.loads(text(value) or "{}")
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def digest_of(group: h5py.Group, attributes: dict[str, Any]) -> str:
    """Digest the values of all data sets below a group, and these attributes, which change their meaning."""
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
    """Yield all data sets below a group, by path, sorted."""
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


def at_once(images: h5py.Dataset) -> int:
    """How many raw images to hold in memory."""
    return max(1, min(FRAMES_PER_CHUNK, limits().array_bytes // max(1, math.prod(images.shape[1:]))))


def frames_reader(path: Path, name: str) -> Callable[[int, int], np.ndarray]:
    """Read slices of a data set. Opens the file each time: an open handle would outlive its consumer and cannot be
    pickled."""

    def read(start: int, stop: int) -> np.ndarray:
        try:
            with h5py.File(path, "r") as file:
                return file[name][start:stop]
        except (OSError, KeyError) as error:
            raise BadEpisode(f"{name} cannot be read from frame {start}: {error}") from None

    return read
