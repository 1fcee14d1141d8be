"""``uwm ingest --dry-run``: what an ingest would do, found by reading all that is new and encoding none of it.

Reading is a small part of an ingest: it is the encoders that take the time. How much they would take is measured on a
few frames, where they would run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from tqdm import tqdm

from infra.cluster import data_context
from pipelines.ingest.episode_reader import EpisodeRecord, Gate, Plan, Reading, Refusal, Work, refusal
from pipelines.ingest.job import Encode, actors, encoder_resources
from preprocessing.episode import FRAMES_PER_CHUNK, EpisodeRef
from preprocessing.store.snapshot import Snapshot

STARTING = 20  # seconds, until encoders encode
MEASURED = 2.0  # seconds


@dataclass(frozen=True)
class Candidate:
    """One new episode: its catalogue row without its places, or why it would be refused."""

    work: Work
    images: int  # frames of all cameras
    columns: int  # of its steps
    row: EpisodeRecord | None
    refusal: Refusal | None


@dataclass(frozen=True)
class Expected:
    """What encoding would take; ``pictures`` counts each camera's frames, once for each encoder."""

    pictures: int
    seconds: float
    bytes: int


def read_all(work: list[Work], plan: Plan, head: Snapshot) -> list[Candidate]:
    """Every episode, in the order of ``work``. A cluster is to be there."""
    items = [{"place": i, "work": json.dumps(asdict(one))} for i, one in enumerate(work)]
    found: dict[int, dict[str, Any]] = {}
    with data_context(), tqdm(total=len(work), desc="read", unit="ep", mininterval=0.5) as bar:
        read = ray.data.from_items(items, override_num_blocks=min(len(items), 512)).map_batches(
            _look,  # type: ignore[arg-type]
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={"plan": plan},
            num_cpus=1,
        )
        for row in read.iter_rows():
            found[row["place"]] = json.loads(row["found"])
            bar.update()
    seen, gate = [], Gate(plan, head)
    for place, one in enumerate(work):
        row, images, columns, why = (found[place][key] for key in ("row", "images", "columns", "refusal"))
        reason = Refusal(*why) if why else None
        if row:
            reason = gate.admit(one.source, row)
        seen.append(Candidate(one, images, columns, row, reason))
    return seen


def expected(seen: list[Candidate], plan: Plan) -> Expected:
    """Of those that would go in. Encoders are loaded and measured where an ingest would run them."""
    going = [one for one in seen if one.refusal is None]
    images = sum(one.images * len(one.work.keys) for one in going)
    rates: dict[str, tuple[float, int]] = {}
    if going:
        rates = ray.get(ray.remote(_rates).options(**encoder_resources()).remote(plan))
    seconds, size = float(STARTING if going else 0), 0
    for one in going:
        assert one.row is not None
        for name in one.work.keys:
            rate, latent = rates[name]
            seconds += one.images / rate / actors()
            size += one.images * latent + one.row["frames"] * one.columns * 4
    return Expected(images, round(seconds, 1), size)


def _look(batch: pa.Table, plan: Plan) -> Iterator[pa.Table]:
    [item] = batch.to_pylist()
    values = json.loads(item["work"])
    ref = EpisodeRef(**values["ref"])
    found: dict[str, Any] = {"row": None, "images": 0, "columns": 0, "refusal": None}
    try:
        reading = Reading(ref, values["source"], values["fps"], plan)
        for _, _, frames in reading.frames():
            found["images"] += len(frames)
        row, steps = reading.record()
        found |= {"row": row, "columns": steps.shape[1]}
    except Exception as error:  # as in the ingest itself
        found["refusal"] = refusal(error, ref)
    yield pa.table({"place": [item["place"]], "found": [json.dumps(found)]})


def _rates(plan: Plan) -> dict[str, tuple[float, int]]:
    """Frames a second and bytes of a frame's latents, by encoder, in one actor's place."""
    encode = Encode(plan, None)
    size = plan.recipe.image_size
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES_PER_CHUNK, size, size, 3), np.uint8)
    rates = {}
    for name, encoder in encode.encoders.items():
        latents = encoder.encode(frames)  # the first time takes longer
        done, began = 0, time.monotonic()
        while (passed := time.monotonic() - began) < MEASURED:
            encoder.encode(frames)
            done += len(frames)
        rates[name] = done / passed, latents[0].nbytes
    return rates
