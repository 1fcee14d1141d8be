"""Wait for other processes, and find Ray's."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def wait_for(condition: Callable[[], Any], driver: subprocess.Popen[str], seconds: float = 300) -> Any:
    """Return what ``condition`` first returns that is true. ``seconds`` are many, as a busy machine starts slowly."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert driver.poll() is None, f"the process ended with {driver.returncode}"
        assert time.monotonic() < deadline, f"still waiting after {seconds} s"
        time.sleep(0.02)
    return found


def workers(title: str, of: int | None = None) -> list[int]:
    """Return the process ids of Ray's workers now running this task, if ``of`` is given only that raylet's workers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if (process / "cmdline").read_bytes().startswith(f"ray::{title}".encode()) and of in (None, parent):
                found.append(int(process.name))
    return found


def listening(pid: int) -> set[tuple[str, str]]:
    """Return (command, address) of each TCP socket on which the process or one of its descendants listens."""
    found = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                for socket in process.net_connections("tcp"):
                    if socket.status == psutil.CONN_LISTEN:
                        found.add((" ".join(process.cmdline())[:80], socket.laddr.ip))
    return found
