"""``make bench-store``: time and space that a store takes. Writes docs/benchmarks/store.md.

Comparisons are within one run: reading is compared with the same bytes in plain files or in plain objects of the same
S3 server (SeaweedFS on loopback), and with chunks of 64 frames; space is compared with the numbers themselves.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import icechunk
import numpy as np
import zarr
from helpers.formats import numbered, write_video
from helpers.rows import Made, write_episodes
from helpers.s3 import server
from tqdm import tqdm

from preprocessing.store.snapshot import Snapshot
from preprocessing.store.store import LatentStore

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "store.md"
UWM = Path(sys.executable).with_name("uwm")
LATENT = (4, 16, 16)  # of a frame of 128 x 128
TINY = (1, 1, 1)
MB = 1e6


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def add(store: LatentStore, names: range, frames: int, cameras: int, shape: tuple[int, ...]) -> float:
    """Commit episodes of random numbers, written by tasks of 60 each; return the seconds of the commit."""
    random = np.random.default_rng(names.start)
    forks, rows, statistics = [], [], []
    for at in range(names.start, names.stop, 60):
        episodes = []
        for name in range(at, min(at + 60, names.stop)):
            latents = {
                f"camera{i}": random.standard_normal((frames, *shape)).astype(np.float16) for i in range(cameras)
            }
            episodes.append(Made(f"{name:032d}", latents, random.standard_normal((frames, 15)).astype(np.float32), 7))
        forks.append(store.fork())
        for row, found in write_episodes(forks[-1], episodes):
            rows.append(row)
            statistics += found
    return timed(lambda: store.commit(uuid.uuid4().hex, forks, rows, statistics, []))


def catalogue(folder: Path) -> list[tuple[str, str]]:
    """Commit and list many tiny episodes."""
    store = LatentStore.create(str(folder / "many"))
    found = []
    for count in (10_000, 100_000):
        there = len(store.snapshot().keys())
        for at in tqdm(range(there, count, 1000), f"{count} episodes", leave=False, disable=None):
            add(store, range(at, at + 1000), 2, 2, TINY)
        more = [add(store, range(10**6 + i, 10**6 + i + 1), 2, 2, TINY) for i in range(count, count + 5)]
        found.append((f"commit of one more episode at {count:,}, median of 5", f"{np.median(more):.3f} s"))
    program = (
        "import time; from preprocessing.store.store import LatentStore; began = time.perf_counter(); "
        f"table = LatentStore.open({store.uri!r}).snapshot().episodes(['id', 'uri', 'index', 'frames', 'embodiment']); "
        "print(table.num_rows, time.perf_counter() - began)"
    )
    listed = [subprocess.check_output([sys.executable, "-c", program], text=True).split() for _ in range(5)]
    seconds = np.median([float(taken) for _, taken in listed])
    found.append((f"open the store and list its {int(listed[0][0]):,} episodes, median of 5", f"{seconds:.3f} s"))
    keys = timed(lambda: LatentStore.open(store.uri).snapshot().keys())
    found.append(("what an ingest asks first: the keys of all of them", f"{keys:.3f} s"))
    return found


def reading(folder: Path) -> list[tuple[str, str]]:
    """Read 1 GB of latents in bulk from a pinned snapshot, and measure the space they take."""
    store = LatentStore.create(str(folder / "large"))
    for at in tqdm(range(0, 1680, 60), "1 GB of latents", leave=False, disable=None):
        add(store, range(at, at + 60), 150, 2, LATENT)
    nbytes, seconds = bulk(store)
    path = flat(folder / "plain", nbytes)
    plain = min(timed(lambda: np.fromfile(path, np.uint8)) for _ in range(3))
    chunked = aligned(folder / "aligned", nbytes // (2048 * 64))
    used = sum(file.stat().st_size for file in (folder / "large").rglob("*") if file.is_file())
    return [
        (
            f"bulk read of a pinned snapshot of {nbytes / MB:.0f} MB, checksums compared",
            f"{nbytes / MB / seconds:.0f} MB/s",
        ),
        ("the same bytes in one plain file", f"{nbytes / MB / plain:.0f} MB/s"),
        ("zarr chunks of 64 frames under Icechunk, each episode on a chunk", f"{chunked:.0f} MB/s"),
        ("space, as a multiple of the float16 latents and float32 numbers", f"{used / nbytes:.3f}"),
        ("the same with each episode of 150 frames on a chunk of 64 frames", f"{192 / 150:.3f}"),
    ]


def bulk(store: LatentStore) -> tuple[int, float]:
    """Read all latents and steps through ``read_each``; return (bytes, best of three in seconds)."""
    rows = store.snapshot().episodes().to_pylist()
    places = [at for row in rows for camera in row["cameras"] for at in camera["segments"]]
    places += [row["steps"] for row in rows]
    nbytes = sum(piece.nbytes for _, piece in store.snapshot().read_each(places))
    best = min(
        timed(lambda: [None for _ in Snapshot(store.uri, store.snapshot().id).read_each(places)]) for _ in range(3)
    )
    return nbytes, best


def flat(path: Path, nbytes: int) -> Path:
    path.write_bytes(np.random.default_rng(0).bytes(nbytes))
    return path


def aligned(folder: Path, chunks: int) -> float:
    """Return the MB/s of a zarr array with 64 frames per chunk, read 4 chunks at a time."""
    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(folder)))
    session = repository.writable_session("main")
    shape, chunk = (chunks * 64, *LATENT), (64, *LATENT)
    array = zarr.create_array(session.store, name="x", shape=shape, chunks=chunk, dtype="float16", compressors=None)
    array[:] = np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16)
    session.commit("x")
    array = zarr.open_array(repository.readonly_session("main").store, path="x", mode="r")
    return array.nbytes / MB / timed(lambda: [array[at : at + 256] for at in range(0, chunks * 64, 256)])


def remote(folder: Path) -> list[tuple[str, str]]:
    with server() as s3:
        store = LatentStore.create(s3.uri("large"))
        for at in tqdm(range(0, 420, 60), "256 MB on S3", leave=False, disable=None):
            add(store, range(at, at + 60), 150, 2, LATENT)
        nbytes, seconds = bulk(store)
        client, body = boto3.client("s3", endpoint_url=s3.endpoint), bytes(8 * 2**20)
        keys = [f"plain/{i}" for i in range(nbytes // len(body))]
        for key in keys:
            client.put_object(Bucket=s3.bucket, Key=key, Body=body)

        def one_after_the_other() -> None:
            for key in keys:
                client.get_object(Bucket=s3.bucket, Key=key)["Body"].read()

        own = len(keys) * len(body) / MB / min(timed(one_after_the_other) for _ in range(3))
        commits = [add(store, range(10**6 + i, 10**6 + i + 1), 2, 2, TINY) for i in range(5)]
    rate = nbytes / MB / seconds
    return [
        (f"bulk read of a pinned snapshot of {nbytes / MB:.0f} MB on S3", f"{rate:.0f} MB/s"),
        ("the server's own rate, objects of 8 MiB one after the other", f"{own:.0f} MB/s"),
        ("the first over the second", f"{rate / own:.2f}"),
        ("commit of one more episode on S3, median of 5", f"{np.median(commits):.3f} s"),
    ]


def known(folder: Path, count: int = 10_000) -> list[tuple[str, str]]:
    """Ingest many files repeatedly, on the command line."""
    raw, store = folder / "raw", folder / "known"
    raw.mkdir()
    clip = write_video(folder / "clip.mp4", numbered(2)).read_bytes()
    for number in range(count):  # a ``free`` box at the end makes each file unique (ISO 14496-12, 8.1.2)
        (raw / f"{number:05d}.mp4").write_bytes(clip + (16).to_bytes(4, "big") + b"free" + number.to_bytes(8, "big"))
    command = [UWM, "ingest", raw, "--store", store, "--image-size", "32", "--json"]
    environment = os.environ | {"UWM_CACHE": str(folder / "cache")}

    def run() -> tuple[dict[str, Any], float]:
        began = time.perf_counter()
        ended = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(ended.stdout.splitlines()[-1]), time.perf_counter() - began

    first, seconds = run()
    assert first["episodes"]["new"] == count
    time.sleep(3)  # a scan is cached only for files unmodified for two seconds
    shutil.rmtree(folder / "cache", ignore_errors=True)
    forgot, slow = run()
    again, quick = run()
    assert forgot["episodes"]["already"] == again["episodes"]["already"] == count and "encode" not in again["waiting"]
    return [
        (f"first ingest of {count:,} files of 2 frames", f"{seconds:.0f} s"),
        ("the same again, every file hashed", f"{slow:.1f} s"),
        ("the same again, files remembered", f"{quick:.1f} s"),
    ]


def main() -> None:
    sections = {"Many episodes": catalogue, "Much data": reading, "On S3": remote, "Ingesting again": known}
    lines = [f"# The latent store\n\n`make bench-store` on {os.cpu_count()} CPU cores."]
    with tempfile.TemporaryDirectory() as folder:
        for title, measure in sections.items():
            lines += ["", f"## {title}", "", "| what | measured |", "|---|---|"]
            lines += [f"| {what} | {value} |" for what, value in measure(Path(folder))]
            print("\n".join(lines[-6:]), file=sys.stderr, flush=True)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join([*lines, ""]))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
