"""Video decoding: upright frames, correct colours, no silently lost frames."""

from __future__ import annotations

import io
import struct
import tracemalloc
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.formats import REAL, jpeg, numbered, quadrants, write_demos, write_video
from helpers.mp4 import TURNS, patch_mp4
from helpers.readers import real
from PIL import Image

from preprocessing import sources
from preprocessing.contracts.contract import DataContract
from preprocessing.episode import FRAMES_PER_CHUNK, Video
from preprocessing.errors import BadEpisode
from preprocessing.video.decode import open_video, probe_video
from preprocessing.video.frames import (
    decode_image,
    first_frames,
    images_video,
    resize,
    sliced_video,
    thinned,
    upside_down,
)
from preprocessing.video.thinning import TOLERANCE


def decoded(path: Path, size: int | None = None) -> np.ndarray:
    return np.concatenate(list(open_video(path).frames(size)))


def centres(image: np.ndarray) -> np.ndarray:
    """The colours of the four quadrants, row by row."""
    quarter = image.shape[0] // 4
    return np.array([image[y, x] for y in (quarter, 3 * quarter) for x in (quarter, 3 * quarter)], int)


@pytest.mark.parametrize(
    "name, codec, pix_fmt",
    [
        ("limited.mp4", "libx264", "yuv420p"),
        ("limited444.mp4", "libx264", "yuv444p"),
        ("full.mp4", "libx264", "yuvj420p"),
        ("full.avi", "mjpeg", "yuvj420p"),
        ("lossless.mkv", "ffv1", "yuv420p"),
        ("old.avi", "mpeg4", "yuv420p"),
        ("deep.mkv", "ffv1", "yuv420p10le"),
        ("rgb.mkv", "ffv1", "bgr0"),
    ],
)
@pytest.mark.parametrize("size", [None, 32])
def test_colours_round_trip(tmp_path, name, codec, pix_fmt, size):
    path = write_video(tmp_path / name, np.stack([quadrants()] * 3), codec=codec, pix_fmt=pix_fmt)
    assert np.abs(centres(decoded(path, size)[1]) - centres(quadrants())).max() <= 6


