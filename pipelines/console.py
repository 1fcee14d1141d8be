"""What a verb prints: results for people on stdout, progress and notes on stderr.

With ``--json`` stdout holds one JSON line, as its last line, and results for people go to stderr.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any, TextIO

import typer


class ResilientStream:
    """A stderr that survives the loss of its reader, such as a closed terminal or pipe; the text is lost.

    Otherwise the progress thread dies holding tqdm's lock.
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
    """Print progress or a note on stderr."""
    typer.echo(line, err=True)


class Printer:
    """Prints one verb's result: lines for people, or one JSON value with the lines on stderr."""

    def __init__(self, as_json: bool = False):
        self._as_json = as_json

    def show(self, line: str) -> None:
        """Print a line of the result for people."""
        typer.echo(line, err=self._as_json)

    def answer(self, value: Any) -> None:
        """Print the result as one JSON line, if that was asked for."""
        if self._as_json:
            typer.echo(json.dumps(value))
