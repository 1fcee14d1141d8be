"""What an ingest tells of each camera's frames: how much the encoder loses, and how they became squares."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command import Uwm
from helpers.formats import jpeg, write_video
from helpers.mp4 import patch_mp4
from helpers.rows import fill
from PIL import Image

from pipelines.ingest import local
from pipelines.ingest.quality import FRAMES, ROUNDS
from pipelines.models import checkpoint, published
from pipelines.recipe import IngestRecipe, load_recipe
from pipelines.train.pretrain import plan
from preprocessing.encoders.vae import Encoder, load_encoder
from preprocessing.episode import Fit, Square
from preprocessing.errors import BadEpisode, UserError
from preprocessing.store.store import LatentStore
from preprocessing.video.decode import open_video
from preprocessing.video.frames import images_video, resize, sliced_video
from uwm_model.metrics import psnr

SIZE = ("--image-size", "64", "--json")


@contextmanager
def in_this_process(function: Callable[..., Any], items: list[Any], plan: Any) -> Iterator[Iterator[Any]]:
    yield (table for one in items for table in function(one, plan=plan))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "apart", in_this_process)


def film(frames: int, height: int = 64, width: int = 64, grain: int = 0) -> np.ndarray:
    """A moving gradient, smooth enough for any encoder; ``grain`` adds noise that none can keep."""
    place = np.linspace(0, 3, height)[:, None] + np.linspace(0, 3, width)
    waves = np.stack([np.sin(place + 0.3 * i)[..., None] + [0, 0.3, 0.6] for i in range(frames)])
    noise = np.random.default_rng(0).normal(0, grain, waves.shape) if grain else 0
    return (120 + 60 * waves + noise).clip(0, 255).astype(np.uint8)


def test_an_ingest_tells_what_its_encoder_loses(tmp_path: Path, uwm: Uwm, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, store = tmp_path / "raw", tmp_path / "store"
    decoded: list[int] = []
    raw.mkdir()
    write_video(raw / "grainy.mp4", film(64 * 5, grain=60), crf="1")
    decode = Encoder.decode

    def counted(encoder: Encoder, latents: np.ndarray) -> np.ndarray:
        decoded.append(len(latents))
        return decode(encoder, latents)

    monkeypatch.setattr(Encoder, "decode", counted)
    arguments = ("ingest", raw, "--store", store, *SIZE, "--encoder", "tiny", "--encoder", "pixels")
    code, report, err = uwm(*arguments)
    [row] = report["quality"]
    assert code == 0 and (row["embodiment"], row["camera"], row["encoder"]) == ("video", "video", "tiny")
    assert 0 < sum(decoded) == row["frames"] <= FRAMES * ROUNDS, "a few frames, however long the video"
    assert row["psnr"] < 26 and f"tiny reconstructs it with {row['psnr']} dB" in err
    assert "--encoder sdxl-vae" in row["note"] and "uwm train-vae" in row["note"] and f"warning: {row['note']}" in err
    snapshot = LatentStore.open(str(store)).snapshot()
    [stored] = [one for one in snapshot.episodes().to_pylist() if one["encoder"] == "tiny"]
    [picture] = stored["pictures"]
    assert (picture["camera"], picture["height"], picture["width"]) == ("video", 64, 64)
    true = np.concatenate(list(open_video(raw / "grainy.mp4").frames(64)))
    again = load_encoder("tiny").decode(snapshot.read(stored["cameras"][0]["segments"]))
    assert row["psnr"] == pytest.approx(psnr(again, true).mean(), abs=0.5)
    shown = uwm("store", "show", store, "--json")
    assert [(one["camera"], one["psnr"]) for one in shown[1]["quality"]] == [("video", row["psnr"])]
    assert f"video, video, tiny: {row['psnr']} dB" in shown[2]
    with Image.open(row["picture"]) as image:
        assert image.size == (1024, 512), "enlarged, to be looked at"
        before, after = np.split(np.asarray(image)[::8, ::8], 2, axis=1)
    assert row["picture"] in err and float(psnr(after, before)) == pytest.approx(row["psnr"], abs=2)
    assert np.abs(true.astype(int) - before).mean((1, 2, 3)).min() == 0, "a frame of the video"

    write_video(raw / "smooth.mp4", film(30))
    code, report, err = uwm(*arguments)
    assert report["quality"][0]["psnr"] > 26 and not report["quality"][0]["note"] and "warning" not in err
    first, second = row["picture"], report["quality"][0]["picture"]
    assert first == second and code == 0
    uwm("store", "remove", store, "--source", raw / "grainy.mp4")
    assert Path(second).exists()
    uwm("store", "remove", store, "--source", raw / "smooth.mp4")
    assert not Path(second).exists(), "consent was withdrawn"


def test_an_encoder_that_cannot_decode_says_so(tmp_path: Path, uwm: Uwm, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", film(20))
    monkeypatch.setattr(Encoder, "decode", None)
    code, report, err = uwm("ingest", tmp_path / "a.mp4", "--store", tmp_path / "store", *SIZE)
    [row] = report["quality"]
    assert code == 0 and report["episodes"]["new"] == 1 and (row["psnr"], row["picture"]) == (None, None)
    assert "warning: video of video: what tiny loses could not be measured" in err
    assert "not measured" in uwm("store", "show", tmp_path / "store", "--json")[2]


def wide(height: int = 90, width: int = 160) -> np.ndarray:
    """Red left of green left of blue, each a third, with a white row on top."""
    frame = np.zeros((height, width, 3), np.uint8)
    for channel, part in enumerate(np.array_split(np.arange(width), 3)):
        frame[:, part, channel] = 200
    frame[: height // 5] = 255
    return frame


@pytest.mark.parametrize("kind", ["array", "jpeg", "mp4", "turned mp4", "tall"])
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_frames_of_another_shape_become_squares(tmp_path: Path, fit: Fit, kind: str) -> None:
    frame = wide()
    frames, video = np.stack([frame] * 3), None
    if kind == "tall":
        frames = frames.transpose(0, 2, 1, 3)
    elif kind == "jpeg":
        video = images_video([jpeg(frame)] * 3)
    elif kind.endswith("mp4"):
        turned = kind == "turned mp4"
        file = write_video(tmp_path / "a.mp4", np.rot90(frames, 1, axes=(1, 2)) if turned else frames, crf="1")
        if turned:
            one = 1 << 16
            patch_mp4(file, b"tkhd", 40, struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30))  # clockwise
        video = open_video(file)
    video = video or sliced_video(3, lambda start, stop: frames[start:stop])
    square = Square(48, fit)
    seen = np.concatenate(list(video.frames(square)))
    assert seen.shape == (3, 48, 48, 3) and seen.dtype == np.uint8
    assert square.recorded == ((160, 90) if kind == "tall" else (90, 160))
    assert np.array_equal(np.concatenate(list(video.frames(48))), np.concatenate(list(video.frames(Square(48)))))
    [first, *_] = seen if kind != "tall" else seen.transpose(0, 2, 1, 3)
    row = first[40 if fit != "pad" else 30].astype(int)
    colours = [int(np.argmax(pixel)) if pixel.max() > 100 else None for pixel in row]
    shares = [colours.count(channel) for channel in range(3)]
    if fit == "crop":  # 90 of 160 columns around the middle: 18 of the left third, 53 of the middle, 18 of the right
        assert abs(shares[0] - 10) <= 1 and abs(shares[1] - 28) <= 2 and abs(shares[2] - 10) <= 1
    else:
        assert all(abs(share - 16) <= 1 for share in shares)
    rows = [bool(first[i].min() > 150) for i in range(48)]
    dark = [bool(first[i].max() < 30) for i in range(48)]
    if fit == "pad":  # 27 of 48 rows, the others black
        assert abs(sum(dark) - 21) <= 2 and abs(sum(rows) - 5) <= 2 and dark[0] and dark[-1]
    else:
        assert not any(dark) and abs(sum(rows) - 10) <= 2


def test_a_frame_that_no_square_can_hold_is_refused_not_allocated() -> None:
    with pytest.raises(BadEpisode, match="exceeds"):
        resize(np.zeros((1, 1, 200_000, 3), np.uint8), Square(128, "crop"))
    assert resize(np.zeros((1, 1, 2000, 3), np.uint8), Square(32, "pad")).shape == (1, 32, 32, 3)


def test_another_fit_is_new_work_and_is_never_mixed(tmp_path: Path, uwm: Uwm) -> None:
    raw, store = tmp_path / "raw", tmp_path / "store"
    raw.mkdir()
    write_video(raw / "a.mp4", film(30, 90, 160))
    write_video(raw / "b.mp4", film(31, 90, 160))
    arguments = ("ingest", raw, "--store", store, *SIZE)
    code, report, err = uwm(*arguments)
    [row] = report["quality"]
    assert (row["width"], row["height"], row["fit"]) == (160, 90, "stretch")
    assert err.count("160 x 90, stretched to a square") == 1
    code, report, err = uwm(*arguments, "--set", "fit=crop", "--dry-run")
    assert report["episodes"]["new"] == 2
    code, report, err = uwm("ingest", raw / "a.mp4", "--store", store, *SIZE, "--set", "fit=crop")
    assert report["episodes"]["new"] == 1 and "160 x 90, its centre cropped to a square" in err
    recipe = load_recipe("small", [])
    with pytest.raises(UserError, match=r"became squares in several ways: .*crop \(1 episodes\).*--set fit="):
        plan(str(store), recipe)
    code, report, _ = uwm(*arguments, "--set", "fit=crop")
    assert report["episodes"] == {"new": 1, "already": 1, "quarantined": 0, "filtered": 0}
    settings = plan(str(store), recipe)
    assert settings.fit == "crop" and checkpoint.Settings.model_validate_json(settings.model_dump_json()).fit == "crop"
    older = json.loads(settings.model_dump_json())
    del older["fit"]
    assert checkpoint.Settings.model_validate(older).fit == "stretch"
    code, _, err = uwm(*arguments, "--set", "fit=zoom")
    assert code == 2 and "fit zoom" in err and "stretch" in err
    assert IngestRecipe().fit == "stretch"


def test_rows_of_an_earlier_version_are_stretched(tmp_path: Path, uwm: Uwm) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    fill(store, ["a", "b"], frames=30)
    assert plan(store.uri, load_recipe("small", [])).fit == "stretch"
    assert uwm("store", "show", store.uri, "--json")[1]["quality"] == []


@pytest.mark.parametrize(
    ("height", "width", "fit", "evaluated", "finetuned"),
    [
        (128, 128, "stretch", True, True),  # LIBERO
        (480, 640, "crop", True, True),
        (480, 640, "stretch", False, False),
        (480, 640, "pad", False, True),
        (180, 320, "stretch", False, False),  # DROID
        (720, 1280, "crop", False, True),
        (640, 480, "crop", False, True),
        (None, None, None, False, False),  # DROID in a store of an earlier version
    ],
)
def test_squares_that_do_not_show_what_the_model_saw_are_refused(
    height: int | None, width: int | None, fit: str | None, evaluated: bool, finetuned: bool
) -> None:
    pictures = [{"camera": "wrist", "height": height, "width": width}] if height else None
    row: Any = {"fit": fit, "pictures": pictures, "format": "droid", "source": "/data/r2d2", "contract": None}
    for extend, right in ((False, evaluated), (True, finetuned)):
        with nullcontext() if right else pytest.raises(UserError, match=r"saw .* 240 x 320") as refused:
            published._same_view(Path("droid.pt"), "/store", [row], extend)
        assert right or (refused and "\n" not in str(refused.value) and "/store" in str(refused.value))
