"""Measurements of what a source's episodes actually contain: to write a contract from, and to check one against.

The most telling measurement is the lag: by how many steps the robot's motion follows the command. Row t of an action is
the command at frame t, so the earliest motion it can cause is that between frames t and t+1. A negative lag means that
actions are recorded late, or that they are not commands but measurements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from preprocessing.contracts.contract import DataContract
from preprocessing.episode import ActionBlock, Episode, EpisodeRef
from preprocessing.errors import BadEpisode
from preprocessing.quality.duplicates import Fingerprints, fingerprint, frame_hashes
from preprocessing.quality.filters import DARK
from preprocessing.sources import load

MEAN_SIZE = 16  # pixels a side of the frames from which up and down and copies are found
COPIES = 4.0  # bits of 64 per frame in which re-encoded videos differ
LAGS = range(-5, 6)
CHANCE = 5.0  # standard deviations of the correlation of unrelated columns
LATE = 3  # steps of lag that are plausible for a robot
FEWEST = 8  # steps that an episode needs for measuring a lag
RELATED = 0.3  # correlation above which an action column is taken to move something
TERMINAL = ("is_last", "dones", "next.done")


class Lag(NamedTuple):
    """The number of steps by which motion best follows the command, and the correlation (0 to 1) at that lag."""

    steps: int
    correlation: float
    mode: Literal["absolute", "delta"]
    proprio: str

    @property
    def said(self) -> str:
        when = f"{self.steps} steps later" if self.steps >= 0 else f"{-self.steps} steps too early"
        return (
            f"{self.proprio} follows the action {when}, like {self.mode} actions (correlation {self.correlation:.2f})"
        )


@dataclass
class Measured:
    """What was measured on the episodes that were read, under a contract or as found.

    ``frames`` and ``mean_frames`` have an entry for each episode, by camera: the number of frames, and their grey mean
    float ``[MEAN_SIZE, MEAN_SIZE]``. ``splits`` maps splits to ids of episodes; copies have the id of the first.
    """

    listed: int  # episodes in the source, read or not
    episodes: list[Episode] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)  # uri and index, reason
    frames: list[dict[str, int]] = field(default_factory=list)
    mean_frames: list[dict[str, np.ndarray]] = field(default_factory=list)
    splits: dict[str, set[str]] = field(default_factory=dict)
    twice: int = 0  # episodes whose exact bytes were already listed
    copies: int = 0  # episodes with another's frames and actions, but not its bytes

    def repairs(self) -> Counter[str]:
        """Return the number of episodes with each repair, by its text."""
        return Counter(repair.text for episode in self.episodes for repair in episode.repairs)

    def actions(self) -> np.ndarray | None:
        """Return all action rows ``[T, A]`` of the episodes whose action is as wide as the first one's."""
        found = [episode.action for episode in self.episodes if episode.action is not None]
        same = [action for action in found if action.shape[1] == found[0].shape[1]]
        return np.concatenate(same) if same else None


def measure(
    refs: Sequence[EpisodeRef], contract: DataContract | None, chosen: Iterable[EpisodeRef], decode: bool = True
) -> Measured:
    """Read the ``chosen`` among all ``refs`` of a source. Raises UserError if the contract does not fit them.

    With ``decode``, all their frames are decoded and counted.
    """
    measured = Measured(len(refs), twice=len(refs) - len({ref.id for ref in refs}))
    measured.problems = [(f"{ref.uri} #{ref.index}", ref.problem) for ref in refs if ref.problem]
    known = Fingerprints()
    for ref in chosen:
        where = f"{ref.uri} #{ref.index}"
        try:
            episode = load(ref, contract)
            seen, broken = _watch(episode) if decode else ({}, {})
        except BadEpisode as bad:
            measured.problems.append((where, str(bad)))
            continue
        measured.problems += [(where, f"camera {name}: {reason}") for name, reason in broken.items()]
        episode = replace(
            episode, cameras={name: video for name, video in episode.cameras.items() if name not in broken}
        )
        measured.episodes.append(episode)
        measured.frames.append({name: len(hashes) for name, (hashes, _) in seen.items()})
        measured.mean_frames.append({name: mean_frame for name, (_, mean_frame) in seen.items()})
        marks = (fingerprint(hashes, episode.action) for hashes, _ in seen.values() if len(hashes))
        first = ref.id
        if mark := next(filter(None, marks), None):
            first, _ = known.nearest(mark, COPIES) or (ref.id, 0)
            known.add(first, mark)
        measured.copies += first != ref.id
        if episode.split:
            measured.splits.setdefault(episode.split, set()).add(first)
    return measured


