"""The Ray Data job of an ingest: decode tasks -> encoder actors -> sink, with commits while it runs.

Each write task writes its own Zarr group and hands it to the driver, which joins rows into episodes and commits
complete ones every few minutes. Memory does not grow with the length of a video.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import icechunk
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Datasink, ExecutionResources

from infra.cluster import actor, cluster, data_context
from infra.progress import Meter, watch
from pipelines.ingest import stages
from pipelines.ingest.committer import Committer, Inbox, JobStopped
from pipelines.ingest.episode_reader import Plan, Refusal, Work, refusal
from pipelines.ingest.stages import ROWS_PER_PASS, ROWS_PER_WRITE, Clock, Encode, item, ref, write
from preprocessing.episode import FRAMES_PER_CHUNK

BLOCK_BYTES = 16 * 2**20  # approximate size of a block of rows
PASSES_AHEAD = 8  # passes per encoder actor that Ray's object store may buffer; with 4 the encoders starve
WRITE_TRIES = 5
TRIES = 3  # attempts to read an episode that kills its process
GPU_SHARE = 0.5  # two actors per GPU: one copies frames while the other computes


def run(
    work: list[Work],
    plan: Plan,
    committer: Committer,
    counted: Meter,
    show: Callable[[dict[str, float]], None],
    address: str | None,
    verbose: bool,
) -> None:
    """Run the job, from raw files to the last commit. If it fails, complete episodes are committed first.

    ``show`` gets what was ``counted`` before and what the job counts.
    """
    gc.collect()  # a job that failed in this process may hold its encoders, and their cores, in a cycle of objects
    with cluster(address, verbose):
        meter = actor(Meter, max_restarts=-1)  # reading it drives the commits, so it lives as long as the driver
        meter.add.remote(**counted.read())
        inbox = ActorInbox()
        with watch(lambda: ray.get(meter.read.remote(), timeout=10), show), committer.receiving(inbox):
            _run(work, plan, committer, inbox, meter)


def _run(work: list[Work], plan: Plan, committer: Committer, inbox: ActorInbox, meter: Any) -> None:
    def count(**amounts: float) -> None:
        meter.add.remote(**amounts)

    with data_context() as context:
        context.target_max_block_size = BLOCK_BYTES
        pass_bytes = ROWS_PER_PASS * FRAMES_PER_CHUNK * plan.recipe.image_size**2 * 3
        ahead = actors() * PASSES_AHEAD * max(pass_bytes, BLOCK_BYTES)
        context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=ahead)
        frames = ray.data.from_items([item(one) for one in work], override_num_blocks=min(len(work), 512)).map_batches(
            decode,  # type: ignore[arg-type]
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={"plan": plan, "count": count, "inbox": inbox},
            num_cpus=0.25,
        )
        latents = frames.map_batches(
            Encode,
            fn_constructor_args=(plan, count, inbox.refuse),
            batch_size=ROWS_PER_PASS,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors()),
            **encoder_resources(),
        )
        again = {"max_retries": WRITE_TRIES, "retry_exceptions": [icechunk.IcechunkError]}
        latents.write_datasink(LatentSink(committer, inbox), ray_remote_args={"num_cpus": 0.25, **again})


def actors() -> int:
    """Return how many encoder actors the cluster has room for."""
    resources = ray.cluster_resources()
    return max(1, int(resources.get("GPU", 0) / GPU_SHARE) or int(resources.get("CPU", 1)))


def encoder_resources() -> dict[str, Any]:
    """Return the Ray resources of one encoder actor."""
    gpu = "GPU" in ray.cluster_resources()
    return {"num_cpus": 0.25, "num_gpus": GPU_SHARE} if gpu else {"num_cpus": 0.7}


def read_on_ray(
    function: Callable[[Any], Iterator[pa.Table]],
    died: Callable[[Any, Exception], pa.Table],
    items: list[Any],
    address: str | None,
    verbose: bool,
) -> Iterator[pa.Table]:
    """Yield the tables of ``function(item)`` for each item, in the order in which they are done.

    For an item that killed its process, the table is ``died(item, error)``.
    """
    with cluster(address, verbose), data_context():
        inbox = ActorInbox()

        def task(batch: pa.Table) -> Iterator[pa.Table]:
            for one in batch.to_pylist():
                try:
                    _give_up(inbox, one)
                except RuntimeError as error:
                    yield died(one, error)
                else:
                    yield from function(one)

        read = ray.data.from_items(items, override_num_blocks=min(len(items), 512)).map_batches(
            task,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
        )
        yield from read.iter_batches(batch_size=None, batch_format="pyarrow")


def on_an_encoder(function: Callable[[Plan], Any], plan: Plan, address: str, verbose: bool) -> tuple[Any, int]:
    """Return ``function(plan)`` with one encoder actor's resources, and how many such actors there would be."""
    with cluster(address, verbose):
        return ray.get(ray.remote(function).options(**encoder_resources()).remote(plan)), actors()


class ActorInbox:
    """An Inbox that tasks on other nodes reach: an actor on the driver's node."""

    def __init__(self) -> None:
        self._actor = actor(Inbox)

    def begin(self, episode: str) -> int:
        return ray.get(self._actor.begin.remote(episode))

    def refuse(self, episode: str, refusal: Refusal) -> None:
        ray.get(self._actor.refuse.remote(episode, refusal))

    def put(self, task: int, written: dict[str, Any]) -> bool:
        return ray.get(self._actor.put.remote(task, written))

    def take(self) -> tuple[list[dict[str, Any]], dict[str, Refusal]]:
        return ray.get(self._actor.take.remote())

    def stop(self) -> None:
        self._actor.stop.remote()


def decode(batch: pa.Table, plan: Plan, count: Any, inbox: ActorInbox) -> Iterator[pa.Table]:
    """Yield an episode's rows. A refusal goes to the inbox."""
    [one] = batch.to_pylist()
    episode, clock = ref(one), Clock(count, "decode")
    try:
        _give_up(inbox, one)
        for row in stages.decode(one, plan):
            clock.wait()  # Ray blocks this task here while the encoders are behind
            yield row
            clock.work()
    except Exception as error:  # one broken file must not end a job over thousands
        # Not as a row: when Ray reruns a task, it drops as many rows as the task had yielded before.
        inbox.refuse(episode.id, refusal(error, episode))


def _give_up(inbox: ActorInbox, item: dict[str, Any]) -> None:
    """Raise RuntimeError if the episode was begun TRIES times before: Ray itself would retry for ever."""
    if inbox.begin(ref(item).id) > TRIES:
        raise RuntimeError(f"the process that read it died {TRIES} times; it may be too large for memory")


class LatentSink(Datasink[None]):
    """Each write task writes its own Zarr group and hands it to the committer's inbox."""

    def __init__(self, committer: Committer, inbox: ActorInbox):
        self._committer, self._inbox, self._uri = committer, inbox, committer.store.uri

    def __getstate__(self) -> dict[str, Any]:
        return {"_uri": self._uri, "_inbox": self._inbox}  # all that a write task needs; the rest stays on the driver

    @property
    def min_rows_per_write(self) -> int:
        return ROWS_PER_WRITE

    def on_write_start(self, schema: pa.Schema | None = None) -> None:
        self._committer.start()

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> None:
        tables = [block for block in blocks if block.num_rows]
        if tables and not self._inbox.put(ctx.task_idx, write(self._uri, tables)):
            raise JobStopped

    def on_write_complete(self, write_result: Any) -> None:
        self._committer.finish()

    def on_write_failed(self, error: Exception) -> None:
        self._committer.commit_complete()
