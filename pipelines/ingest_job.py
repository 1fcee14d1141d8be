"""The Ray Data job of an ingest: decode tasks -> encoder actors -> sink, with commits while it runs.

A decode task turns an episode into rows of at most 64 frames of one camera, then one row with its record; an encoder
actor replaces the frames of several rows, of any episodes and cameras, by the latents of each encoder; each write task
writes a group of its own and hands it to the driver, which joins rows into episodes and commits those that are
complete every few minutes. Nothing is held longer than that: memory does not grow with the length of a video.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
from icechunk import ForkSession
from ray.data import ActorPoolStrategy, DataContext, Datasink
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from preprocessing import sources
from preprocessing.episode import BadEpisode, DataContract, Episode, EpisodeRef
from preprocessing.statistics import Statistics, merge
from preprocessing.store import LatentStore, write_segments

if TYPE_CHECKING:
    from preprocessing.encoders import Precision

BLOCK_BYTES = 16 * 2**20  # rows travel in blocks of about this size
ROWS_PER_PASS = 8  # of up to 64 frames: what an encoder gets at once
ROWS_PER_WRITE = 256
COMMIT_MINUTES = 2  # of work that a crash may cost
COMMIT_EPISODES = 4096
RETRIES = 100  # about one a second until Ray notices, within a minute, that the node of an actor is gone
GPU_SHARE = 0.5  # two actors a device: one copies frames while the other computes
READER = version("unified-world-models")

ROW = pa.schema(
    [
        ("episode", pa.string()),
        ("camera", pa.string()),  # null in the row that carries the record
        ("encoders", pa.list_(pa.string())),  # that are to encode these frames, or the one that did
        ("first", pa.int64()),
        ("shape", pa.list_(pa.int64())),
        ("data", pa.large_binary()),  # uint8 frames, then float16 latents; float32 steps with the record
        ("record", pa.string()),  # JSON: a catalogue row without its places, or {"problem": ...}
    ]
)


@dataclass(frozen=True)
class Work:
    """One episode to ingest: ``keys`` names the catalogue row that each encoder is to make of it."""

    ref: EpisodeRef
    keys: dict[str, str]
    quarantine_key: str
    fps: float | None  # at most so many frames a second, where it has no actions


@dataclass(frozen=True)
class Plan:
    """What is the same for all episodes of an ingest."""

    encoders: dict[str, str]  # digest by name
    precision: Precision
    image_size: int
    contract: DataContract | None


def run(work: list[Work], plan: Plan, committer: Committer, meter: Any) -> None:
    """Everything from raw files to the last commit. Raises what stopped it, after committing what was complete."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    context.print_on_execution_start = False
    cpus = int(ray.cluster_resources().get("CPU", 1))
    gpus = ray.cluster_resources().get("GPU", 0)
    items = [{"ref": json.dumps(asdict(one.ref)), "encoders": list(one.keys), "fps": one.fps or 0.0} for one in work]
    frames = ray.data.from_items(items, override_num_blocks=min(len(items), 512)).map_batches(
        decode,  # type: ignore[arg-type]
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"plan": plan, "meter": meter},
        num_cpus=0.25,
    )
    latents = frames.map_batches(
        Encode,
        fn_constructor_args=(plan, meter),
        batch_size=ROWS_PER_PASS,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=max(1, int(gpus / GPU_SHARE) or cpus)),
        num_cpus=0.25 if gpus else 0.7,
        num_gpus=GPU_SHARE if gpus else 0,
        max_restarts=-1,
        max_task_retries=RETRIES,
    )
    latents.write_datasink(LatentSink(committer), ray_remote_args={"num_cpus": 0.25})


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """For an actor that no other node's end is to take away."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def decode(batch: pa.Table, plan: Plan, meter: Any) -> Iterator[pa.Table]:
    """One episode as rows: its cameras' frames 64 at a time, then its record."""
    [work] = batch.to_pylist()
    ref, encoders = EpisodeRef(**json.loads(work["ref"])), work["encoders"]
    counts: dict[str, int] = {}
    clock = _Clock(meter, "decode")
    try:
        episode = sources.load(ref, plan.contract, work["fps"] or None)
        for camera, video in episode.cameras.items():
            counts[camera] = 0
            for frames in video.frames(plan.image_size):
                row = _row(ref.id, camera, encoders, counts[camera], frames)
                counts[camera] += len(frames)
                clock.wait()  # where the encoders are behind, Ray holds this task here
                yield row
                clock.work()
        last = _record(episode, counts, plan)
        if sources.digest(ref) != ref.digest:
            raise BadEpisode("it changed while it was read; ingest it again when it is complete")
    except BadEpisode as problem:
        # What its bytes are now is for the next run to see; only bytes that were read whole are refused for good.
        last = _refused(ref.id, counts, str(problem), READER if _unchanged(ref) else None)
    except Exception as error:  # one broken file must not end a job over thousands; the reason is kept
        last = _refused(ref.id, counts, f"{type(error).__name__}: {error}", None)
    clock.wait()
    yield last


