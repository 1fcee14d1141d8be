"""Videos of every kind, each frame with its number drawn into it, to check that every frame is the expected one.

The number is ten black or white cells, readable after any codec, in an image that no rotation leaves unchanged.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange
from helpers.formats import REAL, jpeg, quadrants
from helpers.mp4 import TURNS, patch_mp4
from helpers.readers import said
from PIL import Image

from preprocessing.contracts.contract import DataContract
from preprocessing.episode import Episode, EpisodeRef
from preprocessing.errors import BadEpisode, UserError
from preprocessing.limits import Limits, use
from preprocessing.sources import find, load, scan
from preprocessing.video.decode import open_container, open_video, probe_video
from preprocessing.video.frames import decode_image
from uwm_model.metrics import psnr

CELLS, CELL = 10, 8
WIDTH, HEIGHT = 96, 64
COUNT = 36


def drawn(index: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    image = quadrants(96)[:height, :width].copy()
    for cell in range(CELLS):
        image[:CELL, cell * CELL : (cell + 1) * CELL] = 255 if index >> cell & 1 else 0
    return image


def numbers_in(frames: np.ndarray) -> list[int]:
    """The numbers drawn into upright frames of the recorded size."""
    cells = frames[:, 2 : CELL - 2, : CELLS * CELL].reshape(len(frames), CELL - 4, CELLS, CELL, 3)[:, :, :, 2:-2]
    return ((cells.mean(axis=(1, 3, 4)) > 127) @ (1 << np.arange(CELLS))).tolist()


def write(
    path: Path,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times: Sequence[int] | None = None,
    count: int = COUNT,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    rate: int = 20,
    full: bool = False,
    aspect: Fraction | None = None,
    turned: Callable[[np.ndarray], np.ndarray] = lambda image: image,
    **options: str,
) -> Path:
    """Write numbered frames at a rate, or at these times in milliseconds."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        frames = [turned(drawn(index, *size)) for index in range(count)]
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        context = stream.codec_context
        context.thread_count, context.bit_rate, context.gop_size = 1, 4_000_000, 12
        if full:
            context.color_range = ColorRange.JPEG
        if aspect:
            context.sample_aspect_ratio = aspect
        if times:
            context.time_base = Fraction(1, 1000)
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if full:
                frame = frame.reformat(format=pix_fmt, dst_color_range=ColorRange.JPEG)
            if times:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def episode_of(path: Path, fps: float | None = None, breaks: list[str] | None = None) -> Episode:
    return load(ref_of(path), fps=fps, breaks=breaks)


def ref_of(path: Path) -> EpisodeRef:
    [(format, found)] = find(path)
    [ref] = scan(format, found)
    assert format == "video"
    return ref


def frames_of(episode: Episode, size: int | None = None) -> np.ndarray:
    return np.concatenate(list(episode.cameras["video"].frames(size)))


@dataclass(frozen=True)
class Kind:
    codec: str
    pix_fmt: str = "yuv420p"
    worst: float = 24.0  # dB; 4:2:0 chroma blurs the edges of colours
    options: tuple[tuple[str, str], ...] = ()


