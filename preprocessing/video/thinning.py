"""Choose the frames of a stream at a lower rate, and decode only what they need.

The frame on screen at each tick of the lower rate is kept. Frames are chosen by packet timestamps, one group of
pictures (key frame to key frame) at a time: a group without kept frames is not decoded, nor is anything after its last
kept frame, nor are non-reference frames. Where that might be wrong, everything is decoded, and the result is the same.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any, NamedTuple

import av
from av.packet import PktSideDataT
from av.video.frame import PictureType

from preprocessing.errors import BadEpisode
from preprocessing.video.frames import times_kept

IN_ORDER = {"libdav1d", "av1"}  # decoders that return one frame per packet, in packet order
NO_TIMES = 0x80  # AVFMT_NOTIMESTAMPS
MAX_GROUP = 4096  # packets held at once; a stream with fewer key frames is decoded in full
TOLERANCE = 0.001  # seconds a frame may be late: Matroska rounds times to milliseconds
# Codecs whose non-reference frames can be skipped. HEVC marks them per temporal layer only, and VP9 carries
# probabilities over from such frames, too.
SKIPPABLE = {"h264", "mpeg4", "mpeg2video", "mpeg1video"}
STANDING: tuple[PktSideDataT, ...] = (
    "new_extradata",
    "param_change",
    "palette",
)  # sent once, valid for all later packets


@dataclass
class DecodeState:
    """How much of a stream has been read."""

    frames: int = 0
    end: float | None = None  # when the last frame stops being shown, in seconds of the stream's clock
    whole: bool = True  # whether the stream is read to its end


# Yields the frames to output, and how often each.
Choice = Callable[[av.container.InputContainer, av.VideoStream, DecodeState], Iterator[tuple[av.VideoFrame, int]]]


def all_frames(
    container: av.container.InputContainer, stream: av.VideoStream, state: DecodeState
) -> Iterator[tuple[av.VideoFrame, int]]:
    waiting: deque[int | None] = deque()  # timestamps of packets whose frames are still to come
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard and stream.codec_context.name in IN_ORDER:
            waiting.append(packet.pts)
        for frame in packet.decode():
            lost = waiting and waiting.popleft() != frame.pts  # no error is raised if another frame is returned
            if lost or frame.is_corrupt:  # the decoder concealed unreadable bytes
                raise BadEpisode(f"breaks after {state.frames}: a frame is damaged")
            yield frame, 1
            state.frames += 1
            state.end = _end(frame, stream)


def _end(frame: av.VideoFrame | av.Packet[Any], stream: av.VideoStream) -> float | None:
    """When this frame stops being shown, in seconds of the stream's clock."""
    if frame.pts is None or frame.time_base is None:
        return None
    rate = rate_of(stream)
    shown = frame.duration * frame.time_base if frame.duration else (1 / rate if rate else 0)
    return float(frame.pts * frame.time_base + shown)


def frames_decoded(
    container: av.container.InputContainer, stream: av.VideoStream, state: DecodeState, share: float
) -> Iterator[tuple[av.VideoFrame, int]]:
    """Decode all frames and choose. One with no timestamp or a past one is shown a frame time after its predecessor."""
    scale, tolerance = _clock(stream)
    has_times = has_timestamps(container, stream)
    first: float | None = None
    shown: av.VideoFrame | None = None
    begin = -1.0
    for frame, _ in all_frames(container, stream, state):
        end = begin + 1
        if has_times and frame.pts is not None:
            first = frame.pts + tolerance if first is None else first
            end = time if (time := (frame.pts - first) * scale) > begin else end
        if shown is not None and (times := times_kept(begin, end, share)):
            yield shown, times
        shown, begin = frame, end
    if shown is not None and (times := times_kept(begin, begin + (shown.duration * scale or 1), share)):
        yield shown, times


class _Unsure(BadEpisode):
    """The packets do not determine which frames must be decoded."""


class _Coded(NamedTuple):
    """A frame before decoding, and its timestamp in the stream's ticks."""

    time: int
    packet: av.Packet[Any]


def frames_needed(
    container: av.container.InputContainer, stream: av.VideoStream, state: DecodeState, share: float
) -> Iterator[tuple[av.VideoFrame, int]]:
    """Choose frames by packet timestamps, and decode them with the frames they reference. Raises _Unsure."""
    if not has_timestamps(container, stream):
        raise _Unsure
    scale, tolerance = _clock(stream)
    first: float | None = None
    for group, ahead in _groups(container.demux(stream)):
        coded = sorted((*group, *ahead[1:]))
        shown = [index for index, (_, packet) in enumerate(coded) if not packet.is_discard]
        if not shown:
            continue  # hidden by an edit list
        last = coded[-1]
        until = ahead[0].time if ahead else last.time + (last.packet.duration or 1 / scale)
        ends = [*(time for time, _ in coded[1:]), until]
        first = coded[shown[0]].time + tolerance if first is None else first
        kept = {}
        for index in shown:
            begin = coded[index].time
            if times := times_kept((begin - first) * scale, (ends[index] - first) * scale, share):
                kept[begin] = times
        if kept:
            yield from _decode_group(stream.codec_context, [*group, *ahead], kept)
        state.frames += len(shown)
        state.end = _end(coded[shown[-1]].packet, stream)


