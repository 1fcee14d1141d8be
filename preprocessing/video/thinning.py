"""Which frames of a stream come out at a lower rate, and which of the others have to be decoded for them.

The frame on screen at each tick of the lower rate is kept. Frames are chosen from the packets' times, one group of
pictures (key frame to key frame) after the other: a group without a kept frame is not decoded at all, nothing behind
its last kept frame is, and what no other frame leans on is left out. Where that could go wrong, all is decoded, and the
same frames come out.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import NamedTuple

import av
from av.packet import PktSideDataT
from av.video.frame import PictureType

from preprocessing.errors import BadEpisode

IN_ORDER = {"libdav1d", "av1"}  # decoders that give a frame for each packet, in the packets' order
NO_TIMES = 0x80  # AVFMT_NOTIMESTAMPS
MAX_GROUP = 4096  # packets held at once; a stream without key frames is decoded whole instead
EARLY = 0.001  # seconds that a frame may come after its moment: Matroska rounds times to milliseconds
# Where a frame that no other leans on can be left out. HEVC's mark holds within one temporal layer only, and VP9 hands
# on probabilities from such a frame as well.
LEAVES_OUT = {"h264", "mpeg4", "mpeg2video", "mpeg1video"}
STANDING: tuple[PktSideDataT, ...] = ("new_extradata", "param_change", "palette")  # told once, for all that follows


@dataclass
class Seen:
    """How much of a stream has gone by."""

    frames: int = 0
    end: float | None = None  # when the last frame stops being shown, in seconds of the stream's clock
    whole: bool = True  # all of it is to go by


# The frames that are to come out, and how often each.
Choice = Callable[[av.container.InputContainer, av.VideoStream, Seen], Iterator[tuple[av.VideoFrame, int]]]


def all_frames(
    container: av.container.InputContainer, stream: av.VideoStream, seen: Seen
) -> Iterator[tuple[av.VideoFrame, int]]:
    waiting: deque[int | None] = deque()  # times of packets whose frames are to come
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard and stream.codec_context.name in IN_ORDER:
            waiting.append(packet.pts)
        for frame in packet.decode():
            lost = waiting and waiting.popleft() != frame.pts  # its error is not told where another frame came out
            if lost or frame.is_corrupt:  # what its decoder made up for bytes that it could not read
                raise BadEpisode(f"breaks after {seen.frames}: a picture is damaged")
            yield frame, 1
            seen.frames += 1
            seen.end = _end(frame, stream)


def _end(frame: av.VideoFrame | av.Packet, stream: av.VideoStream) -> float | None:
    """When this frame stops being shown, in seconds of the stream's clock."""
    if frame.pts is None or frame.time_base is None:
        return None
    rate = rate_of(stream)
    shown = frame.duration * frame.time_base if frame.duration else (1 / rate if rate else 0)
    return float(frame.pts * frame.time_base + shown)


def times_kept(begin: float, end: float, share: float) -> int:
    """How many of the moments k / share fall to a frame that is shown from ``begin`` to ``end``, in frame times."""
    return kept_before(end, share) - kept_before(begin, share)


def kept_before(time: float, share: float) -> int:
    return math.ceil(max(0.0, time - 1e-6) * share)  # 216 * (7 / 24) is above 63


def frames_decoded(
    container: av.container.InputContainer, stream: av.VideoStream, seen: Seen, share: float
) -> Iterator[tuple[av.VideoFrame, int]]:
    """Chosen among all frames. One without a time, or with a time that is past, comes a frame time after the last."""
    scale, early = _clock(stream)
    told = tells_times(container, stream)
    first: float | None = None
    shown: av.VideoFrame | None = None
    begin = -1.0
    for frame, _ in all_frames(container, stream, seen):
        end = begin + 1
        if told and frame.pts is not None:
            first = frame.pts + early if first is None else first
            end = time if (time := (frame.pts - first) * scale) > begin else end
        if shown is not None and (times := times_kept(begin, end, share)):
            yield shown, times
        shown, begin = frame, end
    if shown is not None and (times := times_kept(begin, begin + (shown.duration * scale or 1), share)):
        yield shown, times


class _Unsure(BadEpisode):
    """The packets do not tell which frames must be decoded."""


