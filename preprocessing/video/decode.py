"""Decode video files into upright frames with correct colours, in bounded memory.

- **Upright.** The display matrix (ISO/IEC 14496-12, 8.3.2 ``tkhd``; phones write one) is applied, mirrors included.
- **Correct colours.** swscale is passed each frame's YUV matrix and range. An unspecified range counts as limited, but
  as full for grey, palette, RGB and the ``yuvj`` formats.
- **One scaler.** Frames are resized by area averaging in the swscale pass that converts to RGB, so nothing aliases.
- **Square pixels.** A sample aspect ratio (14496-12, 12.1.4 ``pasp``) is applied where the recorded size is kept.
- **No silent loss.** A file that breaks, ends before its declared duration or size, or has a concealed or missing frame
  raises ``BadEpisode``, after yielding every frame before the break.
- **One thread per file.** Ingest is parallel by file; codec threads would only compete for the cores.
- **Thinned by time.** A lower rate keeps the frame on screen at each tick (:mod:`preprocessing.video.thinning`).
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

from preprocessing.episode import Repair, Video
from preprocessing.errors import BadEpisode
from preprocessing.limits import limits
from preprocessing.video.frames import check_pixels, chunks, scaled, squared, thinned
from preprocessing.video.thinning import (
    Choice,
    DecodeState,
    all_frames,
    frames_decoded,
    frames_needed,
    has_timestamps,
    is_raw,
    rate_of,
)

SLACK = (
    0.02  # relative to a declared rate: Matroska's milliseconds and FFmpeg's guess from the first frames are off by 1%
)
PROGRESSIVE = 1  # AV_FIELD_PROGRESSIVE
PLAYLIST = b"ffconcat"
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
MAX_REPEATS = 100_000  # of one frame; a clock that jumps by years would fill any store


@dataclass(frozen=True)
class VideoInfo:
    """What a container declares about the stream that is read; nothing is decoded."""

    fps: float
    width: int  # as coded, before rotation
    height: int
    declared_frames: int | None  # None if the format has no count (Matroska, MPEG-TS, fragmented MP4)
    streams: int  # video streams in the file; one is read
    timed: bool  # whether frames have timestamps; a raw stream's do not


class Timing(NamedTuple):
    """The mean rate of a stream's frames in Hz, the largest deviation from it in frame times, and the median rate."""

    rate: float
    strays: float
    usual: float


def probe_video(path: Path | str) -> VideoInfo:
    """Read the header only. Raises BadEpisode if that fails or the file has no video stream."""
    with open_container(path) as container:
        stream = best_stream(container)
        rate = rate_of(stream)
        if not rate:
            raise BadEpisode("declares no frame rate")
        if not stream.width or not stream.height:
            raise BadEpisode("declares no frame size, or one beyond limits.picture_pixels")
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
    """The best video stream of a file. The file is opened only when frames are iterated."""

    def frames(size: int | None) -> Iterator[np.ndarray]:
        return chunks(decode(path, size))

    def thin(share: float) -> Video:
        return Video(lambda size: chunks(_decode_share(path, size, share)))

    return Video(frames, thin=thin)


def open_video_file(path: Path | str) -> tuple[Video, float, list[Repair]]:
    """Open a video file as an episode: its frames at regular times, their rate in Hz, and the repairs.

    Frames at irregular times (phones, screen recorders) are resampled: the frame on screen at each tick of the mean
    rate is taken. A declared rate that contradicts the frames' times is replaced by theirs: a GIF or MP4 that holds its
    last frame for seconds declares a mean rate that no two frames keep. Times come from packets; nothing is decoded.
    """
    info, video, timing = probe_video(path), open_video(path), packet_times(path)
    declared = info.fps
    if timing is None:
        untimed = Repair("fps", f"frames have no timestamps; {declared:g} Hz assumed")
        return video, declared, [] if info.timed else [untimed]
    regular = timing.strays <= 1
    if regular and min(abs(rate / declared - 1) for rate in (timing.rate, timing.usual)) <= SLACK:
        return video, declared, []

    def at(share: float) -> Video:
        return replace(thinned(video, share), thin=lambda less: at(share * less))

    if regular:
        told = replace(video, thin=lambda less: at(less * timing.rate / declared))
        by_times = Repair("fps", f"declares {declared:g} Hz; {timing.rate:g} Hz by its frames' timestamps")
        return told, timing.rate, [by_times]
    text = f"frames come at irregular times; resampled to {timing.rate:g} Hz, their mean rate"
    return at(timing.rate / declared), timing.rate, [Repair("frames", text)]


def open_container(path: Path | str) -> av.container.InputContainer:
    with contextlib.suppress(OSError), Path(path).open("rb") as file:
        if file.read(len(PLAYLIST)) == PLAYLIST:  # FFmpeg would open the files it lists, itself forever included
            raise BadEpisode("is a playlist of other files, not a video")
    try:
        # A Latin-1 title must not fail. Opening decodes the first frames, which may be huge.
        limit = {"max_pixels": str(limits().picture_pixels)}
        return av.open(str(path), metadata_errors="replace", options=limit)
    except av.FFmpegError as error:
        raise BadEpisode(f"cannot be opened as video: {error.strerror}") from None


