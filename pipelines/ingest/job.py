"""The Ray Data job of an ingest: decode tasks -> encoder actors -> sink, with commits while it runs.

A decode task turns an episode into rows of at most 64 frames of one camera, then one row with its record. An encoder
actor replaces the frames of several rows, of any episodes and cameras, with the latents of each encoder. Each write
task writes its own Zarr group and hands it to the driver, which joins rows into episodes and commits complete ones
every few minutes. Memory does not grow with the length of a video.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import icechunk
import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Datasink, ExecutionResources

from infra.cluster import data_context
from pipelines.ingest.committer import Committer
from pipelines.ingest.episode_reader import Plan, Reading, Work, refusal
from preprocessing.encoders.vae import PIXELS
from preprocessing.episode import FRAMES_PER_CHUNK, EpisodeRef
from preprocessing.store.statistics import Statistics
from preprocessing.store.store import LatentStore, write_segments

BLOCK_BYTES = 16 * 2**20  # approximate size of a block of rows
ROWS_PER_PASS = 8  # rows, of up to 64 frames, per call of an encoder actor
PASSES_AHEAD = 8  # passes per encoder actor that Ray's object store may buffer; with 4 the encoders starve
ROWS_PER_WRITE = 256
WRITE_TRIES = 5
TRIES = 3  # attempts to read an episode that kills its process
GPU_SHARE = 0.5  # two actors per GPU: one copies frames while the other computes
ROW = pa.schema(
    [
        ("episode", pa.string()),
        ("camera", pa.string()),  # null in the row that carries the record
        ("encoders", pa.list_(pa.string())),  # those that will encode these frames, or the one that has
        ("first", pa.int64()),
        ("shape", pa.list_(pa.int64())),
        ("data", pa.large_binary()),  # uint8 frames, then latents or pixels; float32 steps with the record
        ("record", pa.string()),  # JSON: a catalogue row without storage locations
    ]
)


def run(work: list[Work], plan: Plan, committer: Committer, meter: Any) -> None:
    """Run the job, from raw files to the last commit. If it fails, complete episodes are committed first."""
    gc.collect()  # a job that failed in this process may hold its encoders, and their cores, in a cycle of objects
    with data_context() as context:
        context.target_max_block_size = BLOCK_BYTES
        pass_bytes = ROWS_PER_PASS * FRAMES_PER_CHUNK * plan.recipe.image_size**2 * 3
        ahead = actors() * PASSES_AHEAD * max(pass_bytes, BLOCK_BYTES)
        context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=ahead)
        items = [
            {"ref": json.dumps(asdict(w.ref)), "source": w.source, "encoders": list(w.keys), "fps": w.fps or 0.0}
            for w in work
        ]
        frames = ray.data.from_items(items, override_num_blocks=min(len(items), 512)).map_batches(
            decode,  # type: ignore[arg-type]
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={"plan": plan, "meter": meter, "inbox": committer.inbox},
            num_cpus=0.25,
        )
        latents = frames.map_batches(
            Encode,
            fn_constructor_args=(plan, meter),
            batch_size=ROWS_PER_PASS,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors()),
            **encoder_resources(),
        )
        again = {"max_retries": WRITE_TRIES, "retry_exceptions": [icechunk.IcechunkError]}
        latents.write_datasink(LatentSink(committer), ray_remote_args={"num_cpus": 0.25, **again})


def actors() -> int:
    """Return how many encoder actors the cluster has room for."""
    resources = ray.cluster_resources()
    return max(1, int(resources.get("GPU", 0) / GPU_SHARE) or int(resources.get("CPU", 1)))


def encoder_resources() -> dict[str, Any]:
    """Return the Ray resources of one encoder actor."""
    gpu = "GPU" in ray.cluster_resources()
    return {"num_cpus": 0.25, "num_gpus": GPU_SHARE} if gpu else {"num_cpus": 0.7}


def decode(batch: pa.Table, plan: Plan, meter: Any, inbox: Any) -> Iterator[pa.Table]:
    """Yield an episode as rows: its cameras' frames 64 at a time, then its record. A refusal goes to the inbox."""
    [item] = batch.to_pylist()
    ref, encoders = EpisodeRef(**json.loads(item["ref"])), item["encoders"]
    clock = _Clock(meter, "decode")
    try:
        if ray.get(inbox.begin.remote(ref.id)) > TRIES:  # Ray itself would retry for ever
            raise RuntimeError(f"the process that read it died {TRIES} times; it may be too large for memory")
        reading = Reading(ref, item["source"], item["fps"] or None, plan)
        for camera, first, frames in reading.frames():
            row = _row(ref.id, camera, encoders, first, frames)
            clock.wait()  # Ray blocks this task here while the encoders are behind
            yield row
            clock.work()
        record, steps = reading.record()
        clock.wait()
        yield _row(ref.id, None, [], 0, steps, json.dumps(record))
    except Exception as error:  # one broken file must not end a job over thousands
        # Not as a row: when Ray reruns a task, it drops as many rows as the task had yielded before.
        ray.get(inbox.refuse.remote(ref.id, refusal(error, ref)))


