"""What a verb prints: results for people on stdout, progress and notes on stderr.

With ``--json`` stdout holds one JSON line, as its last line, and results for people go to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any, TextIO

import typer


class Stderr:
    """The stream that progress is written to, made fit for what is at its other end.

    Where that is no terminal but a file or a pipe, a progress bar becomes a line every ten seconds, and one at its end.
    If the reader is gone (a closed terminal or pipe) the text is lost; otherwise tqdm's thread would die with its lock.
    """

    def __init__(self, stream: TextIO | None):
        """Raises ValueError if UWM_PROGRESS_SECONDS, in place of the ten seconds, is no number."""
        self._stream = stream or _nowhere()
        self._every = 0.0 if self._stream.isatty() else float(os.environ.get("UWM_PROGRESS_SECONDS", "10"))
        self._told, self._bar = time.monotonic(), ""

    def write(self, text: str) -> int:
        if self._every and text.startswith("\r"):  # tqdm draws its bar, or clears it with spaces
            self._bar = text.strip()
            if self._bar and time.monotonic() - self._told > self._every:
                self._put(self._bar + "\n")
                self._told, self._bar = time.monotonic(), ""
        else:
            self._put(self._bar + text if text == "\n" else text)
            self._bar = ""
        return len(text)

    def _put(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _nowhere() -> TextIO:
    """Return a stream for a process whose stderr the shell closed (2>&-).

    It takes the number 2, which otherwise a file would get that Ray's processes then write their logs into.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.fstat(2)
    except OSError:
        os.dup2(nowhere, 2)
    if nowhere == 2:
        os.set_inheritable(2, True)
    return os.fdopen(nowhere, "w", closefd=False)


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
