"""``make bench-ingest``: how near an ingest comes to its slower half, and what memory it takes. Writes
docs/benchmarks/ingest.md.

Decoding alone and encoding alone run on the same cores, frames and batches and with the same number of processes as the
ingest; before, between and after the ingests, since a machine's speed drifts. An ingest's own rate is that of the
frames which the longer of two does more in the time that it takes more, so that what a start costs (Ray, the encoders)
is told apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
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
FEW, MANY, FRAMES = 8, 24, 900  # films, and frames of each: half a minute
MINUTES = 1, 40, 120  # of video at 30 frames a second


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


def encode(path: Path) -> float:
    """Seconds that one process of one thread takes for a film, in passes as the ingest's actors make them."""
    torch.set_num_threads(1)
    encoder = load_encoder("tiny")
    frames = np.concatenate([*open_video(path).frames(SIZE)])
    encoder.encode(frames[:32])
    began = time.perf_counter()
    for start in range(0, len(frames), ROWS_PER_PASS * FRAMES_PER_CHUNK):
        encoder.encode(frames[start : start + ROWS_PER_PASS * FRAMES_PER_CHUNK])
    return time.perf_counter() - began


def alone(files: list[Path], processes: int) -> tuple[float, float]:
    """Seconds a frame of decoding and of encoding, by as many processes at once."""
    with get_context("spawn").Pool(processes) as pool:
        pool.map(len, [()] * processes)  # processes are up
        began = time.perf_counter()
        decoded = sum(pool.imap_unordered(decode, files))
        decoding = (time.perf_counter() - began) / decoded
        chosen = files[: len(files) // processes * processes]
        encoding = sum(pool.map(encode, chosen, 1)) / processes / (len(chosen) * FRAMES)
    return decoding, encoding


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


class Watch:
    """What an ingest takes of the machine, while the block runs: CPU seconds by kind, and the most memory, bytes.

    Memory is the largest sum of what Ray's workers hold of their own and of its object store.
    """

    def __enter__(self) -> Watch:
        self.cpu, self.peak, self._done = Counter[str](), 0, threading.Event()
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _loop(self) -> None:
        used: dict[str, float] = {}  # CPU seconds of each process when it was last seen
        while not self._done.wait(0.5):
            own, shared, first = 0, 0, not used
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    title = (process / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
                    times = (process / "stat").read_text().rpartition(")")[2].split()[11:13]  # user, system
                    fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
                except OSError:  # it has just ended
                    continue
                seconds = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
                kind = "encoding" if "Encode" in title else "decoding" if "decode" in title else "all else"
                self.cpu[kind] += seconds - used.get(process.name, seconds if first else 0.0)
                used[process.name] = seconds
                if title.startswith("ray::"):
                    own += int(fields["RssAnon"].split()[0]) * 1024
                    shared = max(shared, int(fields["RssShmem"].split()[0]) * 1024)
            self.peak = max(self.peak, own + shared)


def throughput(folder: Path, processes: int) -> list[str]:
    for count in (FEW, MANY):
        (folder / f"{count}").mkdir()
        for number in range(count):
            film(folder / f"{count}" / f"{number}.mp4", FRAMES, (320, 240), seed=1000 * count + number)
    files = sorted((folder / f"{FEW}").iterdir())
    apart, ingests = [alone(files, processes)], []
    for count in (FEW, MANY):
        with Watch() as watch:
            ingests.append((ingest(folder / f"{count}", folder / f"store-{count}"), watch.cpu))
        apart.append(alone(files, processes))
    torch.set_num_threads(processes)
    loop = plain_loop(files[0], folder / "plain.zarr", 300)
    decoding, encoding = (len(apart) / sum(seconds) for seconds in zip(*apart, strict=True))
    (few, cpu_few), (many, cpu_many) = ingests
    frames, seconds = many["frames"] - few["frames"], many["seconds"] - few["seconds"]
    rate, whole = frames / seconds, many["frames"] / many["seconds"]
    shares = ", ".join(
        f"{kind} {(cpu_many[kind] - cpu_few[kind]) / (processes * seconds):.0%}"
        for kind in ("encoding", "decoding", "all else")
    )
    return [
        "| what | frames/s | the ingest is |",
        "|---|---|---|",
        f"| decoding alone | {decoding:.0f} | {rate / decoding:.2f} times as fast |",
        f"| encoding alone | {encoding:.0f} | {rate / encoding:.2f} times as fast |",
        f"| a plain loop of decode, encode, append | {loop:.0f} | {rate / loop:.1f} times as fast |",
        f"| **ingest**, {frames:,} frames more | {rate:.0f} | |",
        f"| ingest of {many['frames']:,} frames, start and end included | {whole:.0f} | |",
        "",
        f"Encoding alone, before, between and after: {', '.join(f'{1 / each:.0f}' for _, each in apart)} frames/s.",
        "",
        f"The cores' time in those {frames:,} frames: {shares}. Decoding and encoding on the same cores, with nothing "
        f"else, would be {1 / (1 + encoding / decoding):.2f} times as fast as encoding alone. All else is Ray: its "
        "driver, a dozen small processes, and this machine's own; their number does not grow with the cores.",
        "",
        f"The larger ingest said: encoders waited {many['waiting']['encode']:.0%} of the time, "
        f"decoders {many['waiting']['decode']:.0%}.",
    ]


def memory(folder: Path) -> list[str]:
    lines = ["| video | largest memory of workers and object store |", "|---|---|"]
    peaks = []
    for minutes in MINUTES:
        (folder / f"{minutes} min").mkdir()
        film(folder / f"{minutes} min" / "film.mp4", minutes * 60 * 30, (64, 64), seed=0)
        with Watch() as watch:
            report = ingest(folder / f"{minutes} min", folder / f"store of {minutes} min", size=32)
        assert report["frames"] == minutes * 60 * 30
        peaks.append(watch.peak)
        lines.append(f"| {minutes} min, {report['frames']:,} frames of 32 x 32 | {watch.peak / 1e6:.0f} MB |")
    first, middle, last = peaks
    return [
        *lines,
        "",
        f"The longest takes {last / middle:.2f} times the memory of the middle one and {last / first:.2f} times that "
        "of the shortest, which ends before Ray's buffers are full.",
    ]


def main() -> None:
    processes = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["UWM_CACHE"] = str(folder / "cache")
        heading = (
            f"# Ingesting\n\n`make bench-ingest` on {processes} CPU cores, torch {torch.__version__}, encoder tiny."
        )
        films = f"{FEW} and {MANY} films of 320 x 240, H.264, {FRAMES} frames each, at {SIZE} x {SIZE}."
        speed = throughput(folder, processes)
        lines = [heading, "", "## Throughput", "", films, "", *speed, "", "## Memory", "", *memory(folder), ""]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(lines))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