def _video_streams(container: av.container.InputContainer) -> list[av.VideoStream]:
    """Without cover art, which FFmpeg lists as a video stream, and without streams that no codec decodes."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    return [s for s in streams if s.codec_context is not None]


def packet_times(path: Path | str) -> Timing | None:
    """The timing of the stream that is read. None if unknown: a frame has no timestamp, or two share one."""
    with open_container(path) as container:
        stream = best_stream(container)
        times: list[int] = []
        with contextlib.suppress(av.FFmpegError):  # decoding reports it
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    if packet.pts is None or len(times) == limits().episode_steps:
                        return None
                    times.append(packet.pts)
        shown = np.sort(np.array(times, np.int64))
        if len(shown) < 3 or not stream.time_base or not has_timestamps(container, stream) or not np.diff(shown).all():
            return None
        mean = (shown[-1] - shown[0]) / (len(shown) - 1)
        strays = np.abs(shown - shown[0] - mean * np.arange(len(shown))).max() / mean
        usual = float(np.median(np.diff(shown)))
        timing = Timing(float(1 / (mean * stream.time_base)), float(strays), float(1 / (usual * stream.time_base)))
        interlaced = stream.codec_context.field_order > PROGRESSIVE
        fields = interlaced and timing.rate > 1.5 * (rate_of(stream) or timing.rate)  # two packets per frame
        return None if fields else timing


def best_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The stream marked as default; if several or none are, the one with the most pixels, then the first."""
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
        stream.codec_context.options = {
            "max_pixels": str(limits().picture_pixels)
        }  # coded frames may exceed the container's size
        reformatter = VideoReformatter()
        shape: tuple[int, int] | None = None
        state = DecodeState()
        try:
            for frame, times in choose(container, stream, state):
                if times > MAX_REPEATS:
                    raise BadEpisode(f"shows one frame for the duration of {times}: its clock jumps")
                # The size may change midway (web conferences, joined videos): the first one applies.
                shape = shape or _shape(frame, stream, size)
                yield from repeat(squared(_upright(frame, _rgb(frame, reformatter, *shape)), size), times)
        except av.FFmpegError as error:
            raise BadEpisode(f"{_declared(stream)}breaks after {state.frames}: {error.strerror}") from None
        if state.frames == 0:
            raise BadEpisode("holds no frame that can be decoded")
        if state.whole and (_ends_early(stream, state.frames, state.end) or _is_cut(path)):
            raise BadEpisode(f"{_declared(stream)}ends after {state.frames}: the file is cut off")


def _shape(frame: av.VideoFrame, stream: av.VideoStream, size: int | None) -> tuple[int, int]:
    """Width and height to scale the coded frame to: in square pixels, or what ``size`` asks of the upright frame."""
    width, height = max(1, round(frame.width * (stream.sample_aspect_ratio or 1))), frame.height
    if size is None:
        check_pixels(width, height)
    if _is_sideways(frame):
        width, height = scaled(width, height, size)  # of the upright frame: width rows, height columns
        return width, height
    height, width = scaled(height, width, size)
    return width, height


def _declared(stream: av.VideoStream) -> str:
    return f"declares {stream.frames} frames, " if stream.frames else ""


def _ends_early(stream: av.VideoStream, count: int, end: float | None) -> bool:
    """Whether frames are missing at the end of the stream: a truncated file loses them without an error.

    The declared count alone does not show it: it counts stored frames, not displayed ones. An edit list may hide
    hundreds of leading frames, and a decoder drops leading frames that reference one before the first key frame. Both
    shorten the beginning, so a shortfall is a loss only if the last frame also ends before the declared end of the
    stream (which FFmpeg has corrected for edit lists). Half a frame allows for rounding.

    Matroska has no count, but its writers store each track's end in a DURATION tag. Its times are rounded and its last
    duration is a guess, hence two frames of slack; where its clock is set back, the number of frames decides. A format
    with neither (MPEG-TS) declares nothing to compare with.
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
    """Whether a Matroska file is shorter than its segment declares; FFmpeg reports no error (RFC 8794, 4 to 6)."""

    def size(at: int) -> tuple[int, int]:
        """The variable-length size at this offset, and the offset after it."""
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
    except (OSError, IndexError):  # part of a tar file, whose size is checked there
        return False
    unknown = claimed == (1 << 7 * (begin - segment - len(SEGMENT))) - 1  # a live recording
    return not unknown and begin + claimed > whole


def _seconds(clock: str) -> float | None:
    """``00:00:10.333000000`` as seconds."""
    try:
        hours, minutes, seconds = clock.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return None


def _rgb(frame: av.VideoFrame, reformatter: VideoReformatter, width: int, height: int) -> np.ndarray:
    """Convert colours and size in one swscale pass.

    An unspecified matrix is left to swscale, which uses BT.601 at any size. Every FFmpeg-based loader does so, and
    latents agree with those of models trained elsewhere.
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


def _upright(frame: av.VideoFrame, image: np.ndarray) -> np.ndarray:
    """Apply the display matrix, which maps column x, row y to ``(a x + c y, b x + d y)``.

    Only quarter turns and mirrors are applied; shear and scale are ignored.
    """
    a, b, c, d = _matrix(frame)
    if _is_sideways(frame):  # columns become rows
        image = image.transpose(1, 0, 2)
        a, d = c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _is_sideways(frame: av.VideoFrame) -> bool:
    a, b, _, _ = _matrix(frame)
    return abs(b) > abs(a)


def _matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(matrix, SideData):
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    return a, b, c, d


def _decode_share(path: Path | str, size: int | None, share: float) -> Iterator[np.ndarray]:
    """Decode a share of the frames, with as little decoding as is safe.

    If that fails, on a broken file too, a pass that decodes every frame continues where the first one stopped, or
    raises the same error as without thinning.
    """
    done = 0
    try:
        for image in decode(path, size, partial(frames_needed, share=share)):
            yield image
            done += 1
    except BadEpisode:
        yield from islice(decode(path, size, partial(frames_decoded, share=share)), done, None)
