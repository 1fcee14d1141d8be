"""Which format an HDF5 file has, judged by its groups; for a file of none, which one it looks like."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

import h5py

from preprocessing.errors import BadEpisode
from preprocessing.sources.untrusted.files import files_in, magic
from preprocessing.sources.untrusted.hdf5 import own

SIGNATURE = b"\x89HDF\r\n\x1a\n"
SUFFIXES = (".hdf5", ".h5")
MAX_NAMED = 8  # members of an unknown file that are listed

Kind = Literal["aloha", "droid", "maniskill", "minari", "robotwin", "demonstrations"]


def hdf5_files(path: Path, kind: Kind) -> Iterator[Path]:
    """The file itself, or the files directly in a folder: by suffix, else by signature.

    Unknown files count as demonstrations; their reader reports what is wrong.
    """
    for file in files_in(path):
        if (file.suffix.lower() in SUFFIXES or magic(file).startswith(SIGNATURE)) and kind_of(file) == kind:
            yield file


def kind_of(file: Path) -> Kind:
    """The kind of recording; remembered, as each reader of HDF5 asks."""
    status = file.stat()
    return _kind(os.fspath(file), status.st_mtime_ns, status.st_ctime_ns, status.st_size)


def episode_groups(file: h5py.Group, name: str) -> list[str]:
    """The groups called NAME_0, NAME_1, ..., in the order of their numbers."""
    numbered = [(int(found[1]), key) for key in file if (found := re.fullmatch(rf"{name}_([0-9]{{1,9}})", key))]
    return [key for _, key in sorted(numbered)]


def resembles(file: h5py.Group) -> str:
    """Which format a file without demonstrations looks like and what it lacks, in one clause."""
    top = {key: own(file, key) for key in sorted(file)[: 2**10]}
    names = set(top)
    if {"puppet", "master"} & names:
        return "it looks like RoboMIND's (groups puppet and master), which is not read; convert it to LeRobot"
    if {"observations", "actions"} <= names and isinstance(top["observations"], h5py.Dataset):
        return "it looks like D4RL's: vectors of steps without pictures"
    if "observations" in names or "observation" in names:
        return f"it looks like ALOHA's or RoboTwin's, but has no action or joint_action; it holds {_listed(file)}"
    if {"state", "action"} <= names:
        return "it looks like AgiBot World's proprio_stats.h5, which is not read; convert the data set to LeRobot"
    if isinstance(top.get("data"), h5py.Dataset):
        return "its member data is a data set, not a group of demonstrations"
    if numbered := next((key for key in top if re.fullmatch(r"(traj|episode|demo)_\d+", key)), None):
        return f"{numbered} is neither below a group data, as in robomimic, nor has actions, as in ManiSkill and Minari"
    return f"it is of no known format (see docs/formats.md); it holds {_listed(file)}"


def _listed(file: h5py.Group) -> str:
    names = sorted(file)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(name[:40] for name in names[:MAX_NAMED]) + more if names else "nothing"


@lru_cache(maxsize=2**12)
def _kind(path: str, _modified: int, _changed: int, _size: int) -> Kind:
    try:
        with h5py.File(path, "r") as file:
            return _kind_of_groups(file, Path(path).name)
    except (OSError, RuntimeError, BadEpisode):
        return "demonstrations"


def _kind_of_groups(file: h5py.File, name: str) -> Kind:
    def group(name: str) -> bool:
        return isinstance(own(file, name), h5py.Group)

    if group("observations") and any(own(file, action) is not None for action in ("action", "actions")):
        return "aloha"
    if name == "trajectory.h5" and group("observation") and group("action"):
        return "droid"
    if group("data"):
        return "demonstrations"
    if group("observation") and group("joint_action"):
        return "robotwin"
    kinds: tuple[tuple[Kind, str], ...] = (("maniskill", "traj"), ("minari", "episode"))
    for kind, prefix in kinds:
        for key in episode_groups(file, prefix)[:1]:
            if isinstance(first := own(file, key), h5py.Group) and "actions" in first:
                return kind
    return "demonstrations"
