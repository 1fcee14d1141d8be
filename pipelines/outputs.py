"""Whether a verb can write its results, asked before it works for hours."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

from preprocessing.errors import UserError


def check_writable(folder: Path, option: str) -> None:
    """Raise UserError unless files can be written in ``folder``, which need not exist yet. Leaves nothing behind."""
    try:
        place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"{option} {folder}: {error.strerror}; give a folder that you can write to") from None