def _unchanged(ref: EpisodeRef) -> bool:
    with contextlib.suppress(Exception):
        return bool(ref.problem) or sources.digest(ref) == ref.digest
    return False


def _record(episode: Episode, counts: dict[str, int], plan: Plan) -> pa.Table:
    tracks = {f"camera {camera}": count for camera, count in counts.items()}
    tracks |= {f"proprio {name}": len(values) for name, values in episode.proprio.items()}
    if episode.action is not None:
        tracks["action"] = len(episode.action)
    if not counts or len(set(tracks.values())) != 1 or 0 in tracks.values():
        lengths = ", ".join(f"{name} {count}" for name, count in tracks.items()) or "no camera"
        raise BadEpisode(f"its tracks do not have one common length: {lengths}")
    frames = next(iter(counts.values()))

    columns = [] if episode.action is None else [episode.action]
    steps = np.concatenate([*columns, *episode.proprio.values(), np.zeros((frames, 0))], axis=1, dtype=np.float32)
    if not np.isfinite(steps).all():
        raise BadEpisode("its actions or proprioception hold NaN or infinity")
    record = {
        "id": episode.id,
        "uri": episode.ref.uri,
        "index": episode.ref.index,
        "format": episode.ref.format,
        "frames": frames,
        "fps": episode.fps,
        "embodiment": episode.embodiment,
        "instruction": episode.instruction,
        "success": episode.success,
        "cameras": counts,
        "action_dim": 0 if episode.action is None else episode.action.shape[1],
        "action_layout": json.dumps([block.model_dump() for block in episode.action_layout]),
        "proprio": [{"name": name, "width": values.shape[1]} for name, values in episode.proprio.items()],
        "contract": plan.contract.model_dump_json() if plan.contract else None,
        "repairs": list(episode.repairs),
    }
    return _row(episode.id, None, [], 0, steps, json.dumps(record))


def _refused(episode: str, counts: dict[str, int], reason: str, reader: str | None) -> pa.Table:
    record = {"problem": " ".join(reason.split()), "reader": reader, "cameras": counts}
    return _row(episode, None, [], 0, np.zeros((0, 0), np.float32), json.dumps(record))


def _row(
    episode: str, camera: str | None, encoders: list[str], first: int, data: np.ndarray, record: str | None = None
) -> pa.Table:
    values: list[Any] = [episode, camera, encoders, first, data.shape, np.ascontiguousarray(data).tobytes(), record]
    return pa.table([[value] for value in values], schema=ROW)


class _Clock:
    """Tells the meter how long this process worked and how long it waited: seconds ``NAME_work`` and ``NAME_wait``."""

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
    """An actor that holds the frozen VAEs and replaces frames by latents, the frames of all its rows in one go."""

    def __init__(self, plan: Plan, meter: Any):
        import torch  # takes seconds, which the workers that only decode or write are spared

        from preprocessing.encoders import load_encoder

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._encoders = {name: load_encoder(name, device, plan.precision) for name in plan.encoders}
        self._meter = meter
        self._clock: _Clock | None = None  # starts with the first rows: before, nobody was late

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._clock is None:
            self._clock = _Clock(self._meter, "encode")
        self._clock.work()
        data = [value.as_buffer() for value in batch["data"]]
        rows = batch.drop_columns(["data"]).to_pylist()
        done = [row | {"data": bytes(data[i])} for i, row in enumerate(rows) if row["camera"] is None]
        for name, encoder in self._encoders.items():
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


