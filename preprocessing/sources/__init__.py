"""Raw files in, episodes out: one reader a format, found by content.

A reader is a module with four functions: ``detect(path)`` says whether a file or folder holds its format,
``scan(path)`` lists the episodes by hashing bytes, decoding nothing, ``load(ref)`` makes one an Episode, in any
process that sees the files, and ``digest(ref)`` hashes its bytes once more. To add a format, write such a module and
name it in ``FORMATS``. What a scan finds in a file is remembered until the file changes
(:mod:`preprocessing.sources.scan_cache`).

What a contract overrides (:mod:`preprocessing.contracts.contract`) is overridden here, once for all formats.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

from preprocessing.contracts.contract import DataContract, shipped_for
from preprocessing.episode import Episode, EpisodeRef
from preprocessing.errors import BadEpisode, UserError
from preprocessing.sources import (
    aloha,
    bridge,
    calvin,
    droid,
    robomimic,
    video,
    webdataset,
)
from preprocessing.sources.lerobot import reader as lerobot
from preprocessing.sources.replay_buffer import reader as replay_buffer
from preprocessing.sources.rlds import reader as rlds
from preprocessing.sources.ros import reader as ros
from preprocessing.video.frames import thinned, until_broken

FORMATS: dict[str, ModuleType] = {
    "rlds": rlds,
    "lerobot": lerobot,
    "calvin": calvin,
    "droid": droid,
    "bridge": bridge,
    "aloha": aloha,
    "hdf5": robomimic,
    "ros": ros,
    "replay_buffer": replay_buffer,
    "webdataset": webdataset,
    "video": video,
}
ACTIONLESS = ("webdataset", "video")  # may be thinned; robot logs keep the rate of their actions
# Bytes from outside break readers in more ways than anybody foresees; one bad file must not end an ingest.
BREAKS = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
# Whether a data set's folder is closed: then what lies below it is its own (LeRobot's MP4 files are no episodes).
CLOSED: dict[str, Callable[[Path], bool]] = dict.fromkeys(("rlds", "lerobot", "calvin", "droid", "bridge"), Path.is_dir)
CLOSED["replay_buffer"] = replay_buffer.encloses


def find(path: str | Path, format: str = "auto") -> list[tuple[str, Path]]:
    """What there is to read at a path, as (format, path for ``scan``): a data set, or all those below a folder."""
    start = _local(path)
    if format != "auto" and format not in FORMATS:
        raise UserError(f"--format {format}: no such format; one of auto, {', '.join(FORMATS)}")
    wanted = list(FORMATS) if format == "auto" else [format]
    if not start.exists():
        raise UserError(f"{path}: no such file or folder; check the path")
    # A file keeps its own name where it is a link, for its neighbours may matter (features.json); no ".." stays.
    start = start.resolve() if start.is_dir() else start.parent.resolve() / start.name
    try:
        found = list(_walk(start, wanted, set()))
        empty = start.is_dir() and not any(start.iterdir())
    except PermissionError as error:
        raise UserError(f"{error.filename}: may not be read; check its permissions") from None
    if empty:
        raise UserError(f"{path}: an empty folder; put {_known(format)} there")
    if not found and format != "auto":
        raise UserError(f"{path}: holds nothing of format {format}; expected {_known(format)}, or use --format auto")
    if not found:
        raise UserError(f"{path}: no known format; expected {_known(format)}")
    return found


def scan(format: str, path: Path) -> Iterator[EpisodeRef]:
    """The episodes at a path that ``find`` gave. Unreadable ones come too, with their ``problem``.

    A file that an earlier scan read, and that has not changed since, is not read again. What is broken in a data set as
    a whole comes as one episode with a problem: it must not keep others from being read.
    """
    try:
        yield from FORMATS[format].scan(path)
    except UserError as error:
        yield _broken(format, path, str(error))
    except (BadEpisode, *BREAKS) as error:
        yield _broken(format, path, f"{path}: cannot be listed: {type(error).__name__}: {error}")


def _broken(format: str, path: Path, problem: str) -> EpisodeRef:
    return EpisodeRef(str(path.absolute()), format, 0, hashlib.sha256(problem.encode()).hexdigest(), problem)


def digest(ref: EpisodeRef) -> str:
    """The digest of the bytes as they are on disk now, never from memory; ``ref.digest`` if they are still the same.

    Raises BadEpisode where they are gone, or no longer such an episode.
    """
    try:
        return FORMATS[ref.format].digest(ref)
    except FileNotFoundError:
        raise BadEpisode("its file has gone since it was listed") from None
    except BREAKS as error:
        raise BadEpisode(f"cannot be read again: {type(error).__name__}: {error}") from error


def load(
    ref: EpisodeRef,
    contract: DataContract | None = None,
    fps: float | None = None,
    breaks: list[str] | None = None,
) -> Episode:
    """The episode, as the contract has it. Raises BadEpisode, or UserError where the contract does not fit.

    Without one, a shipped contract for the data set holds, unless its episodes are not what that one says. Of a video
    alone at most ``fps`` frames a second are kept; a robot log keeps its control rate. Where ``breaks`` is given, a
    video that breaks ends there, and why is added to the list as its frames are read.
    """
    if ref.problem:
        raise BadEpisode(ref.problem)
    try:
        episode = FORMATS[ref.format].load(ref)
    except UserError as error:  # of the data set as a whole
        raise BadEpisode(str(error)) from error
    except BREAKS as error:
        raise BadEpisode(f"cannot be read as {ref.format}: {type(error).__name__}: {error}") from error
    _check(episode)
    episode = contract.apply(episode) if contract else _as_shipped(episode)
    episode = replace(episode, embodiment=_slug(episode.embodiment))
    episode = _at_most(episode, fps) if fps else episode
    if breaks is None or ref.format not in ACTIONLESS:
        return episode
    return replace(episode, cameras={name: until_broken(video, breaks) for name, video in episode.cameras.items()})


def _as_shipped(episode: Episode) -> Episode:
    """By the first shipped contract for the data set that fits."""
    misfits = []
    for known in shipped_for(episode.dataset):
        try:
            return known.apply(episode)
        except UserError as misfit:
            guess = f"{episode.dataset} is not as the shipped contract {known.name} says ({misfit})"
            misfits.append(f"{guess}; read as found")
    return replace(episode, repairs=(*episode.repairs, *misfits))


def shipped_contract(episode: Episode) -> DataContract | None:
    """The one that ``load`` read this episode by where it was given none."""
    for known in shipped_for(episode.dataset):
        with suppress(UserError):
            known.apply(load(episode.ref, DataContract()))
            return known
    return None


def _at_most(episode: Episode, fps: float) -> Episode:
    if episode.action is not None or episode.proprio or episode.fps <= fps:
        return episode
    cameras = {name: thinned(video, fps / episode.fps) for name, video in episode.cameras.items()}
    return replace(episode, fps=fps, cameras=cameras)


def _check(episode: Episode) -> None:
    """What every reader owes: rows that belong together, and a layout of exactly the action's columns."""
    rows = {name: len(values) for name, values in (episode.signals | episode.proprio).items()}
    if episode.action is not None:
        rows["action"] = len(episode.action)
        if sum(block.size for block in episode.action_layout) != episode.action.shape[1]:
            raise BadEpisode(f"the action has {episode.action.shape[1]} columns, its layout another number")
    if len(set(rows.values())) > 1:
        raise BadEpisode("lengths differ: " + ", ".join(f"{name} {count}" for name, count in sorted(rows.items())))
    if 0 in rows.values():
        raise BadEpisode("holds no step")
    if not episode.cameras:
        raise BadEpisode("has no camera")