def spread(refs: Sequence[EpisodeRef], count: int) -> list[EpisodeRef]:
    """Return at most ``count`` readable refs, evenly spread over all of them, plus those that occur twice."""
    readable = [ref for ref in refs if not ref.problem]
    places = np.linspace(0, len(readable) - 1, min(count, len(readable))).round().astype(int)
    times = Counter(ref.id for ref in readable)
    chosen = [readable[place] for place in places]
    return [*chosen, *(ref for ref in readable if times[ref.id] > 1 and ref not in chosen)][: 2 * count]


def _watch(episode: Episode) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, str]]:
    """Return the hashes, uint64 ``[T]``, of each camera's frames and their grey mean; and why cameras break.

    Raises BadEpisode if all of them do.
    """
    seen, broken = dict[str, tuple[np.ndarray, np.ndarray]](), dict[str, str]()
    for name, video in episode.cameras.items():
        hashes, total = [np.zeros(0, np.uint64)], np.zeros((MEAN_SIZE, MEAN_SIZE))
        try:
            for chunk in video.frames(MEAN_SIZE):
                grids = chunk.mean(axis=3, dtype=np.float32)
                hashes.append(frame_hashes(grids))
                total += grids.sum(axis=0)
        except BadEpisode as bad:
            broken[name] = str(bad)
            if len(broken) == len(episode.cameras):
                raise
            continue
        every = np.concatenate(hashes)
        seen[name] = every, total / max(len(every), 1)
    return seen, broken


def black_cameras(measured: Measured) -> dict[str, int]:
    """Return the cameras that are black in some episodes, and in how many."""
    means = [(name, mean) for mean_frames in measured.mean_frames for name, mean in mean_frames.items()]
    return Counter(name for name, mean in means if mean.max() < DARK)


def find_lag(episodes: Iterable[Episode]) -> Lag | None:
    """Return the lag of motion behind the command; None if no action column moves anything that proprio measures."""
    acting = [e for e in episodes if e.action is not None and len(e.action) >= FEWEST]
    names = {name for e in acting for name in e.proprio}
    lags = [lag for name in sorted(names) for lag in _lags_to([e for e in acting if name in e.proprio], name)]
    return max(lags, key=lambda lag: lag.correlation, default=None)


def _lags_to(episodes: list[Episode], name: str) -> Iterable[Lag]:
    modes: tuple[Literal["absolute", "delta"], ...] = ("absolute", "delta")
    for mode in modes:
        commands, motions = [], []
        for episode in episodes:
            assert episode.action is not None
            motion = np.diff(episode.proprio[name], axis=0)
            command = np.diff(episode.action, axis=0) if mode == "absolute" else episode.action[:-1]
            commands.append(command)
            motions.append(motion)
        if len({part.shape[1] for part in (*commands,)}) > 1 or len({part.shape[1] for part in motions}) > 1:
            continue
        peaks = np.stack([_related(commands, motions, lag) for lag in LAGS])  # [lags, A]
        by_chance = CHANCE / np.sqrt(sum(map(len, commands)))
        moving = peaks.max(axis=0) > max(RELATED, by_chance)
        if moving.any():
            strength = peaks[:, moving].mean(axis=1)
            best = int(strength.argmax())
            # The difference of absolute commands t and t+1 is row t, but the motion to command t+1 starts at frame t+1.
            yield Lag(LAGS[best] - (mode == "absolute"), float(strength[best]), mode, name)


def _related(commands: list[np.ndarray], motions: list[np.ndarray], lag: int) -> np.ndarray:
    """Return, for each action column, its best correlation ``[A]`` with a column of the motion ``lag`` steps later."""
    early, late = max(0, -lag), max(0, lag)
    a = np.concatenate([part[early : len(part) - late] for part in commands])
    b = np.concatenate([part[late : len(part) - early] for part in motions])
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    size = np.linalg.norm(a, axis=0)[:, None] * np.linalg.norm(b, axis=0)
    return np.abs(np.divide(a.T @ b, size, out=np.zeros_like(size), where=size > 1e-9)).max(axis=1)


def looks_upside_down(measured: Measured) -> list[tuple[Episode, str]]:
    """Return the episodes and cameras whose mean frame resembles the other episodes' more if it is flipped."""
    found = []
    for camera in {name for mean_frames in measured.mean_frames for name in mean_frames}:
        having = [i for i, mean_frames in enumerate(measured.mean_frames) if camera in mean_frames]
        for i in having:
            others = [measured.mean_frames[j][camera] for j in having if j != i]
            if not others:
                continue
            mine, usual = measured.mean_frames[i][camera], np.mean(others, axis=0)
            if _alike(mine[::-1], usual) > max(0.5, _alike(mine, usual) + 0.2):
                found.append((measured.episodes[i], camera))
    return found


