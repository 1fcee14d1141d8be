"""Batches of windows, gathered from the memory-mapped shards of a snapshot.

A window at frame t of an episode reads the observed frames up to t, the actions t .. t+L-1, and the future frames
from t+L on (L is the action chunk; paper section III). Every frame starts a window: beyond the first and last frame
the nearest frame is repeated, and actions past the end are masked. Or only windows inside the episode are used.

A batch takes a few fancy-indexing operations per shard: no worker processes, no copies between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from preprocessing.dataset.embodiment import Embodiment
from preprocessing.dataset.order import SHUFFLE_WINDOWS, Block, WindowOrder
from preprocessing.dataset.selection import source_names, spans
from preprocessing.dataset.shards import LocalCopy, width
from preprocessing.errors import UserError
from preprocessing.store.rows import TrainingRow
from preprocessing.store.snapshot import Snapshot


@dataclass(frozen=True)
class WindowShape:
    """Sizes of a batch, named as in ModelConfig."""

    cameras: int
    observed_frames: int
    future_frames: int
    action_chunk: int
    action_dim: int
    proprio_dim: int


class Samples(NamedTuple):
    """A worker's share of a global batch."""

    arrays: dict[str, np.ndarray]  # see LatentDataset.gather
    episode: np.ndarray  # int64 [b]
    position: np.ndarray  # int64 [b], in the global batch


