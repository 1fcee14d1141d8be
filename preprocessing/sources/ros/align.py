"""Align topics of different rates to the frames of one camera.

A *track* is one topic's values and their times. The camera with the fewest images is the reference: its images are the
episode's frames, so no frame repeats. Every other topic contributes its latest message that is not after the frame.
Frames are dropped until every topic has sent a message.

There are two clocks: the sender's, in the message header, and the recorder's. Mixing them would shift topics against
one another, so the senders' is used only if every topic has it and it agrees with the recorder's.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from preprocessing.episode import Repair
from preprocessing.errors import BadEpisode
from preprocessing.sources.vectors import as_vectors

MAX_DELAY = 10 * 10**9  # nanoseconds between sending and receiving; more means that a clock is not set
MAX_MEDIAN_DELAY = 10**9  # nanoseconds; more means that a clock is wrong; single delays are a stalled disk
FEW = 0.1  # of the busiest camera's images; a topic with fewer is not recording a video
STALE = 10**9  # nanoseconds
UNEVEN = 0.5  # deviation relative to the median interval


@dataclass
class Track:
    """The times of a topic's messages and, for numbers, the row that is valid from each time on."""

    received: array[int] = field(default_factory=lambda: array("q"))
    stamped: array[int] = field(default_factory=lambda: array("q"))
    rows: array[float] = field(default_factory=lambda: array("d"))
    latest: dict[str | int, float] = field(default_factory=dict)
    mapped: bool = False  # the names or their order differ between messages
    ragged: bool = False  # unnamed vectors differ in length

    def add(self, received: int, stamped: int, names: Sequence[str] = (), values: Sequence[float] = ()) -> None:
        """Add a message. Named values update earlier ones: several senders may share a topic, with a part each."""
        keys: Sequence[str | int] = names or range(len(values))
        known = [*self.latest]
        if known and [*keys] != known:
            self.mapped = True
            self.ragged |= not names or isinstance(known[0], int)
            if any(key not in self.latest for key in keys):  # earlier rows lack it
                self.received, self.stamped, self.rows = array("q"), array("q"), array("d")
        self.latest.update(zip(keys, values, strict=True))
        self.received.append(received)
        self.stamped.append(stamped)
        self.rows.extend(self.latest.values())

    def why_not_stamped(self) -> str | None:
        """Why the sender's clock cannot be used; None if it can."""
        sent, received = np.array(self.stamped), np.array(self.received)
        if (sent <= 0).any():
            return "has no header stamps"
        if (np.diff(sent) < 0).any():
            return "has header stamps that run backwards"
        delays = np.abs(sent - received)
        far = delays.max() > MAX_DELAY or np.median(delays) > MAX_MEDIAN_DELAY
        return "has header stamps far from its receive times" if far else None


@dataclass(frozen=True)
class Aligned:
    """Values at each frame: of a camera the number of its message, of a vector its row."""

    fps: float
    cameras: dict[str, np.ndarray]  # int64 [T]
    vectors: dict[str, np.ndarray]  # float32 [T, D]
    repairs: list[Repair]


def align(cameras: dict[str, Track], vectors: dict[str, Track]) -> Aligned:
    """Align all tracks to the slowest camera. Raises BadEpisode if fewer than two frames remain."""
    repairs: list[Repair] = []
    most = max(len(track.received) for track in cameras.values())
    for name in [name for name, track in cameras.items() if len(track.received) < FEW * most]:
        few = f"{name} has only {len(cameras[name].received)} images, another camera {most}; left out"
        repairs.append(Repair("streams", few))
        cameras = {other: track for other, track in cameras.items() if other != name}
    ragged = [name for name, track in vectors.items() if track.ragged]
    repairs += [Repair("streams", f"{name} changes its length; left out") for name in ragged]
    vectors = {name: track for name, track in vectors.items() if name not in ragged}
    for name in (name for name, track in vectors.items() if track.mapped):
        mapped = f"{name} does not always list the same joints in the same order; mapped by name"
        repairs.append(Repair("steps", mapped))

    tracks = cameras | vectors
    unusable = next(((name, why) for name, track in tracks.items() if (why := track.why_not_stamped())), None)
    clock = f"receive times are used: {' '.join(unusable)}" if unusable else "header stamps are used as times"
    repairs.append(Repair("steps", clock))
    times = {name: np.array(track.received if unusable else track.stamped) for name, track in tracks.items()}
    backwards = [name for name in tracks if (np.diff(times[name]) < 0).any()]
    if camera := next((name for name in backwards if name in cameras), None):
        raise BadEpisode(f"the images of {camera} are not sorted by time; run `mcap sort`")
    unsorted = "are not sorted by time; sorted"
    repairs += [Repair("steps", f"messages of {name} {unsorted}") for name in backwards]
    orders = {name: np.argsort(times[name], kind="stable") for name in tracks}

    frames = times[min(cameras, key=lambda name: len(times[name]))]
    for name in [name for name in tracks if times[name].min() > frames[len(frames) // 2]]:
        late = f"{name} is incomplete until past half of the frames; left out"
        repairs.append(Repair("streams", late))
        del times[name]
    held = {name: np.searchsorted(times[name][orders[name]], frames, side="right") - 1 for name in times}
    first = max(int((at < 0).sum()) for at in held.values())
    if first:
        repairs.append(Repair("frames", f"{first} frames before the first message of some topic are dropped"))
    if len(frames) - first < 2:
        raise BadEpisode(f"{len(frames) - first} frames are left once every topic has a message; at least 2 are needed")
    frames, held = frames[first:], {name: orders[name][at[first:]] for name, at in held.items()}

    steps = dict[str, np.ndarray]()
    for name, at in held.items():
        if name in vectors:
            steps[name], mended = as_vectors(_rows(vectors[name])[at], name)
            repairs += mended
    not_finite = [name for name, rows in steps.items() if not np.isfinite(rows).all()]
    repairs += [Repair("streams", f"{name} is not finite at every frame; left out") for name in not_finite]
    for name, at in held.items():
        age = int((frames - times[name][at]).max())
        if age > STALE and name not in not_finite:
            stale = f"{name} is up to {age / 1e9:.1f} s old at a frame"
            repairs.append(Repair("frames" if name in cameras else "steps", stale))
    fps = _fps(frames, repairs)
    shown = {name: at for name, at in held.items() if name in cameras}
    return Aligned(fps, shown, {name: rows for name, rows in steps.items() if name not in not_finite}, repairs)


def _rows(track: Track) -> np.ndarray:
    return np.frombuffer(track.rows, np.float64).reshape(len(track.received), -1)


def _fps(frames: np.ndarray, repairs: list[Repair]) -> float:
    intervals = np.diff(frames) / 1e9
    median = float(np.median(intervals))
    if median <= 0:
        raise BadEpisode("most images have the same time as the one before")
    if uneven := int((np.abs(intervals - median) > UNEVEN * median).sum()):
        text = f"{uneven} of {len(intervals)} frame intervals differ by more than half from {median:.3g} s"
        repairs.append(Repair("frames", text))
    return float(f"{1 / median:.4g}")  # rounded: clock ticks vary
