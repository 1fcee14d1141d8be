"""Ray: a cluster that is already running; one that the command starts, and Ctrl-C; an address without a cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.formats import moving, numbered, write_video
from helpers.processes import LOOPBACK, listening

from infra import cluster
from preprocessing.store.store import LatentStore

UWM = Path(sys.executable).with_name("uwm")


# In a process of its own: this one may be connected to a cluster of its own, which asks for a token.
CLUSTER = """
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
print(cluster.address, cluster.head_node.get_logs_dir_path(), flush=True)
input()
cluster.shutdown()
"""


@pytest.fixture
def running() -> Iterator[tuple[str, Path]]:
    """The address and logs of a cluster of two nodes; Ray believes that one has a GPU."""
    command = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        address, logs = process.stdout.readline().split()
        yield address, Path(logs)
        process.stdin.write("\n")


@pytest.mark.slow
def test_an_ingest_runs_on_the_cluster_at_ray_address(running: tuple[str, Path], tmp_path: Path) -> None:
    address, logs = running
    clip = write_video(tmp_path / "clip.mp4", numbered(40))
    command = [UWM, "ingest", clip, "--store", tmp_path / "store", "--json"]
    drivers = set(logs.glob("python-core-driver-*"))
    environment = os.environ | {"RAY_ADDRESS": address}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["episodes"]["new"] == 1
    assert set(logs.glob("python-core-driver-*")) - drivers, "no driver connected to the cluster"


@pytest.mark.slow
@pytest.mark.parametrize("without_ray", [60, 0])
def test_an_ingest_listens_to_this_machine_alone_and_ctrl_c_leaves_nothing_half_written(
    tmp_path: Path, without_ray: int
) -> None:
    write_video(tmp_path / "video.mp4", moving(3000))
    store, log = tmp_path / "store", tmp_path / "log"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["UWM_PROGRESS_SECONDS"] = "0.1"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [UWM, "ingest", tmp_path, "--store", store, "--image-size", "64", "--set", f"local_seconds={without_ray}"],
            env=environment,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )
    deadline = time.monotonic() + 120
    while not re.search(r"[1-9]\d* images", text := log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, text
        time.sleep(0.2)
    sockets = listening(process.pid)
    assert (len(sockets) > 4) == (not without_ray) and {address for _, address in sockets} <= LOOPBACK, sockets
    os.killpg(process.pid, signal.SIGINT)  # to the whole foreground group, as a terminal does
    assert process.wait(60) == 130
    assert log.read_text().splitlines()[-1].startswith("interrupted")
    assert not LatentStore.open(str(store)).snapshot().episodes().num_rows


def test_a_local_cluster_is_for_this_machine_and_this_user_alone(ray_cluster: None) -> None:
    import ray

    @ray.remote
    def settings() -> tuple[str, str, int]:
        token = os.environ["RAY_AUTH_TOKEN_PATH"]
        return os.environ["RAY_AUTH_MODE"], token, Path(token).stat().st_mode & 0o777

    mode, token, rights = ray.get(settings.remote())
    assert (mode, rights) == ("token", 0o600) and "RAY_AUTH_TOKEN_PATH" not in os.environ
    sockets = listening(os.getpid())
    assert len(sockets) > 4 and {address for _, address in sockets} <= LOOPBACK, sockets
    address = ray.get_runtime_context().gcs_address
    ask = "import sys; from ray._raylet import GcsClient; G = GcsClient(address=sys.argv[1])\n"
    ask += "print(len(G.get_all_node_info(timeout=9)))"
    for given, answer in (({}, ""), ({"RAY_AUTH_TOKEN_PATH": token}, "1\n")):
        mode = {"RAY_AUTH_MODE": "token"} if given else {}
        command = [sys.executable, "-c", ask, address]
        ended = subprocess.run(command, env=os.environ | mode | given, capture_output=True, text=True, timeout=100)
        assert ended.stdout == answer and ("uthentication" in ended.stderr) == (not answer), ended.stderr


def test_what_is_no_ray_is_given_up_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for scheme in ("", "ray://"):
            address = f"{scheme}127.0.0.1:{silent.getsockname()[1]}"
            with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {address} \\(timed out\\)"):
                cluster.check_address(address)


# In a process of its own: this one may be connected to a cluster, whose token must not be forgotten.
PRIVATE_START = """
import os
from infra import cluster
with cluster._token_file() as token, cluster._private_start(token):
    print("RAY_AUTH_TOKEN" in os.environ, os.environ["RAY_AUTH_TOKEN_PATH"].startswith("/proc/"))
print(os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"], "RAY_AUTH_TOKEN_PATH" in os.environ)
"""


def test_the_users_way_into_a_cluster_is_kept() -> None:
    users = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    theirs = users | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "theirs"}
    started = subprocess.run([sys.executable, "-c", PRIVATE_START], env=theirs, capture_output=True, text=True)
    assert started.stdout.splitlines() == ["False True", "token theirs False"], started.stderr
    asks = "import os, infra; print(os.environ.get('RAY_AUTH_MODE'))"
    imported = subprocess.run([sys.executable, "-c", asks], env=users, capture_output=True, text=True)
    assert imported.stdout == "None\n", "a cluster's authentication would be switched off"


def test_an_address_without_a_cluster_is_reported_in_one_line(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4", numbered(8))
    command = [UWM, "ingest", clip, "--store", tmp_path / "store", "--address", "127.0.0.1:1"]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=120
    )  # in a subprocess: this process may already be connected
    assert ended.returncode == 2 and "127.0.0.1:1" in ended.stderr and "Traceback" not in ended.stderr
