"""JSON and JSON lines from outside: in any Unicode encoding, as much of them as is whole, in bounded memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from preprocessing.errors import BadEpisode
from preprocessing.sources.untrusted.files import contents

MAX_BYTES = 2**28  # of one file; the episodes of the largest data sets fill 10**8


def text_of(data: bytes, errors: str = "replace") -> str:
    """Decode UTF-8, UTF-16 or UTF-32, with or without a byte order mark; what is none of these becomes U+FFFD.

    With ``errors="strict"`` it raises ValueError instead.
    """
    return data.decode(json.detect_encoding(data), errors).removeprefix("\ufeff")


def json_of(data: bytes | str) -> Any:
    """Parse JSON; trailing NULs, as a crash leaves them, are dropped. Raises ValueError."""
    text = data if isinstance(data, str) else text_of(data)
    try:
        return _whole(json.loads(text.rstrip("\0"))) if _halves(text) else json.loads(text.rstrip("\0"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_table(file: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Parse a file that holds one JSON object. Raises OSError, or ValueError with a reason."""
    table = json_of(_bytes(file, limit))
    if not isinstance(table, dict):
        raise ValueError("not a JSON object")
    return table


def beside(file: Path) -> tuple[dict[str, Any], str | None]:
    """Parse a file of one JSON object that may be missing: the object, empty without one, and why it cannot be read."""
    try:
        return read_table(file), None
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError) as error:
        return {}, f"{file.name} cannot be read ({' '.join(str(error).split())[:200]}); not used"


def read_lines(file: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Parse JSON lines: the objects, and the numbers of the lines that are none. Raises OSError or ValueError."""
    rows, lost = list[dict[str, Any]](), list[int]()
    for number, line in enumerate(text_of(_bytes(file)).split("\n"), 1):  # not splitlines: U+2028 may be in a text
        if not line.strip(" \t\r\0"):
            continue
        try:
            row = json_of(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            lost.append(number)
    return rows, lost


def _bytes(file: Path, limit: int = MAX_BYTES) -> bytes:
    try:
        return contents(file, limit)
    except BadEpisode as error:
        raise ValueError(str(error)) from None


def _halves(text: str) -> bool:
    """Whether it may hold half a surrogate pair, which JSON can escape and UTF-8 cannot hold."""
    return re.search(r"\\u[dD][89a-fA-F]", text) is not None


def _whole(value: Any) -> Any:
    """The same value with halves of surrogate pairs replaced by U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_whole(name): _whole(inner) for name, inner in value.items()}
    return [_whole(inner) for inner in value] if isinstance(value, list) else value
