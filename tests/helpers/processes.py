"""Wait for other processes, and find Ray's."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wait_for(condition: Callable[[], Any], driver: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + 120
    while not (found := condition()):
        assert driver.poll() is None and time.monotonic() < deadline
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