X265 = (("preset", "ultrafast"), ("x265-params", "log-level=none:pools=none"))
KINDS = {
    "a.mp4": Kind("libx264"),
    "b-frames.mkv": Kind("libx264", options=(("bf", "3"), ("x264-params", "open-gop=1:b-adapt=0"))),
    "a.mov": Kind("libx264"),
    "a.ts": Kind("libx264"),
    "a.flv": Kind("flv", worst=20),
    "hevc.mp4": Kind("libx265", options=X265),
    "vp8.webm": Kind("libvpx"),
    "vp9.webm": Kind("libvpx-vp9", options=(("cpu-used", "8"), ("deadline", "realtime"))),
    "av1.mp4": Kind("libsvtav1", options=(("preset", "12"),)),
    "av1.mkv": Kind("libsvtav1", options=(("preset", "12"),)),
    "old.mp4": Kind("mpeg4"),
    "old.avi": Kind("mpeg4"),
    "older.mpg": Kind("mpeg2video"),
    "jpeg.avi": Kind("mjpeg", "yuvj420p"),
    "jpeg.mkv": Kind("mjpeg", "yuvj422p"),
    "a.gif": Kind("gif", "rgb8", worst=15),
    "a.wmv": Kind("wmv2", worst=20),
    "ten-bit.mp4": Kind("libx264", "yuv420p10le"),
    "ten-bit.hevc.mp4": Kind("libx265", "yuv420p10le", options=X265),
    "ten-bit.av1.mp4": Kind("libsvtav1", "yuv420p10le", options=(("preset", "4"),)),
    "full-range.mp4": Kind("libx264", "yuvj420p"),
    "no-subsampling.mkv": Kind("libx264", "yuv444p"),
    "lossless.mkv": Kind("ffv1", "bgr0", worst=60),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_the_expected_one(tmp_path, name):
    kind = KINDS[name]
    if kind.codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {kind.codec}")
    rate = 25 if name.endswith("mpg") else 20  # MPEG-2 has few rates
    path = write(tmp_path / name, kind.codec, kind.pix_fmt, rate=rate, **dict(kind.options))
    episode = episode_of(path)
    frames = frames_of(episode)
    assert numbers_in(frames) == list(range(COUNT))
    assert psnr(frames, np.stack([drawn(index) for index in range(COUNT)])).min() > kind.worst
    assert episode.fps == pytest.approx(rate, rel=0.01) and said(episode) == []
    half = frames_of(episode_of(path, fps=rate / 2))
    assert numbers_in(half) == list(range(0, COUNT, 2))
    assert np.array_equal(half, frames[::2])


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
def test_full_range_by_a_flag(tmp_path, name):
    frames = frames_of(episode_of(write(tmp_path / name, full=True)))
    assert numbers_in(frames) == list(range(COUNT))
    assert frames[:, :4, 2:6].min() < 8 and abs(int(frames[0, -4, -4, 0]) - 128) < 5
    assert psnr(frames, np.stack([drawn(index) for index in range(COUNT)])).min() > 24


@pytest.mark.parametrize("turn", ["clockwise", "half", "counter-clockwise", "mirrored"])
def test_rotated_videos(tmp_path, turn):
    (a, b, c, d), _ = TURNS[turn]
    undo = {"clockwise": 1, "half": 2, "counter-clockwise": -1}

    def turned(image: np.ndarray) -> np.ndarray:
        return image[:, ::-1] if turn == "mirrored" else np.rot90(image, undo[turn])

    path = write(tmp_path / "a.mp4", turned=turned)
    one = 1 << 16
    patch_mp4(path, b"tkhd", 40, struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30))
    frames = frames_of(episode_of(path))
    assert frames.shape[1:3] == (HEIGHT, WIDTH) and numbers_in(frames) == list(range(COUNT))
    assert numbers_in(frames_of(episode_of(path, fps=5))) == list(range(0, COUNT, 4))


# Half the rate in the second half, and once no new frame for half a second.
UNEVEN = [50 * index for index in range(18)] + [900 + 100 * index for index in range(18)]
PAUSE = [50 * index + (500 if index >= 20 else 0) for index in range(COUNT)]


