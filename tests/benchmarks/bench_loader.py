"""``make bench-loader``: the cost of loading a sample. Writes docs/benchmarks/loader.md.

Random windows of the same shape (two cameras of 128 x 128, 2 current and 2 future frames, 16 actions) in batches of 64,
with two loader processes each, one way after the other, from the page cache:

- ours, from stores in a folder and on an S3 server (SeaweedFS on loopback), once their shards are on this node
- a replay buffer of frames, read as in the published code: 19 frames of each camera, of which 4 are used
- one MP4 file per episode and camera, as in LeRobot (a key frame every other frame), with PyAV: seek to the key frame,
  decode up to the last frame, keep 4
- the same latents with zarr-python, sample by sample

The last three go through torch's DataLoader. CPU time is the user and system time of all processes, measured after the
first batches. Latents are random numbers (their values do not affect reading), frames a drifting texture.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import zarr
from bench_store import add
from helpers.s3 import server
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from preprocessing.dataset.embodiment import describe
from preprocessing.dataset.loader import LatentDataset, WindowShape
from preprocessing.dataset.prefetch import tensors
from preprocessing.store.store import LatentStore

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "loader.md"
EPISODES, FRAMES, CAMERAS, SIZE, FPS = 40, 150, 2, 128, 10
LARGE = 300  # episodes, to time copying to this node
LATENT, BATCH, LOADERS = (4, 16, 16), 64, 2
OFFSETS = (0, 1, 17, 18)  # of a window's frames, from the first
SECONDS = 4.0  # wall time per way
SHAPE = WindowShape(CAMERAS, 2, 2, 16, 7, 8)
MB = 1e6


@dataclass
class Cost:
    """CPU ms per sample, samples per second of wall time, and the largest process in MB."""

    cpu: float
    rate: float
    resident: float


def textures() -> Iterator[np.ndarray]:
    """Yield the frames of each episode and camera, uint8 [FRAMES, SIZE, SIZE, 3]."""
    random = np.random.default_rng(0)
    for _ in range(EPISODES * CAMERAS):
        coarse = torch.from_numpy(random.random((1, 3, 40, 40), np.float32))
        large = torch.nn.functional.interpolate(coarse, size=(2 * SIZE, 2 * SIZE), mode="bicubic")[0].clamp(0, 1)
        scene = (large.numpy().transpose(1, 2, 0) * 255).astype(np.uint8)
        speed = random.uniform(-0.4, 0.4, 2)
        at = (SIZE / 2 + np.arange(FRAMES)[:, None] * speed).astype(int).clip(0, SIZE)
        yield np.stack([scene[y : y + SIZE, x : x + SIZE] for y, x in at])


class Windows(Dataset[dict[str, np.ndarray]]):
    """Windows at random positions; ``read(episode, frame)`` returns the frames of one, [cameras, 4, ...]."""

    def __init__(self, read: Callable[[int, int], np.ndarray]):
        self.read = read
        self.numbers = np.random.default_rng(0).random((EPISODES * FRAMES, 15), np.float32)

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        episode, frame = np.random.default_rng(index).integers(0, (EPISODES, FRAMES - OFFSETS[-1]))
        steps = self.numbers[episode * FRAMES + frame : episode * FRAMES + frame + OFFSETS[-1]]
        return {"frames": self.read(int(episode), int(frame)), "action": steps[1:17, :7], "proprio": steps[:2, 7:]}


class Replay:
    """Reads 19 consecutive frames and keeps 4."""

    def __init__(self, cameras: list[Any]):
        self.cameras = cameras

    def __call__(self, episode: int, frame: int) -> np.ndarray:
        first = episode * FRAMES + frame
        return np.stack([camera[first : first + OFFSETS[-1] + 1][[*OFFSETS]] for camera in self.cameras])


class Latents(Replay):
    """Reads the latents of 4 frames."""

    def __call__(self, episode: int, frame: int) -> np.ndarray:
        first = episode * FRAMES + frame
        return np.stack(
            [np.concatenate([each[at : at + 2] for at in (first, first + OFFSETS[2])]) for each in self.cameras]
        )


class Videos:
    """Reads frames by timestamp from one MP4 file per episode and camera."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, episode: int, frame: int) -> np.ndarray:
        return np.stack([self._frames(episode * CAMERAS + camera, frame) for camera in range(CAMERAS)])

    def _frames(self, video: int, frame: int) -> np.ndarray:
        with av.open(str(self.folder / f"{video}.mp4")) as container:
            stream = container.streams.video[0]
            stream.thread_count = 1
            assert stream.time_base is not None
            ticks = round(1 / FPS / stream.time_base)
            container.seek(frame * ticks, stream=stream)
            wanted = {frame + offset for offset in OFFSETS}
            found = []
            for decoded in container.decode(stream):
                assert decoded.pts is not None
                if (number := round(decoded.pts / ticks)) in wanted:
                    found.append(decoded.to_ndarray(format="rgb24"))
                if number >= frame + OFFSETS[-1]:
                    break
        return np.stack(found)


