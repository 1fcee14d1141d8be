"""``make bench-train``: what Ray, DeepSpeed, curves and checkpoints cost. Writes docs/benchmarks/training.md.

The demo's pretraining on random latents of its shape, on workers of one thread each, with its curves and checkpoints,
beside a bare loop of torch alone: as many processes, DistributedDataParallel, the same optimizer with its average of
the weights, batches that lie in memory. No machine is equally fast at all times, so the two take turns: for some
seconds one of them runs, and all processes of the other are stopped.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.multiprocessing as mp
from rows import Made, commit, write_episodes
from torch.nn.parallel import DistributedDataParallel

from infra import tracking
from infra.engine import adamw
from pipelines.checkpoint import Settings
from pipelines.dataset import dataset, to_batch
from pipelines.pretrain import plan
from pipelines.recipe import Recipe, load_recipe
from pipelines.worker import optimizer_settings
from preprocessing.store import LatentStore

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "training.md"
EPISODES, FRAMES = 32, 100
FIRST, STEPS = 100, 600  # from the one to the other, a checkpoint among them, is what is measured
TURN = 12.0  # seconds; who was stopped wakes to a burst of timers, which has to be little of it
WAYS = {
    "DDP (stage 0)": ["zero_stage=0"],
    "one worker, a core for Ray": ["zero_stage=0", "workers=1"],
    "ZeRO 1": ["zero_stage=1"],
    "ZeRO 2": ["zero_stage=2"],
    "ZeRO 3": ["zero_stage=3"],
}


def make_store(root: Path) -> str:
    store = LatentStore.create(str(root / "store"))
    random = torch.Generator().manual_seed(0)
    made = [
        Made(
            f"episode-{number}",
            {name: torch.randn(FRAMES, 4, 16, 16, generator=random).half().numpy() for name in ("front", "wrist")},
            torch.randn(FRAMES, 8, generator=random).numpy(),
            action_dim=4,
        )
        for number in range(EPISODES)
    ]
    fork = store.fork()
    commit(store, [(fork, *written) for written in write_episodes(fork, made)])
    return store.uri


def bare(rank: int, port: int, settings: Settings, recipe: Recipe, done: Any) -> None:
    """Plain torch, for ever, in one of the processes; ``done`` counts the steps."""
    world = recipe.most_workers
    address = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in address.items()})
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(settings.build())
    optimizer, schedule = adamw(model, optimizer_settings(recipe))
    drawn = dataset(settings, validation=False, recipe=recipe).batches(0, recipe.batch_size, 0, rank, world)
    batches = [to_batch(one.arrays, torch.device("cpu"), torch.float32) for one in itertools.islice(drawn, 16)]
    generator = torch.Generator().manual_seed(rank)
    for batch in itertools.cycle(batches):
        optimizer.zero_grad()
        model(batch, generator).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimizer.step()
        schedule.step()
        done.value += rank == 0


@contextlib.contextmanager
def bare_loop(settings: Settings, recipe: Recipe) -> Any:
    """Its processes, stopped, and the number of their steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    done = context.Value("q", 0)
    processes = [
        context.Process(target=bare, args=(rank, port, settings, recipe, done)) for rank in range(recipe.most_workers)
    ]
    for process in processes:
        process.start()
    try:
        while done.value < 10:
            time.sleep(0.1)
        family = [psutil.Process(process.pid) for process in processes]
        send(family, signal.SIGSTOP)
        yield family, done
    finally:
        for process in processes:
            process.kill()
            process.join()


def send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def kill(training: subprocess.Popen[str]) -> None:
    """It and all its processes, stopped or not, where it has not ended."""
    if training.poll() is None:
        send([*psutil.Process(training.pid).children(recursive=True), psutil.Process(training.pid)], signal.SIGKILL)


def measure(way: str, store: str, root: Path) -> tuple[float, float, float]:
    """Seconds a step of the bare loop and of a whole training; and the share of its time that it waits for data."""
    recipe = load_recipe("demo_pretrain", [*WAYS[way], f"steps={STEPS}"])
    log = root / "log"
    command = [sys.executable, "-c", "from pipelines.cli import main; main()", "pretrain", "--store", store, "--json"]
    command += ["--recipe", "demo_pretrain", "--output", str(root / "runs"), "--new", *WAYS[way], f"steps={STEPS}"]
    turns, bare_seconds, bare_steps = list[tuple[float, float]](), 0.0, 0
    with bare_loop(plan(store, recipe), recipe) as (loop, done), log.open("w") as err, contextlib.ExitStack() as opened:
        training = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True)
        opened.callback(kill, training)
        while training.poll() is None and not re.search(rf" {FIRST}/{STEPS} ", log.read_text()):
            time.sleep(0.1)
        while training.poll() is None:
            family = [psutil.Process(training.pid), *psutil.Process(training.pid).children(recursive=True)]
            send(family, signal.SIGSTOP)
            before, began = done.value, time.time()
            send(loop, signal.SIGCONT)
            time.sleep(TURN)
            send(loop, signal.SIGSTOP)
            bare_seconds, bare_steps = bare_seconds + time.time() - began, bare_steps + done.value - before
            began = time.time()
            send(family, signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                training.wait(TURN)
            turns.append((began, time.time()))
    assert training.returncode == 0 and training.stdout, log.read_text()[-2000:]
    run = json.loads(training.stdout.read().splitlines()[-1])["run_id"]
    points = {point.step: point for point in tracking.MlflowClient().get_metric_history(run, "data_wait_share")}
    first = min(step for step, point in points.items() if point.timestamp / 1000 > turns[0][0])
    since, until = points[first].timestamp / 1000, points[STEPS].timestamp / 1000
    seconds = sum(max(0, min(ended, until) - max(began, since)) for began, ended in turns)
    return bare_seconds / bare_steps, seconds / (STEPS - first), points[FIRST].value


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        root, rows = Path(made), []
        os.environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}", "UWM_CACHE": str(root / "cache")}
        tracking.connect()
        store = make_store(root)
        for way in WAYS:
            loop, step, wait = measure(way, store, root)
            rows.append(f"| {way} | {loop * 1000:.0f} | {step * 1000:.0f} | {step / loop - 1:+.1%} | {wait:.2%} |")
            print(rows[-1], file=sys.stderr)
    recipe = load_recipe("demo_pretrain", [])
    lines = [
        "# A training",
        "",
        f"`make bench-train` on {os.cpu_count()} CPU cores, torch {torch.__version__}. The recipe demo_pretrain, a",
        f"batch of {recipe.batch_size} on two workers of one thread, {STEPS - FIRST} steps and a checkpoint; and a",
        "bare loop of torch (DDP) that took turns with it. Rows are of different minutes: compare within one.",
        "",
        "| how | ms a step of the bare loop | ms a step | over it | waiting for data |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "Two workers fill two cores: what Ray's own processes and a checkpoint's pictures take, they take from them.",
        "One worker leaves them a core, as there are many beside a GPU.",
    ]
    PAGE.write_text("\n".join([*lines, ""]))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
