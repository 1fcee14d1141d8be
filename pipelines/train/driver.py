"""One training on Ray, from start to end, whatever happens to the workers in between.

Ray Train starts the workers and notices when one is gone; they go on from the newest checkpoint (pipelines/train/worker.py).
Ctrl-C and SIGTERM have them save first.
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
from infra.cluster import cluster
from infra.progress import Meter, on_this_node, watch
from pipelines.errors import Interrupted
from pipelines.models.checkpoint import Settings
from pipelines.recipe import Recipe
from pipelines.train.checkpoints import RunFolder
from pipelines.train.preemption import Listening
from pipelines.train.worker import Diverged, Preempted, work
from preprocessing.errors import UserError

ATTEMPTS = 3  # in a row that get no farther, before a failure is taken for one that comes again
WAIT_FOR_WORKERS = "20"  # seconds, before a run with a range of workers begins with those that there are


def train(
    settings: Settings,
    recipe: Recipe,
    output: Path,
    checkpoints: str,
    address: str | None = None,
    verbose: bool = False,
) -> Path:
    """Train on Ray and return the folder of the final weights, ``output/checkpoint``.

    ``checkpoints`` is the URI of the run's own: it goes on from the newest there. Raises Interrupted, Diverged, or
    what a worker raised that comes again.
    """
    output.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(checkpoints)
    config = {
        "settings": settings.model_dump_json(),
        "recipe": recipe.model_dump_json(),
        "folder": checkpoints,
        "tracking_uri": tracking.connect(),
    }
    with cluster(address, verbose):
        meter = Meter.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
        with (
            tqdm(total=recipe.steps, desc=recipe.name, unit="step", mininterval=0.5) as bar,
            watch(meter, Show(bar, meter), every=1.0),  # each question takes from the workers' time
            _saving_on_signals(meter) as told,
            _quiet(verbose),
        ):
            bar.set_postfix_str("starting the workers")
            _persist(recipe, {**config, "meter": meter}, folder, told)
    final = output / "checkpoint"
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    with folder.fetched(recipe.steps) as saved:
        for name in ("model.safetensors", "settings.json", "adapter.safetensors"):
            if (saved / name).exists():
                shutil.copyfile(saved / name, final / name)
    return final


def _persist(recipe: Recipe, config: dict[str, Any], folder: RunFolder, told: threading.Event) -> None:
    """One group of workers after the other, until the last step is saved, or the user wants no more."""
    reached, fruitless = -1, 0
    while (newest := folder.newest()) < recipe.steps:
        if told.is_set():
            raise Interrupted(f"stopped at step {newest}; the same command goes on")
        try:
            _fit(recipe, config)
        except TrainingFailedError as error:
            causes = [*error.worker_failures.values()] if isinstance(error, WorkerGroupError) else [error]
            for cause in causes:
                if isinstance(cause, UserError | Diverged):
                    raise cause from None
            newest = folder.newest()
            reached, fruitless = newest, 0 if newest > reached else fruitless + 1
            if fruitless >= ATTEMPTS:
                raise
            if not told.is_set():
                taken_away = all(isinstance(cause, Preempted) for cause in causes)
                why = "a machine was taken away" if taken_away else f"a worker was lost ({_line(causes[0])})"
                config["meter"].say.remote(f"{why}; going on from step {newest}")


def _fit(recipe: Recipe, config: dict[str, Any]) -> None:
    """One group of workers, until they are done or one of them fails."""
    gpus = ray.cluster_resources().get("GPU", 0) >= recipe.least_workers
    if isinstance(recipe.workers, tuple):
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", WAIT_FOR_WORKERS)
    with tempfile.TemporaryDirectory() as scratch:  # what Ray writes of its own; our checkpoints are elsewhere
        trainer = TorchTrainer(
            work,
            train_loop_config=config,
            torch_config=Listening(backend="nccl" if gpus else "gloo"),
            scaling_config=ScalingConfig(num_workers=recipe.workers, use_gpu=gpus),  # type: ignore[arg-type]
            run_config=RunConfig(name="ray", storage_path=scratch),
        )
        outcome: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:
                outcome.append(error)

        # In a thread, or Ray would answer Ctrl-C itself, and at once.
        thread = threading.Thread(target=fit, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.5)
        if outcome:
            raise outcome[0]


class Show:
    """The progress line, and above it what the workers say."""

    def __init__(self, bar: tqdm, meter: Any):
        self._bar, self._meter, self._heard = bar, meter, 0

    def __call__(self, values: dict[str, float]) -> None:
        if values.get("said", 0) > self._heard:
            for line in ray.get(self._meter.said.remote(self._heard), timeout=10):
                self._heard += 1
                self._bar.write(line, file=self._bar.fp)
        step = int(values.get("step", 0))
        if step and self._bar.n == 0:  # the time left is reckoned from here: a run may begin in its middle
            self._bar.initial, self._bar.start_t = step, time.time()
        self._bar.n = max(self._bar.n, step)
        if "loss" in values:
            self._bar.set_postfix_str(
                f"loss {values['loss']:.3f}, {values['rate']:.0f} samples/s, data wait {100 * values['wait']:.1f} %"
            )
        elif "copying" in values:
            done, total = (f"{tqdm.format_sizeof(values[name])}B" for name in ("copied", "copying"))
            self._bar.set_postfix_str("the first steps" if done == total else f"copying the store: {done} of {total}")


@contextlib.contextmanager
def _saving_on_signals(meter: Any) -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM asks the workers to save and stop; the second stops at once."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def ask(*_: Any) -> None:
        if told.is_set():
            raise KeyboardInterrupt
        told.set()
        meter.put.remote(stop=1)
        meter.say.remote("saving a checkpoint, then stopping; once more stops at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()[:200]}"


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Ray Train prints its state to stdout through loggers it configures late; keep stdout for results."""
    if verbose:
        yield
        return
    with Path(os.devnull).open("w") as sink, contextlib.redirect_stdout(sink):
        yield
