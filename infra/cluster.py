"""Connect to Ray: to the cluster at an address, or to one started on this machine.

Whoever reaches a Ray process may run code as its user. So a cluster started here listens on the loopback interface
only, and asks for a token that other users of the machine cannot read. A cluster at an address keeps its own rules:
RAY_AUTH_MODE, RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH are the user's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LOOPBACK = "127.0.0.1"
ANSWER_SECONDS = 10.0


@contextlib.contextmanager
def cluster(address: str | None = None, verbose: bool = False) -> Iterator[None]:
    """Connect to Ray inside the ``with`` block; nested blocks use the outer connection.

    Without ``address`` and RAY_ADDRESS, the block starts a cluster on this machine's cores, for this user and machine
    alone, and stops it at the end. Raises ConnectionError if no cluster answers at the address.
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
    with _token_file() if address == "local" else contextlib.nullcontext() as token:
        try:
            with _private_start(token) if token else contextlib.nullcontext(), _silent_start(verbose):
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
            _forget_token()


def is_loopback() -> bool:
    """Whether this process is connected to a cluster that only this machine reaches."""
    return ray.util.get_node_ip_address() == LOOPBACK


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

    Raises ConnectionError if it is no address, or if no Ray answers there within ANSWER_SECONDS: Ray itself would retry
    for minutes. What Ray listens with is gRPC, so HTTP/2, whose first frame from a server has type 4 (RFC 9113,
    sections 3.4 and 6.5).
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address in (None, "local", "auto"):
        return address
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (host and colon and port.isdigit()) or "/" in host:
        raise ConnectionError(f"{address}: not the address of a Ray cluster; give HOST:PORT, ray://HOST:PORT or auto")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "1":
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
                if connection.recv(4)[3:] != b"\x04":
                    raise OSError("what answers there is something else")
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


def _token_file() -> BinaryIO:
    """Return an open file in memory with a new token. It is gone once this process closes it, however it ends."""
    file = os.fdopen(os.memfd_create("ray-token"), "wb", buffering=0)
    os.fchmod(file.fileno(), 0o600)
    file.write(secrets.token_hex(32).encode())
    return file


@contextlib.contextmanager
def _private_start(token: BinaryIO) -> Iterator[None]:
    """Let a cluster that starts inside the block listen on the loopback interface only, and demand this token."""
    # Its processes inherit these, and read the token when they start.
    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"/proc/{os.getpid()}/fd/{token.fileno()}"}
    users = {name: os.environ.pop(name) for name in (*ours, "RAY_AUTH_TOKEN") if name in os.environ}
    os.environ |= ours
    _forget_token()
    # Ray would replace any other way to say 127.0.0.1 with the machine's address in its network.
    may_be_remote, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = may_be_remote
        for name in ours:
            del os.environ[name]
        os.environ |= users


def _forget_token() -> None:
    """Let Ray read RAY_AUTH_MODE and the token anew: the next cluster may have another token, or none."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


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
