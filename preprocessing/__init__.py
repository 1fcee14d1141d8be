"""Raw bytes to latents, and stored latents to training windows. Does not import Ray.

The names in ``__all__`` are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preprocessing.contracts.contract import DataContract as DataContract
    from preprocessing.contracts.interface import Interface as Interface
    from preprocessing.encoders.vae import load_encoder as load_encoder
    from preprocessing.episode import Episode as Episode
    from preprocessing.errors import BadEpisode as BadEpisode
    from preprocessing.errors import UserError as UserError
    from preprocessing.store.snapshot import Snapshot as Snapshot
    from preprocessing.store.store import LatentStore as LatentStore

_HOMES = {
    "BadEpisode": "preprocessing.errors",
    "DataContract": "preprocessing.contracts.contract",
    "Episode": "preprocessing.episode",
    "Interface": "preprocessing.contracts.interface",
    "LatentStore": "preprocessing.store.store",
    "Snapshot": "preprocessing.store.snapshot",
    "UserError": "preprocessing.errors",
    "load_encoder": "preprocessing.encoders.vae",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
