"""``uwm ingest --dry-run``: predict an ingest by reading everything new and encoding nothing.

Reading is a small part of an ingest; the encoders take most of the time. Their speed is measured on a few frames, where
they would run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pipelines.ingest.apart import apart
from pipelines.ingest.episode_reader import EpisodeRecord, Gate, Plan, Reading, Refusal, Work, refusal
from pipelines.ingest.local import too_long
from pipelines.ingest.stages import Encode, item, work_of
from preprocessing.episode import FRAMES_PER_CHUNK
from preprocessing.store.snapshot import Snapshot

STARTING, STARTING_ON_RAY = 2, 20  # seconds until encoders have started
MEASURED = 2.0  # seconds of encoding to measure each encoder


@dataclass(frozen=True)
class Candidate:
    """One new episode: its catalogue row without storage locations, or why it would be refused."""

    work: Work
    frames: int  # of all cameras together
    encoders: list[str]  # that have to encode them
    columns: int  # of its steps
    row: EpisodeRecord | None
    refusal: Refusal | None


@dataclass(frozen=True)
class Expected:
    """Cost of the encoding. ``pictures`` counts the frames of all cameras, once per encoder."""

    pictures: int
    seconds: float
    bytes: int


def read_all(work: list[Work], plan: Plan, head: Snapshot, address: str | None, verbose: bool) -> list[Candidate]:
    """Read every episode, in the order of ``work``: in one process, or on Ray where an ingest would."""
    items = [item(one) | {"place": i} for i, one in enumerate(work)]
    found: dict[int, dict[str, Any]] = {}
    with tqdm(total=len(work), desc="read", unit="ep", mininterval=0.5) as bar:
        if plan.recipe.local_seconds and not address:
            began = time.monotonic()
            with apart(read_one, items, plan=plan) as tables:
                for table in tables:
                    _take(table, found, bar)
                    if too_long(time.monotonic() - began, len(found) / len(work), plan):
                        break
        if left := [one for one in items if one["place"] not in found]:
            from pipelines.ingest.job import read_on_ray

            for table in read_on_ray(partial(read_one, plan=plan), _died, left, address, verbose):
                _take(table, found, bar)
    seen, gate = [], Gate(plan, head)
    for place, one in enumerate(work):
        row, frames, columns, why = (found[place][key] for key in ("row", "frames", "columns", "refusal"))
        encoders = found[place]["encoders"]
        reason = Refusal(*why) if why else None
        if row:
            reason = gate.admit(one.source, row)
        seen.append(Candidate(one, frames, encoders, columns, row, reason))
    return seen


def expected(seen: list[Candidate], plan: Plan, address: str | None, verbose: bool) -> Expected:
    """Estimate the cost of the accepted episodes. Encoders are loaded and measured where an ingest would run them."""
    accepted = [one for one in seen if one.refusal is None]
    frames = sum(one.frames * len(one.encoders) for one in accepted)
    rates: dict[str, tuple[float, int]] = {}
    encoders = 1
    to_encode = any(one.encoders for one in accepted)
    if to_encode and address:
        from pipelines.ingest.job import on_an_encoder

        rates, encoders = on_an_encoder(measure, plan, address, verbose)
    elif to_encode:
        rates = measure(plan)
    seconds, size = 0.0, 0
    for one in accepted:
        assert one.row is not None
        size += one.row["frames"] * one.columns * 4 * len(one.work.keys)
        for name in one.encoders:
            rate, latent = rates[name]
            seconds += one.frames / rate / encoders
            size += one.frames * latent
    if accepted:
        seconds += STARTING_ON_RAY if address or seconds > plan.recipe.local_seconds else STARTING
    return Expected(frames, round(seconds, 1), size)


def _take(table: pa.Table, found: dict[int, dict[str, Any]], bar: tqdm[Any]) -> None:
    for row in table.to_pylist():
        found[row["place"]] = json.loads(row["found"])
        bar.update()


def read_one(each: dict[str, Any], plan: Plan) -> Iterator[pa.Table]:
    """Yield one row: the episode's place, and as JSON what a Candidate says of it."""
    one = work_of(each)
    found = _nothing()
    try:
        reading = Reading(one, plan)
        found["encoders"] = reading.encoders
        for _, _, frames in reading.frames():
            found["frames"] += len(frames)
        row, steps = reading.record()
        found |= {"row": row, "columns": steps.shape[1]}
    except Exception as error:  # as in the ingest itself
        found["refusal"] = refusal(error, one.ref)
    yield _answer(each, found)


def _died(each: dict[str, Any], error: Exception) -> pa.Table:
    """Return the row of an episode that killed the process that read it."""
    return _answer(each, _nothing() | {"refusal": refusal(error, work_of(each).ref)})


def _nothing() -> dict[str, Any]:
    return {"row": None, "frames": 0, "encoders": [], "columns": 0, "refusal": None}


def _answer(each: dict[str, Any], found: dict[str, Any]) -> pa.Table:
    return pa.table({"place": [each["place"]], "found": [json.dumps(found)]})


def measure(plan: Plan) -> dict[str, tuple[float, int]]:
    """Return each encoder's frames per second here, and bytes per frame of latents."""
    encode = Encode(plan, lambda **_: None, lambda *_: None)
    size = plan.recipe.image_size
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES_PER_CHUNK, size, size, 3), np.uint8)
    rates = {}
    for name, encoder in encode.encoders.items():
        latents = encode.latents(encoder, frames)  # warm-up: the first call takes longer
        done, began = 0, time.monotonic()
        while (passed := time.monotonic() - began) < MEASURED:
            encode.latents(encoder, frames)
            done += len(frames)
        rates[name] = done / passed, latents[0].nbytes
    return rates
