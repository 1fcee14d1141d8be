"""CALVIN: one file per step, ``episode_0358482.npz``, and a table of continuous recordings.

A split's folder (``training``, ``validation``) holds ``ep_start_end_ids.npy`` with the first and last step of each
recording, and ``lang_annotations/auto_lang_ann.npy`` with instructions for some stretches. With instructions, each
stretch is an episode, and recordings are not read in addition: they would hold the same frames again. Without, each
recording is an episode. The layout: https://github.com/mees/calvin/tree/main/dataset. If that folder is missing,
another ``lang_*`` folder, written for another language model (``lang_folder`` in ``calvin_models/conf``), or the
split's own folder is used. Depth and touch are not read.

Actions are the relative ones that CALVIN's policies are trained on: ``rel_actions``, the motion of the tool in the
world frame, in metres times 50 and radians times 20, clipped at 1. An episode's digest covers its steps' files and its
instruction.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.episode import FRAMES_PER_CHUNK, ActionBlock, Episode, EpisodeRef, Repair, Video
from preprocessing.errors import BadEpisode, UserError
from preprocessing.limits import limits
from preprocessing.sources.scan_cache import Finding, file_digest, findings, overlaps
from preprocessing.sources.untrusted.files import contents
from preprocessing.sources.untrusted.pickles import read_npy
from preprocessing.video.arrays import array_video

FPS = 30.0
RANGES = "ep_start_end_ids.npy"
STEP = re.compile(r"episode_(\d{7,18})\.npz")
ANNOTATIONS = "auto_lang_ann.npy"
MAX_LIST = 2**28  # bytes; the largest annotation file, with its embeddings, has 10**8
NOT_READ = ("depth_static", "depth_gripper", "rgb_tactile", "depth_tactile")
SPLITS = ("training", "validation")
CAMERAS = {"rgb_static": "static", "rgb_gripper": "gripper"}
LAYOUT = (
    ActionBlock(name="position", size=3, kind="position", mode="delta", frame="base", unit="scaled"),
    ActionBlock(
        name="rotation", size=3, kind="rotation", representation="euler_xyz", mode="delta", frame="base", unit="scaled"
    ),
    ActionBlock(name="gripper", size=1, kind="gripper", mode="absolute", gripper_one_means="open"),
)


def detect(path: Path) -> bool:
    """Other programs may write a file of that name, but not beside steps."""
    if not (path / RANGES).is_file():
        return False
    with os.scandir(path) as entries:
        return any(STEP.fullmatch(entry.name) for entry in entries)


def scan(path: Path) -> Iterator[EpisodeRef]:
    folder = path.absolute()
    stretches, there = _stretches(folder), _steps(folder)
    claimed = _claimed_twice(stretches, there)
    whole = [stretch for stretch in stretches if stretch.missing(there) is None]
    files = dict.fromkeys(file for stretch in whole for file in stretch.files(folder))
    found, known = findings("calvin", files, _read), dict[Path, Finding]()
    for index, stretch in enumerate(stretches):
        if (missing := stretch.missing(there)) is not None:
            lost = f"{_name(missing)} is missing, of steps {stretch.first} to {stretch.last}"
            yield EpisodeRef(str(folder / RANGES), "calvin", index, stretch.digest([lost]), lost)
            continue
        steps = list(stretch.files(folder))
        for file in steps:
            while file not in known:
                step, [known[step]] = next(found)
        problem = next((f"{file.name} {known[file].problem}" for file in steps if known[file].problem), None)
        problem = problem or claimed.get(index)
        joined = stretch.digest(known[file].digest for file in steps)
        yield EpisodeRef(str(folder / RANGES), "calvin", index, joined, problem)


def digest(ref: EpisodeRef) -> str:
    folder, stretch = _stretch(ref)
    return stretch.digest(map(file_digest, stretch.files(folder)))


def load(ref: EpisodeRef) -> Episode:
    folder, stretch = _stretch(ref)
    files = list(stretch.files(folder))
    with _opened(files[0]) as first:
        held = {name.removesuffix(".npy") for name in first.namelist()}
    cameras, repairs = dict[str, Video](), list[Repair]()
    for name, camera in CAMERAS.items():
        try:
            if name in held:
                cameras[camera], mended = _camera(files, name)
                repairs += mended
        except BadEpisode as error:
            repairs.append(Repair("streams", f"{error}; left out"))
    vectors = _vectors(files, ["robot_obs", "rel_actions"])
    for name in sorted(held - {*vectors, *CAMERAS, *NOT_READ}):
        try:
            vectors |= _vectors(files, [name])
        except (BadEpisode, ValueError, TypeError) as error:
            text = str(error) if name in str(error) else f"{name}: {error}"
            repairs.append(Repair("streams", f"{text}; left out"))
    return Episode(
        ref=ref,
        fps=FPS,
        cameras=cameras,
        proprio={"robot_obs": vectors["robot_obs"]},
        action=vectors["rel_actions"],
        action_layout=LAYOUT,
        instruction=stretch.instruction,
        success=None,
        embodiment="panda",
        repairs=tuple(repairs),
        signals={name: rows for name, rows in vectors.items() if name not in ("robot_obs", "rel_actions")},
        texts={"language/ann": stretch.instruction} if stretch.instruction else {},
        split=folder.name if folder.name in SPLITS else None,
    )


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps, and the instruction that they carry out."""

    first: int
    last: int
    instruction: str | None

    def files(self, folder: Path) -> Iterator[Path]:
        return (folder / _name(step) for step in range(self.first, self.last + 1))

    def missing(self, there: np.ndarray) -> int | None:
        """The first step that is not in the sorted ``there``. Fast, as a list may claim any number of steps."""
        begin, end = np.searchsorted(there, [self.first, self.last + 1])
        held = there[begin:end] - self.first
        gaps = np.flatnonzero(held != np.arange(len(held)))
        count = int(gaps[0]) if len(gaps) else len(held)
        return None if count == self.last + 1 - self.first else self.first + count

    def digest(self, steps: Iterable[str]) -> str:
        return hashlib.sha256(json.dumps([[*steps], self.instruction]).encode()).hexdigest()


