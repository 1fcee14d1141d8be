"""Connect to Ray: to the cluster at an address, or to one started on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
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
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_reachable(address)
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


def _check_reachable(address: str) -> None:
    """Raise ConnectionError if nothing listens at the address. Ray itself would retry for minutes."""
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