def _slug(name: str) -> str:
    """``PandaOmron`` and ``panda_omron`` are one robot: panda-omron."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "-", name).lower()).strip("-") or "unknown"


def _walk(path: Path, wanted: list[str], seen: set[Path]) -> Iterator[tuple[str, Path]]:
    if path.is_dir():
        if path.resolve() in seen:  # a link that leads back up
            return
        seen.add(path.resolve())
    for name in wanted:
        if FORMATS[name].detect(path):
            yield name, path
            if name in CLOSED and CLOSED[name](path):
                return
    if path.is_dir():
        for child in sorted(path.iterdir()):
            if child.is_dir() and not child.name.startswith("."):
                yield from _walk(child, wanted, seen)


def _local(path: str | Path) -> Path:
    scheme, separator, _ = str(path).partition("://")
    if not separator:
        return Path(path)
    if scheme != "file":
        raise UserError(f"{path}: sources are read from local paths and file:// only; copy or mount the data first")
    return Path(unquote(urlsplit(str(path)).path))


def _known(format: str) -> str:
    means = {
        "auto": f"one of {', '.join(FORMATS)} (docs/formats.md tells more)",
        "rlds": "features.json and *.tfrecord-* files",
        "lerobot": "meta/info.json",
        "calvin": "ep_start_end_ids.npy",
        "droid": "trajectory.h5, metadata_*.json and recordings",
        "bridge": "obs_dict.pkl, policy_out.pkl and images0",
        "aloha": "ALOHA or ACT *.hdf5",
        "hdf5": "robomimic or LIBERO *.hdf5",
        "ros": "*.mcap, ROS 2 bags, *.bag",
        "replay_buffer": "Diffusion Policy or UMI *.zarr, *.zarr.zip",
        "webdataset": "*.tar of clips, not packed",
        "video": "*.mp4, *.mkv, *.webm, ...",
    }
    return means[format]
