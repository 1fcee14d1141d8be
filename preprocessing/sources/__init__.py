"""Raw files in, episodes out: one reader per format, found by content.

A reader is a module with the four functions of :class:`Reader`. To add a format, write the module and give it an entry
in ``TABLE``. Scan results of unchanged files are cached (:mod:`preprocessing.sources.scan_cache`).

Contracts (:mod:`preprocessing.contracts.contract`) are applied here, once for all formats.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from preprocessing.contracts.contract import DataContract, shipped_for
from preprocessing.episode import Episode, EpisodeRef, Repair
from preprocessing.errors import BadEpisode, UserError
from preprocessing.sources import archive, bridge, calvin, droid, video, webdataset
from preprocessing.sources.hdf5 import aloha, maniskill, minari, robomimic, robotwin
from preprocessing.sources.lerobot import reader as lerobot_reader
from preprocessing.sources.reader import BREAKS, Format, Reader
from preprocessing.sources.replay_buffer import reader as replay_buffer_reader
from preprocessing.sources.rlds import reader as rlds_reader
from preprocessing.sources.ros import reader as ros_reader
from preprocessing.sources.unread import contract_line, is_command, unread
from preprocessing.sources.untrusted.files import forget, within
from preprocessing.sources.walk import Survey, walk
from preprocessing.video.frames import thinned, until_broken

TABLE = {
    "rlds": Format(rlds_reader, "features.json and *.tfrecord-* files", closed=rlds_reader.encloses),
    "lerobot": Format(lerobot_reader, "meta/info.json", closed=Path.is_dir),
    "calvin": Format(calvin, "ep_start_end_ids.npy", closed=Path.is_dir),
    "droid": Format(droid, "trajectory.h5, metadata_*.json and recordings", closed=Path.is_dir),
    "bridge": Format(bridge, "obs_dict.pkl, policy_out.pkl and images0", closed=Path.is_dir),
    "aloha": Format(aloha, "ALOHA or ACT *.hdf5"),
    "hdf5": Format(robomimic, "robomimic, LIBERO or Isaac Lab *.hdf5"),
    "maniskill": Format(maniskill, "ManiSkill *.h5 with traj_0, traj_1, ..."),
    "minari": Format(minari, "Minari main_data.hdf5"),
    "robotwin": Format(robotwin, "RoboTwin episode*.hdf5"),
    "ros": Format(ros_reader, "*.mcap, ROS 2 bags, *.bag"),
    "replay_buffer": Format(
        replay_buffer_reader,
        "Diffusion Policy or UMI *.zarr, *.zarr.zip",
        closed=replay_buffer_reader.encloses,
        owns=replay_buffer_reader.folders,
    ),
    "webdataset": Format(webdataset, "*.tar of clips, not compressed", actionless=True),
    "video": Format(video, "*.mp4, *.mkv, *.webm, ...", actionless=True),
}
FORMATS: dict[str, Reader] = {name: format.reader for name, format in TABLE.items()}
SLOWEST, FASTEST = 1e-4, 1e4  # frames a second: one in three hours, the fastest cameras
MOST_REASONS = 6  # why streams were left out, of an episode without a camera
UNREADABLE = "unreadable"  # in place of a format: what cannot be looked into, or holds no data
ACTIONLESS = tuple(name for name, format in TABLE.items() if format.actionless)  # these may be thinned


def find(path: str | Path, format: str = "auto") -> list[tuple[str, Path]]:
    """Find the data sets at or below a path, as (format, path for ``scan``). Raises UserError where there are none.

    A path in an archive is ``set.zip!/folder``.
    """
    found = survey(path, format)
    if not found.places:
        place, problem = next(iter(found.problems.items()))
        raise UserError(f"{place}: {problem}")
    return found.places


def survey(path: str | Path, format: str = "auto", looked: Callable[[], object] = lambda: None) -> Survey:
    """Find the data sets at or below a path, and what is there but cannot be read.

    ``looked`` is called after each file and folder. Raises UserError where there is neither.
    """
    start = _local(path)
    if format != "auto" and format not in TABLE:
        raise UserError(f"--format {format}: no such format; one of auto, {', '.join(TABLE)}")
    if not start.exists():
        raise UserError(f"{path}: no such file or folder; check the path")
    if not (start.is_dir() or start.is_file()):
        raise UserError(f"{path}: neither a file nor a folder; copy what it yields to a file")
    # No ".." remains. A linked file keeps its own name and folder: its neighbours may matter (features.json).
    start = start.resolve() if start.is_dir() else start.parent.resolve() / start.name
    try:
        empty = start.is_dir() and not any(start.iterdir())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check its permissions") from None
    forget()
    found = walk(start, TABLE if format == "auto" else {format: TABLE[format]}, every=format == "auto", looked=looked)
    if empty:
        raise UserError(f"{path}: the folder is empty; put {_expected(format)} there")
    if found.places or found.problems:
        return found
    if format != "auto":
        raise UserError(f"{path}: holds nothing of format {format}; expected {_expected(format)}, or use --format auto")
    raise UserError("; ".join([f"{path}: no known format", f"expected {_expected(format)}", *found.notes]))


def episodes(found: Survey, begin: Callable[[Path], object]) -> Iterator[tuple[Path, EpisodeRef]]:
    """List the episodes of a survey, each with the path of its data set, and what cannot be read as one.

    ``begin`` is called with each path before it is read.
    """
    for format, path in found.places:
        begin(path)
        for ref in scan(format, path, found.root):
            yield path, ref
    for path, problem in found.problems.items():
        yield path, _broken(UNREADABLE, path, problem)


def scan(format: str, path: Path, root: Path | None = None) -> Iterator[EpisodeRef]:
    """List the episodes at a path that ``find`` returned, unreadable ones included, with their ``problem``.

    Unchanged files are not read again. A data set that cannot be listed at all yields one episode with a problem, so
    that the others are still read. Nothing outside of ``root``, the source, is read: by default, outside of the path.
    """
    inside = archive.split(path)
    root = root or (inside[0] if inside else path)
    refs = _scan(format, path)
    while True:
        with within(root):
            ref = next(refs, None)
        if ref is None:
            return
        yield replace(ref, root=str(root))


def _scan(format: str, path: Path) -> Iterator[EpisodeRef]:
    try:
        if place := archive.split(path):
            yield from archive.scan(FORMATS[format].scan, format, *place)
        else:
            yield from FORMATS[format].scan(path)
    except UserError as error:
        yield _broken(format, path, str(error))
    except BadEpisode as error:
        yield _broken(format, path, str(error))
    except BREAKS as error:
        yield _broken(format, path, f"{path}: cannot be listed: {type(error).__name__}: {error}")


def _broken(format: str, path: Path, problem: str) -> EpisodeRef:
    return EpisodeRef(
        str(path.absolute()), format, 0, hashlib.sha256(os.fsencode(f"{path} {problem}")).hexdigest(), problem
    )


def digest(ref: EpisodeRef) -> str:
    """Hash the episode's bytes as they are on disk now, never from the cache; equals ``ref.digest`` if unchanged.

    Raises BadEpisode where they are gone or no longer such an episode.
    """
    try:
        with within(_root(ref)):
            return archive.digest(FORMATS[ref.format].digest, ref)
    except FileNotFoundError:
        raise BadEpisode("its file was deleted after it was listed") from None
    except BREAKS as error:
        raise BadEpisode(f"cannot be read again: {type(error).__name__}: {error}") from error


def load(
    ref: EpisodeRef,
    contract: DataContract | None = None,
    fps: float | None = None,
    breaks: list[str] | None = None,
) -> Episode:
    """Return the episode with the contract applied. Raises BadEpisode, or UserError where the contract does not fit.

    Without a contract, a shipped one for the data set applies if it fits. A video without actions is thinned to at most
    ``fps`` frames a second; a robot log keeps its control rate. With ``breaks``, a video that breaks ends there, and
    the reason is appended to the list when its frames are read.
    """
    episode = _recorded(ref)
    episode = contract.apply(episode) if contract else _with_shipped_contract(episode)
    episode = replace(_with_actions_or_a_word(episode), embodiment=_slug(episode.embodiment))
    episode = _at_most(episode, fps) if fps else episode
    if breaks is None or ref.format not in ACTIONLESS:
        return episode
    return replace(episode, cameras={name: until_broken(video, breaks) for name, video in episode.cameras.items()})


def _recorded(ref: EpisodeRef) -> Episode:
    """Return the episode as its reader does, without a contract."""
    if ref.problem:
        raise BadEpisode(ref.problem)
    try:
        with within(_root(ref)):
            episode = archive.load(FORMATS[ref.format].load, ref)
    except UserError as error:  # of the data set as a whole
        raise BadEpisode(str(error)) from error
    except BREAKS as error:
        raise BadEpisode(f"cannot be read as {ref.format}: {type(error).__name__}: {error}") from error
    _check(episode)
    return replace(episode, repairs=(*episode.repairs, *unread(episode)))


def pictures(
    ref: EpisodeRef, contracts: Sequence[DataContract | None], fps: float | None = None
) -> list[dict[str, tuple[Hashable, ...]]]:
    """Return, for each contract, what the cameras' frames are by name: where values are equal, so are the frames.

    ``fps`` is as in ``load``, which raises the same errors.
    """
    recorded = _recorded(ref)
    found: list[dict[str, tuple[Hashable, ...]]] = []
    for contract in contracts:
        known = contract or _shipped(recorded) or DataContract()
        rate = known.apply(recorded).fps
        thinned_by = fps / rate if fps and fps < rate else 1.0
        found.append({name: (*shown, thinned_by) for name, shown in known.pictures(recorded).items()})
    return found


def _with_actions_or_a_word(episode: Episode) -> Episode:
    """A robot's log without actions trains as a video, which nobody may overlook."""
    told = any(repair.field == "action" for repair in episode.repairs)
    if episode.action is not None or told or episode.ref.format in ACTIONLESS:
        return episode
    vectors = [name for name, values in (episode.signals | episode.proprio).items() if values.shape[1] > 1]
    names = ", ".join(vectors) or "none"
    text = f"no action was found; a contract's key `action` names the columns it is made of. Recorded vectors: {names}"
    if commands := [name for name in episode.signals if is_command(name)]:
        text += f"; to read: `{contract_line('action', commands)}`"
    return replace(episode, repairs=(*episode.repairs, Repair("action", text)))