def write_videos(folder: Path, codec: str, options: dict[str, str], videos: list[np.ndarray]) -> Path:
    folder.mkdir()
    for number, frames in enumerate(tqdm(videos, codec, leave=False, disable=None)):
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream(codec, rate=FPS, options={"g": "2", "crf": "30", **options})
            stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    return folder


def by_dataloader(read: Callable[[int, int], np.ndarray]) -> Cost:
    context = get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=_dataloader, args=(read, its))
    process.start()
    cost = mine.recv()
    process.join()
    return cost


def _dataloader(read: Callable[[int, int], np.ndarray], pipe: Any) -> None:
    torch.set_num_threads(1)
    batches = iter(DataLoader(Windows(read), BATCH, num_workers=LOADERS))
    for _ in range(2 * LOADERS):
        next(batches)
    every = [os.getpid(), *(worker.pid for worker in batches._workers)]  # type: ignore[attr-defined]
    began, used, count = time.perf_counter(), cpu(every), 0
    while time.perf_counter() < began + SECONDS or count % LOADERS:
        next(batches)
        count += 1
    seconds, used = time.perf_counter() - began, cpu(every) - used
    pipe.send(Cost(1e3 * used / count / BATCH, count * BATCH / seconds, max(map(resident, every))))


def by_ours(uri: str, cache: Path) -> Cost:
    """Run two processes, each of which loads its share of the global batches."""
    os.environ["UWM_CACHE"] = str(cache)
    context = get_context("spawn")
    pipes = [context.Pipe() for _ in range(LOADERS)]
    processes = [context.Process(target=_ours, args=(uri, rank, its)) for rank, (_, its) in enumerate(pipes)]
    for process in processes:
        process.start()
    costs = [mine.recv() for mine, _ in pipes]
    for process in processes:
        process.join()
    return Cost(
        statistics.mean(cost.cpu for cost in costs),
        sum(cost.rate for cost in costs),
        max(cost.resident for cost in costs),
    )


