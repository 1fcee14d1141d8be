"""What a verb answers: lines for people on stderr, and with ``--json`` one JSON value as the last line of stdout."""

from __future__ import annotations

import contextlib
import json
from typing import Any, TextIO

import typer


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
    """Print progress or a note, on stderr."""
    typer.echo(line, err=True)


def show(line: str) -> None:
    """Print a result for people, on stdout."""
    typer.echo(line)


def answer(value: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(value))