def _alike(one: np.ndarray, other: np.ndarray) -> float:
    a, b = one - one.mean(), other - other.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / size if size else 0.0


class Remark(NamedTuple):
    """One finding of a check. ``wrong``: certainly a mistake; otherwise a person should look at it."""

    wrong: bool
    line: str


def check(measured: Measured) -> list[Remark]:
    """Return what is wrong or looks odd in these episodes."""
    remarks = [Remark(True, f"{where}: {reason}") for where, reason in measured.problems]
    for episode, counts in zip(measured.episodes, measured.frames, strict=True):
        steps = len(episode.action) if episode.action is not None else None
        for camera, count in counts.items():
            if steps is not None and count != steps:
                line = f"{_where(episode)}: camera {camera} has {count} frames, but there are {steps} actions"
                remarks.append(Remark(True, line))
    remarks += _of_actions(measured)
    for episode, camera in looks_upside_down(measured):
        remarks.append(
            Remark(False, f"{_where(episode)}: camera {camera} looks upside down compared with other episodes")
        )
    for camera, count in sorted(black_cameras(measured).items()):
        remarks.append(Remark(False, f"camera {camera} is black in {count} of {len(measured.episodes)} episodes"))
    if measured.twice:
        remarks.append(Remark(False, f"{measured.twice} episodes occur twice, byte for byte; one of each is read"))
    if measured.copies:
        line = f"{measured.copies} episodes have the frames and actions of another one, re-encoded or renumbered"
        remarks.append(Remark(False, line))
    names = sorted(measured.splits)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if both := measured.splits[one] & measured.splits[other]:
                line = f"{len(both)} episodes are in {one} and in {other}: training data is tested on"
                remarks.append(Remark(True, line))
    for name in TERMINAL:
        flags = [episode.signals[name] for episode in measured.episodes if name in episode.signals]
        if missing := sum(not flag[-1].any() for flag in flags):
            remarks.append(Remark(False, f"{name} is not set at the end of {missing} of {len(flags)} episodes"))
    return remarks


def _of_actions(measured: Measured) -> Iterable[Remark]:
    widths = Counter(e.action.shape[1] for e in measured.episodes if e.action is not None)
    if len(widths) > 1:
        counts = ", ".join(f"{count} episodes with {width}" for width, count in widths.most_common())
        yield Remark(True, f"actions differ in width: {counts} columns")
    actions = measured.actions()
    if actions is None:
        return
    acting = next(e for e in measured.episodes if e.action is not None)
    still = [name for block, values in blocks(acting, actions) for name in _unchanging(block, values)]
    if still:
        yield Remark(False, f"columns of the action that never change: {', '.join(still)}")
    for block, values in blocks(acting, actions):
        if not np.isfinite(values).all():
            yield Remark(True, f"action {block.name} holds NaN or infinity")
        if block.unit == "scaled" and np.abs(values).max() > 1.001:
            yield Remark(False, f"action {block.name} reaches {np.abs(values).max():g}, though it is scaled to +-1")
        if block.representation == "euler_xyz" and np.abs(values).max() > 2 * np.pi:
            yield Remark(True, f"action {block.name} reaches {np.abs(values).max():g}: not an angle in radians")
    lag = find_lag(measured.episodes)
    if lag is None:
        yield Remark(False, "no column of the action moves anything that proprio measures")
    elif lag.steps < 0:
        yield Remark(True, f"{lag.said}: actions are off by that many rows, or are measurements instead of commands")
    elif lag.steps > LATE:
        yield Remark(False, f"{lag.said}: more than {LATE} steps are unusual")
    declared = {block.mode for block in acting.action_layout if block.kind in ("position", "joint")} - {"unknown"}
    if lag and lag.correlation > 2 * RELATED and len(declared) == 1:
        [mode] = declared
        if (mode == "absolute") != (lag.mode == "absolute"):
            yield Remark(False, f"actions are declared {mode}, but move {lag.proprio} like {lag.mode} actions")


def blocks(episode: Episode, action: np.ndarray) -> Iterable[tuple[ActionBlock, np.ndarray]]:
    """Yield each block of the episode's layout with its columns ``[T, size]`` of an action ``[T, A]``."""
    start = 0
    for block in episode.action_layout:
        yield block, action[:, start : start + block.size]
        start += block.size


def _unchanging(block: ActionBlock, values: np.ndarray) -> list[str]:
    """Return the names of the columns that are constant; the block's own name if all of them are."""
    still = np.ptp(values, axis=0) == 0
    return [block.name] if still.all() else [f"{block.name}[{i}]" for i in np.flatnonzero(still)]


def _where(episode: Episode) -> str:
    return f"{episode.ref.uri} #{episode.ref.index}"
