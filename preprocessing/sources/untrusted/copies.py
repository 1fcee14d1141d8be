"""Files that repeat another one in a smaller size: proxies of films, previews of recordings. They go by their names.

GoPro writes ``GL010042.LRV`` beside ``GX010042.MP4`` (older models ``GOPR0042.LRV``), DJI ``DJI_0042.LRF``, both with
``.THM`` thumbnails; Sony ``SUB/C0042S03.MP4`` beside ``CLIP/C0042.MP4``; editors ``C0042_Proxy.mov`` or a folder
``Proxy``. Tools leave ``demo_preview.mp4`` or ``preview.mp4`` beside ``demo.hdf5``. A film that is only named like a
recording is not a copy: it may show something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

SMALL = {".lrv", ".lrf", ".thm"}
MOVING = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mxf", ".mts", ".m2ts", ".insv", ".360"}
STILL = {".gif", ".apng", ".webp"}
LOGS = (".zarr.zip", ".zarr", ".hdf5", ".h5", ".mcap", ".bag", ".db3")
PROXIES = {"proxy", "proxies", "proxy media", "sub"}  # folders
TAG = re.compile(r"(.+?)[-_. ]?(?:proxy|s03)")
SHOWN = re.compile(r"(?:(.+?)[-_. ])?(?:preview|playback|thumb|thumbnail)")


def copies(folder: Path, files: Iterable[Path], folders: Iterable[Path]) -> dict[Path, str]:
    """The files of a folder that repeat another one, and that one's name."""
    names = [*files]
    films = {stem: name for name, stem, kind in _parts(names) if kind in MOVING}
    logs = {
        name.lower().removesuffix(kind): name
        for name in (path.name for path in (*names, *folders))
        if (kind := next((kind for kind in LOGS if name.lower().endswith(kind)), None))
    }
    above = _films_above(folder) if folder.name.lower() in PROXIES else {}
    found = {}
    for file, (name, stem, kind) in zip(names, _parts(names), strict=True):
        tagged, shown = TAG.fullmatch(stem), SHOWN.fullmatch(stem)
        plain = tagged[1] if tagged else stem
        whole = None
        if kind in SMALL:
            whole = films.get(stem) or next((films[own] for own in _gopro(stem) if own in films), None)
        elif kind in MOVING or kind in STILL:
            if shown:
                whole = logs.get(shown[1]) or films.get(shown[1]) if shown[1] else next(iter(logs.values()), None)
            whole = whole or (films.get(plain) if tagged or kind in STILL else None)
        whole = whole or (above.get(stem) or above.get(plain) if kind in MOVING | SMALL else None)
        if whole and whole != name:
            found[file] = whole
    return found


def _parts(files: Iterable[Path]) -> Iterator[tuple[str, str, str]]:
    """Each file's name, and its stem and suffix in small letters."""
    return ((file.name, file.stem.lower(), file.suffix.lower()) for file in files)


def _gopro(stem: str) -> list[str]:
    """The film's names of a low-resolution file ``gl010042``."""
    return [f"{first}{stem[2:]}" for first in ("gx", "gh")] if stem.startswith("gl") else []


def _films_above(folder: Path) -> dict[str, str]:
    """The films that a folder of proxies belongs to, by stem."""
    found = dict[str, str]()
    for place in (folder.parent, folder.parent / "CLIP"):
        with suppress(OSError):
            found |= {stem: name for name, stem, kind in _parts(place.iterdir()) if kind in MOVING}
    return found
