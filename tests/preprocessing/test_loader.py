"""From a snapshot to batches on one node: what is copied and kept, killed processes, memory use."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.rows import Made, write_episodes

from preprocessing import cache
from preprocessing.dataset import shards
from preprocessing.dataset.embodiment import describe
from preprocessing.dataset.loader import LatentDataset, WindowShape
from preprocessing.dataset.shards import LocalCopy, Shard
from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore

SHAPE = WindowShape(cameras=2, observed_frames=2, future_frames=2, action_chunk=4, action_dim=3, proprio_dim=4)
EPISODES, FRAMES = 60, 25
SIZE = FRAMES * (2 * 512 + 20)  # bytes of an episode
SHARD = 5 * SIZE  # about twelve of them


def add(store: LatentStore, names: range, frames: int = FRAMES, latent: tuple[int, ...] = (4, 8, 8)) -> None:
    """Add episodes of two cameras. Every latent holds the episode's number; steps count up from it."""
    fork, made = store.fork(), []
    for name in names:
        latents = np.full((frames, *latent), name, np.float16)
        steps = np.repeat(np.arange(frames, dtype=np.float32)[:, None] + name, 5, 1)
        made.append(Made(f"{name:04}", {"front": latents, "wrist": latents}, steps, 3))
    written = write_episodes(fork, made)
    rows, statistics = [row for row, _ in written], [one for _, found in written for one in found]
    store.commit(os.urandom(8).hex(), [fork], rows, statistics, [])


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    store = LatentStore.create(str(tmp_path_factory.mktemp("made") / "store"))
    add(store, range(EPISODES))
    return store.uri


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the shards in this test's own cache; shards are small."""
    monkeypatch.setenv("UWM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "SHARD_BYTES", SHARD)
    return tmp_path / "cache" / "shards"


def dataset(uri: str, **settings: Any) -> LatentDataset:
    snapshot = LatentStore.open(uri).snapshot()
    rows = snapshot.rows()
    return LatentDataset(snapshot, rows, {"arm": describe("arm", rows, 0, 2)}, SHAPE, **settings)


def local(uri: str) -> LocalCopy:
    snapshot = LatentStore.open(uri).snapshot()
    return LocalCopy(snapshot, snapshot.rows())


def check(copy: LocalCopy, numbers: list[int]) -> None:
    """Assert that these shards hold what was written."""
    with copy.opened(numbers) as opened:
        for number, files in opened.items():
            for key, frame in copy.shards[number].frame.items():
                name, start = int(key[-4:]), copy.shards[number].number[key]
                assert (files["latents"][frame : frame + 2 * FRAMES] == name).all()
                assert (
                    files["steps"][start : start + 5 * FRAMES].reshape(-1, 5)[:, 0] == name + np.arange(FRAMES)
                ).all()


def size(folder: Path) -> int:
    """Return the total size of all files, while other processes create and delete some."""
    found = 0
    for place, _, files in os.walk(folder):
        for name in set(files) - {"lock"}:
            with contextlib.suppress(FileNotFoundError):
                found += (Path(place) / name).stat().st_size
    return found


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A log of the copies made from now on: (name of the shard, name of the thread)."""
    found: list[tuple[str, str]] = []
    fill = Shard.fill

    def noted(self: Shard, *arguments: Any) -> None:
        found.append((self.name, threading.current_thread().name))
        fill(self, *arguments)

    monkeypatch.setattr(Shard, "fill", noted)
    return found


def test_windows_are_gathered_across_shards(uri: str) -> None:
    data = dataset(uri)
    assert 6 < len(data._copy.shards) < 24
    random = np.random.default_rng(0)
    episode, frame = random.integers(0, EPISODES, 200), random.integers(0, FRAMES, 200)
    batch = data.gather(episode, frame)
    names = np.array([int(data.rows[i]["id"]) for i in episode])
    for latents in (batch["current_latents"], batch["future_latents"]):
        assert latents.shape == (200, 2, 2, 4, 8, 8) and latents.dtype == np.float16
        np.testing.assert_array_equal(latents[:, :, :, 0, 0, 0], np.broadcast_to(names[:, None, None], (200, 2, 2)))
    scale = (EPISODES + FRAMES - 2) / 2
    expected = (names + frame - scale) / scale
    np.testing.assert_allclose(batch["action"][:, 0, 0], expected, rtol=1e-5, atol=1e-6)


def test_only_the_current_and_next_blocks_are_held_and_a_change_of_block_waits_for_nothing(
    uri: str, folder: Path, filled: list[tuple[str, str]]
) -> None:
    data = dataset(uri, shuffle=15 * FRAMES)
    order, seen = data._order(0), set[str]()
    batches = data.batches(0, 5)
    for step in range(EPISODES * FRAMES // 5):
        next(batches)
        blocks = [block for each in order.blocks(step * 5) for block in each]
        seen |= {data._copy.shards[n].name for block in blocks for n in order.shards(block)}
        deadline = time.monotonic() + 20
        while not {name for name, _ in filled} >= seen:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert {name for name, _ in filled} == seen
        while data._copy._mapped.keys() != data._copy._wanted:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        if step == 0:
            assert len(seen) < len(data._copy.shards) * 0.8
            begun = len([thread for _, thread in filled if thread == "MainThread"])
    assert len(seen) == len(data._copy.shards) == len(filled)
    assert begun == len([thread for _, thread in filled if thread == "MainThread"]) < len(filled) / 2


def test_the_progress_of_copies_is_reported(uri: str) -> None:
    told: list[tuple[int, int]] = []
    data = dataset(uri, tell=lambda done, total: told.append((done, total)))
    next(data.batches(0, 5))
    sizes, (done, totals) = [shard.bytes for shard in data._copy.shards], zip(*told, strict=True)
    assert set(totals) == {sum(sizes)} == {done[-1]}
    assert sorted(np.diff([0, *done])) == sorted(sizes)


def test_only_the_new_shards_of_a_grown_store_are_copied(tmp_path: Path, filled: list[tuple[str, str]]) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    add(store, range(EPISODES))
    before = local(store.uri)
    check(before, [*range(len(before.shards))])
    assert len(filled) == len(before.shards)
    add(store, range(EPISODES, EPISODES + 2))
    after = local(store.uri)
    check(after, [*range(len(after.shards))])
    assert len(filled) <= len(before.shards) + 2
    store.remove(["0030"], [])
    fewer = local(store.uri)
    check(fewer, [*range(len(fewer.shards))])
    assert len(filled) <= len(before.shards) + 4


def test_the_least_recently_used_shards_are_evicted_and_those_in_use_stay(
    uri: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = local(uri)
    sizes = [shard.bytes for shard in copy.shards]
    limit = max(sizes) * 2 + sizes[0]
    monkeypatch.setenv("UWM_CACHE_GB", str(limit / 1e9))
    with keeping(uri, [0]):
        other = [*range(1, len(sizes))]
        for number in other * 2:
            check(copy, [number])
            assert size(folder) <= limit and (folder / copy.shards[0].name).is_dir()
        newest = {copy.shards[other[-1]].name, copy.shards[0].name}
        assert newest <= {path.name for path in folder.iterdir() if path.is_dir()}
    for number in other:  # its process was killed
        check(copy, [number])
    assert not (folder / copy.shards[0].name).exists()


class keeping:
    """Another process that holds these shards until it is killed."""

    def __init__(self, uri: str, numbers: list[int]):
        context = multiprocessing.get_context("spawn")
        self.mine, its = context.Pipe()
        self.process = context.Process(target=_keep, args=(uri, numbers, its), daemon=True)

    def __enter__(self) -> None:
        self.process.start()
        assert self.mine.poll(60)

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()


def _keep(uri: str, numbers: list[int], pipe: Any) -> None:
    shards.SHARD_BYTES = SHARD
    with local(uri).opened(numbers):
        pipe.send("open")
        time.sleep(600)


def test_a_cache_that_is_too_small_is_reported_in_one_line(
    uri: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UWM_CACHE_GB", "0.0005")
    with pytest.raises(UserError, match=r"from 0.00 GB at a time.*UWM_CACHE_GB, or lower shuffle_windows") as told:
        next(dataset(uri).batches(0, 4))
    assert "\n" not in str(told.value) and size(folder) == 0
    monkeypatch.setenv("UWM_CACHE_GB", "much")
    with pytest.raises(UserError, match="UWM_CACHE_GB=much: give a number"):
        next(dataset(uri).batches(0, 4))
    monkeypatch.delenv("UWM_CACHE_GB")
    copy = local(uri)
    *others, one, two = np.argsort([shard.bytes for shard in copy.shards]).tolist()
    with keeping(uri, [one, two]):
        monkeypatch.setattr(cache, "PATIENCE", 0.3)
        monkeypatch.setenv("UWM_CACHE_GB", str((copy.shards[one].bytes + copy.shards[two].bytes + 99) / 1e9))
        with pytest.raises(UserError, match=r"no room for .* this and other runs use .* GB; raise UWM_CACHE_GB"):
            check(copy, others[:1])
    check(copy, others[:1])


def test_processes_that_race_copy_each_shard_once(uri: str, tmp_path: Path, folder: Path) -> None:
    everything = sum(shard.bytes for shard in local(uri).shards)
    run_all([lambda n=n: process(_read, uri, n, tmp_path / "log", None) for n in range(4)])
    lines = (tmp_path / "log").read_text().split()
    assert len(lines) == len(set(lines)) == len(local(uri).shards)
    assert size(folder) == everything


def test_processes_that_race_for_too_little_room_read_what_was_written(uri: str, tmp_path: Path, folder: Path) -> None:
    sizes = [shard.bytes for shard in local(uri).shards]
    limit = max(sizes) * 3 + min(sizes)
    running = [process(_read, uri, n, tmp_path / "log", limit) for n in range(3)]
    most = 0
    while any(each.is_alive() for each in running):
        if (folder / "room.lock").exists():
            with (folder / "room.lock").open() as room:  # otherwise files are counted that are replaced meanwhile
                fcntl.flock(room, fcntl.LOCK_EX)
                most = max(most, size(folder))
        time.sleep(0.001)
    assert [each.exitcode for each in running] == [0, 0, 0]
    assert 0 < most <= limit
    assert len((tmp_path / "log").read_text().split()) > len(sizes)  # some were copied again


def process(target: Callable[..., None], *arguments: Any) -> Any:
    started = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    started.start()
    return started


def run_all(start: list[Callable[[], Any]]) -> None:
    running = [each() for each in start]
    for each in running:
        each.join()
    assert [each.exitcode for each in running] == [0] * len(running)


def _read(uri: str, number: int, log: Path, limit: int | None) -> None:
    """Open all shards at once, or one by one if there is a limit, and compare them; log a line for each copy."""
    shards.SHARD_BYTES, fill = SHARD, Shard.fill

    def noted(self: Shard, *arguments: Any) -> None:
        with log.open("a") as out:
            out.write(f"{self.name}\n")
        fill(self, *arguments)

    Shard.fill = noted  # type: ignore[method-assign]
    copy = local(uri)
    if limit is None:
        check(copy, [*range(len(copy.shards))])
        return
    os.environ["UWM_CACHE_GB"] = str(limit / 1e9)
    random = np.random.default_rng(number)
    for _ in range(4):
        for each in random.permutation(len(copy.shards)).tolist():
            check(copy, [each])


def test_a_process_killed_while_copying_leaves_no_item(uri: str, folder: Path) -> None:
    died = process(_die, uri)
    died.join()
    assert died.exitcode == -signal.SIGKILL and [path.suffix for path in folder.glob("*/")] == [".building"]
    copy = local(uri)
    check(copy, [*range(len(copy.shards))])
    assert {path.name for path in folder.glob("*/")} == {shard.name for shard in copy.shards}


def _die(uri: str) -> None:
    shards.SHARD_BYTES, fill = SHARD, Shard.fill

    def deadly(self: Shard, *arguments: Any) -> None:
        fill(self, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    Shard.fill = deadly  # type: ignore[method-assign]
    check(local(uri), [0])


def test_lost_or_truncated_files_are_copied_again(uri: str, folder: Path, filled: list[Any]) -> None:
    copy = local(uri)
    every = [*range(len(copy.shards))]
    check(copy, every)
    with (folder / copy.shards[1].name / "latents").open("r+b") as file:
        file.truncate(1000)
    (folder / copy.shards[2].name / "steps").unlink()
    (folder / copy.shards[3].name / "lock").unlink()
    check(copy, every)
    assert len(filled) == len(every) + 3
    with copy.opened(every):
        shutil.rmtree(folder)
        check(copy, every)
    check(copy, every)
    assert len(filled) == 2 * len(every) + 3


def test_a_cache_deleted_while_it_fills_is_filled_anyway(
    uri: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill, times = Shard.fill, iter(range(100))

    def disturbed(self: Shard, *arguments: Any) -> None:
        if next(times) in (0, 3):
            shutil.rmtree(folder)
        fill(self, *arguments)

    monkeypatch.setattr(Shard, "fill", disturbed)
    copy = local(uri)
    check(copy, [*range(len(copy.shards))])


def test_a_full_disk_leaves_nothing_incomplete(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={2 * SHARD}", "tmpfs", small], capture_output=True
    ).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        monkeypatch.setenv("UWM_CACHE", str(small))
        monkeypatch.setenv("UWM_CACHE_GB", "1")
        copy = local(uri)
        with pytest.raises(OSError, match=rf"No space left on device: '{small}/shards/\w+.building/latents'"):
            check(copy, [*range(len(copy.shards))])
        complete = {path.name for path in (small / "shards").glob("*/")}
        assert complete and complete < {shard.name for shard in copy.shards}
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        check(copy, [*range(len(copy.shards))])
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


def test_memory_does_not_grow_with_what_is_read(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "large"))
    for at in range(0, 320, 40):
        add(store, range(at, at + 40), 100, (4, 16, 16))
    command = [sys.executable, "-c", READER, store.uri]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    read, grown = map(float, ended.stdout.split())
    assert read > 120e6 and grown < 40e6


READER = """
import sys, test_loader
from preprocessing.dataset import shards
shards.SHARD_BYTES, shards.RESIDENT_BYTES = 32 * 2**20, 16 * 2**20
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
data = test_loader.dataset(sys.argv[1])
batches = data.batches(0, 32)
for _ in range(20):
    next(batches)
begun, most = resident(), 0
for _ in range(int(data.frames.sum()) // 32):
    next(batches)
    most = max(most, resident())
print(sum(shard.bytes for shard in data._copy.shards), most - begun)
"""
