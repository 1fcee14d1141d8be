"""Topics that speak at rates of their own, brought to the frames of one camera.

A *track* is what one topic said and when. The camera with the fewest pictures is the reference: its pictures are the
episode's frames, so that none of them comes twice. Everything else is taken as it was then: from the latest message
that is not after the frame. Frames before every topic has spoken are dropped.

Two clocks tell when: the sender's, in the message's header, and the recorder's. Mixed, they would set topics off
against one another, so the senders' holds only where every topic has it and it agrees with the recorder's.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from preprocessing.errors import BadEpisode

APART = 10 * 10**9  # nanoseconds between sending and receiving; more is a clock that is not set,
MOSTLY_APART = 10**9  # and more than this most of the time is a clock that goes wrong; a disk may stall once
FEW = 0.1  # of the pictures of the busiest camera: what has less is no camera that films
STALE = 10**9  # nanoseconds
UNEVEN = 0.5  # of the median interval


@dataclass
class Track:
    """When a topic spoke, and, of one that says numbers, the row that held from then on."""

    received: array[int] = field(default_factory=lambda: array("q"))
    stamped: array[int] = field(default_factory=lambda: array("q"))
    rows: array[float] = field(default_factory=lambda: array("f"))
    latest: dict[str | int, float] = field(default_factory=dict)
    mapped: bool = False  # not every message had the same names in the same order
    ragged: bool = False  # the count of numbers that have no names differs

    def add(self, received: int, stamped: int, names: Sequence[str] = (), values: Sequence[float] = ()) -> None:
        """Named values update those that were heard before: several senders may share one topic, a part each."""
        keys: Sequence[str | int] = names or range(len(values))
        heard = [*self.latest]
        if heard and [*keys] != heard:
            self.mapped = True
            self.ragged |= not names or isinstance(heard[0], int)
            if any(key not in self.latest for key in keys):  # the rows so far lack it
                self.received, self.stamped, self.rows = array("q"), array("q"), array("f")
        self.latest.update(zip(keys, values, strict=True))
        self.received.append(received)
        self.stamped.append(stamped)
        self.rows.extend(self.latest.values())

    def why_not_stamped(self) -> str | None:
        """Why the sender's clock is not to be used."""
        sent, received = np.array(self.stamped), np.array(self.received)
        if (sent <= 0).any():
            return "has no header stamps"
        if (np.diff(sent) < 0).any():
            return "has header stamps that run backwards"
        apart = np.abs(sent - received)
        far = apart.max() > APART or np.median(apart) > MOSTLY_APART
        return "has header stamps far from its receipt" if far else None


@dataclass(frozen=True)
class Aligned:
    """What holds at each frame: of a camera the number of its message, of a vector its row."""

    fps: float
    cameras: dict[str, np.ndarray]  # int64 [T]
    vectors: dict[str, np.ndarray]  # float32 [T, D]
    repairs: list[str]


def align(cameras: dict[str, Track], vectors: dict[str, Track]) -> Aligned:
    """Raises BadEpisode where there are no two frames."""
    repairs: list[str] = []
    most = max(len(track.received) for track in cameras.values())
    for name in [name for name, track in cameras.items() if len(track.received) < FEW * most]:
        repairs.append(f"{name} has {len(cameras[name].received)} pictures, another camera {most}; left out")
        cameras = {other: track for other, track in cameras.items() if other != name}
    repairs += [f"{name} changes its length; left out" for name, track in vectors.items() if track.ragged]
    vectors = {name: track for name, track in vectors.items() if not track.ragged}
    for name in (name for name, track in vectors.items() if track.mapped):
        repairs.append(f"{name} does not always name the same joints in the same order; mapped by name")

    tracks = cameras | vectors
    against = next(((name, why) for name, track in tracks.items() if (why := track.why_not_stamped())), None)
    repairs.append(f"times are those of receipt: {' '.join(against)}" if against else "times are the headers' stamps")
    times = {name: np.array(track.received if against else track.stamped) for name, track in tracks.items()}
    backwards = [name for name in tracks if (np.diff(times[name]) < 0).any()]
    if film := next((name for name in backwards if name in cameras), None):
        raise BadEpisode(f"the pictures of {film} are not in the order of their times; `mcap sort` mends that")
    repairs += [f"messages of {name} are not in the order of their times; sorted" for name in backwards]
    orders = {name: np.argsort(times[name], kind="stable") for name in tracks}

    frames = times[min(cameras, key=lambda name: len(times[name]))]
    for name in [name for name in tracks if times[name].min() > frames[len(frames) // 2]]:
        repairs.append(f"{name} is not heard in full before half of the frames are over; left out")
        del times[name]
    held = {name: np.searchsorted(times[name][orders[name]], frames, side="right") - 1 for name in times}
    first = max(int((at < 0).sum()) for at in held.values())
    if first:
        repairs.append(f"{first} frames before every topic had spoken are dropped")
    if len(frames) - first < 2:
        raise BadEpisode(f"{len(frames) - first} frames are left after every topic has spoken; at least 2 are needed")
    frames, held = frames[first:], {name: orders[name][at[first:]] for name, at in held.items()}

    steps = {name: _rows(vectors[name])[at] for name, at in held.items() if name in vectors}
    endless = [name for name, rows in steps.items() if not np.isfinite(rows).all()]
    repairs += [f"{name} is not a number at every frame; left out" for name in endless]
    for name, at in held.items():
        age = int((frames - times[name][at]).max())
        if age > STALE and name not in endless:
            repairs.append(f"{name} is up to {age / 1e9:.1f} s old at a frame")
    fps = _fps(frames, repairs)
    films = {name: at for name, at in held.items() if name in cameras}
    return Aligned(fps, films, {name: rows for name, rows in steps.items() if name not in endless}, repairs)


def _rows(track: Track) -> np.ndarray:
    return np.frombuffer(track.rows, np.float32).reshape(len(track.received), -1)


def _fps(frames: np.ndarray, repairs: list[str]) -> float:
    intervals = np.diff(frames) / 1e9
    median = float(np.median(intervals))
    if median <= 0:
        raise BadEpisode("most of its pictures have the time of the one before")
    if uneven := int((np.abs(intervals - median) > UNEVEN * median).sum()):
        repairs.append(f"{uneven} of {len(intervals)} intervals between frames differ by half from {median:.3g} s")
    return float(f"{1 / median:.4g}")  # of a clock, whose ticks differ