def _groups(packets: Iterable[av.Packet[Any]]) -> Iterator[tuple[list[_Coded], list[_Coded]]]:
    """Yield each group of pictures, and separately the next key frame with its leading frames.

    Leading frames follow a key frame in the file but are shown before it. They may reference the previous group (an
    open group), so they are decoded with that one; every group then decodes without its predecessor.
    """
    group: list[_Coded] = []
    ahead: list[_Coded] = []
    for packet in packets:
        if not packet.size:
            continue  # the end of the file; in AVI also a repeated frame
        if packet.pts is None or packet.is_corrupt or any(map(packet.has_sidedata, STANDING)):
            raise _Unsure
        if len(group) + len(ahead) == MAX_GROUP:
            raise _Unsure
        coded = _Coded(packet.pts, packet)
        if ahead and (packet.is_keyframe or coded.time > ahead[0].time):
            yield _in_order(group, ahead)
            group, ahead = ahead[:1], []
        (ahead if ahead or (group and packet.is_keyframe) else group).append(coded)
    if group:
        yield _in_order(group, ahead)
    if ahead:
        yield ahead[:1], []


def _in_order(group: list[_Coded], ahead: list[_Coded]) -> tuple[list[_Coded], list[_Coded]]:
    """Return the arguments if all frames are shown between the two key frames, at distinct times. Raises _Unsure."""
    times = [coded.time for coded in (*group, *ahead[1:])]
    until = ahead[0].time if ahead else math.inf
    if (
        not group[0].packet.is_keyframe
        or min(times) < group[0].time
        or max(times) >= until
        or len(set(times)) < len(times)
    ):
        raise _Unsure
    return group, ahead


def _decode_group(
    codec: av.VideoCodecContext, packets: list[_Coded], kept: dict[int, int]
) -> Iterator[tuple[av.VideoFrame, int]]:
    """Yield the frames with these timestamps, in order, and how often; nothing after the last one is decoded."""
    last = max(index for index, coded in enumerate(packets) if coded.time in kept)
    frames = _decoded(codec, packets[: last + 1], kept)
    if not packets[0].packet.is_discard:
        key = next(frames, None)
        if key is None or key.pts != packets[0].time or key.pict_type in (PictureType.P, PictureType.B):
            raise _Unsure  # not a real key frame: intra refresh by columns, or a broken index
        frames = chain([key], frames)
    for time, times in kept.items():
        for frame in frames:
            if frame.pts == time:
                yield frame, times
                break
        else:
            raise _Unsure  # a packet without a displayed frame, such as VP8's hidden ones
    codec.flush_buffers()


def _decoded(codec: av.VideoCodecContext, packets: list[_Coded], kept: Container[int]) -> Iterator[av.VideoFrame]:
    """Decode packets, skipping non-reference frames that are not kept."""
    for time, packet in packets:
        spare = codec.name in SKIPPABLE and time not in kept and not packet.is_keyframe
        codec.skip_frame = "NONREF" if spare else "DEFAULT"
        yield from map(_undamaged, codec.decode(packet))
    yield from map(_undamaged, codec.decode(None))


def _undamaged(frame: av.VideoFrame) -> av.VideoFrame:
    if frame.is_corrupt:
        raise _Unsure
    return frame


def has_timestamps(container: av.container.InputContainer, stream: av.VideoStream) -> bool:
    """Whether timestamps can be trusted. AVI has none for presentation; FFmpeg guesses those of reordered frames."""
    return container.format.name != "avi" or not stream.codec_context.has_b_frames


def _clock(stream: av.VideoStream) -> tuple[float, float]:
    """The length of a clock tick in frame times, and of ``TOLERANCE`` in ticks."""
    tick = stream.time_base or Fraction(1, 1000)
    return float((rate_of(stream) or 25) * tick), float(TOLERANCE / tick)


def rate_of(stream: av.VideoStream) -> Fraction | None:
    """The declared rate in Hz, if any. A raw stream's average rate is just FFmpeg's default."""
    return stream.guessed_rate if is_raw(stream) else stream.average_rate or stream.guessed_rate


def is_raw(stream: av.VideoStream) -> bool:
    """Whether the stream has no container."""
    return bool(stream.container.format.flags & NO_TIMES)