class _Coded(NamedTuple):
    """A frame before it is decoded, and when it is shown, in the stream's ticks."""

    time: int
    packet: av.Packet


def frames_needed(
    container: av.container.InputContainer, stream: av.VideoStream, seen: Seen, share: float
) -> Iterator[tuple[av.VideoFrame, int]]:
    """Chosen by the times of packets, and decoded with what they lean on. Raises _Unsure."""
    if not tells_times(container, stream):
        raise _Unsure
    scale, early = _clock(stream)
    first: float | None = None
    for group, ahead in _groups(container.demux(stream)):
        coded = sorted((*group, *ahead[1:]))
        shown = [index for index, (_, packet) in enumerate(coded) if not packet.is_discard]
        if not shown:
            continue  # an edit list hides them
        last = coded[-1]
        until = ahead[0].time if ahead else last.time + (last.packet.duration or 1 / scale)
        ends = [*(time for time, _ in coded[1:]), until]
        first = coded[shown[0]].time + early if first is None else first
        kept = {}
        for index in shown:
            begin = coded[index].time
            if times := times_kept((begin - first) * scale, (ends[index] - first) * scale, share):
                kept[begin] = times
        if kept:
            yield from _decode_group(stream.codec_context, [*group, *ahead], kept)
        seen.frames += len(shown)
        seen.end = _end(coded[shown[-1]].packet, stream)


def _groups(packets: Iterable[av.Packet]) -> Iterator[tuple[list[_Coded], list[_Coded]]]:
    """Each group of pictures, from a key frame to the next; and apart, that next one with the frames that it leads.

    Those follow it in the file but are shown before it. They may lean on the group before, which then is an open one:
    they belong to that group, and every group can be decoded without the one before.
    """
    group: list[_Coded] = []
    ahead: list[_Coded] = []
    for packet in packets:
        if not packet.size:
            continue  # the end of the file; in AVI also a frame that is shown once more
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
    """The same, if all are shown between the two key frames, each at a time of its own."""
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
    """The frames of these times, in their order, and how often; nothing behind the last of them is decoded."""
    last = max(index for index, coded in enumerate(packets) if coded.time in kept)
    frames = _decoded(codec, packets[: last + 1], kept)
    if not packets[0].packet.is_discard:
        key = next(frames, None)
        if key is None or key.pts != packets[0].time or key.pict_type in (PictureType.P, PictureType.B):
            raise _Unsure  # a key frame by name only: refreshed by columns, or the index is broken
        frames = chain([key], frames)
    for time, times in kept.items():
        for frame in frames:
            if frame.pts == time:
                yield frame, times
                break
        else:
            raise _Unsure  # a packet that shows nothing, such as VP8's hidden frames
    codec.flush_buffers()


def _decoded(codec: av.VideoCodecContext, packets: list[_Coded], kept: Container[int]) -> Iterator[av.VideoFrame]:
    """Without the frames that are neither kept nor needed for another."""
    for time, packet in packets:
        spare = codec.name in LEAVES_OUT and time not in kept and not packet.is_keyframe
        codec.skip_frame = "NONREF" if spare else "DEFAULT"
        yield from map(_undamaged, codec.decode(packet))
    yield from map(_undamaged, codec.decode(None))


def _undamaged(frame: av.VideoFrame) -> av.VideoFrame:
    if frame.is_corrupt:
        raise _Unsure
    return frame


def tells_times(container: av.container.InputContainer, stream: av.VideoStream) -> bool:
    """AVI stores no time of presentation; where frames are reordered, what FFmpeg says of them is a guess."""
    return container.format.name != "avi" or not stream.codec_context.has_b_frames


def _clock(stream: av.VideoStream) -> tuple[float, float]:
    """Frame times in a tick of the stream's clock, and ticks in ``EARLY``."""
    tick = stream.time_base or Fraction(1, 1000)
    return float((rate_of(stream) or 25) * tick), float(EARLY / tick)


def rate_of(stream: av.VideoStream) -> Fraction | None:
    """In Hz, as far as anything says. The average of a raw stream is FFmpeg's default, whatever the stream says."""
    return stream.guessed_rate if is_raw(stream) else stream.average_rate or stream.guessed_rate


def is_raw(stream: av.VideoStream) -> bool:
    """A stream without a container."""
    return bool(stream.container.format.flags & NO_TIMES)
