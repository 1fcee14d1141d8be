"""A camera's frames from images or arrays, in bounded memory, and wrappers around them.

Each becomes a :class:`preprocessing.episode.Video`, which reads only while iterated and never holds more than
``FRAMES_PER_CHUNK`` frames. Video files are decoded by :mod:`preprocessing.video.decode`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from preprocessing.episode import FRAMES_PER_CHUNK, Square, Video
from preprocessing.errors import BadEpisode
from preprocessing.limits import limits


def images_video(images: Sequence[bytes]) -> Video:
    """A video of JPEG or PNG files, one per frame, all of one size."""
    return indexed_images_video(len(images), images.__getitem__)


def indexed_images_video(count: int, read: Callable[[int], bytes]) -> Video:
    """A video of JPEG or PNG files that ``read(index)`` returns when they are needed."""

    def video(indices: Sequence[int]) -> Video:
        def frames(size: int | None) -> Iterator[np.ndarray]:
            return chunks(resize(decode_image(read(index))[None], size)[0] for index in indices)

        def thin(share: float) -> Video:
            return video([index for place, index in enumerate(indices) if times_kept(place, place + 1, share)])

        return Video(frames, thin=thin)

    return video(range(count))


def sliced_video(length: int, read: Callable[[int, int], np.ndarray], at_once: int = FRAMES_PER_CHUNK) -> Video:
    """A video of slices, of an array or an HDF5 data set.

    ``read(start, stop)`` returns uint8 ``[n, H, W, 3]`` with n <= ``at_once``.
    """

    def frames(size: int | None) -> Iterator[np.ndarray]:
        for start in range(0, length, at_once):
            _check_length(start)
            yield resize(read(start, min(start + at_once, length)), size)

    return Video(frames)


def upside_down(video: Video) -> Video:
    """The same camera with the order of its rows reversed."""

    def frames(size: int | None) -> Iterator[np.ndarray]:
        for chunk in video.frames(size):
            yield np.ascontiguousarray(chunk[:, ::-1])

    return Video(frames, turned=not video.turned, thin=lambda share: upside_down(thinned(video, share)))


def colours_exchanged(video: Video) -> Video:
    """The same camera with red and blue swapped."""

    def frames(size: int | None) -> Iterator[np.ndarray]:
        for chunk in video.frames(size):
            yield np.ascontiguousarray(chunk[..., ::-1])

    return Video(frames, video.turned, lambda share: colours_exchanged(thinned(video, share)))


def first_frames(video: Video, count: int) -> Video:
    """At most the first ``count`` frames. The rest is still decoded, to detect a break in it."""

    def frames(size: int | None) -> Iterator[np.ndarray]:
        left = count
        for chunk in video.frames(size):
            if left > 0:
                yield chunk[:left]
            left -= len(chunk)

    def thin(share: float) -> Video:
        return first_frames(thinned(video, share), kept_before(count, share))

    return Video(frames, turned=video.turned, thin=thin)


def times_kept(begin: float, end: float, share: float) -> int:
    """How many of the ticks k / share fall into ``[begin, end)``, in which a frame is shown, in frame times."""
    return kept_before(end, share) - kept_before(begin, share)


def kept_before(time: float, share: float) -> int:
    return math.ceil(max(0.0, time - 1e-6) * share)  # 216 * (7 / 24) is above 63


def frames_to_use(declared: dict[str, int | None], rows: int, table: str) -> tuple[int, str | None]:
    """How many steps the table and all cameras share, and a description of the mismatch, if any.

    ``declared`` has each camera's number of frames as its container declares it, so nothing is decoded; a camera
    without one is checked when it is decoded. One frame more or less than rows is a recorder's slip at the end; a
    larger difference means that they are of different recordings, and raises BadEpisode.
    """
    counts = {camera: count or rows for camera, count in declared.items()}
    for camera, count in counts.items():
        if abs(count - rows) > 1:
            raise BadEpisode(f"camera {camera} declares {count} frames, {table} has {rows} rows")
    slips = [f"{camera} has {count}" for camera, count in counts.items() if count != rows]
    return min([rows, *counts.values()]), f"{table} has {rows} rows, {', '.join(slips)} frames" if slips else None


def until_broken(video: Video, reasons: list[str]) -> Video:
    """The same camera up to where it breaks; ``reasons`` receives the reason. Raises BadEpisode if no frame is left."""

    def frames(size: int | None) -> Iterator[np.ndarray]:
        some = False
        try:
            for chunk in video.frames(size):
                yield chunk
                some = True
        except BadEpisode as error:
            if not some:
                raise
            reasons.append(str(error))

    return Video(frames, video.turned, lambda share: until_broken(thinned(video, share), reasons))


def thinned(video: Video, share: float) -> Video:
    """The same camera at a lower rate, as a ``share`` of its own rate, in (0, 1].

    Frame k is the one on screen k / share frame times after the first. Video files have timestamps, so a variable rate
    becomes regular, and a frame that stays on screen is repeated; in other videos frame i is shown at time i.
    """
    if video.thin:
        return video.thin(share)

    def frames(size: int | None) -> Iterator[np.ndarray]:
        every = (frame for chunk in video.frames(size) for frame in chunk)
        # A view would keep its whole chunk in memory.
        return chunks(frame.copy() for index, frame in enumerate(every) if times_kept(index, index + 1, share))

    return Video(frames, turned=video.turned)


def decode_image(data: bytes) -> np.ndarray:
    """Decode a JPEG or PNG to uint8 ``[H, W, 3]``. Untrusted bytes reach no other decoder. Raises BadEpisode."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            check_pixels(image.width, image.height)
            if image.mode.startswith("I"):  # Pillow would clip values above 255
                raise BadEpisode("an image is 16-bit greyscale: depth")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError:
        raise BadEpisode(f"an image of {len(data)} bytes is neither JPEG nor PNG") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadEpisode(f"an image cannot be decoded: {error}") from None


