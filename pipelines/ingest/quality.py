"""What an encoder loses: a few frames of each camera, decoded again and compared with their source.

An encoder that never saw a robot's cameras may lose exactly the object that is to be picked, and nothing downstream
would show it. So each ingest measures it, tells it, and draws the frames before and after.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image, PngImagePlugin

from preprocessing.cache import cache_folder
from preprocessing.encoders.vae import PIXELS
from preprocessing.episode import Fit
from preprocessing.store.storage import Bucket, Folder
from uwm_model.metrics import psnr

GOOD = 26.0  # dB; below, small objects and textures are gone
IDENTICAL = 100.0  # dB, of frames without a difference
FRAMES = 4  # of 64 consecutive ones
SECONDS = 0.5  # after which no further frame of these is decoded: some decoders take a second for one
ROUNDS = 3  # stretches of 64 frames to look at, of an embodiment's camera
SHARE = 0.01  # of the time spent encoding that looking at more than one may take
SIDE = 256  # pixels; of larger frames the centre is decoded
SHOWN = 512  # pixels, to which the height of small frames is multiplied in the picture
SQUARE = 0.1  # relative difference of the sides below which a frame counts as square


class QualityRow(TypedDict):
    """What became of one camera's pictures: recorded height and width in pixels, PSNR in dB (None: not measured).

    ``picture`` is a PNG with a frame and its reconstruction side by side; ``note`` what a person should know.
    """

    embodiment: str
    camera: str
    encoder: str
    psnr: float | None
    frames: int
    height: int
    width: int
    fit: Fit
    note: str | None
    picture: str | None


class Reconstructed(TypedDict):
    """Columns of an encoded row: the PSNR of some of its frames, and the worst of them as a PNG."""

    psnr: list[float]
    sample: bytes | None


NOTHING: Reconstructed = {"psnr": [], "sample": None}


class Sampler:
    """Decides which encoded frames to decode, and measures them. What fails is not measured: it stops no ingest."""

    def __init__(self) -> None:
        self._rounds: Counter[tuple[str, str, str]] = Counter()
        self._began = time.monotonic()
        self._spent = 0.0

    def measure(
        self, name: str, encoder: Any, embodiment: str, camera: str, frames: np.ndarray, latents: np.ndarray
    ) -> Reconstructed:
        """Compare some of the frames uint8 ``[N, S, S, 3]`` with their latents ``[N, C, h, w]``, decoded."""
        key = (embodiment, camera, name)
        affordable = self._spent < SHARE * (time.monotonic() - self._began)
        if name == PIXELS or self._rounds[key] >= (ROUNDS if affordable else 1):
            return NOTHING
        self._rounds[key] += 1
        began, found = time.monotonic(), []
        with contextlib.suppress(Exception):
            for index in np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).astype(int):
                shown, there = _centre(frames[index], latents[index], encoder.stride)
                [again] = encoder.decode(there[None])
                found.append((min(float(psnr(again, shown)), IDENTICAL), shown, again))
                if time.monotonic() - began > SECONDS:
                    break
        self._spent += time.monotonic() - began
        if not found:
            return NOTHING
        _, shown, again = min(found, key=lambda one: one[0])
        image = io.BytesIO()
        Image.fromarray(np.concatenate([shown, again], axis=1)).save(image, "PNG")
        return {"psnr": [value for value, _, _ in found], "sample": image.getvalue()}


def _centre(frame: np.ndarray, latents: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    first = max(0, (latents.shape[1] - SIDE // stride) // 2)
    part = slice(first, first + SIDE // stride)
    pixels = slice(first * stride, (first + SIDE // stride) * stride)
    return frame[pixels, pixels], latents[:, part, part]


class Qualities:
    """The quality of catalogue rows, by embodiment, camera and encoder."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str, str], list[tuple[float, int]]] = {}
        self._shapes: dict[tuple[str, str, str], Counter[tuple[int, int, Fit]]] = {}
        self._samples: dict[tuple[str, str, str], tuple[bytes, str]] = {}

    def add(
        self,
        rows: Iterable[Mapping[str, Any]],
        psnr: Mapping[tuple[str, str], tuple[float, int]],
        samples: Mapping[tuple[str, str], bytes] | None = None,
    ) -> None:
        """Count rows. By (key of the row, camera), ``psnr`` holds dB and frames, ``samples`` PNGs."""
        for row in rows:
            for picture in row["pictures"] or ():
                where = (row["embodiment"], picture["camera"], row["encoder"])
                shape: tuple[int, int, Fit] = (picture["height"], picture["width"], row["fit"] or "stretch")
                self._shapes.setdefault(where, Counter())[shape] += 1
                values = self._values.setdefault(where, [])
                if (row["key"], picture["camera"]) in psnr:
                    values.append(psnr[row["key"], picture["camera"]])
                sample = (samples or {}).get((row["key"], picture["camera"]))
                if sample and where not in self._samples:
                    self._samples[where] = sample, row["id"]

    def rows(self) -> list[QualityRow]:
        """Return one row a camera and encoder. Unencoded pixels, which lose nothing, have one if nothing else does."""
        encoded = {where[:2] for where in self._shapes if where[2] != PIXELS}
        found: list[QualityRow] = []
        for where, shapes in self._shapes.items():
            if where[2] == PIXELS and where[:2] in encoded:
                continue
            embodiment, camera, encoder = where
            [((height, width, fit), _)] = shapes.most_common(1)
            values = self._values[where]
            frames = sum(count for _, count in values)
            mean = round(sum(value * count for value, count in values) / frames, 1) if frames else None
            found.append(
                {
                    "embodiment": embodiment,
                    "camera": camera,
                    "encoder": encoder,
                    "psnr": mean,
                    "frames": frames,
                    "height": height,
                    "width": width,
                    "fit": fit,
                    "note": _note(embodiment, camera, encoder, mean),
                    "picture": None,
                }
            )
        return found

    def draw(self, place: Folder | Bucket) -> list[QualityRow]:
        """Write the samples as PNGs, one a camera and encoder, where the next ingest replaces them; return the rows."""
        found = self.rows()
        for row in found:
            sample = self._samples.get((row["embodiment"], row["camera"], row["encoder"]))
            if sample:
                with contextlib.suppress(OSError):  # a picture less is no reason to fail
                    row["picture"] = str(_write(picture_folder(place), row, *sample))
        return found


