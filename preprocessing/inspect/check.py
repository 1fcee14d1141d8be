"""What episodes of a source really hold, measured: to write a contract from, and to check one against.

The lag is the most telling of all: by how many steps the robot's motion follows the command. Row t of an action is what
was commanded at frame t, so the motion between frames t and t+1 is the earliest that it can have caused. A lag below
zero means that actions are recorded one row late, or that they are no commands but what was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from preprocessing.contracts.contract import DataContract
from preprocessing.episode import ActionBlock, Episode, EpisodeRef
from preprocessing.errors import BadEpisode
from preprocessing.quality.duplicates import Fingerprints, fingerprint, frame_hashes
from preprocessing.sources import load

PICTURE = 16  # pixels a side, of the mean picture that tells up from down, and of what tells copies
COPIES = 4.0  # bits of 64 a frame in which re-encoded films differ
LAGS = range(-5, 6)
CHANCE = 5.0  # standard deviations of the correlation of what is not related
LATE = 3  # steps that a robot may well need to follow
FEWEST = 8  # steps of an episode that can tell a lag
RELATED = 0.3  # correlation from which an action column is taken to move something
TERMINAL = ("is_last", "dones", "next.done")


class Lag(NamedTuple):
    """Steps by which motion follows the command at best, and how closely it does (a correlation, 0 to 1)."""

    steps: int
    correlation: float
    mode: Literal["absolute", "delta"]
    proprio: str

    @property
    def said(self) -> str:
        when = f"{self.steps} steps later" if self.steps >= 0 else f"{-self.steps} steps before it comes"
        return f"{self.proprio} follows the action {when}, as {self.mode} ones do (correlation {self.correlation:.2f})"


@dataclass
class Measured:
    """Of those episodes of a source that were read, under a contract or as found."""

    listed: int
    episodes: list[Episode] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)  # uri and index, reason
    frames: list[dict[str, int]] = field(default_factory=list)  # of each episode, by camera
    pictures: list[dict[str, np.ndarray]] = field(default_factory=list)  # mean pictures [PICTURE, PICTURE], grey
    splits: dict[str, set[str]] = field(default_factory=dict)  # ids of the episodes of each; of copies the first's
    twice: int = 0  # episodes whose very bytes were listed before
    copies: int = 0  # episodes with the pictures and actions of another, though not its bytes

    def repairs(self) -> Counter[str]:
        """How many episodes have each repair, by its text."""
        return Counter(repair.text for episode in self.episodes for repair in episode.repairs)

    def actions(self) -> np.ndarray | None:
        """All rows ``[T, A]`` of those episodes whose action is as wide as the first one's."""
        found = [episode.action for episode in self.episodes if episode.action is not None]
        same = [action for action in found if action.shape[1] == found[0].shape[1]]
        return np.concatenate(same) if same else None


def measure(
    refs: Sequence[EpisodeRef], contract: DataContract | None, chosen: Iterable[EpisodeRef], decode: bool = True
) -> Measured:
    """Read the ``chosen`` of all ``refs`` of a source; UserError where the contract does not fit them.

    Their frames are decoded, for that tells how many there really are, unless told otherwise.
    """
    measured = Measured(len(refs), twice=len(refs) - len({ref.id for ref in refs}))
    measured.problems = [(f"{ref.uri} #{ref.index}", ref.problem) for ref in refs if ref.problem]
    known = Fingerprints()
    for ref in chosen:
        try:
            episode = load(ref, contract)
            seen = {name: _watch(episode, name) for name in episode.cameras} if decode else {}
        except BadEpisode as bad:
            measured.problems.append((f"{ref.uri} #{ref.index}", str(bad)))
            continue
        measured.episodes.append(episode)
        measured.frames.append({name: len(hashes) for name, (hashes, _) in seen.items()})
        measured.pictures.append({name: picture for name, (_, picture) in seen.items()})
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
    """At most so many of the readable ones, evenly spread over all of them; then those that are there twice."""
    readable = [ref for ref in refs if not ref.problem]
    places = np.linspace(0, len(readable) - 1, min(count, len(readable))).round().astype(int)
    times = Counter(ref.id for ref in readable)
    chosen = [readable[place] for place in places]
    return [*chosen, *(ref for ref in readable if times[ref.id] > 1 and ref not in chosen)][: 2 * count]


def _watch(episode: Episode, camera: str) -> tuple[np.ndarray, np.ndarray]:
    """Hashes uint64 ``[T]`` of a camera's frames, and their mean, grey."""
    hashes, total = [np.zeros(0, np.uint64)], np.zeros((PICTURE, PICTURE))
    for chunk in episode.cameras[camera].frames(PICTURE):
        grids = chunk.mean(axis=3, dtype=np.float32)
        hashes.append(frame_hashes(grids))
        total += grids.sum(axis=0)
    every = np.concatenate(hashes)
    return every, total / max(len(every), 1)


def find_lag(episodes: Iterable[Episode]) -> Lag | None:
    """By how much motion follows the command; None where no column of the actions moves anything that is measured."""
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
            # A change of an absolute command comes a step after the command that the motion starts from.
            yield Lag(LAGS[best] - (mode == "absolute"), float(strength[best]), mode, name)


