"""Untrusted HDF5 files: their contents and digests.

Nothing outside of a file is read: soft and external links, external storage and virtual data sets are not followed.
A digest covers values, not bytes, so a repacked file keeps it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

from preprocessing.errors import BadEpisode
from preprocessing.limits import limits

PIECE_BYTES = 2**24
MAX_UNWRITTEN = 2**16  # chunks: they take no space in a file, but time to read
MAX_PACKED = 4096  # compression ratio; Deflate's best is 1032
MAX_MEMBERS = 2**13  # of one episode; a few linked groups can unfold to any number
MAX_DEPTH = 32  # of groups within groups
MAX_VARIABLE = 2**20  # texts, or other values of variable length, in one data set; each takes a microsecond or more


def child(group: h5py.Group, name: str, kind: type) -> Any:
    """The member of this type. Raises BadEpisode if there is none."""
    member = own(group, name)
    if not isinstance(member, kind):
        raise BadEpisode(f"no {'group' if kind is h5py.Group else 'data set'} {name!r} in {group.name}")
    return member


def groups(group: h5py.Group) -> list[str]:
    """The names of the groups in a group, links aside, without opening each: there may be 60,000."""
    found = []
    for name in group:
        place = name.encode("utf-8", "surrogateescape")
        try:
            if group.id.links.get_info(place).type == h5py.h5l.TYPE_HARD:
                found += [name] if h5py.h5o.get_info(group.id, place).type == h5py.h5o.TYPE_GROUP else []
        except (KeyError, OSError, RuntimeError, ValueError) as error:
            raise BadEpisode(f"{name} in {group.name} cannot be opened: {error}") from None
    return found


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
    if dataset.dtype.hasobject and dataset.size > MAX_VARIABLE:
        raise BadEpisode(f"{dataset.name} holds {dataset.size} values of variable length, more than {MAX_VARIABLE}")
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
    for name, member in members(group):
        if isinstance(member, h5py.Dataset) and member.shape is not None:
            yield name, member


def members(group: h5py.Group) -> Iterator[tuple[str, h5py.Group | h5py.Dataset | None]]:
    """Yield everything below a group, by path, sorted; None for links. Raises BadEpisode if it is too much."""
    for number, found in enumerate(_members(group, "", 0)):
        if number == MAX_MEMBERS:
            raise BadEpisode(f"{group.name} has more than {MAX_MEMBERS} members")
        yield found


def _members(group: h5py.Group, prefix: str, depth: int) -> Iterator[tuple[str, h5py.Group | h5py.Dataset | None]]:
    if depth > MAX_DEPTH:
        raise BadEpisode(f"{group.name[:80]}... lies more than {MAX_DEPTH} groups deep")
    if len(group) > MAX_MEMBERS:
        raise BadEpisode(f"{group.name} has {len(group)} members, more than {MAX_MEMBERS}")
    for key in sorted(group):
        member = own(group, key)
        yield f"{prefix}{key}", member
        if isinstance(member, h5py.Group):
            yield from _members(member, f"{prefix}{key}/", depth + 1)