@ray.remote(num_cpus=0)
class Inbox:
    """Where write tasks leave what they wrote, on the driver's node. A task that Ray ran twice is heard once."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._written: list[Any] = []
        self._stopped = False

    def put(self, task: int, written: Any) -> bool:
        """Whether the job is to go on."""
        if task not in self._seen:
            self._seen.add(task)
            self._written.append(written)
        return not self._stopped

    def take(self) -> list[Any]:
        taken, self._written = self._written, []
        return taken

    def stop(self) -> None:
        self._stopped = True


class Stopped(Exception):
    """The driver has asked this job to end."""


class LatentSink(Datasink):
    """Each write task writes a group of its own and hands it to the committer's inbox."""

    def __init__(self, committer: Committer):
        self._committer = committer
        self._inbox = committer.inbox
        self._fork = committer.store.fork()

    def __getstate__(self) -> dict[str, Any]:
        return {"_fork": self._fork, "_inbox": self._inbox}  # what a write task needs; the rest stays on the driver

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
                kind = np.float32 if row["camera"] is None else np.float16
                rows.append(row)
                arrays.append(np.frombuffer(buffer, kind).reshape(row["shape"]))
        for row, values, place in zip(rows, arrays, write_segments(self._fork, arrays), strict=True):
            row["place"] = asdict(place)
            if values.size:
                columns = np.moveaxis(values, 1, -1).reshape(-1, values.shape[1])  # channels of latents
                row["statistics"] = Statistics.of(columns).to_row()
        if not ray.get(self._inbox.put.remote(ctx.task_idx, {"fork": self._fork, "rows": rows})):
            raise Stopped

    def on_write_complete(self, write_result: Any) -> None:
        self._committer.finish()

    def on_write_failed(self, error: Exception) -> None:
        self._committer.keep()


@dataclass
class _Pending:
    """What has come of one episode so far."""

    record: dict[str, Any] | None = None
    steps: dict[str, Any] | None = None
    segments: dict[tuple[str, str], dict[int, dict[str, Any]]] = field(default_factory=dict)  # by (encoder, camera)

    def complete(self, encoders: Iterable[str]) -> bool:
        return self.record is not None and all(
            sum(row["place"]["count"] for row in self.segments.get((encoder, camera), {}).values()) == count
            for encoder in encoders
            for camera, count in self.record["cameras"].items()
        )


@dataclass
class _Batch:
    """What is to become one commit. One that failed is asked for again as it is: it may have been made after all."""

    episodes: list[str]  # ids, those of bad ones too
    forks: list[ForkSession] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    statistics: list[dict[str, Any]] = field(default_factory=list)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    unused: list[dict[str, Any]] = field(default_factory=list)
    name: str = field(default_factory=lambda: uuid.uuid4().hex)


