"""Read episodes with the readers, and mark tests that need the real data next to the checkout."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from helpers.formats import REAL

from preprocessing.episode import ActionBlock, Episode, EpisodeRef
from preprocessing.sources import find, load, scan

real = pytest.mark.skipif(not REAL.exists(), reason=f"no real data at {REAL}")


def refs_of(path: Path) -> list[EpisodeRef]:
    return [ref for format, found in find(path) for ref in scan(format, found)]


def episodes_of(path: Path) -> list[Episode]:
    return [load(pickle.loads(pickle.dumps(ref))) for ref in refs_of(path)]


def frames_of(episode: Episode, camera: str, size: int | None = None) -> np.ndarray:
    return np.concatenate(list(episode.cameras[camera].frames(size)))


def sizes(layout: tuple[ActionBlock, ...]) -> dict[str, int]:
    return {block.name: block.size for block in layout}


def said(episode: Episode) -> list[str]:
    """The texts of an episode's repairs."""
    return [repair.text for repair in episode.repairs]
