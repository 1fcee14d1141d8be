"""Connect to Ray: to the cluster at an address, or to one started on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@contextlib.contextmanager
def cluster(address: str | None = None, verbose: bool = False) -> Iterator[None]:
    """Connect to Ray inside the ``with`` block; nested blocks use the outer connection.

    Without ``address`` and RAY_ADDRESS, the block starts a cluster on this machine's cores and stops it at the end.
    Raises ConnectionError if no cluster answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        for name in ("ray", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are also raised
    # "local", not None: after a crash a stale file would point to a cluster that is gone.
    address = check_address(address) or "local"
    try:
        with _silent_start(verbose):
            ray.init(
                address=address,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.ERROR,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "RAY_TRAIN_V2_ENABLED": "1"}},
            )
    except RuntimeError as error:
        if mismatch := _version_mismatch(str(error)):
            raise ConnectionError(f"{address}: {mismatch}") from None
        raise
    try:
        yield
    finally:
        ray.shutdown()


def actor(kind: type, **options: Any) -> Any:
    """Start an actor of this class on the driver's node, where it survives the loss of other nodes."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(kind).options(num_cpus=0, scheduling_strategy=here, **options).remote()


@contextlib.contextmanager
def data_context() -> Iterator[Any]:
    """Provide a copy of the Ray Data settings, without progress bars, for datasets created inside the block."""
    from ray.data import DataContext  # imported lazily: slow

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with DataContext.current(context):
        yield context


def check_address(address: str | None) -> str | None:
    """Return the address, or RAY_ADDRESS if it is None; None if there is neither.

    Raises ConnectionError if it is no address, or if nothing listens there: Ray itself would retry for minutes.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address in (None, "local", "auto"):
        return address
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (host and colon and port.isdigit()) or "/" in host:
        raise ConnectionError(f"{address}: not the address of a Ray cluster; give HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({error}); check --address and RAY_ADDRESS"
        ) from None
    return address


def _version_mismatch(message: str) -> str | None:
    """Return Ray's complaint about differing versions as one line; None if it complains about something else."""
    ray_versions, pythons = (re.findall(rf"{what}(?: version)?:? v?(\d[\w.]*)", message) for what in ("Ray", "Python"))
    if "ersion mismatch" not in message or not (len(ray_versions) == 2 or len(pythons) == 2):
        return None
    found = [(what, *pair) for what, pair in (("Ray", ray_versions), ("Python", pythons)) if len(pair) == 2]
    cluster, here = (" and ".join(f"{what} {pair[i]}" for what, *pair in found) for i in (0, 1))
    return f"the cluster runs {cluster}, this machine {here}; install the same versions on both"


@contextlib.contextmanager
def _silent_start(verbose: bool) -> Iterator[None]:
    """Discard file descriptor 2 while Ray's C++ core starts and logs there; failures are raised as exceptions."""
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