def test_full_range_by_its_flag_alone(tmp_path):
    """yuv420p flagged as full range: read as limited, dark and bright would be off by 15 levels."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=20)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.color_range = 2
        frame = av.VideoFrame.from_ndarray(quadrants(), format="rgb24")
        frame = frame.reformat(format="yuv420p", src_color_range="JPEG", dst_color_range="JPEG")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert np.abs(centres(decoded(tmp_path / "a.mkv")[0]) - centres(quadrants())).max() <= 3


def test_grey_keeps_its_range(tmp_path):
    steps = np.repeat(np.arange(0, 256, 51, dtype=np.uint8), 8)
    grey = np.broadcast_to(steps[None, :, None], (48, 48, 3)).copy()
    path = write_video(tmp_path / "a.mkv", grey[None], codec="ffv1", pix_fmt="gray")
    assert np.abs(decoded(path)[0].astype(int) - grey).max() <= 3


def test_the_matrix_in_the_stream_is_used(tmp_path):
    """BT.709 coefficients, applied by hand and declared: read as BT.601, colours would be off by 20 levels."""
    plain = write_video(tmp_path / "601.mp4", np.stack([quadrants()] * 3))
    named = write_video(
        tmp_path / "709.mp4", np.stack([quadrants()] * 3), **{"x264-params": "colormatrix=bt709:range=tv"}
    )
    off = centres(decoded(named)[0]) - centres(decoded(plain)[0])  # same samples, another declared matrix
    assert np.abs(off).max() > 12

    def luma(colour: np.ndarray, red: float, blue: float) -> float:
        return red * colour[0] + (1 - red - blue) * colour[1] + blue * colour[2]

    for as601, as709 in zip(centres(decoded(plain)[0]), centres(decoded(named)[0]), strict=True):
        assert abs(luma(as601, 0.299, 0.114) - luma(as709, 0.2126, 0.0722)) < 4


def test_every_frame_once_in_order_and_in_bounded_chunks(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered(100))
    chunks = list(open_video(path).frames(16))
    assert [len(chunk) for chunk in chunks] == [FRAMES_PER_CHUNK, 100 - FRAMES_PER_CHUNK]
    levels = np.concatenate(chunks).mean((1, 2, 3))
    assert np.abs(levels - (np.arange(100) * 2 + 20)).max() < 3
    info = probe_video(path)
    assert (info.fps, info.width, info.height, info.declared_frames, info.streams) == (20, 64, 64, 100, 1)


def test_memory_does_not_grow_with_the_video(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered(100).repeat(5, axis=0), preset="ultrafast")
    tracemalloc.start()
    for _ in open_video(path).frames(64):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * FRAMES_PER_CHUNK * 64 * 64 * 3


@pytest.mark.parametrize("turn", TURNS)
def test_rotated_videos_become_upright(tmp_path, turn):
    (a, b, c, d), seen = TURNS[turn]
    tall = np.concatenate([quadrants(), quadrants()[:, :32]], axis=1)  # 64 high, 96 wide
    path = write_video(tmp_path / "a.mp4", np.stack([tall] * 2))
    one = 1 << 16
    patch_mp4(path, b"tkhd", 40, struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30))
    assert np.abs(decoded(path)[0].astype(int) - seen(tall)).mean() < 6
    small = decoded(path, 32)[0]
    assert np.abs(small.astype(int) - seen(resize(tall[None], 32)[0])).mean() < 6


def test_shrinking_averages_instead_of_skipping(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = resize(stripes[None], 16)
    assert small.std() < 2 and abs(small.mean() - 127) < 2
    path = write_video(tmp_path / "a.mkv", np.stack([stripes] * 2), codec="ffv1", pix_fmt="yuv444p")
    small = decoded(path, 16)
    assert small.std() < 8 and abs(small.mean() - 127) < 4
    assert resize(stripes[None, :8, :8], 16).shape == (1, 16, 16, 3)


def test_a_truncated_video_is_refused_with_both_counts(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), np.uint8)
    path = write_video(tmp_path / "a.mp4", noise, g="1", bf="0")
    data = path.read_bytes()
    with av.open(str(path)) as container:
        starts = [packet.pos for packet in container.demux(video=0) if packet.size]
    for frame in (25, 39):  # exactly between two frames, where FFmpeg reports no error, and within one
        for offset, word in ((0, "ends"), (5, "breaks")):
            path.write_bytes(data[: starts[frame] + offset])
            with pytest.raises(BadEpisode, match=f"declares 40 frames, {word} after {frame}"):
                decoded(path, 16)
    path = write_video(tmp_path / "a.mkv", noise, g="1", bf="0")
    assert probe_video(path).declared_frames is None
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadEpisode, match=r"(breaks|ends) after \d+"):
        decoded(path, 16)


def test_frames_hidden_by_an_edit_list_are_no_loss(tmp_path):
    """Cut without re-encoding: the file stores 30 frames and shows the last 20."""
    path = write_video(tmp_path / "a.mp4", numbered(30), bf="0")
    data = path.read_bytes()
    at = data.index(b"elst") + 12
    duration, start = struct.unpack(">Ii", data[at : at + 8])
    timescale = 20 * 512 * 1  # of the media: what the muxer picks for 20 frames a second
    patch_mp4(path, b"elst", 8, struct.pack(">Ii", duration * 2 // 3, start + timescale // 2))
    frames = decoded(path, 16)
    assert probe_video(path).declared_frames == 30 and len(frames) == 20
    assert abs(frames[0].mean() - 40) < 3 and abs(frames[-1].mean() - 78) < 3


def test_no_video_no_episode(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"not a write_texture at all" * 100)
    with pytest.raises(BadEpisode, match="cannot be opened as video"):
        probe_video(tmp_path / "a.mp4")
    with pytest.raises(BadEpisode, match="cannot be opened as video"):
        decoded(tmp_path / "missing.mp4")
    unknown = write_video(tmp_path / "b.mp4", numbered(3))
    patch_mp4(unknown, b"avc1", -4, b"zzzz")  # the brand in ftyp
    patch_mp4(unknown, b"avc1", -4, b"zzzz")  # the codec in stsd
    with pytest.raises(BadEpisode, match="no video stream that can be decoded"):
        probe_video(unknown)


def test_images(tmp_path):
    png = io.BytesIO()
    Image.fromarray(quadrants()).save(png, "PNG")
    frames = np.concatenate(list(images_video([png.getvalue(), jpeg(quadrants())]).frames(32)))
    assert frames.shape == (2, 32, 32, 3)
    assert np.abs(centres(frames[0]) - centres(quadrants())).max() == 0
    assert np.abs(centres(frames[1]) - centres(quadrants())).max() <= 4
    with pytest.raises(BadEpisode, match="frame size changes"):
        list(images_video([jpeg(quadrants(32)), jpeg(quadrants(64))]).frames(None))


def test_exif_orientation_is_applied():
    turned = Image.Exif()
    turned[0x0112] = 6  # EXIF's Orientation: the first row is the right side
    file = io.BytesIO()
    Image.fromarray(quadrants()).save(file, "JPEG", quality=95, exif=turned)
    assert np.abs(centres(decode_image(file.getvalue())) - centres(np.rot90(quadrants(), -1))).max() <= 4


def test_invalid_images_and_bombs():
    for data in (b"", b"GIF89a nothing", jpeg(quadrants())[:300]):
        with pytest.raises(BadEpisode, match="image"):
            decode_image(data)
    deep = io.BytesIO()
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(deep, "PNG")
    with pytest.raises(BadEpisode, match="16-bit greyscale"):  # 8 bits would make it all white
        decode_image(deep.getvalue())
    bomb = io.BytesIO()
    Image.new("L", (9_000, 9_000)).save(bomb, "PNG")
    with pytest.raises(BadEpisode, match="9000x9000"):
        decode_image(bomb.getvalue())


def test_array_videos_and_their_wrappers():
    frames = numbered(70, 8)
    video = sliced_video(70, lambda a, b: frames[a:b])
    assert [len(chunk) for chunk in video.frames(None)] == [64, 6]
    assert [len(chunk) for chunk in first_frames(video, 65).frames(4)] == [64, 1]
    image = sliced_video(1, lambda a, b: quadrants()[None])
    turned = upside_down(image)
    assert turned.turned and not upside_down(turned).turned
    assert np.array_equal(next(turned.frames(None))[0], quadrants()[::-1])


def write_texture(
    path: Path, codec: str, count: int = 60, gop: int = 12, times: Sequence[int] | None = None, **options: str
) -> Path:
    """A moving texture, no two frames alike; every 1/30 s, or at these times in milliseconds."""
    texture = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        context = stream.codec_context
        context.thread_count, context.gop_size, context.max_b_frames, context.bit_rate = 1, gop, 2, 1_000_000
        if times:
            context.time_base = Fraction(1, 1000)
        for index in range(count):
            y, x = int(100 + 90 * np.sin(index / 9)), int(100 + 90 * np.cos(index / 13))
            frame = av.VideoFrame.from_ndarray(texture[y : y + 48, x : x + 64], format="rgb24")
            if times:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


UNEVEN = np.cumsum([0, *np.random.default_rng(1).integers(10, 60, 40), 900, *([33] * 18)]).tolist()
OPEN = {"bf": "3", "x264-params": "open-gop=1:b-adapt=0"}
VIDEOS: dict[str, tuple[str, dict]] = {
    "closed.mp4": ("libx264", {"bf": "3", "x264-params": "b-adapt=0"}),
    "open.mp4": ("libx264", OPEN),
    "open.mkv": ("libx264", OPEN),
    "open.ts": ("libx264", OPEN),
    "columns.mp4": ("libx264", {"x264-params": "intra-refresh=1"}),
    "one-group.mp4": ("libx264", {"g": "600"}),
    "uneven.mp4": ("libx264", {"times": UNEVEN}),
    "uneven.mkv": ("libx264", {"times": UNEVEN}),
    "old.mp4": ("mpeg4", {}),
    "old.avi": ("mpeg4", {}),
    "older.mpg": ("mpeg2video", {}),
    "lossless.mkv": ("ffv1", {}),
    "open.hevc.mp4": ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:open-gop=1"}),
    "web.webm": ("libvpx-vp9", {"cpu-used": "8", "deadline": "realtime"}),
}


def on_screen(path: Path, rate: float) -> list[int]:
    """The index of the frame shown at each tick of the rate, by exact arithmetic on timestamps."""
    with av.open(str(path)) as container:
        stream = max(container.streams.video, key=lambda stream: stream.width)
        tolerance = Fraction(TOLERANCE)
        frames = [
            (frame.pts * stream.time_base, frame.duration * stream.time_base) for frame in container.decode(stream)
        ]
    (start, _), (last, shown) = frames[0], frames[-1]
    indices, tick = [], 0
    while start + tick / Fraction(rate) < last + shown - tolerance:
        indices.append(sum(time <= start + tick / Fraction(rate) + tolerance for time, _ in frames) - 1)
        tick += 1
    return indices


def at_rate(path: Path, rate: float, size: int | None = None) -> np.ndarray:
    return np.concatenate(list(thinned(open_video(path), rate / probe_video(path).fps).frames(size)))


@pytest.mark.parametrize("name", VIDEOS)
def test_a_thinned_video_is_what_was_on_screen_bit_for_bit(tmp_path, name):
    codec, options = VIDEOS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    path = write_texture(tmp_path / name, codec, **options)
    every = decoded(path)
    for rate in (1, 4.5, 7, 10, 23):
        expected = on_screen(path, rate)
        assert np.array_equal(at_rate(path, rate), every[expected]), rate
    assert name.startswith("uneven") or len(at_rate(path, 10)) == 20
    if name.startswith("open"):  # frames that follow a key frame and are shown before it
        with av.open(str(path)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        keys = [index for index, packet in enumerate(packets) if packet.is_keyframe]
        assert len(keys) > 3 and any(packets[key].pts > packets[key + 1].pts for key in keys[1:-1])


def test_a_frame_that_stays_on_screen_is_repeated(tmp_path):
    path = write_texture(tmp_path / "a.mkv", "libx264", times=UNEVEN)
    assert np.diff(on_screen(path, 10)).tolist().count(0) >= 8  # the 900 milliseconds in UNEVEN
    assert len(at_rate(path, 10)) == round(UNEVEN[-1] / 100)


@pytest.mark.parametrize("name", ["closed.mp4", "open.mp4", "open.hevc.mp4", "old.mp4"])
def test_unneeded_frames_are_not_decoded(tmp_path, name):
    """Frame 0 and one more are kept; all bytes except theirs and those of their references are zeroed."""
    codec, options = VIDEOS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    path = write_texture(tmp_path / name, codec, **options)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    times = sorted(packet.pts for packet in packets)
    order = [times.index(packet.pts) for packet in packets]
    keys = [place for place, packet in enumerate(packets) if packet.is_keyframe]
    led = [order[place] for place in range(60) if any(key < place and order[key] > order[place] for key in keys)]
    assert bool(led) == (name != "closed.mp4")
    second = next((index for index in led if index >= 30), 40)
    kept = at_rate(path, 30 / second)
    assert len(kept) == 2 and np.array_equal(kept, decoded(path)[[0, second]])

    group = max((key for key in keys if order[key] <= second), key=lambda key: order[key])
    for place, packet in enumerate(packets):
        alone = codec == "libx264" and place not in keys and not data[packet.pos + 4] & 0x60  # nal_ref_idc is 0
        needed = group <= place <= order.index(second) and (order[place] == second or not alone)
        if place > 0 and not needed:
            data[packet.pos + 5 : packet.pos + packet.size] = bytes(packet.size - 5)  # after the length and the type
    path.write_bytes(data)
    assert np.array_equal(at_rate(path, 30 / second), kept)
    with pytest.raises(BadEpisode, match=r"(breaks|ends) after"):
        decoded(path)


def test_a_truncated_video_is_refused_when_thinned_too(tmp_path):
    path = write_texture(tmp_path / "a.mp4", "libx264", movflags="faststart")
    data = path.read_bytes()
    with av.open(str(path)) as container:
        starts = [packet.pos for packet in container.demux(video=0) if packet.size]
    for frame in (25, 59):
        for offset in (0, 5):
            path.write_bytes(data[: starts[frame] + offset])
            with pytest.raises(BadEpisode) as whole:
                decoded(path)
            with pytest.raises(BadEpisode) as thin:
                at_rate(path, 1)
            assert str(thin.value) == str(whole.value)
    path = write_texture(tmp_path / "a.mkv", "libx264")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadEpisode, match=r"(breaks|ends) after \d+"):
        at_rate(path, 1)


def test_a_packet_without_a_shown_frame_is_not_a_frame(tmp_path):
    """VP8 has hidden reference frames: show_frame (RFC 6386, 9.1) is 0."""
    if "libvpx" not in av.codecs_available:
        pytest.skip("this FFmpeg has no libvpx")
    path = write_texture(tmp_path / "a.webm", "libvpx")
    with av.open(str(path)) as container:
        hidden = bytes(next(packet for packet in container.demux(video=0) if packet.pts == 1000))
    path.write_bytes(path.read_bytes().replace(hidden, bytes([hidden[0] & ~0x10]) + hidden[1:]))
    every = decoded(path)
    assert len(every) == 59
    for rate in (1, 7):
        assert np.array_equal(at_rate(path, rate), every[on_screen(path, rate)])


def test_a_cut_video_begins_with_frames_whose_references_are_gone(tmp_path):
    path = write_texture(tmp_path / "whole.ts", *VIDEOS["open.ts"][:1], **VIDEOS["open.ts"][1])
    with av.open(str(path)) as container, av.open(str(tmp_path / "cut.ts"), "w") as cut:
        out = cut.add_stream_from_template(container.streams.video[0])
        packets = [packet for packet in container.demux(video=0) if packet.size]
        second = [index for index, packet in enumerate(packets) if packet.is_keyframe][1]
        assert packets[second + 1].pts < packets[second].pts
        for packet in packets[second:]:
            packet.stream = out
            cut.mux(packet)
    every = decoded(tmp_path / "cut.ts")
    for rate in (1, 7, 23):
        assert np.array_equal(at_rate(tmp_path / "cut.ts", rate), every[on_screen(tmp_path / "cut.ts", rate)])


def test_thinning_ignores_frames_hidden_by_an_edit_list(tmp_path):
    path = write_texture(tmp_path / "a.mp4", "libx264", **OPEN)
    at = path.read_bytes().index(b"elst") + 12
    duration, start = struct.unpack(">Ii", path.read_bytes()[at : at + 8])
    patch_mp4(path, b"elst", 8, struct.pack(">Ii", duration // 2, start + 7 * 512))  # half, from the eighth frame on
    every = decoded(path)
    assert len(every) == 30
    for rate in (1, 7, 23):
        assert np.array_equal(at_rate(path, rate), every[on_screen(path, rate)])


def test_thinning_with_a_clock_that_restarts(tmp_path):
    once = write_texture(tmp_path / "a.ts", "libx264", bf="0")
    twice = tmp_path / "twice.ts"
    twice.write_bytes(once.read_bytes() * 2)
    every = decoded(twice)
    assert len(every) == 120 and np.array_equal(at_rate(twice, 1), every[[0, 30, 60, 90]])


def test_avi_frames_are_counted(tmp_path):
    path = write_texture(tmp_path / "a.avi", "libx264", bf="3", **{"x264-params": "b-adapt=0"})
    assert np.array_equal(at_rate(path, 7), decoded(path)[[int(k * 30 / 7) for k in range(14)]])


def test_a_stream_without_key_frames_is_not_held_in_memory(tmp_path, monkeypatch):
    path = write_texture(tmp_path / "a.mp4", "libx264", **VIDEOS["one-group.mp4"][1])
    expected = at_rate(path, 7)
    monkeypatch.setattr("preprocessing.video.thinning.MAX_GROUP", 59)
    assert np.array_equal(at_rate(path, 7), expected)


def test_a_clock_that_jumps_is_refused(tmp_path):
    path = write_texture(tmp_path / "a.mkv", "libx264", times=[*range(0, 1770, 30), 10**9])
    with pytest.raises(BadEpisode, match="its clock jumps"):
        at_rate(path, 20)


def test_arrays_and_images_are_thinned_by_counting():
    frames = numbered(100, 8)
    video = sliced_video(100, lambda a, b: frames[a:b])

    def indices(video: Video) -> list[int]:
        return [round((float(frame.mean()) - 20) / 2) for chunk in video.frames(None) for frame in chunk]

    for rate in (1, 7, 20, 29, 30):
        expected = [k * 30 // rate for k in range(100) if k * 30 // rate < 100]
        assert indices(thinned(video, rate / 30)) == expected
        assert indices(thinned(first_frames(video, 70), rate / 30)) == [index for index in expected if index < 70]
    turned = thinned(upside_down(video), 1 / 30)
    assert turned.turned and indices(turned) == [0, 30, 60, 90]
    image = np.stack([quadrants()] * 4)
    [[seen, _]] = thinned(upside_down(sliced_video(4, lambda a, b: image[a:b])), 0.5).frames(None)
    assert np.array_equal(seen, quadrants()[::-1])
    broken = images_video([jpeg(quadrants()), b"never looked at"] * 3)
    assert sum(len(chunk) for chunk in thinned(broken, 0.5).frames(None)) == 3
    assert sum(len(chunk) for chunk in thinned(upside_down(first_frames(broken, 4)), 0.5).frames(16)) == 2


def test_thinning_holds_at_most_one_chunk():
    video = thinned(sliced_video(6400, lambda a, b: np.zeros((b - a, 64, 64, 3), np.uint8)), 0.02)
    tracemalloc.start()
    assert [len(chunk) for chunk in video.frames(None)] == [FRAMES_PER_CHUNK, 64]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * FRAMES_PER_CHUNK * 64 * 64 * 3


def test_videos_are_thinned_and_robot_logs_are_not(tmp_path):
    path = write_texture(tmp_path / "a.mp4", "libx264")
    [ref] = sources.scan("video", path)

    def loaded(contract: DataContract | None, fps: float | None) -> tuple[float, np.ndarray]:
        episode = sources.load(ref, contract, fps)
        return episode.fps, np.concatenate(list(episode.cameras["video"].frames(None)))

    every = decoded(path)
    slow = DataContract(fps=10, flip=("video",))  # recorded at 10 Hz, played at 30 Hz
    for contract, rate, fps, kept in (
        (None, None, 30, every),
        (None, 30, 30, every),
        (None, 60, 30, every),
        (None, 10, 10, every[::3]),
        (slow, 5, 5, every[::2, ::-1]),
    ):
        found, frames = loaded(contract, rate)
        assert found == fps and np.array_equal(frames, kept)
    log = next(sources.scan("hdf5", write_demos(tmp_path / "demo.hdf5", steps=9)))
    episode = sources.load(log, fps=1)
    assert episode.fps == 20 and sum(len(c) for c in episode.cameras["agentview"].frames(None)) == 9


@real
@pytest.mark.parametrize("name", ["test_clip_10s.mp4", "nasa_13013.mp4", "flipping_a_pancake.mkv"])
def test_real_videos_thinned(name):
    path = REAL / "video" / name
    every = decoded(path, 64)
    for rate in (1, 4.5, 11):
        assert np.array_equal(at_rate(path, rate, 64), every[on_screen(path, rate)])


@real
@pytest.mark.parametrize(
    "name, frames", [("test_clip_10s.mp4", 240), ("nasa_13013.mp4", 390), ("flipping_a_pancake.mkv", 310)]
)
def test_real_videos(name, frames):
    assert decoded(REAL / "video" / name, 64).shape == (frames, 64, 64, 3)


@real
def test_the_best_of_several_streams_is_read():
    info = probe_video(REAL / "video" / "nasa_13013.mp4")
    assert (info.width, info.height, info.streams) == (480, 270, 2)


@real
def test_the_broken_video_reports_how_far_it_goes():
    with pytest.raises(BadEpisode, match="declares 50 frames, breaks after 28: Invalid data"):
        decoded(REAL / "video" / "corrupted.mp4", 64)
