"""What a verb answers: lines for people on stderr, and with ``--json`` one JSON value as the last line of stdout."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON line on stdout.")]
Snapshot = Annotated[str | None, typer.Option(help="Snapshot id or tag to read; the newest if left out.", metavar="ID")]


class Refused(Exception):
    """A promotion gate's answer was no; exit code 4."""


class Stopped(Exception):
    """A training was ended by Ctrl-C or SIGTERM, after a checkpoint; exit code 130."""


def say(line: str) -> None:
    typer.echo(line, err=True)


def answer(value: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(value))
