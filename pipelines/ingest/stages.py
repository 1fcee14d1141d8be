"""The three stages of an ingest: decode an episode, encode its frames, write its rows.

``decode`` turns an episode into rows of at most 64 frames of one camera, then one row with its record. ``Encode``
replaces the frames of several rows, of any episodes and cameras, with the latents of each encoder. ``write`` puts rows
into a Zarr group of their own. :mod:`pipelines.ingest.local` and :mod:`pipelines.ingest.job` join them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.ingest.episode_reader import Plan, Reading, Refusal, Work
from pipelines.ingest.quality import Sampler
from preprocessing.encoders.vae import BATCH, PIXELS
from preprocessing.episode import EpisodeRef
from preprocessing.store.statistics import Statistics
from preprocessing.store.store import LatentStore, write_segments

ROWS_PER_PASS = 8  # rows, of up to 64 frames, per call of an encoder
ROWS_PER_WRITE = 256
THREADS = 8  # of an encoder without Ray; each holds the activations of a batch
ROW = pa.schema(
    [
        ("episode", pa.string()),
        ("camera", pa.string()),  # null in the row that carries the record
        ("embodiment", pa.string()),
        ("encoders", pa.list_(pa.string())),  # those that will encode these frames, or the one that has
        ("first", pa.int64()),
        ("shape", pa.list_(pa.int64())),
        ("data", pa.large_binary()),  # uint8 frames, then latents or pixels; float32 steps with the record
        ("record", pa.string()),  # JSON: a catalogue row without storage locations
        ("psnr", pa.list_(pa.float64())),  # of some encoded frames (quality.Reconstructed)
        ("sample", pa.binary()),
    ]
)


def item(work: Work) -> dict[str, Any]:
    """Return what ``decode`` needs of an episode, as columns of a table."""
    values = asdict(work)
    return {"ref": json.dumps(values.pop("ref")), "work": json.dumps(values)}


def ref(item: dict[str, Any]) -> EpisodeRef:
    return EpisodeRef(**json.loads(item["ref"]))


def work_of(item: dict[str, Any]) -> Work:
    return Work(ref(item), **json.loads(item["work"]))


def decode(item: dict[str, Any], plan: Plan) -> Iterator[pa.Table]:
    """Yield an episode as rows: its cameras' frames 64 at a time, then its record. May raise anything."""
    one = work_of(item)
    reading = Reading(one, plan)
    for camera, first, frames in reading.frames():
        if reading.encoders:
            yield row(one.ref.id, frames, camera, reading.episode.embodiment, reading.encoders, first)
    record, steps = reading.record()
    yield row(one.ref.id, steps, record=record)


def row(
    episode: str,
    data: np.ndarray,
    camera: str | None = None,
    embodiment: str | None = None,
    encoders: Sequence[str] = (),
    first: int = 0,
    record: Mapping[str, Any] | None = None,
) -> pa.Table:
    raw, text = np.ascontiguousarray(data).tobytes(), json.dumps(record) if record else None
    values: list[Any] = [episode, camera, embodiment, list(encoders), first, data.shape, raw, text, [], None]
    return pa.table([[value] for value in values], schema=ROW)


class Clock:
    """Counts how long a stage worked and waited, as seconds ``NAME_work`` and ``NAME_wait``."""

    def __init__(self, count: Callable[..., None], name: str):
        self._count, self._name, self._since = count, name, time.monotonic()

    def work(self) -> None:
        self._passed("wait")

    def wait(self) -> None:
        self._passed("work")

    def _passed(self, what: str) -> None:
        now = time.monotonic()
        self._count(**{f"{self._name}_{what}": now - self._since})
        self._since = now


