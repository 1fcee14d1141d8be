"""``checkpoint.json``, the manifest of a checkpoint: what its files were when they were written.

    {"step": 1000, "files": {NAME: bytes}, "sha256": {NAME: hexadecimal}, ..., "digest": SHA-256 of all the rest}

Weights and training state are numbers: a flipped bit in them would be trained on without a word. So whoever loads a
checkpoint compares. Earlier versions wrote no manifest beside final weights, and no checksums into any.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from preprocessing.errors import UserError

MANIFEST = "checkpoint.json"
DIGEST = "digest"  # of everything else in the file

Sums = dict[str, tuple[int, str]]  # (bytes, SHA-256) by file name


def measure(paths: Iterable[Path]) -> Sums:
    """Return the sums of these files."""
    return {path.name: (path.stat().st_size, digest_of(path.open("rb"))) for path in paths}


def digest_of(file: Any) -> str:
    """Read a binary file to its end, close it and return its SHA-256."""
    with file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dump(sums: Sums, about: Mapping[str, Any]) -> bytes:
    """Return a manifest's bytes. ``about`` is what else it says, as JSON values."""
    files = {name: size for name, (size, _) in sums.items()}
    return seal({**about, "files": files, "sha256": {name: digest for name, (_, digest) in sums.items()}})


def parse(content: bytes) -> dict[str, Any]:
    """Return what a manifest says. Raises ValueError if it is not as it was written."""
    values = unseal(content)
    if not isinstance(values.get("files"), dict):
        raise ValueError("no manifest")
    return values


def seal(values: Mapping[str, Any]) -> bytes:
    """Return JSON values as bytes that hold their own digest."""
    return json.dumps({**values, DIGEST: _digest(values)}, indent=1).encode()


def unseal(content: bytes) -> dict[str, Any]:
    """Return the values. Raises ValueError if they are not as they were written.

    What an earlier version wrote, without a digest, is returned as it is.
    """
    values = json.loads(content)
    if not isinstance(values, dict):
        raise ValueError("no JSON object")
    if (digest := values.pop(DIGEST, None)) != _digest(values) and (digest or "sha256" in values):
        raise ValueError("its digest differs")
    return values


def difference(
    manifest: Mapping[str, Any], sizes: Mapping[str, int], read: Callable[[str], BinaryIO] | None
) -> str | None:
    """Say how files differ from what was written, None if they do not. ``sizes`` are those there now, by name.

    Without ``read``, which opens a file, only sizes are compared.
    """
    for name, size in manifest["files"].items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]} bytes, not {size}"
        written = manifest.get("sha256", {}).get(name)
        # Read twice, because what arrives damaged need not lie there damaged.
        if read and written and all(digest_of(read(name)) != written for _ in range(2)):
            return f"{name} is not as it was written"
    return None


def verify(folder: Path, sealed: bool) -> None:
    """Raise UserError unless the checkpoint's files are as they were written.

    ``sealed``: its settings say that it has a manifest. Without one there is only a note that it cannot be checked.
    """
    try:
        manifest = parse((folder / MANIFEST).read_bytes())
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        problem = difference(manifest, sizes, lambda name: (folder / name).open("rb"))
        sealed |= "sha256" in manifest
    except FileNotFoundError:
        manifest, problem = {}, f"{MANIFEST} is missing" if sealed else None
    except ValueError:
        problem = f"{MANIFEST} is not as it was written"
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}"
    if problem:
        raise UserError(f"{folder}: this checkpoint is damaged ({problem}); use another, or a copy of it")
    if not sealed:
        from pipelines.console import say  # imported lazily: a policy acts without the command line

        say(f"{folder}: written by an earlier version, without checksums; whether it is damaged cannot be told")


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
