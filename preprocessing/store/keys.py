"""Keys of ingest work: what has the same key is ingested once."""

from __future__ import annotations

import hashlib

from preprocessing.contracts.contract import DataContract
from preprocessing.episode import Fit


def work_key(
    episode_id: str,
    contract: DataContract | None,
    encoder: str,
    image_size: int,
    fps: float | None,
    fit: Fit = "stretch",
) -> str:
    """Return the key of encoding this episode under this contract, with this encoder, image size, rate and fit."""
    meaning = contract.digest if contract else "as found"
    more = (f":{fps:g} fps" if fps else "") + (f":{fit}" if fit != "stretch" else "")
    return hashlib.sha256(f"{episode_id}:{meaning}:{encoder}:{image_size}{more}".encode()).hexdigest()[:32]
