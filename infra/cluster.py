"""Ray: one started here when no address is given, or the cluster at an address. And progress from its workers."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read by Ray when it is imported or starts processes, so they are set before.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a local start would otherwise leave a token that breaks later ones
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_DEDUP_LOGS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Between two tasks Ray would end a worker after a second, and the next costs seconds of a core to start.
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
# Those that it starts ahead have no runtime environment: no task of ours runs in them, and each takes 1 % of a core.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# Workers matter as much as what else runs on this machine: Ray's 15 leaves them a thirtieth of a core that is busy.
os.environ.setdefault("RAY_worker_niceness", "0")

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@contextlib.contextmanager
def cluster(address: str | None = None, verbose: bool = False) -> Iterator[None]:
    """A connection to Ray for as long as the block runs; nested use keeps the outer one.

    Without ``address`` and RAY_ADDRESS a cluster of this machine's cores is started and ended with the block.
    Raises ConnectionError where nobody answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        for name in ("ray", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it logs as an error, it raises too
    # "local", not None: after a crash a stale file would send us to a cluster that is gone.
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _knock(address)
    with _silent_start(verbose):
        ray.init(
            address=address,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "RAY_TRAIN_V2_ENABLED": "1"}},
        )
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Ray itself goes on trying for minutes before it says that nobody is there."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):  # local, auto
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({error}); check --address and RAY_ADDRESS"
        ) from None


@contextlib.contextmanager
def _silent_start(verbose: bool) -> Iterator[None]:
    """Ray's C++ core announces on file descriptor 2 that it was told to be quiet; failures come as exceptions."""
    if verbose:
        yield
        return
    kept = os.dup(2)
    with Path(os.devnull).open("w") as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """For an actor that no other node's end is to take away."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@ray.remote(num_cpus=0)
class Meter:
    """Sums and latest values that workers send and the driver's progress line reads; and what either is to be told."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._said: list[str] = []

    def add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self._values[name] = self._values.get(name, 0.0) + amount

    def put(self, **values: float) -> None:
        self._values.update(values)

    def read(self) -> dict[str, float]:
        return self._values

    def say(self, line: str) -> None:
        self._said.append(line)
        self._values["said"] = len(self._said)

    def said(self, since: int) -> list[str]:
        """The lines after the first ``since``."""
        return self._said[since:]


@contextlib.contextmanager
def watch(meter: Any, show: Callable[[dict[str, float]], None], every: float = 0.5) -> Iterator[None]:
    """Call ``show`` with the meter's values every so many seconds while the block blocks."""
    done = threading.Event()

    def loop() -> None:
        while not done.wait(every):
            with contextlib.suppress(Exception):  # a progress line is never worth a failed run
                show(ray.get(meter.read.remote(), timeout=10))

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(Exception):
            show(ray.get(meter.read.remote(), timeout=10))