def _ours(uri: str, rank: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    batches = dataset(uri).batches(0, LOADERS * BATCH, 0, rank, LOADERS)
    for _ in range(50):
        tensors(next(batches).arrays)
    mine = [os.getpid()]
    began, used, count = time.perf_counter(), cpu(mine), 0
    while time.perf_counter() < began + SECONDS:
        tensors(next(batches).arrays)
        count += 1
    seconds, used = time.perf_counter() - began, cpu(mine) - used
    pipe.send(Cost(1e3 * used / count / BATCH, count * BATCH / seconds, resident(os.getpid())))


def dataset(uri: str) -> LatentDataset:
    snapshot = LatentStore.open(uri).snapshot()
    rows = snapshot.rows()
    return LatentDataset(snapshot, rows, {"arm": describe("arm", rows, 0, CAMERAS)}, SHAPE)


def cpu(processes: list[int]) -> float:
    """Return the seconds of user and system time that the processes have used."""
    ticks = 0
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def resident(process: int) -> float:
    """Return the process's peak memory in MB."""
    [line] = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / MB


def filled(uri: str, cache: Path) -> str:
    """Return the MB/s at which shards are copied from a store to this node."""
    os.environ["UWM_CACHE"] = str(cache)
    data = dataset(uri)
    began = time.perf_counter()
    next(data.batches(0, BATCH))
    return f"{sum(shard.bytes for shard in data._copy.shards) / MB / (time.perf_counter() - began):.0f} MB/s"


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary, server() as s3:
        folder = Path(temporary)
        stores = {"folder": str(folder / "store"), "S3": s3.uri("store")}
        large = {"folder": str(folder / "large"), "S3": s3.uri("large")}
        for uri in tqdm(stores.values(), "stores", leave=False, disable=None):
            add(LatentStore.create(uri), range(EPISODES), FRAMES, CAMERAS, LATENT)
        fills = {}
        for place, uri in tqdm(large.items(), "filling", leave=False, disable=None):
            store = LatentStore.create(uri)
            for at in range(0, LARGE, 60):
                add(store, range(at, at + 60), FRAMES, CAMERAS, LATENT)
            fills[place] = filled(uri, folder / f"cache-{place}")

        videos = [*tqdm(textures(), "frames", EPISODES * CAMERAS, leave=False, disable=None)]
        rows = [np.concatenate(videos[camera::CAMERAS]) for camera in range(CAMERAS)]
        zarrs, latents = [], []
        for camera, frames in enumerate(rows):
            chunks = (1, *frames.shape[1:])
            zarrs.append(zarr.create_array(str(folder / f"{camera}.zarr"), data=frames, chunks=chunks))
            numbers = np.random.default_rng(0).standard_normal((len(frames), *LATENT), np.float32).astype(np.float16)
            where = str(folder / f"latents-{camera}.zarr")
            latents.append(zarr.create_array(where, data=numbers, chunks=(16, *LATENT), compressors=None))
        os.environ["SVT_LOG"] = "1"  # errors only
        h264 = write_videos(folder / "h264", "libx264", {"preset": "veryfast"}, videos)
        av1 = write_videos(folder / "av1", "libsvtav1", {"preset": "10", "svtav1-params": "lp=1"}, videos)
        ways: dict[str, Callable[[], Cost]] = {
            **{f"ours, {place}": partial(by_ours, uri, folder / f"cache-{place}") for place, uri in stores.items()},
            f"ours, folder, {LARGE} episodes": partial(by_ours, large["folder"], folder / "cache-folder"),
            "replay buffer, numpy, all in memory": partial(by_dataloader, Replay(rows)),
            "replay buffer, zarr, a chunk a frame": partial(by_dataloader, Replay(zarrs)),
            "MP4, h264, PyAV": partial(by_dataloader, Videos(h264)),
            "MP4, AV1, PyAV": partial(by_dataloader, Videos(av1)),
            "the same latents, zarr-python, a sample at a time": partial(by_dataloader, Latents(latents)),
        }
        costs: dict[str, Cost] = {}
        for way, measure in tqdm(ways.items(), "ways", disable=None):
            costs[way] = measure()
    own = next(iter(costs.values())).cpu
    lines = [
        "# Loading samples",
        "",
        f"`make bench-loader` on {os.cpu_count()} CPU cores, torch {torch.__version__}.",
        f"Random windows of two cameras of {SIZE} x {SIZE}, in batches of {BATCH}, with two loader processes each;",
        f"{EPISODES} episodes of {FRAMES} frames.",
        "",
        "| way | CPU ms a sample | times ours | samples/s | largest process, MB |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {way} | {cost.cpu:.3f} | {cost.cpu / own:.1f} | {cost.rate:,.0f} | {cost.resident:.0f} |"
        for way, cost in costs.items()
    ]
    lines += [
        "",
        "The ways do not read the same amount: per camera, ours gathers 4 latents of 2 KB; the replay buffer reads",
        "19 frames of 49 KB and uses 4 of them. All ways but ours go through torch's DataLoader.",
    ]
    nbytes = LARGE * FRAMES * (CAMERAS * 2048 + 60) / MB
    lines += ["", f"| {nbytes:.0f} MB that are not on this node | rate |", "|---|---|"]
    lines += [
        f"| copied from a store {'in a folder' if p == 'folder' else 'on S3'} | {rate} |" for p, rate in fills.items()
    ]
    PAGE.write_text("\n".join([*lines, ""]))
    print(PAGE.read_text(), file=sys.stdout)


if __name__ == "__main__":
    main()
