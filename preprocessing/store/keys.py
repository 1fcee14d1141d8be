"""Keys of ingest work: what has the same key is ingested once."""

from __future__ import annotations

import hashlib

from preprocessing.contracts.contract import DataContract


def work_key(episode_id: str, contract: DataContract | None, encoder: str, image_size: int, fps: float | None) -> str:
    """Return the key of encoding this episode under this contract, with this encoder, image size and rate."""
    meaning = contract.digest if contract else "as found"
    rate = f":{fps:g} fps" if fps else ""
    return hashlib.sha256(f"{episode_id}:{meaning}:{encoder}:{image_size}{rate}".encode()).hexdigest()[:32]
