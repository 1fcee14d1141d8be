"""Frames out of video files: upright, right colours, in bounded memory. Notable:

- **Upright.** The display matrix (ISO/IEC 14496-12, 8.3.2 ``tkhd``; phones write one) is applied, mirrors included.
- **Right colours.** The YUV matrix and range of each frame are handed to swscale; a range that is not named is
  limited, but full for grey, palette, RGB and the ``yuvj`` formats.
- **One scaler.** Sizes are reached by area averaging in the same swscale pass that makes RGB, so nothing aliases.
- **Square pixels.** A sample aspect ratio (14496-12, 12.1.4 ``pasp``) is applied where the recorded size is kept.
- **Honest ends.** A file that breaks, that ends before the time or size its container declares, or of which a picture
  is made up or lost, is a ``BadEpisode``, which comes after all that was before the break.
- **One thread a file.** An ingest is parallel by file; codec threads would only fight it for the cores.
- **Thinned by time.** A lower rate keeps the frame on screen at each of its ticks (:mod:`preprocessing.video.thinning`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import SideData
from av.stream import Disposition
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from preprocessing.episode import Video
from preprocessing.errors import BadEpisode
from preprocessing.limits import limits
from preprocessing.video.frames import check_pixels, chunks, thinned
from preprocessing.video.thinning import (
    Choice,
    Seen,
    all_frames,
    frames_decoded,
    frames_needed,
    is_raw,
    rate_of,
    tells_times,
)

SLACK = 0.02  # of a declared rate: Matroska's milliseconds and FFmpeg's guesses from the first frames are off by one
PROGRESSIVE = 1  # AV_FIELD_PROGRESSIVE
LIST = b"ffconcat"
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
MAX_STILL = 100_000  # times that one frame may be kept; a clock that jumps by years would fill any store


@dataclass(frozen=True)
class VideoInfo:
    """What a container says about the video stream that is read, before anything is decoded."""

    fps: float
    width: int  # as coded: before a rotation is applied
    height: int
    declared_frames: int | None  # None where the format does not count (Matroska, MPEG-TS, fragmented MP4)
    streams: int  # video streams in the file, of which one is read
    timed: bool  # whether frames carry times; those of a raw stream do not


class Timing(NamedTuple):
    """When a stream's frames are shown: their mean rate in Hz, by how many frame times one strays from it, and the rate
    of most of them."""

    rate: float
    strays: float
    usual: float


def probe_video(path: Path | str) -> VideoInfo:
    """Reads the header only. Raises BadEpisode where that is impossible or there is no video in the file."""
    with open_container(path) as container:
        stream = best_stream(container)
        rate = rate_of(stream)
        if not rate:
            raise BadEpisode("declares no frame rate")
        if not stream.width or not stream.height:
            raise BadEpisode("declares no picture size, or one beyond limits.picture_pixels")
        check_pixels(stream.width, stream.height)
        return VideoInfo(
            fps=float(rate),
            width=stream.width,
            height=stream.height,
            declared_frames=stream.frames or None,
            streams=len(_video_streams(container)),
            timed=not is_raw(stream),
        )


def open_video(path: Path | str) -> Video:
    """The best video stream of a file. Nothing is opened before somebody iterates."""

    def frames(size: int | None) -> Iterator[np.ndarray]:
        return chunks(decode(path, size))

    def thin(share: float) -> Video:
        return Video(lambda size: chunks(_decode_share(path, size, share)))

    return Video(frames, thin=thin)


def open_film(path: Path | str) -> tuple[Video, float, list[str]]:
    """A film as an episode: its frames at regular times, their rate in Hz, and what was mended for that.

    Of one whose frames come at irregular times (phones, screen recorders), the frame on screen at each tick of its mean
    rate is taken. A declared rate that is not that of the frames gives way to theirs: a GIF or MP4 that holds its last
    picture for seconds declares a mean that no two frames keep. Times are those of packets; nothing is decoded.
    """
    info, video, timing = probe_video(path), open_video(path), packet_times(path)
    declared = info.fps
    if timing is None:
        return video, declared, [] if info.timed else [f"frames carry no times; {declared:g} Hz assumed"]
    regular = timing.strays <= 1
    if regular and min(abs(rate / declared - 1) for rate in (timing.rate, timing.usual)) <= SLACK:
        return video, declared, []

    def at(share: float) -> Video:
        return replace(thinned(video, share), thin=lambda less: at(share * less))

    if regular:
        told = replace(video, thin=lambda less: at(less * timing.rate / declared))
        return told, timing.rate, [f"declares {declared:g} Hz; {timing.rate:g} Hz by the times of its frames"]
    said = f"frames come at irregular times; resampled to {timing.rate:g} Hz, their mean rate"
    return at(timing.rate / declared), timing.rate, [said]


def open_container(path: Path | str) -> av.container.InputContainer:
    with contextlib.suppress(OSError), Path(path).open("rb") as file:
        if file.read(len(LIST)) == LIST:  # FFmpeg would open what it names: its neighbours, or itself without end
            raise BadEpisode("is a list of other files, no film")
    try:
        # A title in Latin-1 is no reason to refuse. Opening decodes the first frames, which may be huge.
        limit = {"max_pixels": str(limits().picture_pixels)}
        return av.open(str(path), metadata_errors="replace", options=limit)
    except av.FFmpegError as error:
        raise BadEpisode(f"cannot be opened as video: {error.strerror}") from None


def _video_streams(container: av.container.InputContainer) -> list[av.VideoStream]:
    """Cover art of a music file is a video stream to FFmpeg, but no video; one without a codec cannot be decoded."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    return [s for s in streams if s.codec_context is not None]


