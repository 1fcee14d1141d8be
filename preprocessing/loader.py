"""Windows to batches: whole-batch gathers from a memory map.

The pinned snapshot is copied once per machine into flat files (latents float16, pixels uint8, steps float32), since
zarr-python is far too slow to read sample by sample (docs/design/store.md). A batch is then a few fancy indexes: no
worker processes, no copies between them.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from preprocessing.cache import cache_folder
from preprocessing.episode import UserError
from preprocessing.snapshot import Snapshot
from preprocessing.windows import Embodiment, WindowSampler, spans


@dataclass(frozen=True)
class WindowShape:
    """Sizes of a batch, as the model's configuration names them."""

    cameras: int
    observed_frames: int
    future_frames: int
    action_chunk: int
    action_dim: int
    proprio_dim: int


class LatentDataset:
    """Episodes of a pinned snapshot, ready to be gathered.

    ``rows`` are catalogue rows of one encoder; ``embodiments`` says how each fills the model's slots. An episode of
    which several spans may be used counts as so many: ``rows`` holds its row as often, ``first`` where each begins.
    ``pixels`` are catalogue rows of the same episodes, where windows are to have the current frames' pixels too;
    ``sentences`` float32 [E] by instruction, where they are to have the episode's.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        rows: list[dict[str, Any]],
        embodiments: dict[str, Embodiment],
        shape: WindowShape,
        pixels: list[dict[str, Any]] | None = None,
        sentences: dict[str, np.ndarray] | None = None,
    ):
        used = [(row, first, stop) for row in rows for first, stop in spans(row)]
        self.rows, self.shape = [row for row, _, _ in used], shape
        if not used:
            return
        self._latents, self._steps = _flat_files(snapshot, rows)
        self._pixels = None if pixels is None else _flat_pixels(snapshot, _alike(rows, pixels))
        self._sentences = None if sentences is None else np.stack([*sentences.values()])
        places = {text: place for place, text in enumerate(sentences or ())}
        self._sentence = np.array([places.get(row["instruction"], -1) for row in self.rows])
        latents_start, steps_start = _starts(rows)
        rows = self.rows
        self.first = np.array([first for _, first, _ in used])
        self.frames = np.array([stop - first for _, first, stop in used])
        self.embodiment = np.array([embodiments[row["embodiment"]].index for row in rows])
        self._camera_start = np.full((len(rows), shape.cameras), -1)
        self._steps_start = np.zeros(len(rows), np.int64)
        self._action_dim = np.array([row["action_dim"] for row in rows])
        self._proprio_dim = np.array([_width(row) - row["action_dim"] for row in rows])
        for i, (row, first) in enumerate(zip(rows, self.first, strict=True)):
            slots = embodiments[row["embodiment"]].cameras
            for number, camera in enumerate(row["cameras"]):
                if camera["name"] in slots:
                    start = latents_start[row["key"]] + number * row["frames"]
                    self._camera_start[i, slots.index(camera["name"])] = start + first
            self._steps_start[i] = steps_start[row["key"]] + first * _width(row)

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
        start = self._camera_start[episode]
        present = start >= 0
        group = self.embodiment[episode]

        acting = frame[:, None] + np.arange(shape.action_chunk)
        action, action_dims = self._columns(episode, np.minimum(acting, last), 0, self._action_dim, shape.action_dim)
        offset, scale = self._action_scale
        action_mask = (acting <= last)[:, :, None] & action_dims[:, None, :]
        action = np.where(action_mask, (action - offset[group, None]) / scale[group, None], 0)

        proprio, proprio_mask = self._columns(episode, observed, self._action_dim, self._proprio_dim, shape.proprio_dim)
        offset, scale = self._proprio_scale
        proprio = np.where(proprio_mask[:, None], (proprio - offset[group, None]) / scale[group, None], 0)
        more = {} if self._pixels is None else {"current_pixels": _frames(self._pixels, start, present, observed)}
        if self._sentences is not None:
            sentence = self._sentence[episode]
            more |= {"instruction": self._sentences[sentence], "instruction_mask": sentence >= 0}
        return more | {
            "current_latents": _frames(self._latents, start, present, observed),
            "future_latents": _frames(self._latents, start, present, future),
            "camera_mask": present,
            "action": action.astype(np.float32),
            "action_mask": action_mask,
            "proprio": proprio.astype(np.float32),
            "proprio_mask": proprio_mask,
            "embodiment": group.astype(np.int64),
        }

    def batches(
        self, seed: int, weights: dict[int, float], size: int, first_step: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """This worker's share of the global batch of each step, for ever, from ``first_step`` on."""
        sampler = WindowSampler(self.frames, self.embodiment, weights, seed)
        step = first_step
        while True:
            episode, frame = sampler.batch(step, size)
            yield self.gather(episode[rank::world], frame[rank::world])
            step += 1

    def drawn(self, seed: int, weights: dict[int, float], size: int, step: int, rank: int, world: int) -> list[str]:
        """Ids of the episodes that this worker's share of that step's batch is from."""
        episode, _ = WindowSampler(self.frames, self.embodiment, weights, seed).batch(step, size)
        return sorted({self.rows[i]["id"] for i in episode[rank::world]})

    def _columns(
        self, episode: np.ndarray, frame: np.ndarray, first: Any, width: np.ndarray, padded: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Columns [first, first + width) of the steps at ``frame`` [B, T] -> [B, T, padded], and which exist."""
        row = (self._action_dim + self._proprio_dim)[episode]
        column = np.arange(padded)
        exists = column < width[episode, None]
        offset = np.broadcast_to(first, self.frames.shape)[episode]
        where = (self._steps_start[episode] + offset)[:, None, None] + frame[:, :, None] * row[:, None, None] + column
        return self._steps[np.where(exists[:, None], where, 0)], exists


def _frames(stored: np.ndarray, start: np.ndarray, present: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Of each camera that is present [B, V], from where its episode starts, the frames [B, T]; zeros of the others."""
    where = np.where(present, start, 0)[:, :, None] + np.where(present[:, :, None], frame[:, None, :], 0)
    frames = stored[where]
    frames[~present] = 0
    return frames


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


def _width(row: dict[str, Any]) -> int:
    """Columns of the steps that a model reads: actions and proprioception."""
    return row["action_dim"] + sum(part["width"] for part in row["proprio"])


def _starts(rows: list[dict[str, Any]]) -> tuple[dict[str, int], dict[str, int]]:
    """Where each row's frames and numbers begin in the flat files, by its key."""
    latents, steps, frames_end, numbers_end = {}, {}, 0, 0
    for row in rows:
        latents[row["key"]], steps[row["key"]] = frames_end, numbers_end
        frames_end += row["frames"] * len(row["cameras"])
        numbers_end += row["frames"] * _width(row)
    return latents, steps


def _table(top: int, width: int, embodiments: dict[str, Embodiment], which: str) -> tuple[np.ndarray, np.ndarray]:
    offset, scale = np.zeros((top, width)), np.ones((top, width))
    for spec in embodiments.values():
        normalizer = getattr(spec, which)
        offset[spec.index, : len(normalizer.offset)] = normalizer.offset
        scale[spec.index, : len(normalizer.scale)] = normalizer.scale
    return offset, scale


def _flat_files(snapshot: Snapshot, rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Memory maps of these episodes: latents float16 [frames of all cameras, C, h, w] and steps float32, flat."""

    def build(folder: Path) -> None:
        segments, stepping = _segments(rows), [row for row in rows if row["steps"]["count"]]
        _copy(snapshot, segments, [None] * len(segments), folder / "latents.f16", np.float16)
        steps = [row["steps"] for row in stepping]
        _copy(snapshot, steps, [*map(_width, stepping)], folder / "steps.f32", np.float32)

    folder = _built(rows, build)
    shape = snapshot.shape(_segments(rows)[0])[1:]
    latents = np.memmap(folder / "latents.f16", np.float16, "r").reshape(-1, *shape)
    return latents, np.memmap(folder / "steps.f32", np.float32, "r")


def _flat_pixels(snapshot: Snapshot, rows: list[dict[str, Any]]) -> np.ndarray:
    """A memory map uint8 [frames of all cameras, 3, H, W]."""

    def build(folder: Path) -> None:
        segments = _segments(rows)
        _copy(snapshot, segments, [None] * len(segments), folder / "pixels.u8", np.uint8)

    shape = snapshot.shape(_segments(rows)[0])[1:]
    return np.memmap(_built(rows, build) / "pixels.u8", np.uint8, "r").reshape(-1, *shape)


def _segments(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [at for row in rows for camera in row["cameras"] for at in camera["segments"]]


def _built(rows: list[dict[str, Any]], build: Callable[[Path], None]) -> Path:
    """The folder of these rows' flat files.

    Built under a lock by the first process of a machine that asks; a folder that is there is complete.
    """
    name = hashlib.sha256("".join(row["key"] for row in rows).encode()).hexdigest()[:24]
    root = cache_folder()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"flat-{name}"
    with FileLock(root / f"flat-{name}.lock"):
        if not folder.exists():
            building = root / f"building-{name}"
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            build(building)
            building.rename(folder)
    return folder


def _copy(
    snapshot: Snapshot, locations: list[dict[str, Any]], columns: Sequence[int | None], path: Path, dtype: type
) -> None:
    """These locations one after the other in a flat file, read in the order in which the store has them.

    Of each, only the first ``columns`` are kept; None keeps all.
    """
    shapes = [
        (count, kept if kept is not None else width, *rest)
        for (count, width, *rest), kept in zip(map(snapshot.shape, locations), columns, strict=True)
    ]
    starts = np.cumsum([0, *map(math.prod, shapes)])
    # Never empty, for a memory map of nothing is an error.
    flat = np.memmap(path, dtype, "w+", shape=(max(1, int(starts[-1])),))
    pieces = snapshot.read_each(locations)
    for i, rows in tqdm(pieces, f"cache {path.stem}", len(locations), unit=" segments", leave=False, delay=2):
        flat[starts[i] : starts[i + 1]] = rows[:, : columns[i]].ravel()
    flat.flush()