def resize(frames: np.ndarray, size: int | None) -> np.ndarray:
    """Resize uint8 ``[T, H, W, 3]`` to ``[T, size, size, 3]``: area averages when shrinking, else bilinear.

    A :class:`Square` says how another shape becomes a square. Raises BadEpisode for one that is far too long for it.
    """
    height, width = frames.shape[1:3]
    rows, columns = scaled(height, width, size)
    if size is None or (rows, columns) == (height, width) == (size, size):
        return frames
    # Pillow widens its filters with the reduction, so both average instead of skipping pixels. When growing, a box
    # filter would merely repeat pixels.
    method = Image.Resampling.BOX if rows <= height and columns <= width else Image.Resampling.BILINEAR
    whole = (np.asarray(Image.fromarray(frame).resize((columns, rows), method)) for frame in frames)
    return np.stack([squared(frame, size) for frame in whole])


def scaled(height: int, width: int, size: int | None) -> tuple[int, int]:
    """Return (height, width) to which a frame of this shape is scaled before ``squared``; a Square notes the shape."""
    if size is None:
        return height, width
    if isinstance(size, Square):
        size.recorded = height, width
        if size.fit != "stretch":
            factor = size / (min if size.fit == "crop" else max)(height, width)
            rows, columns = max(1, round(height * factor)), max(1, round(width * factor))
            check_pixels(columns, rows)
            return rows, columns
    return int(size), int(size)


def squared(frame: np.ndarray, size: int | None) -> np.ndarray:
    """Cut the centre out of a scaled frame uint8 ``[h, w, 3]``, or put black bars around it: ``[size, size, 3]``."""
    height, width = frame.shape[:2]
    if size is None or height == width == size:
        return frame
    top, left = max(height - size, 0) // 2, max(width - size, 0) // 2
    frame = frame[top : top + size, left : left + size]
    above, before = (size - frame.shape[0]) // 2, (size - frame.shape[1]) // 2
    whole = np.zeros((size, size, 3), np.uint8)
    whole[above : above + frame.shape[0], before : before + frame.shape[1]] = frame
    return whole


def chunks(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Stack frames ``[H, W, 3]`` into arrays ``[n, H, W, 3]``. Those before a BadEpisode are yielded first."""
    chunk: list[np.ndarray] = []
    try:
        for number, frame in enumerate(frames):
            _check_length(number)
            if chunk and frame.shape != chunk[0].shape:
                raise BadEpisode(f"the frame size changes from {chunk[0].shape[:2]} to {frame.shape[:2]}")
            chunk.append(frame)
            if len(chunk) == FRAMES_PER_CHUNK:
                yield np.stack(chunk)
                chunk = []
    except BadEpisode:
        if chunk:
            yield np.stack(chunk)
        raise
    if chunk:
        yield np.stack(chunk)


def check_pixels(width: int, height: int) -> None:
    """Raise BadEpisode if an image exceeds the recipe's limits: a 30 kB PNG can unpack to gigabytes."""
    if width * height > limits().picture_pixels:
        raise BadEpisode(f"an image of {width}x{height} pixels exceeds limits.picture_pixels")


def _check_length(frames: int) -> None:
    if frames >= limits().episode_steps:
        raise BadEpisode(f"has more frames than limits.episode_steps, {limits().episode_steps}")