class Encode:
    """Holds the frozen VAEs and replaces the frames of all rows of a table with latents, in one pass.

    ``count`` adds amounts by name to those that the progress line shows. An episode whose frames the encoders cannot
    take goes to ``refuse``.
    """

    def __init__(self, plan: Plan, count: Callable[..., None], refuse: Callable[[str, Refusal], None]):
        self._plan, self._count, self._refuse = plan, count, refuse
        self._sampler = Sampler()
        self._clock: Clock | None = None  # starts with the first rows: waiting before them is not waiting for decoders

    @cached_property
    def encoders(self) -> dict[str, Any]:
        """The encoders by name, loaded with the first frames: a new contract may need none."""
        import torch  # imported lazily: slow, and workers that decode or write do not need it

        from preprocessing.encoders.vae import load_encoder

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return {name: load_encoder(name, device, self._plan.recipe.precision) for name in self._plan.encoders}

    @cached_property
    def _pool(self) -> ThreadPoolExecutor | None:
        import torch

        # Threads that encode different frames wait for nobody. Those that share a layer wait for each other at its
        # end: 2.5 times slower as soon as another process has one of two cores. Ray's workers have one thread.
        threads = 1 if torch.cuda.is_available() else min(torch.get_num_threads(), THREADS)
        return ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) if threads > 1 else None

    def __call__(self, batch: pa.Table) -> pa.Table:
        if not batch.num_rows:  # without columns, too, if every episode was refused
            return ROW.empty_table()
        if self._clock is None:
            self._clock = Clock(self._count, "encode")
        self._clock.work()
        data = [value.as_buffer() for value in batch["data"]]
        rows = batch.drop_columns(["data"]).to_pylist()
        done = [row | {"data": bytes(data[i])} for i, row in enumerate(rows) if row["camera"] is None]
        self._count(episodes=len(done))
        for name in self._plan.encoders:
            mine = [i for i, row in enumerate(rows) if name in row["encoders"]]
            if not mine:
                continue
            encoder = self.encoders[name]
            frames = [np.frombuffer(data[i], np.uint8).reshape(rows[i]["shape"]) for i in mine]
            encoded = self._encoded(encoder, frames, [rows[i]["episode"] for i in mine])
            for i, source, chunk in zip(mine, frames, encoded, strict=True):
                if chunk is not None:
                    lost = self._sampler.measure(name, encoder, rows[i]["embodiment"], rows[i]["camera"], source, chunk)
                    made = {"encoders": [name], "shape": list(chunk.shape), "data": chunk.tobytes()}
                    done.append(rows[i] | made | lost)
            self._count(frames=sum(map(len, frames)))
        self._clock.wait()
        return pa.Table.from_pylist(done, schema=ROW)

    def _encoded(self, encoder: Any, frames: list[np.ndarray], episodes: list[str]) -> Sequence[np.ndarray | None]:
        """Return the latents of each array of frames; None, and a refusal, for an episode that breaks the encoder."""
        ends = np.cumsum([len(some) for some in frames])
        with suppress(Exception):
            return np.split(self.latents(encoder, np.concatenate(frames)), ends[:-1])
        self.latents(encoder, np.zeros_like(frames[0][:1]))  # raises if the encoder itself is what is broken
        found: list[np.ndarray | None] = []
        for some, episode in zip(frames, episodes, strict=True):
            try:
                found.append(self.latents(encoder, some))
            except Exception as error:
                found.append(None)
                self._refuse(episode, Refusal(f"its frames cannot be encoded: {type(error).__name__}: {error}", None))
        return found

    def latents(self, encoder: Any, frames: np.ndarray) -> np.ndarray:
        """uint8 ``[N, S, S, 3]`` -> the encoder's latents, on all threads."""
        if self._pool is None:
            return encoder.encode(frames)
        parts = [frames[start : start + BATCH["cpu"]] for start in range(0, len(frames), BATCH["cpu"])]
        return np.concatenate(list(self._pool.map(encoder.encode, parts)))


def write(store_uri: str, tables: Iterable[pa.Table]) -> dict[str, Any]:
    """Write encoded rows; return what the committer needs of them: the Icechunk fork, and the rows with locations."""
    rows, arrays = [], []
    for table in tables:
        data = [value.as_buffer() for value in table["data"]]
        for row, buffer in zip(table.drop_columns(["data"]).to_pylist(), data, strict=True):
            kind = "f4" if row["camera"] is None else "u1" if row["encoders"] == [PIXELS] else "f2"
            rows.append(row)
            arrays.append(np.frombuffer(buffer, kind).reshape(row["shape"]))
    fork = LatentStore.open(store_uri).fork()  # of the current head: gc may have deleted an older one
    for row, values, place in zip(rows, arrays, write_segments(fork, arrays), strict=True):
        row["place"] = place
        if values.size and values.dtype != np.uint8:  # pixels need no statistics: they are not normalised by them
            columns = np.moveaxis(values, 1, -1).reshape(-1, values.shape[1])  # channels of latents
            row["statistics"] = Statistics.of(columns).to_row()
    return {"fork": fork, "rows": rows}
