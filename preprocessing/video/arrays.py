"""A recorded array as a camera: where its channels are, and what its numbers mean as colours.

Recorders store images in many ways: uint8 or floats from 0 to 1, channels last or first, with alpha. Every reader that
holds arrays opens them here. What is not colours (depth, masks, single channels) is refused with a reason, so that the
reader can leave that stream out and say why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from preprocessing.episode import FRAMES_PER_CHUNK, Repair, Video
from preprocessing.errors import BadEpisode
from preprocessing.limits import limits
from preprocessing.video.frames import check_pixels, chunks, resize

Pieces = Callable[[], Iterable[np.ndarray]]
SIDE = {2: 16, 3: 8}  # pixels, by the number of axes: arrays with shorter sides are matrices or tables of vectors
PIECE = 2**26  # bytes of an array that are converted at once


def is_picture(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Whether rows of this shape ``[...]``, one per step, look like pictures, of whatever kind."""
    if len(shape) == 3 and shape[2] == 3 and dtype == np.uint8:
        return True
    return dtype.kind in "fiub" and sum(size >= SIDE.get(len(shape), math.inf) for size in shape) >= 2


def array_video(name: str, shape: tuple[int, ...], dtype: np.dtype, pieces: Pieces) -> tuple[Video, list[Repair]]:
    """The camera in an array ``[T, *shape]``, and what was mended.

    ``pieces()`` yields its rows in order, some at a time. Read are uint8, and other numbers if all are in 0 to 1 or in
    0 to 255; ``[H, W, 3]``, ``[H, W, 4]`` (alpha is dropped) and ``[3, H, W]``. Raises BadEpisode, with the name and
    the reason, if that is not what the array holds.
    """
    what = f"{name} is {dtype} of shape {('T', *shape)}".replace("'", "")
    if len(shape) == 2 or (len(shape) == 3 and 1 in (shape[0], shape[2])):
        raise BadEpisode(f"{what}: a single channel (depth, a mask or grey), not colours")
    if dtype.kind not in "fiu" or len(shape) != 3:
        raise BadEpisode(f"{what}, not colour images")
    last, first = shape[2] in (3, 4), shape[0] == 3
    if not (last or first):
        raise BadEpisode(f"{what}: neither its last axis nor its first has three channels")
    first = not last
    check_pixels(*(shape[1:] if first else shape[:2]))
    mended = ["has its channels first; moved last"] if first else []
    if last and shape[2] == 4:
        mended.append("has an alpha channel; dropped")
    scale = 1.0
    if dtype != np.uint8:
        low, high = _range(pieces())
        if not 0 <= low <= high <= 255:
            raise BadEpisode(f"{what}: it ranges from {low:g} to {high:g}, which are not colours")
        scale = 255.0 if dtype.kind == "f" and high <= 1 else 1.0
        if scale > 1:
            mended.append("is recorded from 0 to 1; scaled to 0 to 255")

    def frames(size: int | None) -> Iterator[np.ndarray]:
        return chunks(resize(frame[None], size)[0] for rows in pieces() for frame in _colours(rows, first, scale, name))

    return Video(frames), [Repair("frames", f"{name} {text}") for text in mended]


def rows_at_once(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """How many rows ``[*shape]`` to read at once."""
    row = max(1, int(np.prod(shape, dtype=np.float64)) * dtype.itemsize)
    return max(1, min(FRAMES_PER_CHUNK, min(PIECE, limits().array_bytes) // row))


def _range(pieces: Iterable[np.ndarray]) -> tuple[float, float]:
    """The least and greatest value; of images from 0 to 255 those of the first pieces, which tell them from 0 to 1."""
    low, high = np.inf, -np.inf
    for rows in pieces:
        if rows.size:
            low, high = float(np.minimum(low, rows.min())), float(np.maximum(high, rows.max()))  # NaN stays
        if high > 1 or low < 0 or np.isnan(low):
            break
    return low, high


def _colours(rows: np.ndarray, first: bool, scale: float, name: str) -> np.ndarray:
    rows = (rows.transpose(0, 2, 3, 1) if first else rows)[..., :3]
    if rows.dtype != np.uint8:
        if not (np.isfinite(rows).all() and rows.min() >= 0 and rows.max() * scale <= 255):
            raise BadEpisode(f"{name} ranges from {rows.min()} to {rows.max()}, which are not colours")
        rows = np.rint(rows * scale).astype(np.uint8)
    return np.array(rows, order="C")  # a view would keep what it is a part of in memory