class LatentDataset:
    """Episodes of a pinned snapshot, ready to be gathered.

    ``rows`` are catalogue rows of one encoder; ``embodiments`` says how each fills the model's slots. ``pixels`` are
    catalogue rows of the same episodes, if windows are to include the current frames' pixels; ``instructions`` maps
    instructions to float32 ``[E]``, if windows are to include them. ``mixture`` maps sources to shares of the samples
    (:func:`~preprocessing.dataset.selection.source_of`); without it, embodiments are sampled in proportion to their
    windows. Samples are drawn from about ``shuffle`` windows at any time. ``tell`` receives the progress of copying, as
    in LocalCopy. ``inside``: only windows inside an episode. Raises UserError if the mixture does not fit the rows.

    An episode with several usable spans counts as several episodes: the attribute ``rows`` has one entry per span, and
    ``first`` where the span starts. The attribute ``source``, int64 ``[episodes]``, indexes ``source_names``.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        rows: list[TrainingRow],
        embodiments: dict[str, Embodiment],
        shape: WindowShape,
        pixels: list[TrainingRow] | None = None,
        instructions: dict[str, np.ndarray] | None = None,
        mixture: dict[str, float] | None = None,
        shuffle: int = SHUFFLE_WINDOWS,
        tell: Callable[[int, int], None] | None = None,
        inside: bool = False,
    ):
        self._inside, (self._lead, least) = inside, window_limits(shape, inside)
        used = [(row, first, stop) for row in rows for first, stop in spans(row) if stop - first >= least]
        self.rows, self.shape = [row for row, _, _ in used], shape
        if not used:
            return
        self._copy = copy = LocalCopy(snapshot, rows, None if pixels is None else _alike(rows, pixels), tell)
        self._vectors = None if instructions is None else np.stack([*instructions.values()])
        places: dict[str | None, int] = {text: place for place, text in enumerate(instructions or ())}
        self._instruction = np.array([places.get(row["instruction"], -1) for row in self.rows])
        rows = self.rows
        self.first = np.array([first for _, first, _ in used])
        self.frames = np.array([stop - first for _, first, stop in used])
        self.windows = self.frames - (least - 1)
        self.embodiment = np.array([embodiments[row["embodiment"]].index for row in rows], np.int64)
        named = source_names(rows, mixture or {})
        self.source_names = [*dict.fromkeys(named)]
        self.source = np.array([self.source_names.index(name) for name in named], np.int64)
        windows = np.bincount(self.source, self.windows)
        self._weights = [(mixture or {}).get(*each) for each in zip(self.source_names, windows, strict=True)]
        self._shuffle = shuffle
        self._shard = np.array([copy.shard[row["key"]] for row in rows])
        self._camera_start = np.full((len(rows), shape.cameras), -1)
        self._action_dim = np.array([row["action_dim"] for row in rows])
        self._width = np.array([width(row) for row in rows])
        self._steps_start = np.zeros(len(rows), np.int64)
        for i, (row, first) in enumerate(zip(rows, self.first, strict=True)):
            slots, shard = embodiments[row["embodiment"]].cameras, copy.shards[self._shard[i]]
            for number, camera in enumerate(row["cameras"]):
                if camera["name"] in slots:
                    start = shard.frame[row["key"]] + number * row["frames"]
                    self._camera_start[i, slots.index(camera["name"])] = start + first
            if self._width[i]:  # otherwise any index does
                self._steps_start[i] = shard.number[row["key"]] + first * self._width[i]

        top = 1 + max(spec.index for spec in embodiments.values())
        self._action_scale = _table(top, shape.action_dim, embodiments, "action_normalizer")
        self._action_reach = np.ones((top, shape.action_dim), np.float32)
        for spec in embodiments.values():
            self._action_reach[spec.index, : len(spec.action_reach)] = spec.action_reach
        self._proprio_scale = _table(top, shape.proprio_dim, embodiments, "proprio_normalizer")

    def gather(self, episode: np.ndarray, frame: np.ndarray) -> dict[str, np.ndarray]:
        """Return the windows at ``frame`` int ``[B]`` of ``episode`` int ``[B]``, normalised and padded.

        current_latents float16 [B, V, To, C, h, w], future_latents [B, V, Tf, C, h, w], camera_mask bool [B, V],
        action float32 [B, L, A] within +- action_reach [B, A], action_mask bool [B, L, A], proprio float32 [B, To, P],
        proprio_mask bool [B, P], embodiment int64 [B]; if requested, current_pixels uint8 [B, V, To, 3, H, W],
        instruction float32 [B, E] and instruction_mask bool [B].
        """
        shape, last = self.shape, self.frames[episode, None] - 1
        observed = np.clip(frame[:, None] + np.arange(1 - shape.observed_frames, 1), 0, last)
        future = np.minimum(frame[:, None] + shape.action_chunk + np.arange(shape.future_frames), last)
        acting = frame[:, None] + np.arange(shape.action_chunk)
        start, group = self._camera_start[episode], self.embodiment[episode]
        present, action_dim = start >= 0, self._action_dim[episode]
        action_at, action_dims = self._columns(episode, np.minimum(acting, last), 0, action_dim, shape.action_dim)
        proprio_at, proprio_mask = self._columns(
            episode, observed, action_dim, self._width[episode] - action_dim, shape.proprio_dim
        )
        at = {
            "current_latents": ("latents", _places(start, present, observed)),
            "future_latents": ("latents", _places(start, present, future)),
            "action": ("steps", action_at),
            "proprio": ("steps", proprio_at),
        }
        if self._copy.has_pixels:
            at["current_pixels"] = ("pixels", at["current_latents"][1])
        arrays = self._fetch(self._shard[episode], at)
        if not present.all():
            for name in arrays.keys() - {"action", "proprio"}:
                arrays[name][~present] = 0
        action_mask = (acting <= last)[:, :, None] & action_dims[:, None, :]
        arrays["action"] = _normalised(arrays["action"], action_mask, self._action_scale, group)
        arrays["proprio"] = _normalised(arrays["proprio"], proprio_mask[:, None], self._proprio_scale, group)
        if self._vectors is not None:
            instruction = self._instruction[episode]
            arrays |= {"instruction": self._vectors[instruction], "instruction_mask": instruction >= 0}
        masks = {"camera_mask": present, "action_mask": action_mask, "proprio_mask": proprio_mask}
        return arrays | masks | {"embodiment": group, "action_reach": self._action_reach[group]}

    def average_sample(self) -> tuple[float, float, float]:
        """Return what ``batches`` yields in a sample on average: the number of True entries of its action_mask, the
        probability that it has no actions, and the number of its cameras.
        """
        chunk = self.shape.action_chunk
        steps = np.minimum(self.frames, chunk)  # that exist, over all windows:
        acting = self.windows * chunk if self._inside else (self.frames - steps) * steps + steps * (steps + 1) / 2
        totals = np.stack([
            acting * self._action_dim,
            self.windows * (self._action_dim == 0),
            self.windows * (self._camera_start >= 0).sum(1),
        ])  # fmt: skip
        weights = np.array(self._weights) / np.bincount(self.source, self.windows)
        action_values, without_actions, cameras = totals @ weights[self.source] / sum(self._weights)
        return float(action_values), float(without_actions), float(cameras)

    def batches(self, seed: int, size: int, first_step: int = 0, rank: int = 0, world: int = 1) -> Iterator[Samples]:
        """Yield this worker's share of the global batch of each step from ``first_step`` on, forever.

        Each window of a source comes once per epoch (dataset/order.py). The shards of the current blocks are copied to
        this node first, those of the next blocks in the background.
        """
        order, place = self._order(seed), list[Block]()
        position = np.arange(rank, size, world)
        step = first_step
        while True:
            now, soon = order.blocks(step * size)
            if now != place:
                self._copy.want(*({int(n) for block in blocks for n in order.shards(block)} for blocks in (now, soon)))
                place = now
            episode, frame = order.draw(step, size, rank, world)
            yield Samples(self.gather(episode, frame + self._lead), episode, position)
            step += 1

    def _order(self, seed: int) -> WindowOrder:
        return WindowOrder(self.windows, self.source, self._shard, self._weights, self._shuffle, seed)

    def _columns(
        self, episode: np.ndarray, frame: np.ndarray, first: int | np.ndarray, count: np.ndarray, padded: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of columns [first, first + count) of the steps at ``frame`` [B, T], int64 [B, T, padded],
        and which of them exist, bool [B, padded]. Indices of columns that do not exist are arbitrary but valid.
        """
        column = np.arange(padded)
        exists = column < count[:, None]
        offset = np.where(exists, np.expand_dims(first, -1) + column, 0)
        row = self._steps_start[episode, None] + frame * self._width[episode, None]
        return row[:, :, None] + offset[:, None, :], exists

    def _fetch(self, shard: np.ndarray, at: dict[str, tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return, for each name in ``at``, the values of a shard file at these indices [B, ...]; ``shard`` is [B]."""
        order = np.argsort(shard, kind="stable")
        # An empty share of a batch still has the shapes of a shard's arrays.
        numbers, starts = np.unique(shard[order] if len(shard) else [0], return_index=True)
        found: dict[str, np.ndarray] = {}
        with self._copy.opened(numbers.tolist()) as opened:
            for files, here in zip(opened.values(), np.split(order, starts[1:]), strict=True):
                for name, (file, places) in at.items():
                    stored = files[file]
                    if name not in found:
                        found[name] = np.empty(places.shape + stored.shape[1:], stored.dtype)
                    found[name][here] = stored[places[here]] if len(stored) else 0
        runs = sum(1 if file == "steps" else places.shape[1] for file, places in at.values())
        self._copy.touched(len(shard) * runs, sum(values.nbytes for values in found.values()))
        return found


def window_limits(shape: WindowShape, inside: bool) -> tuple[int, int]:
    """Return the first frame of an episode that starts a window, and the fewest frames of an episode that has one."""
    lead = shape.observed_frames - 1
    return (lead, lead + shape.action_chunk + shape.future_frames) if inside else (0, 1)


def _places(start: np.ndarray, present: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Return the indices [B, V, T] of the frames [B, T] of each camera [B, V]; arbitrary for absent cameras."""
    return np.where(present, start, 0)[:, :, None] + np.where(present[:, :, None], frame[:, None, :], 0)


def _normalised(
    raw: np.ndarray, mask: np.ndarray, scales: tuple[np.ndarray, np.ndarray], group: np.ndarray
) -> np.ndarray:
    """Return (raw - offset) / scale of each sample's embodiment, float32 [B, T, D]; zero where the mask is False."""
    offset, scale = scales
    values = (raw - offset[group, None]) / scale[group, None]
    return np.where(mask, values, 0).astype(np.float32)


def _alike(rows: list[TrainingRow], pixels: list[TrainingRow]) -> list[TrainingRow]:
    """Return the rows of pixels in the order of ``rows``, so that frames have the same indices in both."""
    by_id = {row["id"]: row for row in pixels}
    for row in rows:
        other = by_id.get(row["id"])
        names = [[camera["name"] for camera in found["cameras"]] for found in (row, other) if found]
        if other is None or other["frames"] != row["frames"] or names[0] != names[1]:
            raise UserError(
                f"{row['uri']} #{row['index']}: the store's pixels do not match its latents; "
                "ingest it again with --encoder pixels and otherwise the same settings"
            )
    return [by_id[row["id"]] for row in rows]


def _table(top: int, width: int, embodiments: dict[str, Embodiment], which: str) -> tuple[np.ndarray, np.ndarray]:
    """Return offset and scale, float [embodiments, width], of every embodiment's normalizer ``which``."""
    offset, scale = np.zeros((top, width)), np.ones((top, width))
    for spec in embodiments.values():
        normalizer = getattr(spec, which)
        offset[spec.index, : len(normalizer.offset)] = normalizer.offset
        scale[spec.index, : len(normalizer.scale)] = normalizer.scale
    return offset, scale