class Committer:
    """Joins rows into episodes on the driver, and commits those that are complete every COMMIT_MINUTES."""

    def __init__(self, store: LatentStore, work: list[Work], plan: Plan, most_bad: float):
        self.store = store
        self.inbox = Inbox.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
        self.snapshot: str | None = None
        self.episodes = self.already = self.frames = 0
        self.quarantine: list[dict[str, Any]] = []
        self.too_bad = False
        self._work = {one.ref.id: one for one in work}
        self._left = {one.ref.id: place for place, one in enumerate(work)}  # not committed yet
        self._plan = plan
        self._most_bad = most_bad
        self._pending: dict[str, _Pending] = {}
        self._forks: list[tuple[ForkSession, list[dict[str, Any]]]] = []  # not committed yet, and their rows
        self._batch: _Batch | None = None
        self._lock = threading.Lock()
        self._last_commit = time.monotonic()

    def start(self) -> None:
        self._last_commit = time.monotonic()

    def tick(self) -> int:
        """Commit if it is time for it. Returns how many episodes are done. For a thread beside the job."""
        with self._lock:
            self._receive()
            complete = self._complete()
            late = time.monotonic() - self._last_commit > COMMIT_MINUTES * 60
            if complete and (late or len(complete) >= COMMIT_EPISODES):
                self._commit(complete)
                complete = []
            return len(self._work) - len(self._left) + len(complete)

    def keep(self) -> None:
        """Commit what is complete."""
        with self._lock:
            self._receive()
            self._commit(self._complete())

    def finish(self) -> None:
        """Commit the rest; RuntimeError if anything of it is missing."""
        self.keep()
        if self._left:
            first = self._work[next(iter(self._left))].ref
            raise RuntimeError(
                f"{len(self._left)} episodes came back incomplete, {first.uri} #{first.index} among them"
            )

    def _receive(self) -> None:
        for written in ray.get(self.inbox.take.remote()):
            self._forks.append((written["fork"], written["rows"]))
            for row in written["rows"]:
                if row["episode"] not in self._left:
                    continue
                pending = self._pending.setdefault(row["episode"], _Pending())
                if row["camera"] is not None:
                    [encoder] = row["encoders"]
                    pending.segments.setdefault((encoder, row["camera"]), {})[row["first"]] = row
                else:
                    pending.record, pending.steps = json.loads(row["record"]), row

    def _complete(self) -> list[str]:
        """In the order of the sources, whatever order tasks ended in."""
        complete = [one for one, pending in self._pending.items() if pending.complete(self._work[one].keys)]
        return sorted(complete, key=self._left.__getitem__)

    def _commit(self, complete: list[str]) -> None:
        self._last_commit = time.monotonic()
        if self._batch:
            self._send(self._batch)
            complete = [one for one in complete if one in self._left]
        if complete:
            self._batch = self._gather(complete)
            self._send(self._batch)

    def _gather(self, complete: list[str]) -> _Batch:
        batch = _Batch(complete)
        for fork, rows in self._forks:
            if not {row["episode"] for row in rows}.isdisjoint(complete):
                batch.forks.append(fork)
                batch.unused += [row["place"] for row in rows if row["episode"] not in self._left]
        for episode in complete:
            one, pending = self._work[episode], self._pending[episode]
            assert pending.record is not None
            if "problem" in pending.record:
                batch.quarantine.append(_quarantined(one, pending.record))
                batch.unused += [row["place"] for found in pending.segments.values() for row in found.values()]
                continue
            for encoder, key in one.keys.items():
                row, statistics = _catalogued(one, pending, encoder, key, self._plan)
                batch.rows.append(row)
                batch.statistics += statistics
        return batch

    def _send(self, batch: _Batch) -> None:
        commit = self.store.commit(
            batch.name, batch.forks, batch.rows, batch.statistics, batch.quarantine, batch.unused
        )
        self._batch = None
        self.snapshot = commit.snapshot
        frames = {row["id"]: row["frames"] for row in batch.rows if row["key"] in commit.keys}
        self.episodes += len(frames)
        self.frames += sum(frames.values())
        self.already += len({row["id"] for row in batch.rows} - frames.keys())
        self.quarantine += batch.quarantine
        for episode in batch.episodes:
            del self._left[episode], self._pending[episode]
        # Nothing was committed where all were doubles: then episodes that are still to come need their forks again.
        again = not (commit.keys or batch.quarantine)
        self._forks = [
            (fork, rows)
            for fork, rows in self._forks
            if not any(fork is done for done in batch.forks)
            or (again and any(row["episode"] in self._left for row in rows))
        ]
        if len(self.quarantine) > self._most_bad:
            self.too_bad = True
            self.inbox.stop.remote()


def _quarantined(one: Work, record: dict[str, Any]) -> dict[str, Any]:
    ref = one.ref
    why = {"reason": record["problem"], "reader": record["reader"]}
    return {"key": one.quarantine_key, "id": ref.id, "uri": ref.uri, "index": ref.index, **why}


def _catalogued(
    one: Work, pending: _Pending, encoder: str, key: str, plan: Plan
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The catalogue row of one encoding of an episode, and its statistics' rows."""
    assert pending.record is not None and pending.steps is not None
    cameras, statistics = [], []
    for camera in pending.record["cameras"]:
        found = [row for _, row in sorted(pending.segments[encoder, camera].items())]
        cameras.append({"name": camera, "segments": [row["place"] for row in found]})
        total = merge(Statistics.from_row(row["statistics"]) for row in found)
        statistics.append({"key": key, "array": camera, **total.to_row()})
    if "statistics" in pending.steps:
        statistics.append({"key": key, "array": "steps", **pending.steps["statistics"]})
    named = {"key": key, "encoder": encoder, "encoder_digest": plan.encoders[encoder]}
    return {**pending.record, **named, "cameras": cameras, "steps": pending.steps["place"]}, statistics
