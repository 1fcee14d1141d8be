"""Windows to batches: whole-batch gathers from the memory maps of a snapshot's shards.

A batch is a few fancy indexes a shard: no worker processes, no copies between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from preprocessing.dataset.embodiment import Embodiment, sources, spans
from preprocessing.dataset.order import Block, WindowOrder
from preprocessing.dataset.shards import LocalCopy, width
from preprocessing.errors import UserError
from preprocessing.store.snapshot import Snapshot

SHUFFLE_WINDOWS = 2**20


@dataclass(frozen=True)
class WindowShape:
    """Sizes of a batch, as the model's configuration names them."""

    cameras: int
    observed_frames: int
    future_frames: int
    action_chunk: int
    action_dim: int
    proprio_dim: int


class Samples(NamedTuple):
    """A worker's share of a global batch."""

    arrays: dict[str, np.ndarray]  # of LatentDataset.gather
    episode: np.ndarray  # int64 [b]
    position: np.ndarray  # int64 [b]: their places in the global batch


class LatentDataset:
    """Episodes of a pinned snapshot, ready to be gathered.

    ``rows`` are catalogue rows of one encoder; ``embodiments`` says how each fills the model's slots. An episode of
    which several spans may be used counts as so many: ``rows`` holds its row as often, ``first`` where each begins.
    ``pixels`` are catalogue rows of the same episodes, where windows are to have the current frames' pixels too;
    ``sentences`` float32 [E] by instruction, where they are to have the episode's. ``mixture`` are shares of samples
    by source (preprocessing/dataset/embodiment.py), without which each embodiment has that of its windows; ``source`` int64 [E]
    says of each episode which of ``source_names`` it counts as. Samples are drawn from about ``shuffle`` windows at a
    time. ``tell`` hears how copies come along, as LocalCopy has it. Raises UserError where the mixture does not fit the
    rows.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        rows: list[dict[str, Any]],
        embodiments: dict[str, Embodiment],
        shape: WindowShape,
        pixels: list[dict[str, Any]] | None = None,
        sentences: dict[str, np.ndarray] | None = None,
        mixture: dict[str, float] | None = None,
        shuffle: int = SHUFFLE_WINDOWS,
        tell: Callable[[int, int], None] | None = None,
    ):
        used = [(row, first, stop) for row in rows for first, stop in spans(row)]
        self.rows, self.shape = [row for row, _, _ in used], shape
        if not used:
            return
        self._copy = copy = LocalCopy(snapshot, rows, None if pixels is None else _alike(rows, pixels), tell)
        self._sentences = None if sentences is None else np.stack([*sentences.values()])
        places = {text: place for place, text in enumerate(sentences or ())}
        self._sentence = np.array([places.get(row["instruction"], -1) for row in self.rows])
        rows = self.rows
        self.first = np.array([first for _, first, _ in used])
        self.frames = np.array([stop - first for _, first, stop in used])
        self.embodiment = np.array([embodiments[row["embodiment"]].index for row in rows], np.int64)
        named = sources(rows, mixture or {})
        self.source_names = [*dict.fromkeys(named)]
        self.source = np.array([self.source_names.index(name) for name in named], np.int64)
        windows = np.bincount(self.source, self.frames)
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
            if self._width[i]:  # of one without, 0 is a place, too
                self._steps_start[i] = shard.number[row["key"]] + first * self._width[i]

        top = 1 + max(spec.index for spec in embodiments.values())
        self._action_scale = _table(top, shape.action_dim, embodiments, "action_normalizer")
        self._proprio_scale = _table(top, shape.proprio_dim, embodiments, "proprio_normalizer")

    def gather(self, episode: np.ndarray, frame: np.ndarray) -> dict[str, np.ndarray]:
        """The windows at ``frame`` int ``[B]`` of ``episode`` int ``[B]``, normalised and padded.

        current_latents float16 [B, V, To, C, h, w], future_latents [B, V, Tf, C, h, w], camera_mask bool [B, V],
        action float32 [B, L, A] in [-1, 1], action_mask bool [B, L, A], proprio float32 [B, To, P],
        proprio_mask bool [B, P], embodiment int64 [B]; where asked for, current_pixels uint8 [B, V, To, 3, H, W],
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
        if self._sentences is not None:
            sentence = self._sentence[episode]
            arrays |= {"instruction": self._sentences[sentence], "instruction_mask": sentence >= 0}
        masks = {"camera_mask": present, "action_mask": action_mask, "proprio_mask": proprio_mask}
        return arrays | masks | {"embodiment": group}

    def batches(self, seed: int, size: int, first_step: int = 0, rank: int = 0, world: int = 1) -> Iterator[Samples]:
        """This worker's share of the global batch of each step, for ever, from ``first_step`` on.

        Each window of a source comes once an epoch (preprocessing/dataset/order.py). Shards of the current blocks are copied
        to this node first, those of the next meanwhile.
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
            yield Samples(self.gather(episode, frame), episode, position)
            step += 1

    def drawn(self, seed: int, size: int, step: int, rank: int, world: int) -> list[str]:
        """Ids of the episodes that this worker's share of that step's batch is from."""
        episode, _ = self._order(seed).draw(step, size, rank, world)
        return sorted({self.rows[i]["id"] for i in episode})

    def epoch(self, step: int, size: int) -> float:
        """How often the windows of all sources that have a share were seen before this step, on average."""
        return step * size / self._order(0).windows

    def _order(self, seed: int) -> WindowOrder:
        return WindowOrder(self.frames, self.source, self._shard, self._weights, self._shuffle, seed)

    def _columns(
        self, episode: np.ndarray, frame: np.ndarray, first: int | np.ndarray, count: np.ndarray, padded: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where columns [first, first + count) of the steps at ``frame`` [B, T] are, int64 [B, T, padded], and which
        of them exist, bool [B, padded]. Where one does not, any place stands in.
        """
        column = np.arange(padded)
        exists = column < count[:, None]
        offset = np.where(exists, np.expand_dims(first, -1) + column, 0)
        row = self._steps_start[episode, None] + frame * self._width[episode, None]
        return row[:, :, None] + offset[:, None, :], exists

    def _fetch(self, shard: np.ndarray, at: dict[str, tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """By name, from a file of each sample's shard [B], what lies at these places [B, ...]."""
        order = np.argsort(shard, kind="stable")
        numbers, starts = np.unique(shard[order], return_index=True)
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


def _places(start: np.ndarray, present: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Of each camera [B, V], from where its episode starts, the frames [B, T]; of one that is absent, any."""
    return np.where(present, start, 0)[:, :, None] + np.where(present[:, :, None], frame[:, None, :], 0)


def _normalised(
    raw: np.ndarray, mask: np.ndarray, scales: tuple[np.ndarray, np.ndarray], group: np.ndarray
) -> np.ndarray:
    """(raw - offset) / scale of each sample's embodiment, float32 [B, T, D]; zeros where the mask is False."""
    offset, scale = scales
    values = (raw - offset[group, None]) / scale[group, None]
    return np.where(mask, values, 0).astype(np.float32)


def _alike(rows: list[dict[str, Any]], pixels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of pixels in the order of ``rows``, so that frames lie at the same places."""
    by_id = {row["id"]: row for row in pixels}
    for row in rows:
        other = by_id.get(row["id"])
        names = [[camera["name"] for camera in found["cameras"]] for found in (row, other) if found]
        if other is None or other["frames"] != row["frames"] or names[0] != names[1]:
            raise UserError(
                f"{row['uri']} #{row['index']}: its pixels are not in the store as its latents are; "
                "ingest it again with --encoder pixels, and the other settings as before"
            )
    return [by_id[row["id"]] for row in rows]


def _table(top: int, width: int, embodiments: dict[str, Embodiment], which: str) -> tuple[np.ndarray, np.ndarray]:
    offset, scale = np.zeros((top, width)), np.ones((top, width))
    for spec in embodiments.values():
        normalizer = getattr(spec, which)
        offset[spec.index, : len(normalizer.offset)] = normalizer.offset
        scale[spec.index, : len(normalizer.scale)] = normalizer.scale
    return offset, scale