def _with_shipped_contract(episode: Episode) -> Episode:
    """Apply the first shipped contract for the data set that fits."""
    misfits = []
    for known in shipped_for(episode.dataset):
        try:
            return known.apply(episode)
        except UserError as misfit:
            text = f"the shipped contract {known.name} does not fit {episode.dataset} ({misfit}); read without it"
            misfits.append(Repair("contract", text))
    return replace(episode, repairs=(*episode.repairs, *misfits))


def shipped_contract(episode: Episode) -> DataContract | None:
    """Return the shipped contract that ``load`` applied to this episode, if any."""
    return _shipped(load(episode.ref, DataContract()))


def _shipped(recorded: Episode) -> DataContract | None:
    for known in shipped_for(recorded.dataset):
        with suppress(UserError):
            known.apply(recorded)
            return known
    return None


def _at_most(episode: Episode, fps: float) -> Episode:
    if episode.action is not None or episode.proprio or episode.fps <= fps:
        return episode
    cameras = {name: thinned(video, fps / episode.fps) for name, video in episode.cameras.items()}
    return replace(episode, fps=fps, cameras=cameras)


def _check(episode: Episode) -> None:
    """Check what every reader owes: a rate, arrays of one length, and a layout of exactly the action's columns."""
    if not SLOWEST <= episode.fps <= FASTEST:
        raise BadEpisode(f"a rate of {episode.fps:g} frames a second; it must be between {SLOWEST:g} and {FASTEST:g}")
    rows = {name: len(values) for name, values in (episode.signals | episode.proprio).items()}
    if episode.action is not None:
        rows["action"] = len(episode.action)
        columns = sum(block.size for block in episode.action_layout)
        if columns != episode.action.shape[1]:
            raise BadEpisode(f"the action has {episode.action.shape[1]} columns, its layout {columns}")
    if len(set(rows.values())) > 1:
        raise BadEpisode("lengths differ: " + ", ".join(f"{name} {count}" for name, count in sorted(rows.items())))
    if 0 in rows.values():
        raise BadEpisode("holds no step")
    if not episode.cameras:
        left_out = [repair.text for repair in episode.repairs if repair.field == "streams"]
        others = f"; and {len(left_out) - MOST_REASONS} more" if len(left_out) > MOST_REASONS else ""
        reasons = f": {'; '.join(left_out[:MOST_REASONS])}{others}" if left_out else ""
        raise BadEpisode(f"has no camera{reasons}")


def _slug(name: str) -> str:
    """``PandaOmron`` and ``panda_omron`` are one embodiment: panda-omron."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "-", name).lower()).strip("-") or "unknown"


def folder_of(path: Path) -> str:
    """The folder, or the archive, whose episodes belong together, of a path that ``find`` returned."""
    if place := archive.split(path):
        return str(path if place[1] else place[0])
    return str(path if path.is_dir() else path.parent)


def _root(ref: EpisodeRef) -> Path | None:
    return Path(ref.root) if ref.root else None


def _local(path: str | Path) -> Path:
    scheme, separator, _ = str(path).partition("://")
    if not separator:
        return Path(path)
    if scheme != "file":
        raise UserError(f"{path}: sources must be local paths or file:// URLs; copy or mount the data first")
    return Path(unquote(urlsplit(str(path)).path))


def _expected(format: str) -> str:
    if format == "auto":
        return f"one of {', '.join(TABLE)} (see docs/formats.md)"
    return TABLE[format].looks_like
