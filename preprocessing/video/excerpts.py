"""Ranges of consecutive frames of a video, by number: decoded and digested without the rest.

Frame k of a video is the one shown k frame times after the first. This is checked: an excerpt of a video whose frames
have other timestamps raises BadEpisode.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import av
import numpy as np

from preprocessing.episode import Video
from preprocessing.errors import BadEpisode
from preprocessing.video.decode import best_stream, decode, open_container
from preprocessing.video.frames import chunks
from preprocessing.video.thinning import DecodeState


def excerpt(path: Path, first: int, count: int, fps: float) -> Video:
    """Frames ``[first, first + count)`` of a video of ``fps`` frames a second, opened only when iterated."""

    def frames(size: int | None) -> Iterator[np.ndarray]:
        return chunks(decode(path, size, partial(_between, first=first, count=count, fps=fps)))

    return Video(frames)


def _between(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    state: DecodeState,
    first: int,
    count: int,
    fps: float,
) -> Iterator[tuple[av.VideoFrame, int]]:
    state.whole = False
    number = _numbers(stream, fps)
    if first and stream.time_base:
        container.seek((stream.start_time or 0) + int(first / fps / stream.time_base), stream=stream)  # a key frame
    for frame in container.decode(stream):
        at = number(frame.pts)
        if at < first:
            continue
        if at != first + state.frames:
            raise BadEpisode(f"frame {first + state.frames} of {Path(container.name).name} has an unexpected timestamp")
        state.frames += 1
        yield frame, 1
        if state.frames == count:
            return
    raise BadEpisode(f"{Path(container.name).name} ends {count - state.frames} frames before its episode")


def excerpt_digests(path: Path, excerpts: Sequence[tuple[int, int]], fps: float) -> list[tuple[str, int]]:
    """Digest the coded frames of each ``(first, count)``, and count those that exist. Nothing is decoded.

    ``excerpts`` must be sorted and must not overlap. Appending frames to a video keeps the digests of earlier ones.
    """
    hashes = [hashlib.sha256() for _ in excerpts]
    found = [0] * len(excerpts)
    starts = [first for first, _ in excerpts]
    with open_container(path) as container:
        stream = best_stream(container)
        number = _numbers(stream, fps)
        if starts[0] and stream.time_base:
            container.seek((stream.start_time or 0) + int(starts[0] / fps / stream.time_base), stream=stream)
        try:
            for packet in container.demux(stream):
                if not packet.size:
                    continue
                at = number(packet.pts)
                if packet.is_keyframe and at >= sum(excerpts[-1]):
                    break
                which = bisect_right(starts, at) - 1
                if which >= 0 and at < sum(excerpts[which]):
                    hashes[which].update(bytes(packet))
                    found[which] += 1
        except av.FFmpegError as error:
            raise BadEpisode(f"{path.name} breaks: {error.strerror}") from None
    return [(sha.hexdigest(), count) for sha, count in zip(hashes, found, strict=True)]


def _numbers(stream: av.VideoStream, fps: float) -> Callable[[int | None], int]:
    start, tick = stream.start_time or 0, float(stream.time_base or 0) * fps

    def number(pts: int | None) -> int:
        if pts is None:
            raise BadEpisode("holds a frame without a timestamp")
        return round((pts - start) * tick)

    return number
