"""What a terminal, a file and a lost reader see of progress."""

from __future__ import annotations

import io

import pytest
from tqdm import tqdm

from pipelines import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(stream: io.StringIO) -> str:
    with tqdm(total=4, desc="ingest", file=console.Stderr(stream), mininterval=0) as bar:
        for number in range(4):
            bar.set_postfix_str(f"{number} frames")
            bar.update()
            if number == 1:
                bar.write("a worker was lost", file=bar.fp)
    return stream.getvalue()


def test_a_file_gets_a_line_every_ten_seconds_and_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    lines = drawn(io.StringIO()).splitlines()
    assert lines.count("a worker was lost") == 1 and "\r" not in "".join(lines)
    assert 2 < len(lines) < 8 and lines[-1].startswith("ingest: 100%") and all(lines)


def test_a_short_bar_in_a_file_is_one_line() -> None:
    assert [line[:12] for line in drawn(io.StringIO()).splitlines()] == ["a worker was", "ingest: 100%"]


def test_a_terminal_sees_every_change() -> None:
    assert drawn(Terminal()).count("\r") > 8
