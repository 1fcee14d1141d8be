"""Options that several verbs share."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON line on stdout.")]
SnapshotId = Annotated[
    str | None, typer.Option(help="Snapshot id or tag to read; the newest if left out.", metavar="ID")
]


def verbose() -> bool:
    """Whether ``uwm -v`` was asked for: logging itself says so."""
    return logging.getLogger().isEnabledFor(logging.INFO)
