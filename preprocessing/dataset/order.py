"""The order of samples: without replacement, a function of (seed, position) alone, with random access to any step.

Shares are met exactly: of the first N samples, floor(N w1) are from the first source; of the M others, floor(M w2 /
(1 - w1)) are from the second; and so on. So every prefix of a run has the requested mixture, to less than one sample
per source. The k-th sample of a source with n windows is number k % n of its epoch k // n, and each window comes once
per epoch.

Windows are in shards (dataset/shards.py), and a machine need not hold all of them at once. So an epoch is the source's
shards in random order, cut into blocks of whole shards, and each block's windows in random order. If everything fits
into one block, that is a perfect shuffle. Memory: one int per window of the current blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

SHUFFLE_WINDOWS = 2**20  # that samples are drawn from at any time

PRECISION = 2**30  # least number of parts of a share; integers, so that shares stay exact at any position
BATCH, EPOCH, BLOCK = range(3)  # domain separators of the random generators' seeds

Block = tuple[int, int, int]  # source, epoch, number within the epoch


class WindowOrder:
    """Global batches of (episode, frame), of which any worker can compute any part.

    ``windows``, ``source`` and ``shard`` are int ``[E]``: each episode's number of windows, its source and its shard.
    ``weights`` are the sources' shares of the samples; they need not sum to 1. A block has at most the source's share
    of ``shuffle`` windows, but at least one shard.
    """

    def __init__(
        self,
        windows: np.ndarray,
        source: np.ndarray,
        shard: np.ndarray,
        weights: Sequence[float],
        shuffle: int,
        seed: int,
    ):
        self._seed = seed
        used = [s for s, weight in enumerate(weights) if weight > 0 and windows[source == s].any()]
        share = np.array([weights[s] for s in used], np.float64)
        total = int(windows.sum())
        # A multiple of the total, so that shares given as numbers of windows are met exactly.
        unit = max(1, PRECISION // total) * total
        self._parts = [max(1, part) for part in np.round(share / share.sum() * unit).astype(np.int64).tolist()]
        self._sources = {
            s: _Source(np.flatnonzero(source == s), windows, shard, int(shuffle * of_all), seed, s)
            for s, of_all in zip(used, share / share.sum(), strict=True)
        }
        self.windows = sum(each.windows for each in self._sources.values())

    def draw(self, step: int, size: int, rank: int = 0, world: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return episode and frame, int64 ``[b]``, of samples rank, rank + world, ... of the step's global batch."""
        places = np.random.default_rng((self._seed, BATCH, step)).permutation(size)[rank::world]
        episode, frame = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
        for source, here, number in self._numbers(step * size + places):
            episode[here], frame[here] = source.windows_at(number)
        return episode, frame

    def blocks(self, position: int) -> tuple[list[Block], list[Block]]:
        """Return, for each source, the block of its next sample from ``position`` on, and the block after that."""
        now, soon, left, rest = [], [], position, sum(self._parts)
        for (s, source), part in zip(self._sources.items(), self._parts, strict=True):
            count = int(_floor(np.array(left), part, rest))
            left, rest = left - count, rest - part
            epoch, block = source.place(count)
            now.append((s, epoch, block))
            last = block + 1 == len(source.starts(epoch))
            soon.append((s, epoch + 1, 0) if last else (s, epoch, block + 1))
        return now, soon

    def shards(self, block: Block) -> np.ndarray:
        """Return the shards that hold the block's windows."""
        source, epoch, number = block
        return self._sources[source].shards(epoch, number)

    def _numbers(self, position: np.ndarray) -> list[tuple[_Source, np.ndarray, np.ndarray]]:
        """Return, for each source, the indices of its samples in ``position`` and their numbers within the source."""
        found, here, left, rest = [], np.arange(len(position)), position, sum(self._parts)
        for source, part in zip(self._sources.values(), self._parts, strict=True):
            number = _floor(left, part, rest)
            mine = _floor(left + 1, part, rest) > number
            if mine.any():
                found.append((source, here[mine], number[mine]))
            here, left, rest = here[~mine], (left - number)[~mine], rest - part
        return found


class _Source:
    """The order of one source's windows. Epochs and blocks are computed on demand; the last two are cached."""

    def __init__(self, members: np.ndarray, windows: np.ndarray, shard: np.ndarray, most: int, seed: int, source: int):
        self._members = members[np.argsort(shard[members], kind="stable")]  # episodes, sorted by shard
        self._length = windows[self._members]
        self._shards, first = np.unique(shard[self._members], return_index=True)
        self._bounds = np.append(first, len(self._members))
        self._size = np.add.reduceat(self._length, first)
        self._most, self._seed, self._source = most, seed, source
        self.windows = int(self._length.sum())
        self._epoch, self._block = lru_cache(2)(self._make_epoch), lru_cache(2)(self._make_block)

    def windows_at(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return episode and frame, int64 ``[b]`` each, of the samples with these numbers."""
        episode, frame = np.empty(len(number), np.int64), np.empty(len(number), np.int64)
        epochs, places = number // self.windows, number % self.windows
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            starts = self.starts(epoch)
            blocks = np.searchsorted(starts, places[here], side="right") - 1
            for block in np.unique(blocks).tolist():
                mine = here[blocks == block]
                members, ends, shuffled = self._block(epoch, block)
                window = shuffled[places[mine] - starts[block]]
                member = np.searchsorted(ends, window, side="right")
                episode[mine] = self._members[members[member]]
                frame[mine] = window - (ends[member] - self._length[members[member]])
        return episode, frame

    def place(self, number: int) -> tuple[int, int]:
        """Return epoch and block of the sample with this number."""
        epoch, place = divmod(number, self.windows)
        return epoch, int(np.searchsorted(self.starts(epoch), place, side="right")) - 1

    def starts(self, epoch: int) -> np.ndarray:
        """Return the number of windows before each of the epoch's blocks, int64 ``[blocks]``."""
        return self._epoch(epoch)[1]

    def shards(self, epoch: int, block: int) -> np.ndarray:
        return self._shards[self._epoch(epoch)[0][block]]

    def _make_epoch(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Return each block's shards, as indices into ``_shards``, and the number of windows before each block."""
        order = np.random.default_rng((self._seed, EPOCH, self._source, epoch)).permutation(len(self._shards))
        cuts, held = [0], 0
        for at, size in enumerate(self._size[order].tolist()):
            if held and held + size > self._most:
                cuts.append(at)
                held = 0
            held += size
        before = np.cumsum(self._size[order]) - self._size[order]
        return np.split(order, cuts[1:]), before[cuts]

    def _make_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the block's episodes (indices into ``_members``), the ends of their windows, and a permutation."""
        shards = self._epoch(epoch)[0][block]
        members = np.concatenate([np.arange(self._bounds[s], self._bounds[s + 1]) for s in shards])
        ends = np.cumsum(self._length[members])
        random = np.random.default_rng((self._seed, BLOCK, self._source, epoch, block))
        return members, ends, random.permutation(np.arange(ends[-1], dtype=np.int32))


def _floor(count: np.ndarray, part: int, whole: int) -> np.ndarray:
    """Return floor(count * part / whole) exactly, although the product may not fit into 64 bits."""
    return count // whole * part + count % whole * part // whole