def _row(
    episode: str, camera: str | None, encoders: list[str], first: int, data: np.ndarray, record: str | None = None
) -> pa.Table:
    values: list[Any] = [episode, camera, encoders, first, data.shape, np.ascontiguousarray(data).tobytes(), record]
    return pa.table([[value] for value in values], schema=ROW)


class _Clock:
    """Reports to the meter how long this process worked and waited, as seconds ``NAME_work`` and ``NAME_wait``."""

    def __init__(self, meter: Any, name: str):
        self._meter, self._name, self._since = meter, name, time.monotonic()

    def work(self) -> None:
        self._passed("wait")

    def wait(self) -> None:
        self._passed("work")

    def _passed(self, what: str) -> None:
        now = time.monotonic()
        self._meter.add.remote(**{f"{self._name}_{what}": now - self._since})
        self._since = now


class Encode:
    """An actor that holds the frozen VAEs and replaces the frames of all its rows with latents in one pass."""

    def __init__(self, plan: Plan, meter: Any):
        import torch  # imported lazily: slow, and workers that decode or write do not need it

        from preprocessing.encoders.vae import load_encoder

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.encoders = {name: load_encoder(name, device, plan.recipe.precision) for name in plan.encoders}
        self._meter = meter
        self._clock: _Clock | None = None  # starts with the first rows: waiting before them is not waiting for decoders

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._clock is None:
            self._clock = _Clock(self._meter, "encode")
        self._clock.work()
        data = [value.as_buffer() for value in batch["data"]]
        rows = batch.drop_columns(["data"]).to_pylist()
        done = [row | {"data": bytes(data[i])} for i, row in enumerate(rows) if row["camera"] is None]
        self._meter.add.remote(episodes=len(done))
        for name, encoder in self.encoders.items():
            mine = [i for i, row in enumerate(rows) if name in row["encoders"]]
            if not mine:
                continue
            frames = np.concatenate([np.frombuffer(data[i], np.uint8).reshape(rows[i]["shape"]) for i in mine])
            latents = encoder.encode(frames)
            ends = np.cumsum([rows[i]["shape"][0] for i in mine])
            for i, chunk in zip(mine, np.split(latents, ends[:-1]), strict=True):
                done.append(rows[i] | {"encoders": [name], "shape": list(chunk.shape), "data": chunk.tobytes()})
            self._meter.add.remote(frames=len(frames))
        self._clock.wait()
        return pa.Table.from_pylist(done, schema=ROW)


class JobStopped(Exception):
    """The driver asked this job to stop."""


class LatentSink(Datasink):
    """Each write task writes its own Zarr group and hands it to the committer's inbox."""

    def __init__(self, committer: Committer):
        self._committer = committer
        self._inbox = committer.inbox
        self._uri = committer.store.uri

    def __getstate__(self) -> dict[str, Any]:
        return {"_uri": self._uri, "_inbox": self._inbox}  # all that a write task needs; the rest stays on the driver

    @property
    def min_rows_per_write(self) -> int:
        return ROWS_PER_WRITE

    def on_write_start(self, schema: pa.Schema | None = None) -> None:
        self._committer.start()

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> None:
        rows, arrays = [], []
        for block in blocks:
            data = [value.as_buffer() for value in block["data"]]
            for row, buffer in zip(block.drop_columns(["data"]).to_pylist(), data, strict=True):
                kind = "f4" if row["camera"] is None else "u1" if row["encoders"] == [PIXELS] else "f2"
                rows.append(row)
                arrays.append(np.frombuffer(buffer, kind).reshape(row["shape"]))
        fork = LatentStore.open(
            self._uri
        ).fork()  # of the current head: gc may have deleted the one at the start of a long job
        for row, values, place in zip(rows, arrays, write_segments(fork, arrays), strict=True):
            row["place"] = place
            if values.size and values.dtype != np.uint8:  # pixels need no statistics: they are not normalised by them
                columns = np.moveaxis(values, 1, -1).reshape(-1, values.shape[1])  # channels of latents
                row["statistics"] = Statistics.of(columns).to_row()
        if not ray.get(self._inbox.put.remote(ctx.task_idx, {"fork": fork, "rows": rows})):
            raise JobStopped

    def on_write_complete(self, write_result: Any) -> None:
        self._committer.finish()

    def on_write_failed(self, error: Exception) -> None:
        self._committer.commit_complete()
