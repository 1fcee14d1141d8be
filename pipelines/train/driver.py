"""Run one training on Ray to its end, across failures of the workers.

Ray Train starts the workers and notices when one is lost; new ones resume from the newest checkpoint
(pipelines/train/worker.py). On Ctrl-C or SIGTERM the workers save a checkpoint first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from tqdm import tqdm

from infra import tracking
from infra.cluster import actor, cluster, is_loopback
from infra.progress import Meter, watch
from pipelines.errors import Interrupted
from pipelines.models import manifest
from pipelines.models.checkpoint import Settings
from pipelines.models.manifest import MANIFEST
from pipelines.recipe import Recipe
from pipelines.train.checkpoints import RunFolder
from pipelines.train.devices import HIDDEN
from pipelines.train.preemption import PreemptibleTorchConfig
from pipelines.train.worker import Diverged, Preempted, work
from preprocessing.errors import UserError

NO_RATE = "{desc}: {n_fmt}/{total_fmt}{postfix}"  # of the progress bar, until there is a step to measure
ATTEMPTS = 3  # failures in a row without a new checkpoint before giving up
WAIT_FOR_WORKERS = "20"  # seconds before a run with a range of workers starts with those available


def train(
    settings: Settings,
    recipe: Recipe,
    output: Path,
    checkpoints: str,
    address: str | None = None,
    verbose: bool = False,
    identity: str = "",
) -> Path:
    """Train on Ray and return the folder of the final weights, ``output/checkpoint``.

    ``checkpoints`` is the URI of this run's checkpoints; training resumes from the newest that is intact. ``identity``
    is the run's (RunRecord), which checkpoints keep. Workers have GPUs if the recipe's ``device`` says so
    (pipelines/train/devices.py), and otherwise see none. Raises Interrupted, Diverged, UserError, or a worker's failure
    that keeps recurring.
    """
    output.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(checkpoints)
    config = {
        "settings": settings.model_dump_json(),
        "recipe": recipe.model_dump_json(),
        "folder": checkpoints,
        "tracking_uri": tracking.connect(),
        "identity": identity,
    }
    with cluster(address, verbose):
        meter = actor(Meter)
        with (
            tqdm(total=recipe.steps, desc=recipe.name, unit="step", mininterval=0.5, bar_format=NO_RATE) as bar,
            ProgressLine(bar, meter, recipe.workers).shown(),
            _save_on_signals(meter) as stop_requested,
            _silence_stdout(verbose),
        ):
            _train_to_the_end(recipe, {**config, "meter": meter}, folder, stop_requested)
    final = output / "checkpoint"
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    with folder.fetched(recipe.steps) as saved:
        for name in ("model.safetensors", "settings.json", "adapter.safetensors"):
            if (saved / name).exists():
                shutil.copyfile(saved / name, final / name)
    (final / MANIFEST).write_bytes(manifest.dump(manifest.measure(final.iterdir()), {"step": recipe.steps}))
    return final


def _train_to_the_end(
    recipe: Recipe, config: dict[str, Any], folder: RunFolder, stop_requested: threading.Event
) -> None:
    """Start one group of workers after another until the last step is saved or the user stops."""
    reached, fruitless = -1, 0
    while (newest := folder.newest()) < recipe.steps or _is_damaged(folder, recipe.steps, config["meter"]):
        if stop_requested.is_set():
            raise Interrupted(f"stopped at step {newest}; run the same command to resume")
        config["meter"].put.remote(starting=1)
        try:
            _run_workers(recipe, config)
        except TrainingFailedError as error:
            causes = [*error.worker_failures.values()] if isinstance(error, WorkerGroupError) else [error]
            for cause in causes:
                if isinstance(cause, UserError | Diverged):
                    raise cause from None
            newest = folder.newest()
            reached, fruitless = newest, 0 if newest > reached else fruitless + 1
            if fruitless >= ATTEMPTS:
                raise
            if not stop_requested.is_set():
                preempted = all(isinstance(cause, Preempted) for cause in causes)
                why = "a machine was preempted" if preempted else f"a worker was lost ({_one_line(causes[0])})"
                config["meter"].say.remote(f"{why}; resuming from step {newest}")


def _is_damaged(folder: RunFolder, last: int, meter: Any) -> bool:
    """Whether the last step's checkpoint had to be removed, so that training goes on from the one before."""
    for line in folder.sweep():
        meter.say.remote(line)
    return folder.newest() < last


