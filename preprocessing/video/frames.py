"""A camera's frames: out of pictures or arrays, in bounded memory, and what can be put around them.

Everything becomes a :class:`preprocessing.episode.Video`, which reads only while somebody iterates and never holds more
than ``FRAMES_PER_CHUNK`` frames. Films are decoded by :mod:`preprocessing.video.decode`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from preprocessing.episode import FRAMES_PER_CHUNK, Video
from preprocessing.errors import BadEpisode
from preprocessing.limits import limits
from preprocessing.video.thinning import kept_before, times_kept


def images_video(images: Sequence[bytes]) -> Video:
    """JPEG or PNG files, one a frame, all of one size."""
    return pictures_video(len(images), images.__getitem__)


def pictures_video(count: int, read: Callable[[int], bytes]) -> Video:
    """The same, where ``read(index)`` gives each as it is needed."""

    def video(indices: Sequence[int]) -> Video:
        def frames(size: int | None) -> Iterator[np.ndarray]:
            return chunks(resize(decode_image(read(index))[None], size)[0] for index in indices)

        def thin(share: float) -> Video:
            return video([index for place, index in enumerate(indices) if times_kept(place, place + 1, share)])

        return Video(frames, thin=thin)

    return video(range(count))


def sliced_video(length: int, read: Callable[[int, int], np.ndarray], at_once: int = FRAMES_PER_CHUNK) -> Video:
    """``read(start, stop)`` gives uint8 ``[n, H, W, 3]``, n at most ``at_once``: an array's slices, or an HDF5 data
    set's."""

    def frames(size: int | None) -> Iterator[np.ndarray]:
        for start in range(0, length, at_once):
            _check_length(start)
            yield resize(read(start, min(start + at_once, length)), size)

    return Video(frames)


def upside_down(video: Video) -> Video:
    """The same camera with its rows in the opposite order."""

    def frames(size: int | None) -> Iterator[np.ndarray]:
        for chunk in video.frames(size):
            yield np.ascontiguousarray(chunk[:, ::-1])

    return Video(frames, turned=not video.turned, thin=lambda share: upside_down(thinned(video, share)))


def colours_exchanged(video: Video) -> Video:
    """The same camera with red for blue and blue for red."""

    def frames(size: int | None) -> Iterator[np.ndarray]:
        for chunk in video.frames(size):
            yield np.ascontiguousarray(chunk[..., ::-1])

    return Video(frames, video.turned, lambda share: colours_exchanged(thinned(video, share)))


def first_frames(video: Video, count: int) -> Video:
    """At most the first ``count`` frames. The rest is decoded all the same, so that a break in it is found."""

    def frames(size: int | None) -> Iterator[np.ndarray]:
        left = count
        for chunk in video.frames(size):
            if left > 0:
                yield chunk[:left]
            left -= len(chunk)

    def thin(share: float) -> Video:
        return first_frames(thinned(video, share), kept_before(count, share))

    return Video(frames, turned=video.turned, thin=thin)


def until_broken(video: Video, said: list[str]) -> Video:
    """The same camera up to where it breaks; why it does is added to ``said``. No frame at all is a BadEpisode."""

    def frames(size: int | None) -> Iterator[np.ndarray]:
        some = False
        try:
            for chunk in video.frames(size):
                yield chunk
                some = True
        except BadEpisode as error:
            if not some:
                raise
            said.append(str(error))

    return Video(frames, video.turned, lambda share: until_broken(thinned(video, share), said))


def thinned(video: Video, share: float) -> Video:
    """The same camera at a lower rate: ``share`` (above 0, at most 1) is that rate by the camera's own.

    The k-th frame is the one on screen k / share frame times after the first. A file says by itself when its frames
    are shown, so a variable rate comes out regular, a frame that stays on screen more than once; elsewhere frame
    i is shown at i.
    """
    if video.thin:
        return video.thin(share)

    def frames(size: int | None) -> Iterator[np.ndarray]:
        every = (frame for chunk in video.frames(size) for frame in chunk)
        # A view would keep the whole chunk that it came in.
        return chunks(frame.copy() for index, frame in enumerate(every) if times_kept(index, index + 1, share))

    return Video(frames, turned=video.turned)


def decode_image(data: bytes) -> np.ndarray:
    """A JPEG or PNG as uint8 ``[H, W, 3]``. Only these two decoders are tried on bytes from outside."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            check_pixels(image.width, image.height)
            if image.mode.startswith("I"):  # Pillow would cut off what is above 255
                raise BadEpisode("an image has 16 bits of grey: that is depth")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError:
        raise BadEpisode(f"an image of {len(data)} bytes is neither JPEG nor PNG") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadEpisode(f"an image cannot be decoded: {error}") from None


def resize(frames: np.ndarray, size: int | None) -> np.ndarray:
    """uint8 ``[T, H, W, 3]`` to ``[T, size, size, 3]``: averaged over areas when shrinking, bilinear when growing."""
    if size is None or frames.shape[1:3] == (size, size):
        return frames
    # Pillow's filters widen with the reduction, so both average instead of skipping pixels; a box that grows
    # would merely repeat them.
    method = Image.Resampling.BOX if size <= min(frames.shape[1:3]) else Image.Resampling.BILINEAR
    return np.stack([np.asarray(Image.fromarray(frame).resize((size, size), method)) for frame in frames])


def chunks(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Frames ``[H, W, 3]`` as arrays ``[n, H, W, 3]``. Where they break, what was before the break comes first."""
    chunk: list[np.ndarray] = []
    try:
        for number, frame in enumerate(frames):
            _check_length(number)
            if chunk and frame.shape != chunk[0].shape:
                raise BadEpisode(f"the picture size changes from {chunk[0].shape[:2]} to {frame.shape[:2]}")
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
    """BadEpisode where a picture is larger than the limits of the recipe allow: a 30 kB PNG can unpack to gigabytes."""
    if width * height > limits().picture_pixels:
        raise BadEpisode(f"a picture of {width}x{height} pixels is more than limits.picture_pixels")


def _check_length(frames: int) -> None:
    if frames >= limits().episode_steps:
        raise BadEpisode(f"has more frames than limits.episode_steps, {limits().episode_steps}")