def shown_at(times: Sequence[int], rate: float) -> list[int]:
    """The frame on screen at each tick."""
    last = times[-1] + (times[-1] - times[-2])
    ticks = np.arange(0, (last - times[0]) * rate / 1000 - 1e-6) / rate * 1000 + times[0]
    return [int(np.searchsorted(times, tick + 1, side="right")) - 1 for tick in ticks]  # a millisecond's rounding


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm"])
@pytest.mark.parametrize("times", [UNEVEN, PAUSE], ids=["uneven", "pause"])
def test_irregular_times_become_regular(tmp_path, times, suffix):
    codec = "libvpx" if suffix == "webm" else "libx264"
    path = write(tmp_path / f"a.{suffix}", codec, times=times)
    mean = 1000 * (COUNT - 1) / (times[-1] - times[0])
    episode = episode_of(path)
    assert episode.fps == pytest.approx(mean, rel=0.01)
    assert said(episode) == [f"frames come at irregular times; resampled to {episode.fps:g} Hz, their mean rate"]
    found = numbers_in(frames_of(episode))
    wanted = shown_at(times, episode.fps)
    assert found == wanted[: len(found)] and abs(len(found) - len(wanted)) <= 1 and found[-1] == COUNT - 1
    slow = numbers_in(frames_of(episode_of(path, fps=5)))
    wanted = shown_at(times, 5)
    assert slow == wanted[: len(slow)] and abs(len(slow) - len(wanted)) <= 1


LATE = [50 * index + 50 * (index >= 9) for index in range(20)]


@pytest.mark.parametrize("times", [[50 * index + (index % 3) * 7 for index in range(COUNT)], LATE], ids=["all", "one"])
def test_small_jitter_is_left_alone(tmp_path, times):
    episode = episode_of(write(tmp_path / "a.mkv", times=times, count=len(times)))
    assert numbers_in(frames_of(episode)) == list(range(len(times)))
    assert episode.fps == 20 and said(episode) == []


def held(path: Path) -> Path:
    """Twenty frames a second; the last one is shown for three seconds."""
    if path.suffix == ".gif":
        first, *others = [Image.fromarray(drawn(index)).quantize() for index in range(COUNT)]
        first.save(path, save_all=True, append_images=others, duration=[50] * (COUNT - 1) + [3000])
        return path
    with av.open(str(write(path.with_name("usual.mp4"), bf="0"))) as usual, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(usual.streams.video[0])
        packets = [packet for packet in usual.demux(video=0) if packet.size]
        packets[-1].duration *= 60
        for packet in packets:
            packet.stream = stream
            container.mux(packet)
    path.with_name("usual.mp4").unlink()
    return path


def misdeclared(path: Path) -> Path:
    """Matroska's DefaultDuration (RFC 9559, 5.1.4.1.13) says 40 Hz."""
    data = bytearray(write(path).read_bytes())
    at = data.index(b"\x23\xe3\x83\x84") + 4
    data[at : at + 4] = struct.pack(">I", 25_000_000)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("make, name", [(held, "a.gif"), (held, "a.mp4"), (misdeclared, "a.mkv")])
