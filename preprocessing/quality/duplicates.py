"""Near-duplicate episodes: re-encoded, rescaled, or at another frame rate. (Exact duplicates share their id.)

A fingerprint consists of perceptual hashes (pHash: signs of the lowest frequencies of the discrete cosine transform) of
frames spaced evenly over the episode, and of the actions at these frames. Copies differ in 0 to 4 of 64 bits per frame,
unrelated videos in about 30. Two episodes in front of the same fixed camera may differ in 5, so the actions, if any,
must agree as well. Trimmed, mirrored or cropped copies are not found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FRAMES = 16
WEAK = 8.0  # a coefficient below this may be noise or codec artefacts; half a grey level of a 16 x 16 frame
TELLING = 3  # bits set per frame, on average: flatter frames all look alike
RELATIVE = 0.05  # of a column's standard deviation: the tolerance within which actions agree
ROUNDING = 1e-3  # of a column's largest value, likewise; float16 rounds to half of that


def frame_hashes(grids: np.ndarray) -> np.ndarray:
    """Return the hashes, uint64 ``[n]``, of grey levels float32 ``[n, 16, 16]``."""
    from scipy.fft import dctn  # imported lazily: slow

    waves = dctn(grids, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(grids), 64)
    return np.packbits(waves > WEAK, axis=1).view(np.uint64)[:, 0]


def fingerprint(hashes: np.ndarray, action: np.ndarray | None) -> bytes | None:
    """Return the fingerprint of hashes uint64 ``[T]`` and actions ``[T, A]``; None if the frames are too flat."""
    chosen = hashes[_evenly(len(hashes))]
    if np.bitwise_count(chosen).mean() < TELLING:
        return None
    trace = np.zeros(0) if action is None else action[_evenly(len(action))]
    return chosen.tobytes() + np.nan_to_num(trace).clip(-65504, 65504).astype(np.float16).tobytes()


class Fingerprints:
    """The fingerprints seen so far. Finds the nearest of 100,000 in some milliseconds, by comparing them all."""

    def __init__(self) -> None:
        self._groups: dict[int, _Group] = {}  # by length: episodes with different action widths are no copies

    def add(self, name: str, mark: bytes) -> None:
        if group := self._groups.get(len(mark)):
            group.add(name, mark)
        else:
            self._groups[len(mark)] = _Group.of(mark, name)

    def nearest(self, mark: bytes, limit: float) -> tuple[str, float] | None:
        """Return name and distance (bits of 64 per frame) of the nearest fingerprint within ``limit``, or None."""
        if not (group := self._groups.get(len(mark))):
            return None
        distances = group.distances(mark, limit)
        best = int(distances.argmin())
        return (group.names[best], float(distances[best])) if distances[best] <= limit else None


@dataclass
class _Group:
    """Fingerprints of one length, in arrays that double when full."""

    names: list[str]
    hashes: np.ndarray  # uint64 [N, FRAMES]
    traces: np.ndarray  # float16 [N, FRAMES, A]

    @classmethod
    def of(cls, mark: bytes, name: str) -> _Group:
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
        """Return the distance to each, infinite if the actions disagree; they are compared only within ``limit``."""
        hashes, trace = _parts(mark)
        differing = np.bitwise_count(self.hashes[: len(self.names)] ^ hashes)
        found = differing.sum(axis=1, dtype=np.uint16) / FRAMES
        near = np.flatnonzero(found <= limit)
        found[near[~_agree(self.traces[near].astype(np.float32), trace.astype(np.float32))]] = np.inf
        return found


def _agree(traces: np.ndarray, trace: np.ndarray) -> np.ndarray:
    """Return bool ``[n]``: which of the traces agree with ``trace`` in every column."""
    allowed = RELATIVE * trace.std(axis=0) + ROUNDING * np.abs(trace).max(axis=0)
    return (np.abs(traces - trace).mean(axis=1) <= allowed).all(axis=1)


def _parts(mark: bytes) -> tuple[np.ndarray, np.ndarray]:
    hashes = np.frombuffer(mark, np.uint64, FRAMES)
    return hashes, np.frombuffer(mark, np.float16, offset=hashes.nbytes).reshape(FRAMES, -1)


def _evenly(length: int) -> np.ndarray:
    """Return the indices of the middles of FRAMES equal parts."""
    return ((np.arange(FRAMES) + 0.5) * length / FRAMES).astype(np.int64)
