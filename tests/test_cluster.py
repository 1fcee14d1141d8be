"""The same verb on a Ray cluster that is already there, by option and by environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Uwm
from formats import numbered, write_video

import infra.cluster  # noqa: F401  its settings come before Ray's import

UWM = Path(sys.executable).with_name("uwm")


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    """A cluster of two nodes, as another process would have started it."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["option", "environment"])
def test_an_ingest_runs_where_the_address_says(how: str, running: Any, tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4", numbered(40))
    command = [UWM, "ingest", clip, "--store", tmp_path / "store", "--json"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    if how == "option":
        command += ["--address", running.address]
    else:
        environment["RAY_ADDRESS"] = running.address
    logs = Path(running.head_node.get_logs_dir_path())
    drivers = set(logs.glob("python-core-driver-*"))
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["episodes"]["new"] == 1
    assert set(logs.glob("python-core-driver-*")) - drivers, "no driver came to the cluster"


def test_an_address_where_nobody_answers_is_told_in_one_line(tmp_path: Path, uwm: Uwm) -> None:
    import ray

    if ray.is_initialized():
        pytest.skip("this process has a cluster already")
    clip = write_video(tmp_path / "clip.mp4", numbered(8))
    code, _, err = uwm("ingest", clip, "--store", tmp_path / "store", "--address", "127.0.0.1:1")
    assert code == 2 and "127.0.0.1:1" in err and "Traceback" not in err