def test_frame_times_override_a_declared_rate(tmp_path, make, name):
    path = make(tmp_path / name)
    declared = probe_video(path).fps
    assert abs(declared - 20) > 5
    episode = episode_of(path)
    assert episode.fps == pytest.approx(20) and numbers_in(frames_of(episode)) == list(range(COUNT))
    assert said(episode) == [f"declares {declared:g} Hz; 20 Hz by its frames' timestamps"]
    half = numbers_in(frames_of(episode_of(path, fps=10)))
    last = COUNT - 1
    assert half[: COUNT // 2] == list(range(0, COUNT, 2)) and set(half[COUNT // 2 :]) <= {last}


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_videos_that_begin_late(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", times=[7_000 + 50 * index for index in range(COUNT)])
    assert numbers_in(frames_of(episode_of(path))) == list(range(COUNT))
    assert numbers_in(frames_of(episode_of(path, fps=10))) == list(range(0, COUNT, 2))


def retimed(path: Path, change: Callable[[int, int], int]) -> Path:
    """Set each frame's time in a Matroska file, int16 milliseconds two bytes before its data (RFC 9559, 10.2), to
    ``change(index, time)``. FFmpeg would not write such files."""
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    data, at = bytearray(path.read_bytes()), 0
    for index, packet in enumerate(packets):
        at = data.index(packet, at)
        assert data[at - 4] == 0x81  # the track's number
        data[at - 3 : at - 1] = struct.pack(">h", change(index, *struct.unpack(">h", data[at - 3 : at - 1])))
    path.write_bytes(data)
    return path


WRONG_TIMES: dict[str, Callable[[int, int], int]] = {
    "set back by a second": lambda index, time: time - 1000 * (index >= 30),
    "two at a time": lambda index, time: time - 50 * (index % 2),
    "neighbours exchanged": lambda index, time: time + (50 if index % 2 == 0 else -50) * (10 <= index < 20),
    "all at once": lambda index, time: 0,
}


@pytest.mark.parametrize("wrong", WRONG_TIMES)
def test_odd_timestamps_lose_and_reorder_no_frame(tmp_path, wrong):
    path = retimed(write(tmp_path / "a.mkv", "mpeg4", bf="0"), WRONG_TIMES[wrong])
    with av.open(str(path)) as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert times != sorted(set(times))
    assert numbers_in(frames_of(episode_of(path))) == list(range(COUNT))
    half = numbers_in(frames_of(episode_of(path, fps=10)))
    assert half == sorted(half) and abs(len(half) - COUNT // 2) <= 4


def test_a_clock_that_restarts(tmp_path):
    """Two recordings joined byte by byte, as MPEG-TS allows."""
    path = write(tmp_path / "a.ts", "mpeg2video", rate=25)
    path.write_bytes(path.read_bytes() * 2)
    episode = episode_of(path)
    assert numbers_in(frames_of(episode)) == [*range(COUNT)] * 2
    half = numbers_in(frames_of(episode_of(path, fps=12.5)))
    assert half == [*range(0, COUNT, 2)] * 2


def test_matroska_rounds_times_to_milliseconds(tmp_path):
    path = write(tmp_path / "a.mkv", rate=30)
    assert numbers_in(frames_of(episode_of(path, fps=15))) == list(range(0, COUNT, 2))


def test_interlaced_videos_may_have_two_packets_per_frame(tmp_path):
    path = write(tmp_path / "a.mkv", **{"x264-params": "tff=1"})
    assert episode_of(path).fps == 20
    data = path.read_bytes()
    at = data.index(b"\x23\xe3\x83\x84") + 4
    path.write_bytes(data[:at] + struct.pack(">I", 100_000_000) + data[at + 4 :])
    assert (episode_of(path).fps, said(episode_of(path))) == (10, [])


def test_cover_art_is_not_a_video(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        container.add_attachment("cover.jpg", "image/jpeg", jpeg(quadrants(400)))
        for index in range(COUNT):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(drawn(index), format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "a.mkv")) as container:
        assert [stream.width for stream in container.streams.video] == [WIDTH, 400]
    episode = episode_of(tmp_path / "a.mkv")
    assert numbers_in(frames_of(episode)) == list(range(COUNT)) and said(episode) == []


def test_a_size_change_keeps_the_first_size(tmp_path):
    path = write(tmp_path / "a.ts", size=(192, 128), bf="0")
    large = path.read_bytes()
    path.write_bytes(write(path, bf="0").read_bytes() + large)
    frames = frames_of(episode_of(path))
    assert frames.shape[1:] == (HEIGHT, WIDTH, 3) and numbers_in(frames[:COUNT]) == list(range(COUNT))
    assert len(frames) == 2 * COUNT
    use(Limits(picture_pixels=10_000))
    try:
        with pytest.raises(BadEpisode, match="breaks after"):
            frames_of(episode_of(path))
    finally:
        use(Limits())


def test_a_title_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Caf#"
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(drawn(index), format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"Caf#", b"Caf\xe9"))
    assert numbers_in(frames_of(episode_of(path))) == [0, 1, 2]


@pytest.mark.parametrize("brand, is_video", [(b"isom", True), (b"qt  ", True), (b"M4A ", False), (b"heic", False)])
def test_files_without_suffix_are_detected_by_brand(tmp_path, brand, is_video):
    data = bytearray(write(tmp_path / "a.mp4").read_bytes())
    data[8:12] = brand
    (tmp_path / "a.mp4").unlink()
    (tmp_path / "is_video").write_bytes(data)
    if is_video:
        assert numbers_in(frames_of(episode_of(tmp_path / "is_video"))) == list(range(COUNT))
    else:
        with pytest.raises(UserError, match="no known format"):
            find(tmp_path / "is_video")


def test_raw_streams_without_timestamps(tmp_path):
    path = write(tmp_path / "a.h264")
    for name in ("a.mp4", "b.h264"):
        path = path.rename(tmp_path / name)
        episode = episode_of(path)
        assert numbers_in(frames_of(episode)) == list(range(COUNT))
        assert (episode.fps, said(episode)) == (20, ["frames have no timestamps; 20 Hz assumed"])
        assert numbers_in(frames_of(episode_of(path, fps=10))) == list(range(0, COUNT, 2))


@pytest.mark.parametrize("make, name", [(write, "a.h264"), (misdeclared, "a.mkv")])
def test_a_contract_settles_the_rate(tmp_path, make, name):
    """Both for frames without timestamps and for a declared rate that contradicts them."""
    [ref] = scan("video", make(tmp_path / name))
    assert [repair.field for repair in load(ref).repairs] == ["fps"]
    episode = load(ref, DataContract(fps=12))
    assert episode.fps == 12 and said(episode) == []


@pytest.mark.parametrize("default", [None, 0, 1])
def test_the_best_of_several_streams(tmp_path, default):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for place, (width, height) in enumerate([(96, 64), (192, 128)]):
            stream = container.add_stream("libx264", rate=20)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.thread_count = 1
            if default is not None:
                stream.disposition = av.stream.Disposition.default if place == default else av.stream.Disposition(0)
            streams.append(stream)
        for index in range(COUNT):
            for place, stream in enumerate(streams):
                image = drawn(index + 100 * place).repeat(place + 1, axis=0).repeat(place + 1, axis=1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    episode = episode_of(path)
    best = 1 if default is None else default
    frames = frames_of(episode)[:, :: best + 1, :: best + 1]
    assert numbers_in(frames) == [index + 100 * best for index in range(COUNT)]
    size = "192x128" if best else "96x64"
    assert said(episode) == [f"2 video streams; the one of {size} is read"]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_pixels_that_are_not_square(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", aspect=Fraction(2, 1))
    frames = frames_of(episode_of(path))
    assert frames.shape == (COUNT, HEIGHT, 2 * WIDTH, 3) and numbers_in(frames[:, :, ::2]) == list(range(COUNT))
    assert frames_of(episode_of(path), 32).shape == (COUNT, 32, 32, 3)  # the whole frame, as in any video


@pytest.mark.parametrize("size", [(81, 33), (95, 63)])
def test_odd_sizes(tmp_path, size):
    path = write(tmp_path / "a.mkv", "ffv1", "yuv420p", size=size)
    frames = frames_of(episode_of(path))
    assert frames.shape == (COUNT, *size[::-1], 3) and numbers_in(frames) == list(range(COUNT))


# ---------------------------------------------------------------------------------------------------------- broken


def middle(path: Path) -> int:
    """The offset of the 20th frame's bytes."""
    with av.open(str(path)) as container:
        return [packet.pos for packet in container.demux(video=0) if packet.size][20]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: middle(path) + 3])


def spoil(path: Path) -> None:
    data, at = bytearray(path.read_bytes()), middle(path)
    data[at : at + 400] = b"\xff" * 400
    path.write_bytes(data)


@pytest.mark.parametrize("fps", [None, 10])
@pytest.mark.parametrize("suffix, break_it", [("mp4", cut), ("mkv", cut), ("avi", cut), ("mp4", spoil)])
def test_a_broken_video_is_kept_up_to_its_break_if_asked(tmp_path, suffix, break_it, fps):
    path = write(tmp_path / f"a.{suffix}", bf="0", g="1")
    whole = frames_of(episode_of(path))
    break_it(path)
    with pytest.raises(BadEpisode, match=r"(breaks|ends) after (19|20)"):
        frames_of(episode_of(path, fps))
    breaks: list[str] = []
    frames = frames_of(episode_of(path, fps, breaks))
    assert len(breaks) == 1 and "after" in breaks[0]
    step = 2 if fps else 1
    assert len(frames) in (20 // step, 19 // step + 1) and np.array_equal(frames, whole[:20:step][: len(frames)])


@pytest.mark.parametrize("fps", [None, 12.5])
@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.mp4", "mpeg4"), ("a.mkv", "mpeg2video")])
def test_a_concealed_frame_is_a_break(tmp_path, name, codec, fps):
    path = write(tmp_path / name, codec, rate=25, bf="0")
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][20]
    data, at = bytearray(path.read_bytes()), path.read_bytes().index(bytes(packet))
    start = at + packet.size // 2
    data[start : start + 2] = bytes(byte ^ 0x5F for byte in data[start : start + 2])
    path.write_bytes(data)
    with av.open(str(path)) as container:  # the decoder logs that it conceals the rest of the frame
        assert sum(frame.is_corrupt for frame in container.decode(video=0)) > 0
    with pytest.raises(BadEpisode, match=r"breaks after 20: a frame is damaged"):
        frames_of(episode_of(path, fps))
    breaks: list[str] = []
    kept = numbers_in(frames_of(episode_of(path, fps, breaks)))
    assert kept == list(range(20))[:: 2 if fps else 1][: len(kept)] and len(kept) >= (8 if fps else 20)


@pytest.mark.skipif("libsvtav1" not in av.codecs_available, reason="this FFmpeg writes no AV1")
def test_a_lost_frame_is_a_break(tmp_path):
    """PyAV hides a packet's error if an earlier frame is returned; later frames would then move up."""
    path = write(tmp_path / "a.mp4", "libsvtav1", preset="12")
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][20]
    whole, at, lost = path.read_bytes(), packet.pos, 0
    for place in range(8):  # its header and the next frame's
        data = bytearray(whole)
        data[at + place : at + place + 2] = bytes([data[at + place] ^ 0x55, data[at + place + 1] ^ 0xFF])
        path.write_bytes(data)
        try:
            with av.open(str(path)) as container:
                container.streams.video[0].codec_context.thread_count = 1
                lost += (shown := sum(1 for _ in container.decode(video=0))) < COUNT
        except av.FFmpegError:
            continue
        if shown < COUNT:
            with pytest.raises(BadEpisode, match=r"breaks after \d+: a frame is damaged"):
                frames_of(episode_of(path))
    assert lost or pytest.skip("no damage here that goes unnoticed")


@pytest.mark.parametrize("suffix, codec", [("mkv", "libx264"), ("webm", "libvpx")])
def test_a_truncated_matroska_file_without_tags_is_detected_by_size(tmp_path, suffix, codec):
    path = write(tmp_path / f"a.{suffix}", codec)
    whole = path.read_bytes().replace(b"DURATION", b"NOTATALL")
    path.write_bytes(whole)
    assert numbers_in(frames_of(episode_of(path))) == list(range(COUNT))
    for keep in (middle(path), middle(path) + 3):
        path.write_bytes(whole[:keep])
        with pytest.raises(BadEpisode, match="ends after 20: the file is cut off"):
            frames_of(episode_of(path))
    live = bytearray(whole[:keep])  # its size was unknown when it was written
    at = live.index(b"\x18\x53\x80\x67") + 4
    live[at : at + 8] = b"\x01" + b"\xff" * 7
    path.write_bytes(live)
    assert len(frames_of(episode_of(path))) >= 19
    path.write_bytes(live.replace(b"NOTATALL", b"DURATION"))
    with pytest.raises(BadEpisode, match="ends after 20: the file is cut off"):
        frames_of(episode_of(path))


def test_a_playlist_is_not_a_video(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_text("ffconcat version 1.0\nfile a.mp4\n")
    assert ref_of(path).problem == "is a playlist of other files, not a video"


@pytest.mark.skipif(not REAL.exists(), reason=f"no real data at {REAL}")
def test_the_real_broken_video(tmp_path):
    path = REAL / "video" / "corrupted.mp4"
    with pytest.raises(BadEpisode, match="declares 50 frames, breaks after 28"):
        frames_of(episode_of(path), 64)
    breaks: list[str] = []
    kept = frames_of(episode_of(path, breaks=breaks), 64)
    assert len(kept) == 28 and breaks[0].startswith("declares 50 frames, breaks after 28")
    before = []
    with pytest.raises(BadEpisode):
        for chunk in open_video(path).frames(64):
            before.append(chunk)
    assert np.array_equal(kept, np.concatenate(before))


def test_a_video_without_any_frame_is_always_refused(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44_100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    ref = ref_of(path)
    assert "no video stream" in str(ref.problem)
    with pytest.raises(BadEpisode, match="no video stream"):
        load(ref, breaks=[])
    path = write(tmp_path / "b.mp4", g="1")
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + 8])
    breaks: list[str] = []
    with pytest.raises(BadEpisode):
        frames_of(load(ref_of(path), breaks=breaks))


# ---------------------------------------------------------------------------------------------------------- limits


@pytest.fixture
def strict():
    use(Limits(picture_pixels=5000, episode_steps=30))
    yield
    use(Limits())


def test_frames_beyond_the_limits_are_refused(tmp_path, strict):
    large = "an image of 96x64 pixels exceeds limits.picture_pixels"
    assert ref_of(write(tmp_path / "a.mp4")).problem == large
    with pytest.raises(BadEpisode, match=large):
        next(open_video(tmp_path / "a.mp4").frames(16))
    with pytest.raises(BadEpisode, match=r"has more frames than limits.episode_steps, 30"):
        frames_of(episode_of(write(tmp_path / "b.mp4", size=(80, 32))))
    assert len(frames_of(episode_of(write(tmp_path / "c.mp4", size=(80, 32), count=30)))) == 30


def test_pixels_that_are_very_wide(tmp_path):
    use(Limits(picture_pixels=100_000))
    try:
        path = write(tmp_path / "a.mkv", aspect=Fraction(50, 1))
        with pytest.raises(BadEpisode, match=r"an image of 4800x64 pixels exceeds limits.picture_pixels"):
            frames_of(episode_of(path))
        assert frames_of(episode_of(path), 16).shape == (COUNT, 16, 16, 3)
    finally:
        use(Limits())


def test_the_limit_holds_while_opening(tmp_path, strict):
    """A JPEG's size is known only by decoding it."""
    path = write(tmp_path / "a.avi", "mjpeg", "yuvj420p")
    with open_container(path) as container:
        assert container.streams.video[0].width == 0


def test_coded_frames_larger_than_declared_are_refused(tmp_path):
    """The container says 64 x 64; the decoder would allocate what the stream itself says."""
    path = write(tmp_path / "a.mkv", "mjpeg", "yuvj420p", size=(96, 64))
    data = bytearray(path.read_bytes())
    at = 0
    while (at := data.find(b"\xff\xc0\x00\x11\x08", at)) >= 0:  # start of frame: precision, height, width
        data[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
        at += 9
    path.write_bytes(data)
    with pytest.raises(BadEpisode):
        frames_of(episode_of(path), 16)


def test_images_have_the_same_limit(strict):
    with pytest.raises(BadEpisode, match=r"limits.picture_pixels"):
        decode_image(jpeg(quadrants(72)))
