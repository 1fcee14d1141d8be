"""Options that several verbs share."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON on stdout.")]
SnapshotId = Annotated[str | None, typer.Option(help="Snapshot id or tag (default: newest).", metavar="ID")]


def verbose() -> bool:
    """Whether ``uwm -v`` was given, as the level of the root logger records it."""
    return logging.getLogger().isEnabledFor(logging.INFO)
