"""Folders of frozen weights, local or from the Hugging Face hub, and the digests that version them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from preprocessing.errors import UserError


def model_folder(what: str, name: str, hub: dict[str, str], patterns: Sequence[str], known: Iterable[str]) -> Path:
    """Return the local folder ``name``, or else the hub's: ``hub`` maps short names to hub ids.

    ``patterns`` selects the files to download into the hub's cache. Raises UserError, which starts with ``what`` and
    lists the ``known`` names, if there is no such model.
    """
    if Path(name).is_dir():
        return Path(name)
    if "/" not in hub.get(name, name):
        raise UserError(f"{what} {name}: no such folder, and not one of {', '.join(known)} or a hub id")
    from huggingface_hub import snapshot_download  # imported lazily: slow

    try:
        return Path(snapshot_download(hub.get(name, name), allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises a dozen kinds, and httpx's own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{what} {name}: no such folder, and the download from the hub failed ({reason}); give a folder"
        ) from None


def require_files(what: str, name: str, folder: Path, files: Iterable[str], expected: str) -> None:
    """Raise UserError if the folder lacks one of the files."""
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise UserError(f"{what} {name}: {folder} lacks {missing[0]}; expected a {expected} folder")


def read_config(what: str, folder: Path) -> dict[str, Any]:
    """Return the folder's config.json. Raises UserError if it is not readable."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{what} {folder}: config.json is not readable JSON") from None


def digest(settings: Any, files: Iterable[Path]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the settings (as JSON) and the files' contents, in order."""
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]