def packet_times(path: Path | str) -> Timing | None:
    """Of the stream that is read. None where it cannot be told: a frame without a time, or two at one time."""
    with open_container(path) as container:
        stream = best_stream(container)
        times: list[int] = []
        with contextlib.suppress(av.FFmpegError):  # whoever decodes it will say so
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    if packet.pts is None or len(times) == limits().episode_steps:
                        return None
                    times.append(packet.pts)
        shown = np.sort(np.array(times, np.int64))
        if len(shown) < 3 or not stream.time_base or not tells_times(container, stream) or not np.diff(shown).all():
            return None
        mean = (shown[-1] - shown[0]) / (len(shown) - 1)
        strays = np.abs(shown - shown[0] - mean * np.arange(len(shown))).max() / mean
        usual = float(np.median(np.diff(shown)))
        timing = Timing(float(1 / (mean * stream.time_base)), float(strays), float(1 / (usual * stream.time_base)))
        interlaced = stream.codec_context.field_order > PROGRESSIVE
        fields = interlaced and timing.rate > 1.5 * (rate_of(stream) or timing.rate)  # two packets are a frame
        return None if fields else timing


def best_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The stream its author marked as default; among several, the one with the most pixels, then the first."""
    streams = _video_streams(container)
    if not streams:
        raise BadEpisode("holds no video stream that can be decoded")
    return max(streams, key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height, -s.index))


def decode(path: Path | str, size: int | None, choose: Choice = all_frames) -> Iterator[np.ndarray]:
    with open_container(path) as container:
        stream = best_stream(container)
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        check_pixels(stream.width, stream.height)
        stream.codec_context.options = {"max_pixels": str(limits().picture_pixels)}  # what is coded may be larger
        reformatter = VideoReformatter()
        shape: tuple[int, int] | None = None
        seen = Seen()
        try:
            for frame, times in choose(container, stream, seen):
                if times > MAX_STILL:
                    raise BadEpisode(f"holds one frame for the time of {times}: its clock jumps")
                # A stream may change its size midway (a web conference, a joined film): the first one holds.
                shape = shape or ((size, size) if size else _shown(frame, stream))
                yield from repeat(_upright(frame, _rgb(frame, reformatter, *shape)), times)
        except av.FFmpegError as error:
            raise BadEpisode(f"{_declared(stream)}breaks after {seen.frames}: {error.strerror}") from None
        if seen.frames == 0:
            raise BadEpisode("holds no frame that can be decoded")
        if seen.whole and (_ends_early(stream, seen.frames, seen.end) or _is_cut(path)):
            raise BadEpisode(f"{_declared(stream)}ends after {seen.frames}: the file is cut off")


def _shown(frame: av.VideoFrame, stream: av.VideoStream) -> tuple[int, int]:
    """Width and height in square pixels."""
    width = max(1, round(frame.width * (stream.sample_aspect_ratio or 1)))
    check_pixels(width, frame.height)
    return width, frame.height


def _declared(stream: av.VideoStream) -> str:
    return f"declares {stream.frames} frames, " if stream.frames else ""


def _ends_early(stream: av.VideoStream, count: int, end: float | None) -> bool:
    """Whether frames are missing at the end of the stream, where a cut-off file loses them without an error.

    The declared count alone cannot tell: it is what the container stores, not what it shows. An edit list may hide
    a run-up of hundreds of frames, and a decoder drops leading pictures that lean on one before the first key
    frame. Both shorten the beginning, so a shortfall is a loss only where the last frame also ends before the
    declared end of the stream (which FFmpeg has corrected for edit lists). Half a frame is for rounding.

    Matroska counts nothing, but its writers note each track's end in a DURATION tag. Its times are rounded and its
    last duration is a guess, hence two frames of slack; where its clock is set back, the number of frames tells. A
    format with neither (MPEG-TS) promises nothing to break.
    """
    if end is None:
        return stream.frames > count
    frame_time = 1 / float(rate_of(stream) or 25)
    if stream.frames:
        if count >= stream.frames:
            return False
        if stream.duration is None or stream.time_base is None:
            return True
        declared_end = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
        return end < declared_end - 0.5 * frame_time
    tag = _seconds(stream.metadata.get("DURATION", ""))
    return tag is not None and max(end, count * frame_time) < tag - 2 * frame_time


def _is_cut(path: Path | str) -> bool:
    """Whether a Matroska file is shorter than its segment says, which FFmpeg takes for the end (RFC 8794, 4 to 6)."""

    def size(at: int) -> tuple[int, int]:
        """The size that stands there, and where it ends."""
        end = at + 9 - head[at].bit_length()
        return int.from_bytes(head[at:end]) & (1 << 7 * (end - at)) - 1, end

    try:
        with Path(path).open("rb") as file:
            head, whole = file.read(1024), file.seek(0, 2)
        if not head.startswith(EBML):
            return False
        segment = sum(size(len(EBML)))
        if head[segment : segment + len(SEGMENT)] != SEGMENT:
            return False
        claimed, begin = size(segment + len(SEGMENT))
    except (OSError, IndexError):  # a part of a tar file, which is known to be whole
        return False
    unknown = claimed == (1 << 7 * (begin - segment - len(SEGMENT))) - 1  # of what was recorded live
    return not unknown and begin + claimed > whole


def _seconds(clock: str) -> float | None:
    """``00:00:10.333000000`` as seconds."""
    try:
        hours, minutes, seconds = clock.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return None


def _rgb(frame: av.VideoFrame, reformatter: VideoReformatter, width: int, height: int) -> np.ndarray:
    """Colours and size in one swscale pass.

    An unnamed matrix is left to swscale, which takes BT.601 whatever the size. That is what every FFmpeg-based
    loader does, so latents agree with those of models trained elsewhere.
    """
    source_range = frame.color_range
    if source_range == ColorRange.UNSPECIFIED:
        full = frame.format.name.startswith(("yuvj", "gray", "pal8")) or frame.format.is_rgb
        source_range = ColorRange.JPEG if full else ColorRange.MPEG
    rgb = reformatter.reformat(
        frame,
        width=width,
        height=height,
        format="rgb24",
        interpolation=Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT,
        src_color_range=source_range,
        dst_color_range=ColorRange.JPEG,
        threads=1,
    )
    return rgb.to_ndarray()


def _upright(frame: av.VideoFrame, picture: np.ndarray) -> np.ndarray:
    """Applies the display matrix, which sends column x, row y to ``(a x + c y, b x + d y)``.

    Only its quarter turns and mirrors are meaningful for whole pictures; a shear or a scale is left alone.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(matrix, SideData):
        return picture
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(b) > abs(a):  # columns become rows
        picture = picture.transpose(1, 0, 2)
        a, d = c, b
    return np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _decode_share(path: Path | str, size: int | None, share: float) -> Iterator[np.ndarray]:
    """A share of the frames, from as little decoding as is safe.

    Whatever is in the way of that, a broken file included, is left to a decoder that sees every frame: it goes on
    where the first one stopped, or says what is wrong in the words used of a film that is not thinned.
    """
    done = 0
    try:
        for picture in decode(path, size, partial(frames_needed, share=share)):
            yield picture
            done += 1
    except BadEpisode:
        yield from islice(decode(path, size, partial(frames_decoded, share=share)), done, None)
