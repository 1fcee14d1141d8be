"""An ingest survives killed processes, a full disk, a faulty network, wrong clocks and flipped bits.

Afterwards each store is read completely and compared with that of an undisturbed ingest. Meanwhile a reader keeps
reading it and must only find complete snapshots.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.formats import numbered, write_demos, write_lerobot, write_video
from helpers.processes import wait_for, workers
from helpers.rows import commit, differences, fill, random_episode
from helpers.s3 import S3, FaultyProxy
from helpers.soak import KILLS, SEED, chances

from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore

pytest_plugins = ["helpers.s3"]

# The command line in a separate process. It writes every few rows and commits every half second. Frames are averaged
# instead of encoded by the VAE, which is slow to import: the faults should hit a running ingest.
DRIVER = """
import os, signal, sys
import numpy as np
from icechunk import Session
from pipelines import cli
from pipelines.ingest import committer
from pipelines.ingest import job as ingest_job

class Average(ingest_job.Encode):
    def __init__(self, plan, count, refuse):
        super().__init__(plan, count, refuse)
        self.encoders, self._pool = dict.fromkeys(plan.encoders, self), None
    def encode(self, frames):
        frames = np.pad(frames, ((0, 0), (0, 0), (0, 0), (0, 1))).astype(np.float16)
        return frames.reshape(len(frames), 8, 8, 8, 8, 4).mean((2, 4)).transpose(0, 3, 1, 2)

committer.COMMIT_MINUTES, ingest_job.ROWS_PER_WRITE, ingest_job.Encode = 0, 2, Average
death, pool, commit, commits = sys.argv.pop(1), ingest_job.ActorPoolStrategy, Session.commit, []
ingest_job.ActorPoolStrategy = lambda size: pool(size=1)  # leaves room for several drivers

def deadly(session, *arguments, **named):
    commits.append(session)
    if death == f"before commit {len(commits)}":
        os.kill(os.getpid(), signal.SIGKILL)
    snapshot = commit(session, *arguments, **named)
    if death == f"after commit {len(commits)}":
        os.kill(os.getpid(), signal.SIGKILL)
    return snapshot

