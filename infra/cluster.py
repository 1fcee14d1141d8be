"""Ray: one started here when no address is given, or the cluster at an address. And progress from its workers."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

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
