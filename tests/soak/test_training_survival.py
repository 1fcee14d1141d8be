"""A training survives killed workers, drivers and nodes, preemption, a full disk and a broken checkpoint.

Each run is compared with an undisturbed one: losses and weights must be equal to the last bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
from helpers.processes import wait_for, workers
from helpers.rows import fill
from helpers.s3 import S3
from helpers.soak import KILLS, chances
from safetensors.torch import load_file

from infra import tracking
from preprocessing.store.storage import parse
from preprocessing.store.store import LatentStore

pytest_plugins = ["helpers.s3"]

STEPS, EVERY = 128, 8
TINY = [
    f"steps={STEPS}", f"checkpoint_every={EVERY}", "log_every=1", "batch_size=8", "validation_share=0.2",
    "warmup_steps=4", "model.width=32", "model.heads=2", "model.registers=1", "model.timestep_width=16",
    "model.depth=2", "model.frame_width=8", "model.condition_width=16",
]  # fmt: skip


class Trainings:
    """Starts pretraining on one store and one cluster with the command line, in separate processes."""

    def __init__(self, cluster: Any, root: Path):
        self.cluster, self.root, self.store = cluster, root, root / "store"
        self.node = cluster.add_node(num_cpus=1)
        self.started: list[subprocess.Popen[Any]] = []
        fill(LatentStore.create(str(self.store)), [f"episode-{i}" for i in range(20)], cameras=("front", "wrist"))
        self.start("reference").finish()
        self.reference = Training(self, "reference", None, None)

    def start(self, name: str, *more: str, checkpoints: str | None = None) -> Training:
        for left in self.started:  # by a failed test; the next run would wait for its workers
            left.kill()
        more = (*more, "--checkpoints", checkpoints) if checkpoints else more
        command = [sys.executable, "-c", "from pipelines.cli import main; main()", "pretrain", "--store", self.store]
        process = subprocess.Popen(
            [*command, "--output", self.root / name, "--address", self.cluster.address, *TINY, *more],
            stdout=subprocess.DEVNULL,
            stderr=(self.root / f"{name}.err").open("w"),
            env=os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{self.root / name}.db"},
        )
        self.started.append(process)
        return Training(self, name, process, checkpoints)


class Training:
    def __init__(self, trainings: Trainings, name: str, process: Any, checkpoints: str | None):
        self.trainings, self.name, self.process = trainings, name, process
        self.folder = trainings.root / name
        self.place = checkpoints or str(self.folder)

    def finish(self, code: int = 0) -> str:
        """Wait for the process; return its stderr."""
        assert self.process.wait(timeout=400) == code, self.stderr()[-3000:]
        return self.stderr()

    def stderr(self) -> str:
        return self.folder.with_suffix(".err").read_text()

    def checkpoints(self) -> list[int]:
        """Return the steps of its checkpoints."""
        files, root = parse(self.place).filesystem()
        held = files.get_file_info(pyarrow.fs.FileSelector(root, recursive=True, allow_not_found=True))
        return sorted(int(info.path.split("/")[-2][5:]) for info in held if info.base_name == "checkpoint.json")

    def after(self, count: int) -> None:
        """Wait until ``count`` checkpoints were written; older ones may be deleted already."""
        try:
            wait_for(lambda: max(self.checkpoints(), default=0) >= count * EVERY, self.process)
        except AssertionError as error:
            raise AssertionError(f"{error}; its stderr: {self.stderr()[-3000:]}") from None

    def losses(self) -> dict[tuple[str, int], float]:
        tracking.connect(f"sqlite:///{self.folder}.db")
        [run] = tracking.MlflowClient().search_runs(["1"])
        found = {}
        for name in ("loss", "validation_loss"):
            points = tracking.history(run.info.run_id, name)
            assert len(points) == len(dict(points)), "a step was logged twice"
            found |= {(name, step): value for step, value in points}
        return found

    def assert_equals_reference(self) -> None:
        reference = self.trainings.reference
        assert self.losses() == reference.losses()
        [mine], [its] = (list(each.folder.glob("*/checkpoint")) for each in (self, reference))
        weights, expected = (load_file(folder / "model.safetensors") for folder in (mine, its))
        assert all(weights[name].equal(expected[name]) for name in weights.keys() | expected.keys())


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory, s3: S3) -> Iterator[Trainings]:  # sets the workers' credentials
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield Trainings(cluster, tmp_path_factory.mktemp("trainings"))
    cluster.shutdown()


@pytest.mark.soak
def test_a_node_that_dies_and_one_worker_that_resumes_from_s3(trainings: Trainings, s3: S3) -> None:
    # First in this file: for three minutes Ray does not give to others what a killed driver had asked for.
    training = trainings.start("node", "workers=[1, 2]", checkpoints=s3.uri("runs"))
    try:
        training.after(2)
        trainings.cluster.remove_node(trainings.node, allow_graceful=False)
        assert "a worker was lost" in training.finish()
    finally:
        trainings.node = trainings.cluster.add_node(num_cpus=1)
    reference = trainings.reference.losses()
    assert training.losses() == pytest.approx(reference, abs=1e-4)
    files, root = parse(training.place).filesystem()
    [run] = files.get_file_info(pyarrow.fs.FileSelector(root))
    with files.open_input_stream(f"{run.path}/step-{STEPS:08d}/checkpoint.json") as content:
        assert json.loads(content.read())["workers"] == 1


@pytest.mark.soak
def test_workers_and_drivers_that_die_or_are_asked_to_stop(trainings: Trainings) -> None:
    first = trainings.start("killed")
    first.after(1)
    os.kill(workers("RayTrainWorker")[0], signal.SIGKILL)
    first.after(3)
    first.process.kill()
    first.process.wait()
    assert "a worker was lost" in first.stderr()
    [cut] = first.folder.glob(f"*/step-{first.checkpoints()[-1]:08d}/state-0.safetensors")
    cut.write_bytes(cut.read_bytes()[:-1])  # as after a power failure without fsync

    second = trainings.start("killed")
    second.after(4)
    os.kill(wait_for(lambda: workers("RayTrainWorker"), second.process)[1], signal.SIGTERM)
    wait_for(lambda: "a machine was preempted; resuming from step" in second.stderr(), second.process)
    second.after(6)
    second.process.send_signal(signal.SIGINT)
    err = second.finish(130)
    assert "resuming interrupted run" in err
    stopped = re.search(r"interrupted; stopped at step (\d+)", err)
    assert stopped and int(stopped[1]) >= 6 * EVERY

    third = trainings.start("killed")
    third.finish()
    third.assert_equals_reference()
    assert len(list(third.folder.glob("*/run.json"))) == 1


@pytest.mark.soak
def test_drivers_and_workers_killed_again_and_again(trainings: Trainings) -> None:
    chance, killed = chances("training"), 0
    training = trainings.start("often")
    while killed < KILLS:
        before = max(training.checkpoints(), default=0)
        wait_for(lambda training=training: workers("RayTrainWorker"), training.process)
        if before + EVERY >= STEPS:
            break
        time.sleep(chance.uniform(0, 6))
        if training.process.poll() is not None:
            break
        if chance.random() < 0.5 and (there := workers("RayTrainWorker")):
            os.kill(chance.choice(there), signal.SIGKILL)
            wait_for(lambda there=there: workers("RayTrainWorker") != there, training.process)
        else:
            training.process.kill()
            training.process.wait()
            training = trainings.start("often")
        killed += 1
    training.finish()
    training.assert_equals_reference()
    assert len(list(training.folder.glob("*/run.json"))) == 1


@pytest.mark.soak
def test_a_disk_that_is_full_for_a_while(trainings: Trainings, tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        training = trainings.start("full", checkpoints=str(tmp_path))
        wait_for(lambda: list(tmp_path.glob("*/run.json")), training.process)
        with contextlib.suppress(OSError), (tmp_path / "full").open("wb", buffering=0) as full:
            while full.write(bytes(2**20)):
                pass
        wait_for(lambda: "no checkpoint of step 8: " in training.stderr(), training.process)
        (tmp_path / "full").unlink()
        assert "o space left" in training.finish()
        training.assert_equals_reference()
        assert training.checkpoints()[-1] == STEPS
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)