def _stretch(ref: EpisodeRef) -> tuple[Path, Stretch]:
    folder = Path(ref.uri).parent
    stretches = _stretches(folder)
    if ref.index >= len(stretches):
        raise BadEpisode(f"{folder} now has only {len(stretches)} episodes, fewer than when it was listed")
    return folder, stretches[ref.index]


@lru_cache(maxsize=1)  # CALVIN's largest split has 23,000
def _listed(file: Path, _changed: int) -> list[Stretch]:
    try:
        table = read_npy(contents(file, MAX_LIST))
        if file.name == RANGES:
            return [_checked(first, last, None) for first, last in table.tolist()]
        pairs = zip(table["info"]["indx"], table["language"]["ann"], strict=True)
        return [_checked(first, last, instruction) for (first, last), instruction in pairs]
    except (OSError, BadEpisode, LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{file}: not a list of episodes ({error}); restore the file") from None


def _stretches(folder: Path) -> list[Stretch]:
    lists = [
        folder / "lang_annotations" / ANNOTATIONS,
        *sorted(folder.glob(f"lang_*/{ANNOTATIONS}")),
        folder / ANNOTATIONS,
    ]
    file = next((file for file in lists if file.is_file()), folder / RANGES)
    return _listed(file, file.stat().st_mtime_ns)


def _claimed_twice(stretches: list[Stretch], there: np.ndarray) -> dict[int, str]:
    """Why a recording is refused whose steps another one claims, too; annotated stretches may overlap."""
    recordings = [
        (one.first, one.last + 1, index)
        for index, one in enumerate(stretches)
        if one.instruction is None and one.missing(there) is None
    ]
    return {
        index: f"episode {other} claims some of its steps, too; mend {RANGES}" for index, other in overlaps(recordings)
    }


def _name(step: int) -> str:
    return f"episode_{step:07d}.npz"


def _steps(folder: Path) -> np.ndarray:
    """The steps that have a file, int64, sorted; the largest split has two million."""
    names = (STEP.fullmatch(file.name) for file in folder.iterdir())
    return np.unique(np.fromiter((int(name[1]) for name in names if name), np.int64))


def _checked(first: Any, last: Any, instruction: Any) -> Stretch:
    if not 0 <= int(first) <= int(last) < int(first) + limits().episode_steps:
        raise ValueError(f"steps {int(first)} to {int(last)}")
    if not isinstance(instruction, str | None):
        raise TypeError(f"an instruction that is a {type(instruction).__name__}")
    return Stretch(int(first), int(last), instruction)


def _vectors(files: list[Path], names: list[str]) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for file in files:
        with _opened(file) as arrays:
            for name, rows in found.items():
                rows.append(_array(file, arrays, name))
                if rows[-1].ndim != 1 or rows[-1].shape != rows[0].shape:
                    raise BadEpisode(f"{name} is not one vector per step")
    return {name: np.stack(rows).astype(np.float32) for name, rows in found.items()}


def _camera(files: list[Path], name: str) -> tuple[Video, list[Repair]]:
    with _opened(files[0]) as arrays:
        image = _array(files[0], arrays, name)

    def pieces() -> Iterator[np.ndarray]:
        for file in files:
            with _opened(file) as arrays:
                row = _array(file, arrays, name)
            if (row.shape, row.dtype) != (image.shape, image.dtype):
                raise BadEpisode(f"{name} in {file.name} is {row.dtype} of shape {row.shape}, unlike the first")
            yield row[None]

    return array_video(name, image.shape, image.dtype, pieces)


def _array(file: Path, arrays: zipfile.ZipFile, name: str) -> np.ndarray:
    if f"{name}.npy" not in arrays.namelist():
        raise BadEpisode(f"{file.name} holds no {name}")
    member = arrays.getinfo(f"{name}.npy")
    if member.file_size > limits().array_bytes // FRAMES_PER_CHUNK:  # as many as are held at once
        where = f"{name} in {file.name} decompresses to {member.file_size} bytes"
        raise BadEpisode(f"{where}, more than a {FRAMES_PER_CHUNK}th of limits.array_bytes")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadEpisode(f"{name} in {file.name} is not compressed with deflate")
    with arrays.open(member) as opened:  # read() without a size could return more than declared
        return np.asarray(read_npy(opened.read(member.file_size)))


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(file) as opened:
            yield opened
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:  # RuntimeError: encrypted
        raise BadEpisode(f"{file.name} cannot be read: {error}") from None


def _read(file: Path) -> list[Finding]:
    return [Finding(file_digest(file))]
