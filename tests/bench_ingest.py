"""``make bench-ingest``: how near an ingest comes to its slower half, and what memory it takes. Writes
docs/benchmarks/ingest.md.

Decoding alone and encoding alone run on the same cores, in the same batches and with the same number of processes as
the ingest. Its own rate is that of the frames it takes longer for twice as many files, so that what a start costs
(Ray, the encoders) is told apart. Memory is the largest sum, at any moment, of what Ray's workers hold of their own and
of its object store.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import zarr

from pipelines.ingest_job import ROWS_PER_PASS
from preprocessing.encoders import load_encoder
from preprocessing.episode import FRAMES_PER_CHUNK
from preprocessing.video import open_video

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "ingest.md"
UWM = Path(sys.executable).with_name("uwm")
SIZE = 128
FILES, FRAMES = 8, 900  # a file: half a minute
LONG, SHORT = 2 * 3600, 60  # seconds of video at 30 frames a second


def film(path: Path, frames: int, size: tuple[int, int], seed: int) -> Path:
    """H.264, 30 frames a second, a moving picture with some noise, as a camera gives."""
    random = np.random.default_rng(seed)
    width, height = size
    scene = random.integers(0, 256, (height // 8 + 64, width // 8 + 64, 3)).repeat(8, 0).repeat(8, 1).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast", "crf": "23", "g": "60"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            x = number % 256
            picture = scene[x : x + height, x : x + width] + random.integers(-6, 6, (height, width, 1))
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decode(path: Path) -> int:
    return sum(len(frames) for frames in open_video(path).frames(SIZE))


def encode(frames: int) -> float:
    """Seconds that one process of one thread takes, in passes as the ingest's actors make them."""
    torch.set_num_threads(1)
    encoder = load_encoder("tiny")
    batch = np.random.default_rng(0).integers(0, 256, (ROWS_PER_PASS * FRAMES_PER_CHUNK, SIZE, SIZE, 3), np.uint8)
    encoder.encode(batch[:32])
    began = time.perf_counter()
    for at in range(0, frames, len(batch)):
        encoder.encode(batch[: min(len(batch), frames - at)])
    return time.perf_counter() - began


def plain_loop(path: Path, folder: Path, frames: int) -> float:
    """Frames a second of a script: decode, encode in float32 with all threads, append, one frame after the other."""
    encoder = load_encoder("tiny")
    array = zarr.create_array(folder, shape=(0, 4, 16, 16), chunks=(64, 4, 16, 16), dtype="float16")
    began, done = time.perf_counter(), 0
    for chunk in open_video(path).frames(SIZE):
        for frame in chunk:
            array.append(encoder.encode(frame[None]))
            done += 1
            if done == frames:
                return frames / (time.perf_counter() - began)
    raise ValueError(f"{path} has fewer than {frames} frames")


def ingest(raw: Path, store: Path, size: int = SIZE) -> dict[str, Any]:
    command = [UWM, "ingest", raw, "--store", store, "--image-size", str(size), "--json"]
    return json.loads(subprocess.check_output(command, text=True).splitlines()[-1])


def throughput(folder: Path, processes: int) -> list[str]:
    for name, count in (("once", FILES), ("twice", 2 * FILES)):
        (folder / name).mkdir()
        for number in range(count):
            film(folder / name / f"{number}.mp4", FRAMES, (320, 240), seed=1000 * count + number)
    frames = FILES * FRAMES
    files = sorted((folder / "once").iterdir())
    with get_context("spawn").Pool(processes) as pool:
        pool.map(len, [()] * processes)  # processes are up
        began = time.perf_counter()
        assert sum(pool.imap_unordered(decode, files)) == frames
        decoding = frames / (time.perf_counter() - began)
        encoding = frames / max(pool.map(encode, [frames // processes] * processes, 1))
    torch.set_num_threads(processes)
    loop = plain_loop(files[0], folder / "plain.zarr", 300)
    once, twice = (ingest(folder / name, folder / f"store-{name}") for name in ("once", "twice"))
    rate = frames / (twice["seconds"] - once["seconds"])
    whole = twice["frames"] / twice["seconds"]
    return [
        "| what | frames/s | the ingest is |",
        "|---|---|---|",
        f"| decoding alone | {decoding:.0f} | {rate / decoding:.2f} times as fast |",
        f"| encoding alone | {encoding:.0f} | {rate / encoding:.2f} times as fast |",
        f"| a plain loop of decode, encode, append | {loop:.0f} | {rate / loop:.1f} times as fast |",
        f"| **ingest**, {frames:,} frames more | {rate:.0f} | |",
        f"| ingest of {twice['frames']:,} frames, start and end included | {whole:.0f} | |",
        "",
        f"The larger ingest said: encoders waited {twice['waiting']['encode']:.0%} of the time, "
        f"decoders {twice['waiting']['decode']:.0%}.",
    ]


class Watch:
    """The largest sum of private memory of Ray's workers and shared memory of its object store, bytes."""

    def __enter__(self) -> Watch:
        self.peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.25):
            total, shared = 0, 0
            for process in Path("/proc").iterdir():
                try:
                    if process.name.isdigit() and (process / "cmdline").read_bytes().startswith(b"ray::"):
                        fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
                        total += int(fields["RssAnon"].split()[0]) * 1024
                        shared = max(shared, int(fields["RssShmem"].split()[0]) * 1024)
                except (OSError, KeyError):  # it has just ended
                    continue
            self.peak = max(self.peak, total + shared)


def memory(folder: Path) -> list[str]:
    lines = ["| video | largest memory of workers and object store |", "|---|---|"]
    peaks = []
    for seconds in (SHORT, LONG):
        (folder / f"{seconds}").mkdir()
        film(folder / f"{seconds}" / "film.mp4", seconds * 30, (64, 64), seed=0)
        with Watch() as watch:
            report = ingest(folder / f"{seconds}", folder / f"store-{seconds}", size=32)
        assert report["frames"] == seconds * 30
        peaks.append(watch.peak)
        lines.append(f"| {seconds / 60:.0f} min, {report['frames']:,} frames of 32 x 32 | {watch.peak / 1e6:.0f} MB |")
    return [*lines, "", f"The long one takes {peaks[1] / peaks[0]:.2f} times the memory of the short one."]


def main() -> None:
    processes = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["UWM_CACHE"] = str(folder / "cache")
        heading = (
            f"# Ingesting\n\n`make bench-ingest` on {processes} CPU cores, torch {torch.__version__}, encoder tiny."
        )
        films = f"{FILES} and {2 * FILES} films of 320 x 240, H.264, {FRAMES} frames each, at {SIZE} x {SIZE}."
        speed = throughput(folder, processes)
        lines = [heading, "", "## Throughput", "", films, "", *speed, "", "## Memory", "", *memory(folder), ""]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(lines))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