def _related(commands: list[np.ndarray], motions: list[np.ndarray], lag: int) -> np.ndarray:
    """For each action column ``[A]`` its closest correlation with a column of the motion ``lag`` steps later."""
    early, late = max(0, -lag), max(0, lag)
    a = np.concatenate([part[early : len(part) - late] for part in commands])
    b = np.concatenate([part[late : len(part) - early] for part in motions])
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    size = np.linalg.norm(a, axis=0)[:, None] * np.linalg.norm(b, axis=0)
    return np.abs(np.divide(a.T @ b, size, out=np.zeros_like(size), where=size > 1e-9)).max(axis=1)


def looks_upside_down(measured: Measured) -> list[tuple[Episode, str]]:
    """Episodes and cameras whose mean picture, turned over, is more like the other episodes' than as it is."""
    found = []
    for camera in {name for pictures in measured.pictures for name in pictures}:
        having = [i for i, pictures in enumerate(measured.pictures) if camera in pictures]
        for i in having:
            others = [measured.pictures[j][camera] for j in having if j != i]
            if not others:
                continue
            mine, usual = measured.pictures[i][camera], np.mean(others, axis=0)
            if _alike(mine[::-1], usual) > max(0.5, _alike(mine, usual) + 0.2):
                found.append((measured.episodes[i], camera))
    return found


def _alike(one: np.ndarray, other: np.ndarray) -> float:
    a, b = one - one.mean(), other - other.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / size if size else 0.0


class Remark(NamedTuple):
    """One thing that a check found. ``wrong`` is a mistake for sure; the rest a person should look at."""

    wrong: bool
    line: str


def check(measured: Measured) -> list[Remark]:
    """What is wrong, or looks odd, with these episodes."""
    remarks = [Remark(True, f"{where}: {reason}") for where, reason in measured.problems]
    for episode, counts in zip(measured.episodes, measured.frames, strict=True):
        steps = len(episode.action) if episode.action is not None else None
        for camera, count in counts.items():
            if steps is not None and count != steps:
                line = f"{_where(episode)}: camera {camera} has {count} frames, there are {steps} actions"
                remarks.append(Remark(True, line))
    remarks += _of_actions(measured)
    for episode, camera in looks_upside_down(measured):
        remarks.append(Remark(False, f"{_where(episode)}: camera {camera} looks upside down against other episodes"))
    if measured.twice:
        remarks.append(Remark(False, f"{measured.twice} episodes are there twice, byte for byte; one of each is read"))
    if measured.copies:
        line = f"{measured.copies} episodes have the pictures and actions of another one, re-encoded or renumbered"
        remarks.append(Remark(False, line))
    names = sorted(measured.splits)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if both := measured.splits[one] & measured.splits[other]:
                line = f"{len(both)} episodes are in {one} and in {other}: what is tested on is trained on"
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
        yield Remark(True, f"actions of different width: {counts} columns")
    actions = measured.actions()
    if actions is None:
        return
    acting = next(e for e in measured.episodes if e.action is not None)
    still = [name for block, values in blocks(acting, actions) for name in _unchanging(block, values)]
    if still:
        yield Remark(False, f"of the action, these never change: {', '.join(still)}")
    for block, values in blocks(acting, actions):
        if not np.isfinite(values).all():
            yield Remark(True, f"action {block.name} holds NaN or infinity")
        if block.unit == "scaled" and np.abs(values).max() > 1.001:
            yield Remark(False, f"action {block.name} reaches {np.abs(values).max():g}, though it is scaled to +-1")
        if block.representation == "euler_xyz" and np.abs(values).max() > 2 * np.pi:
            yield Remark(True, f"action {block.name} reaches {np.abs(values).max():g}: no angle in radians")
    lag = find_lag(measured.episodes)
    if lag is None:
        yield Remark(False, "no column of the actions moves anything that proprioception measures")
    elif lag.steps < 0:
        yield Remark(True, f"{lag.said}: actions are off by that many rows, or are measurements and no commands")
    elif lag.steps > LATE:
        yield Remark(False, f"{lag.said}: more than {LATE} steps are unusual")
    told = {block.mode for block in acting.action_layout if block.kind in ("position", "joint")} - {"unknown"}
    if lag and lag.correlation > 2 * RELATED and len(told) == 1:
        [mode] = told
        if (mode == "absolute") != (lag.mode == "absolute"):
            yield Remark(False, f"actions are called {mode}, but move {lag.proprio} as {lag.mode} ones do")


def blocks(episode: Episode, action: np.ndarray) -> Iterable[tuple[ActionBlock, np.ndarray]]:
    """Each block of the episode's layout, and its columns ``[T, size]`` of an action ``[T, A]``."""
    start = 0
    for block in episode.action_layout:
        yield block, action[:, start : start + block.size]
        start += block.size


def _unchanging(block: ActionBlock, values: np.ndarray) -> list[str]:
    """Names of the columns that are the same in all rows; the block's own, where all of them are."""
    still = np.ptp(values, axis=0) == 0
    return [block.name] if still.all() else [f"{block.name}[{i}]" for i in np.flatnonzero(still)]


def _where(episode: Episode) -> str:
    return f"{episode.ref.uri} #{episode.ref.index}"
