"""``make bench-ingest``: throughput of an ingest compared with its slower half, and its memory. Writes
docs/benchmarks/ingest.md.

Decoding alone and encoding alone run on the same cores, frames and batches, with as many processes as the ingest, and
before and after each ingest, because a machine's speed drifts. An ingest's steady rate is read from its progress line;
the cost of starting Ray and the encoders is reported separately.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import zarr

from pipelines.ingest.job import ROWS_PER_PASS
from preprocessing.encoders.vae import load_encoder
from preprocessing.episode import FRAMES_PER_CHUNK
from preprocessing.video.decode import open_video

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "ingest.md"
UWM = Path(sys.executable).with_name("uwm")
SIZE = 128
VIDEOS, FRAMES, ROUNDS = 16, 900, 3  # videos of half a minute
MINUTES = 1, 40, 120  # of video at 30 frames a second


def make_video(path: Path, frames: int, size: tuple[int, int], seed: int) -> Path:
    """Write H.264 at 30 frames/s: a moving scene with some noise, like a camera's."""
    random = np.random.default_rng(seed)
    width, height = size
    scene = random.integers(0, 256, (height // 8 + 64, width // 8 + 64, 3)).repeat(8, 0).repeat(8, 1).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast", "crf": "23", "g": "60"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            x = number % 256
            pixels = scene[x : x + height, x : x + width] + random.integers(-6, 6, (height, width, 1))
            frame = av.VideoFrame.from_ndarray(pixels.clip(0, 255).astype(np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decode(path: Path) -> int:
    return sum(len(frames) for frames in open_video(path).frames(SIZE))


def encode(path: Path) -> float:
    """Return the seconds that one single-threaded process takes for a video, in passes as large as the ingest's."""
    torch.set_num_threads(1)
    encoder = load_encoder("tiny")
    frames = np.concatenate([*open_video(path).frames(SIZE)])
    encoder.encode(frames[:32])
    began = time.perf_counter()
    for start in range(0, len(frames), ROWS_PER_PASS * FRAMES_PER_CHUNK):
        encoder.encode(frames[start : start + ROWS_PER_PASS * FRAMES_PER_CHUNK])
    return time.perf_counter() - began


def alone(files: list[Path], processes: int) -> tuple[float, float]:
    """Return the seconds per frame of decoding and of encoding, with this many processes."""
    with get_context("spawn").Pool(processes) as pool:
        pool.map(len, [()] * processes)  # start the processes
        began = time.perf_counter()
        decoded = sum(pool.imap_unordered(decode, files))
        decoding = (time.perf_counter() - began) / decoded
        chosen = files[: len(files) // processes * processes]
        encoding = sum(pool.map(encode, chosen, 1)) / processes / (len(chosen) * FRAMES)
    return decoding, encoding


def plain_loop(path: Path, folder: Path, frames: int) -> float:
    """Return the frames/s of a script: decode, encode in float32 with all threads, append, one frame at a time."""
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


@dataclass
class Ingest:
    """One ``uwm ingest``: its JSON result; seconds, frames and CPU seconds by kind at each update of its progress line;
    and the peak memory of Ray's workers and object store, in bytes."""

    report: dict[str, Any] = field(default_factory=dict)
    moments: list[tuple[float, int, Counter[str]]] = field(default_factory=list)
    peak: int = 0

    def steady(self) -> tuple[float, dict[str, float]]:
        """Return the frames/s between the first and the last tenth of all frames, and the cores in use by kind."""
        last = self.moments[-1][1]
        seconds, frames, cpu = zip(*(at for at in self.moments if 0.1 < at[1] / last < 0.9), strict=True)
        rate = float(np.polyfit(seconds, frames, 1)[0])
        return rate, {kind: (cpu[-1][kind] - cpu[0][kind]) / (seconds[-1] - seconds[0]) for kind in cpu[-1]}


def ingest(raw: Path, store: Path, size: int = SIZE) -> Ingest:
    command = [UWM, "ingest", raw, "--store", store, "--image-size", f"{size}", "--max-bad", "0", "--json"]
    command += ["--set", "local_seconds=0"]  # on Ray from the start
    environment = os.environ | {"UWM_PROGRESS_SECONDS": "0.4"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    run, cpu, used = Ingest(), Counter[str](), dict[str, float]()
    for line in process.stderr:
        working, memory = processes_now()
        for pid, (kind, seconds) in working.items():  # a worker may decode first and write later
            cpu[kind] += seconds - used.get(pid, seconds)
            used[pid] = seconds
        run.peak = max(run.peak, memory)
        if found := re.search(r"(\d+) frames,", line):
            run.moments.append((time.monotonic(), int(found[1]), cpu.copy()))
    run.report = json.loads(process.stdout.read().splitlines()[-1])
    assert process.wait() == 0
    return run


def processes_now() -> tuple[dict[str, tuple[str, float]], int]:
    """Return each process's kind of work and CPU seconds so far, and the memory of Ray's workers in bytes."""
    working, own, shared = dict[str, tuple[str, float]](), 0, 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            times = (process / "stat").read_text().rpartition(")")[2].split()[11:13]  # user, system
            fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        except OSError:  # the process has just ended
            continue
        kind = "encoding" if "Encode" in title else "decoding" if "decode" in title else "all else"
        working[process.name] = kind, sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
        if title.startswith("ray::"):
            own += int(fields["RssAnon"].split()[0]) * 1024
            shared = max(shared, int(fields["RssShmem"].split()[0]) * 1024)
    return working, own + shared


def throughput(folder: Path, processes: int) -> list[str]:
    (folder / "videos").mkdir()
    for number in range(VIDEOS):
        make_video(folder / "videos" / f"{number}.mp4", FRAMES, (320, 240), seed=number)
    files = sorted((folder / "videos").iterdir())[: VIDEOS // 2]
    torch.set_num_threads(processes)
    apart, loops, ingests = [alone(files, processes)], [], []
    for number in range(ROUNDS):
        ingests.append(ingest(folder / "videos", folder / f"store-{number}"))
        loops.append(plain_loop(files[0], folder / f"plain-{number}.zarr", 300))
        apart.append(alone(files, processes))
    rates, cores = zip(*(run.steady() for run in ingests), strict=True)
    rate, loop = np.mean(rates), np.mean(loops)
    decoding, encoding = (len(apart) / sum(seconds) for seconds in zip(*apart, strict=True))
    whole = np.mean([run.report["frames"] / run.report["seconds"] for run in ingests])
    shares = ", ".join(f"{kind} {np.mean([each[kind] for each in cores]) / processes:.0%}" for kind in cores[0])
    waits = ", ".join(f"{name}rs {share:.0%}" for name, share in ingests[-1].report["waiting"].items())
    return [
        "| what | frames/s | the ingest is |",
        "|---|---|---|",
        f"| decoding alone | {decoding:.0f} | {rate / decoding:.2f} times as fast |",
        f"| encoding alone | {encoding:.0f} | {rate / encoding:.2f} times as fast |",
        f"| a plain loop of decode, encode, append | {loop:.0f} | {rate / loop:.1f} times as fast |",
        f"| **ingest**, while it goes steadily | {rate:.0f} | |",
        f"| ingest of {VIDEOS * FRAMES:,} frames, start and end included | {whole:.0f} | |",
        "",
        "The plain loop encodes one frame at a time.",
        "",
        f"Means of {ROUNDS} rounds. The ingests: {', '.join(f'{each:.0f}' for each in rates)} frames/s; encoding "
        f"alone, before, between and after them: {', '.join(f'{1 / each:.0f}' for _, each in apart)}.",
        "",
        f"CPU time during the ingests: {shares}. Decoding and encoding on the same cores, with nothing else, would be "
        f"{1 / (1 + encoding / decoding):.2f} times as fast as encoding alone. All else is Ray's driver, a dozen "
        "small processes of Ray, and the system's own; their number does not grow with the cores.",
        "",
        f"Share of time spent waiting: {waits}.",
    ]


def memory(folder: Path) -> list[str]:
    lines = ["| video | largest memory of workers and object store |", "|---|---|"]
    peaks = []
    for minutes in MINUTES:
        (folder / f"{minutes} min").mkdir()
        make_video(folder / f"{minutes} min" / "video.mp4", minutes * 60 * 30, (64, 64), seed=0)
        run = ingest(folder / f"{minutes} min", folder / f"store of {minutes} min", size=32)
        assert run.report["frames"] == minutes * 60 * 30
        peaks.append(run.peak)
        lines.append(f"| {minutes} min, {run.report['frames']:,} frames of 32 x 32 | {run.peak / 1e6:.0f} MB |")
    first, middle, last = peaks
    return [
        *lines,
        "",
        f"The longest video takes {last / middle:.2f} times the memory of the middle one and {last / first:.2f} times "
        "that of the shortest, which ends before Ray's buffers are full.",
    ]


def main() -> None:
    processes = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["UWM_CACHE"] = str(folder / "cache")
        heading = f"# Ingest\n\n`make bench-ingest` on {processes} CPU cores, torch {torch.__version__}, encoder tiny."
        videos = f"{VIDEOS} H.264 videos of 320 x 240, {FRAMES} frames each, resized to {SIZE} x {SIZE}."
        speed = throughput(folder, processes)
        lines = [heading, "", "## Throughput", "", videos, "", *speed, "", "## Memory", "", *memory(folder), ""]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(lines))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