def _run_workers(recipe: Recipe, config: dict[str, Any]) -> None:
    """Run one group of workers until they finish or one of them fails."""
    if isinstance(recipe.workers, tuple):
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", WAIT_FOR_WORKERS)
    with tempfile.TemporaryDirectory() as scratch:  # for Ray's own files; our checkpoints are elsewhere
        trainer = trainer_of(recipe, config, scratch)
        outcome: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:
                outcome.append(error)

        # In a thread, because otherwise Ray would handle Ctrl-C itself and stop at once.
        thread = threading.Thread(target=fit, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.5)
        if outcome:
            raise outcome[0]


def trainer_of(recipe: Recipe, config: dict[str, Any], scratch: str) -> TorchTrainer:
    """Return Ray's trainer of one group of workers, on the recipe's device."""
    gpus = recipe.device == "gpu"
    environment = {"env_vars": {} if gpus else HIDDEN}
    return TorchTrainer(
        work,
        train_loop_config=config,
        torch_config=PreemptibleTorchConfig(
            backend="nccl" if gpus else "gloo", meeting_folder=scratch if is_loopback() else None
        ),
        scaling_config=ScalingConfig(num_workers=recipe.workers, use_gpu=gpus),  # type: ignore[arg-type]
        run_config=RunConfig(name="ray", storage_path=scratch, worker_runtime_env=environment),  # type: ignore[call-arg]
    )


class ProgressLine:
    """Shows the progress bar, and above it the workers' messages."""

    def __init__(self, bar: tqdm[Any], meter: Any, workers: int | tuple[int, int]):
        self._bar, self._meter, self._shown = bar, meter, 0
        low, high = (workers, workers) if isinstance(workers, int) else workers
        self._who = f"{low} to {high} workers" if low < high else f"{low} worker{'s' if low > 1 else ''}"
        self._waiting_since: float | None = None

    def shown(self) -> contextlib.AbstractContextManager[None]:
        """Show the meter's values while the block runs."""
        read = self._meter.read
        return watch(lambda: ray.get(read.remote(), timeout=10), self, every=1.0)  # each poll costs the workers time

    def __call__(self, values: dict[str, float]) -> None:
        if values.get("said", 0) > self._shown:
            for line in ray.get(self._meter.said.remote(self._shown), timeout=10):
                self._shown += 1
                self._bar.write(line, file=self._bar.fp)
        if "first" in values and self._bar.bar_format:  # the workers have begun, perhaps midway: time counts from here
            self._bar.initial = self._bar.n = int(values["first"])
            self._bar.start_t, self._bar.bar_format = time.time(), None
        self._bar.n = max(self._bar.n, int(values.get("step", 0)))
        copied, copying = (values.get(name, 0) for name in ("copied", "copying"))
        if not values.get("starting"):
            self._waiting_since = None
        elif copied == copying:
            # Ray may hold what a driver that was killed had asked for, up to three minutes.
            self._waiting_since = self._waiting_since or time.monotonic()
            self._bar.set_postfix_str(f"starting {self._who}, {time.monotonic() - self._waiting_since:.0f} s")
            return
        if copied < copying:
            done, total = (f"{tqdm.format_sizeof(size)}B" for size in (copied, copying))
            self._bar.set_postfix_str(f"copying the store to the local cache: {done} of {total}")
        elif "loss" in values:
            self._bar.set_postfix_str(
                f"loss {values['loss']:.3f}, {values['rate']:.0f} samples/s, data wait {100 * values['wait']:.1f} %"
            )
        else:
            self._bar.set_postfix_str("waiting for the first steps")


@contextlib.contextmanager
def _save_on_signals(meter: Any) -> Iterator[threading.Event]:
    """On the first Ctrl-C or SIGTERM set the event and ask the workers to save and stop; on the second stop at once."""
    stop_requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop_requested
        return

    def request_stop(*_: Any) -> None:
        if stop_requested.is_set():
            raise KeyboardInterrupt
        stop_requested.set()
        meter.put.remote(stop=1)
        meter.say.remote("saving a checkpoint before stopping; press Ctrl-C again to stop at once")

    before = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()[:200]}"


@contextlib.contextmanager
def _silence_stdout(verbose: bool) -> Iterator[None]:
    """Keep stdout for results: Ray Train prints its state there, through loggers that it configures late."""
    if verbose:
        yield
        return
    with Path(os.devnull).open("w") as sink, contextlib.redirect_stdout(sink):
        yield
