"""Episodes that are copies of one another: re-encoded, rescaled, at another frame rate. Exact ones share their id.

A fingerprint is a perceptual hash (pHash: signs of the lowest waves of the picture, by the discrete cosine transform)
of frames spaced evenly over the episode, and the actions at these frames. Copies differ in 0 to 4 of 64 bits a frame,
films that have nothing to do with one another in about 30. Two episodes before one fixed camera may differ in 5, so
where there are actions these have to agree as well. A trimmed, mirrored or cropped copy is not found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FRAMES = 16
WEAK = 8.0  # a wave below this may be noise or what a codec left; half a grey level of a 16 x 16 picture
TELLING = 3  # bits set in a frame, on average: pictures that are flatter are all alike
RELATIVE = 0.05  # of a column's standard deviation: by so much may actions differ that are the same
ROUNDING = 1e-3  # of a column's largest value; float16 rounds to half of that


def frame_hashes(grids: np.ndarray) -> np.ndarray:
    """uint64 ``[n]`` of grey levels float32 ``[n, 16, 16]``."""
    from scipy.fft import dctn  # takes a moment, which whoever looks for no copies is spared

    waves = dctn(grids, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(grids), 64)
    return np.packbits(waves > WEAK, axis=1).view(np.uint64)[:, 0]


def fingerprint(hashes: np.ndarray, action: np.ndarray | None) -> bytes | None:
    """Of an episode with these frames uint64 ``[T]`` and actions ``[T, A]``; None where its pictures are too flat."""
    chosen = hashes[_evenly(len(hashes))]
    if np.bitwise_count(chosen).mean() < TELLING:
        return None
    trace = np.zeros(0) if action is None else action[_evenly(len(action))]
    return chosen.tobytes() + np.nan_to_num(trace).clip(-65504, 65504).astype(np.float16).tobytes()


class Fingerprints:
    """Those seen so far; finds the nearest one to another among 100,000 in some milliseconds, by comparing all."""

    def __init__(self) -> None:
        self._groups: dict[int, _Group] = {}  # by length: with actions of another width, none is a copy

    def add(self, name: str, mark: bytes) -> None:
        if group := self._groups.get(len(mark)):
            group.add(name, mark)
        else:
            self._groups[len(mark)] = _Group.of(mark, name)

    def nearest(self, mark: bytes, limit: float) -> tuple[str, float] | None:
        """Name and distance of the nearest one, if it is not farther than ``limit``."""
        if not (group := self._groups.get(len(mark))):
            return None
        distances = group.distances(mark, limit)
        best = int(distances.argmin())
        return (group.names[best], float(distances[best])) if distances[best] <= limit else None


@dataclass
class _Group:
    """Fingerprints of one length, as arrays that double when they are full."""

    names: list[str]
    hashes: np.ndarray  # uint64 [N, FRAMES]
    traces: np.ndarray  # float16 [N, FRAMES, A]

    @classmethod
    def of(cls, mark: bytes, name: str = "") -> _Group:
        hashes, trace = _parts(mark)
        return cls([name], hashes[None].copy(), trace[None].copy())

    def add(self, name: str, mark: bytes) -> None:
        count = len(self.names)
        if count == len(self.hashes):
            self.hashes = np.concatenate([self.hashes, np.zeros_like(self.hashes)])
            self.traces = np.concatenate([self.traces, np.zeros_like(self.traces)])
        self.hashes[count], self.traces[count] = _parts(mark)
        self.names.append(name)

    def distances(self, mark: bytes, limit: float) -> np.ndarray:
        """To each; actions are compared where the pictures are within ``limit``."""
        hashes, trace = _parts(mark)
        differing = np.bitwise_count(self.hashes[: len(self.names)] ^ hashes)
        found = differing.sum(axis=1, dtype=np.uint16) / FRAMES
        near = np.flatnonzero(found <= limit)
        found[near[~_agree(self.traces[near].astype(np.float32), trace.astype(np.float32))]] = np.inf
        return found


def _agree(traces: np.ndarray, trace: np.ndarray) -> np.ndarray:
    """bool ``[n]``: which of these are the same movement as that one, in every column."""
    allowed = RELATIVE * trace.std(axis=0) + ROUNDING * np.abs(trace).max(axis=0)
    return (np.abs(traces - trace).mean(axis=1) <= allowed).all(axis=1)


def _parts(mark: bytes) -> tuple[np.ndarray, np.ndarray]:
    hashes = np.frombuffer(mark, np.uint64, FRAMES)
    return hashes, np.frombuffer(mark, np.float16, offset=hashes.nbytes).reshape(FRAMES, -1)


def _evenly(length: int) -> np.ndarray:
    """The frames in the middle of each of as many equal parts."""
    return ((np.arange(FRAMES) + 0.5) * length / FRAMES).astype(np.int64)
