"""Frames come out upright, in their colours, all of them or a reason why not."""

from __future__ import annotations

import io
import struct
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
from formats import REAL, jpeg, numbered, quadrants, write_video
from PIL import Image

from preprocessing.episode import FRAMES_PER_CHUNK, BadEpisode
from preprocessing.video import (
    decode_image,
    first_frames,
    images_video,
    open_video,
    probe_video,
    resize,
    sliced_video,
    upside_down,
)

real = pytest.mark.skipif(not REAL.exists(), reason=f"no real data at {REAL}")


def decoded(path: Path, size: int | None = None) -> np.ndarray:
    return np.concatenate(list(open_video(path).frames(size)))


def centres(picture: np.ndarray) -> np.ndarray:
    """The colours of the four quadrants, in reading order."""
    quarter = picture.shape[0] // 4
    return np.array([picture[y, x] for y in (quarter, 3 * quarter) for x in (quarter, 3 * quarter)], int)


def patch_mp4(path: Path, box: bytes, offset: int, values: bytes) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(box) + 4 + offset
    data[at : at + len(values)] = values
    path.write_bytes(data)


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
def test_colours_are_those_that_were_written(tmp_path, name, codec, pix_fmt, size):
    path = write_video(tmp_path / name, np.stack([quadrants()] * 3), codec=codec, pix_fmt=pix_fmt)
    assert np.abs(centres(decoded(path, size)[1]) - centres(quadrants())).max() <= 6


def test_full_range_by_its_flag_alone(tmp_path):
    """Plain yuv420p that says it is full range: read as limited, dark and bright would be 15 levels off."""
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


def test_grey_stays_as_dark_and_bright_as_it_was(tmp_path):
    steps = np.repeat(np.arange(0, 256, 51, dtype=np.uint8), 8)
    grey = np.broadcast_to(steps[None, :, None], (48, 48, 3)).copy()
    path = write_video(tmp_path / "a.mkv", grey[None], codec="ffv1", pix_fmt="gray")
    assert np.abs(decoded(path)[0].astype(int) - grey).max() <= 3


def test_the_matrix_in_the_stream_is_used(tmp_path):
    """BT.709 coefficients, applied by hand, written under their name: reading them as BT.601 is 20 levels off."""
    plain = write_video(tmp_path / "601.mp4", np.stack([quadrants()] * 3))
    named = write_video(
        tmp_path / "709.mp4", np.stack([quadrants()] * 3), **{"x264-params": "colormatrix=bt709:range=tv"}
    )
    off = centres(decoded(named)[0]) - centres(decoded(plain)[0])  # same samples, another name
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


def test_memory_does_not_grow_with_the_film(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered(100).repeat(5, axis=0), preset="ultrafast")
    tracemalloc.start()
    for _ in open_video(path).frames(64):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * FRAMES_PER_CHUNK * 64 * 64 * 3


# Matrices of ISO/IEC 14496-12 8.3.2 (a b; c d) as phones write them, and what the viewer sees.
TURNS = {
    "clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "half": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "counter-clockwise": ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "transposed": ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_turned_films_come_out_upright(tmp_path, turn):
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


def test_a_cut_off_film_is_refused_with_both_counts(tmp_path):
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
    (tmp_path / "a.mp4").write_bytes(b"not a film at all" * 100)
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
    with pytest.raises(BadEpisode, match="picture size changes"):
        list(images_video([jpeg(quadrants(32)), jpeg(quadrants(64))]).frames(None))


def test_images_that_are_not_or_are_bombs():
    for data in (b"", b"GIF89a nothing", jpeg(quadrants())[:300]):
        with pytest.raises(BadEpisode, match="image"):
            decode_image(data)
    bomb = io.BytesIO()
    Image.new("L", (9_000, 9_000)).save(bomb, "PNG")
    with pytest.raises(BadEpisode, match="9000x9000"):
        decode_image(bomb.getvalue())


def test_arrays_and_what_is_put_around_them():
    frames = numbered(70, 8)
    video = sliced_video(70, lambda a, b: frames[a:b])
    assert [len(chunk) for chunk in video.frames(None)] == [64, 6]
    assert [len(chunk) for chunk in first_frames(video, 65).frames(4)] == [64, 1]
    picture = sliced_video(1, lambda a, b: quadrants()[None])
    turned = upside_down(picture)
    assert turned.turned and not upside_down(turned).turned
    assert np.array_equal(next(turned.frames(None))[0], quadrants()[::-1])


@real
@pytest.mark.parametrize(
    "name, frames", [("test_clip_10s.mp4", 240), ("nasa_13013.mp4", 390), ("flipping_a_pancake.mkv", 310)]
)
def test_real_films(name, frames):
    assert decoded(REAL / "video" / name, 64).shape == (frames, 64, 64, 3)


@real
def test_the_best_of_several_streams_is_read():
    info = probe_video(REAL / "video" / "nasa_13013.mp4")
    assert (info.width, info.height, info.streams) == (480, 270, 2)


@real
def test_the_broken_film_says_how_far_it_goes():
    with pytest.raises(BadEpisode, match="declares 50 frames, breaks after 28: Invalid data"):
        decoded(REAL / "video" / "corrupted.mp4", 64)