def shape_note(row: QualityRow) -> str | None:
    """Return what becomes of frames that are not square; None of those that are."""
    height, width = row["height"], row["width"]
    if abs(width - height) <= SQUARE * min(width, height):
        return None
    done = {"stretch": "stretched to a square", "crop": "its centre cropped to a square"}
    return f"{width} x {height}, {done.get(row['fit'], 'padded to a square with black')}"


def picture_folder(place: Folder | Bucket) -> Path:
    """Return the folder of a store's pictures: next to a local store, hidden as its lock is, else in the cache."""
    if isinstance(place, Folder):
        return place.path.parent / f".{place.path.name}.quality"
    return cache_folder() / "quality" / hashlib.sha256(place.uri.encode()).hexdigest()[:16]


def forget(place: Folder | Bucket, ids: set[str]) -> None:
    """Delete the pictures of these episodes, which were removed from the store."""
    for file in picture_folder(place).glob("*.png"):
        with contextlib.suppress(OSError):
            with Image.open(file) as image:
                episode = image.info.get("episode")
            if episode in ids:
                file.unlink()


def _write(folder: Path, row: QualityRow, sample: bytes, episode: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    parts = (row["embodiment"], row["camera"], row["encoder"])
    name = "_".join(re.sub(r"[^\w.-]+", "-", part.rpartition("/")[2] or "-").strip("-.") or "-" for part in parts)
    told = PngImagePlugin.PngInfo()
    told.add_text("episode", episode)
    building = folder / f".{name}.{os.getpid()}"
    with Image.open(io.BytesIO(sample)) as image:
        times = max(1, SHOWN // image.height)
        shown = image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)
        shown.save(building, "PNG", pnginfo=told)
    return building.replace(folder / f"{name}.png")


def _note(embodiment: str, camera: str, encoder: str, measured: float | None) -> str | None:
    if encoder == PIXELS:
        return None
    if measured is None:
        return f"{camera} of {embodiment}: what {encoder} loses could not be measured"
    if measured >= GOOD:
        return None
    better = "a larger --image-size" if encoder == "sdxl-vae" else "--encoder sdxl-vae"
    return (
        f"{camera} of {embodiment}: {encoder} reconstructs it with {measured:.1f} dB; below {GOOD:.0f} dB small "
        f"objects and textures are lost. Use {better}, or train an encoder on these frames: uwm train-vae"
    )
