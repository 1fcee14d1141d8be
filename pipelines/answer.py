"""What a verb answers: lines for people on stderr, and with ``--json`` one JSON value as the last line of stdout."""

from __future__ import annotations

import contextlib
import json
from typing import Annotated, Any, TextIO

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON line on stdout.")]
Snapshot = Annotated[str | None, typer.Option(help="Snapshot id or tag to read; the newest if left out.", metavar="ID")]


class Refused(Exception):
    """A promotion gate's answer was no; exit code 4."""


class Stopped(Exception):
    """A training was ended by Ctrl-C or SIGTERM, after a checkpoint; exit code 130."""


class Lasting:
    """A stderr that may lose its reader, as where a terminal is closed or a pipe ends: nothing but its text is lost.

    Else the thread that draws the progress would die of it with tqdm's lock in its hands.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def say(line: str) -> None:
    typer.echo(line, err=True)


def answer(value: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(value))