Session.commit = deadly
cli.main()
"""


class Drivers:
    """Starts ingests of one folder on one cluster. ``reference`` is the store of an undisturbed one."""

    def __init__(self, cluster: Any, raw: Path, folder: Path):
        self.cluster, self.raw, self.folder = cluster, raw, folder
        self.reference = str(folder / "reference")
        finish(self.start(self.reference))
        assert len(LatentStore.open(self.reference).log()) > 3, "it should commit several times"

    def start(self, store: str, death: str = "never", raw: Path | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DRIVER, death, "ingest", raw or self.raw, "--store", store, "--json"]
        return subprocess.Popen(
            [*command, "--image-size", "64", "--address", self.cluster.address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def finish(driver: subprocess.Popen[str], code: int = 0) -> tuple[Any, str]:
    """Wait for a driver; return its report and its stderr."""
    out, err = driver.communicate(timeout=240)
    assert driver.returncode == code, err[-3000:]
    return json.loads(out.splitlines()[-1]) if code == 0 else None, err


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory, s3: S3) -> Iterator[Drivers]:  # s3 sets the workers' credentials
    from ray.cluster_utils import Cluster

    raw = tmp_path_factory.mktemp("raw")
    for number in range(24):
        write_video(raw / f"{number:02}.mp4", numbered(100)[number : number + 70 + number])
    write_demos(raw / "toy_demo.hdf5", demos=6, steps=70)
    write_lerobot(raw / "lerobot", rows=70, episodes=4)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 5, "include_dashboard": False})
    yield Drivers(cluster, raw, tmp_path_factory.mktemp("stores"))
    cluster.shutdown()


@contextlib.contextmanager
def reader(store: str) -> Iterator[None]:
    """While the block runs, keep opening the store and reading its newest snapshot completely."""
    done, found = threading.Event(), list[str]()

    def read() -> None:
        while not done.wait(1):
            with contextlib.suppress(UserError):  # no store yet
                snapshot = LatentStore.open(store).snapshot()
                found.extend(snapshot.verify())
                found.extend(row["id"] for row in snapshot.rows() if frames(row) != {row["frames"]})

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not found


def frames(row: dict[str, Any]) -> set[int]:
    return {sum(at["count"] for at in camera["segments"]) for camera in row["cameras"]}


def episodes(store: str) -> int:
    try:
        return LatentStore.open(store).snapshot().episodes(["id"]).num_rows
    except UserError:
        return 0


@pytest.mark.soak
@pytest.mark.parametrize("place", ["folder", "s3"])
def test_pairs_of_drivers_killed_at_random_moments(drivers: Drivers, s3: S3, place: str) -> None:
    """On S3 through a network that loses one request in thirty."""
    chance, deaths, killed, number = chances(place), ["before commit 2", "after commit 2"], 0, 0
    with FaultyProxy(s3.port, seed=SEED) as proxy:
        for fault in ("reset before", "reset after", "500", "503", "truncate"):
            proxy.inject(fault, rate=0.007)
        while killed < KILLS:
            name = f"killed-{number}"
            store = quiet = str(drivers.folder / name)
            if place == "s3":
                store, quiet = s3.uri(name, proxy.endpoint), s3.uri(name)
            with reader(quiet):
                pair = [drivers.start(store, deaths.pop() if deaths else "never") for _ in range(2)]
                first = pair[0]  # with little left to do it may finish before it is seen at work
                wait_for(lambda first=first: workers("MapBatches(decode)") or first.poll() is not None, first)
                for driver in pair:
                    time.sleep(chance.uniform(0, 5))
                    driver.kill()
                    _, err = driver.communicate()
                    unlucky = (1, 2) if place == "s3" else ()  # with the network
                    assert driver.returncode in (0, -signal.SIGKILL, *unlucky) and "Traceback" not in err, err[-3000:]
                    killed += driver.returncode == -signal.SIGKILL
            if episodes(quiet) == episodes(drivers.reference):
                assert not differences(quiet, drivers.reference)
                number += 1
    all_at_once(drivers, quiet, 2)


@pytest.mark.soak
def test_four_at_once(drivers: Drivers) -> None:
    all_at_once(drivers, str(drivers.folder / "four"), 4)


def all_at_once(drivers: Drivers, store: str, count: int) -> None:
    missing = episodes(drivers.reference) - episodes(store)
    with reader(store):
        reports = [finish(driver)[0]["episodes"] for driver in [drivers.start(store) for _ in range(count)]]
    assert sum(report["new"] for report in reports) == missing
    assert sum(report["new"] + report["already"] for report in reports) == count * episodes(drivers.reference)
    assert not differences(store, drivers.reference)


@pytest.mark.soak
def test_workers_and_a_node_that_die(drivers: Drivers) -> None:
    store = str(drivers.folder / "workers")
    node = drivers.cluster.add_node(num_cpus=2)
    raylet = node.all_processes["raylet"][0].process.pid
    with reader(store):
        driver = drivers.start(store)
        for title in ("MapBatches(decode)", "MapWorker(MapBatches(Average))", "Write"):
            os.kill(wait_for(lambda title=title: workers(title), driver)[0], signal.SIGKILL)
        wait_for(lambda: workers("Write", raylet), driver)
        drivers.cluster.remove_node(node, allow_graceful=False)
        report, _ = finish(driver)
    assert report["episodes"] == {"new": episodes(drivers.reference), "already": 0, "quarantined": 0, "filtered": 0}
    assert not differences(store, drivers.reference)


@pytest.mark.soak
def test_a_disk_that_fills_up(drivers: Drivers, tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        store = str(tmp_path / "store")
        finish(drivers.start(store, raw=drivers.raw / "toy_demo.hdf5"))
        room = shutil.disk_usage(tmp_path).used // 1024 + 300  # for a part of the rest
        subprocess.run(["mount", "-o", f"remount,size={room}k", tmp_path], check=True)
        with reader(store):
            driver = drivers.start(store)
            last = driver.communicate(timeout=240)[1].splitlines()[-1]
            assert driver.returncode in (1, 2), last  # a write fails first, or three commits in a row do
            assert last.startswith(("failed: ", "error: stopped: ")) and "o space left" in last
        snapshot = LatentStore.open(store).snapshot()
        assert 6 <= episodes(store) < episodes(drivers.reference) and not list(snapshot.verify())
        subprocess.run(["mount", "-o", "remount,size=64m", tmp_path], check=True)
        report, _ = finish(drivers.start(store))
        assert report["episodes"]["already"] == snapshot.episodes(["id"]).num_rows
        assert not differences(store, drivers.reference)
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


@pytest.mark.soak
def test_a_server_and_a_network_that_fail(drivers: Drivers, s3: S3) -> None:
    with FaultyProxy(s3.port) as proxy:
        for fault in ("reset before", "reset after", "500", "503", "delay", "truncate"):
            proxy.inject(fault, rate=0.03, seconds=1)
        store, quiet = s3.uri("survival", proxy.endpoint), s3.uri("survival")
        with reader(quiet):
            for _ in range(5):
                driver = drivers.start(store)
                _, err = driver.communicate(timeout=240)
                assert "Traceback" not in err
                if driver.returncode == 0:
                    break
        assert not differences(quiet, drivers.reference)
        assert len(proxy.counts) == 6, proxy.counts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folder", "s3"])
def test_clocks_that_differ(name: str, tmp_path: Path, s3: S3) -> None:
    store = LatentStore.create(s3.uri("clocks") if name == "s3" else str(tmp_path / "store"))
    store.tag("paper", fill(store, ["now"]))
    late = random_episode(store, "late", 70, ("front",))
    faketime = importlib.util.find_spec("libfaketime")
    assert faketime and faketime.origin
    library = Path(faketime.origin).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
    faked = {"LD_PRELOAD": str(library), "DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}
    offsets = ("-20d", "+4s", "+20m") if name == "s3" else ("-20d", "-4s", "+4s", "+20m", "+20d")
    for offset in offsets:
        environment = os.environ | faked | {"FAKETIME": offset, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-c", WRITER, store.uri, offset]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        refused = "" if offset.endswith("s") else "this machine's clock"
        assert ended.returncode == 0 and refused in ended.stdout, ended.stderr
        assert LatentStore.open(store.uri).snapshot("paper").episodes().num_rows == 1
    commit(store, [late])  # written before the other commits
    written = [offset for offset in offsets if offset.endswith("s")]
    assert store.snapshot().episodes(["id"])["id"].to_pylist() == ["now", *written, "late"]
    assert not list(store.snapshot().verify())


WRITER = """
import datetime, sys
from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore
from helpers.rows import fill
try:
    store = LatentStore.open(sys.argv[1])
    store.collect_garbage(datetime.timedelta(0))
    fill(store, [sys.argv[2]])
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    fill(store, ["a", "b"], frames=130, cameras=("front", "wrist"))
    fill(store, ["c"])
    refused = {"key": "q", "id": "q", "uri": "/raw/q", "index": 0, "reason": "breaks", "reader": "1"}
    store.commit("refused", [], [], [], [refused])
    store.remove(["c"], [])
    good, chance = everything(store.uri), random.Random(0)
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    named: dict[str, set[str]] = {}
    for path in [*files, *chance.choices(files, k=8)]:
        kept = path.read_bytes()
        flipped, bit = bytearray(kept), chance.randrange(8 * len(kept))
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            lines = list(LatentStore.open(store.uri).snapshot().verify())
        except BaseException as error:  # including Icechunk's panics
            lines = [f"{type(error).__name__}: {error}"]
        try:
            assert lines or everything(store.uri) == good, f"bit {bit} of {path} is not found"
        finally:
            path.write_bytes(kept)
        named.setdefault(path.relative_to(tmp_path / "store").parts[0], set()).update(lines)
    assert everything(store.uri) == good
    latents = [line for line in named["chunks"] if line.startswith("episode")]
    place = r"episode [ab] \(/raw/[ab] #0\): (front|wrist), rows \d+ to \d+ of data/\w+/latents_4x8x8 \(chunk 0\)"
    assert any(re.fullmatch(place, line) for line in latents)
    assert any(re.match("table catalogue/", line) for line in named["chunks"])


def everything(uri: str) -> list[Any]:
    """Return everything that a reader can get from the newest snapshot."""
    snapshot = LatentStore.open(uri).snapshot()
    rows = snapshot.episodes().to_pylist()
    found: list[Any] = [snapshot.id, rows, snapshot.removed(), snapshot.quarantine(), snapshot.keys()]
    for row in rows:
        cameras = {camera["name"]: camera["segments"] for camera in row["cameras"]}
        for name, places in {**cameras, "steps": [row["steps"]]}.items():
            found += [snapshot.read(places).tobytes(), str(snapshot.statistics([row["key"]], name))]
    return found
