"""Where this machine keeps what it can make again: copies of snapshots, and what scans have found."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``UWM_CACHE``, or ~/.cache/uwm. It may not exist yet."""
    return Path(os.environ.get("UWM_CACHE", "~/.cache/uwm")).expanduser()
