"""``make bench-train``: what Ray, DeepSpeed, curves and checkpoints cost. Writes docs/benchmarks/training.md.

The demo's pretraining on random latents of its shape, two workers of one thread each, as long as it is, with its
curves and checkpoints. A step is the time from a curve's point to the next, whatever happens in between. The bare loop
is torch alone: two processes, DistributedDataParallel, the same optimizer with its average of the weights, batches that
lie in memory. A machine is not equally fast at all times, so the bare loop runs before and after each training, which
is held against the mean of these two.
"""

from __future__ import annotations

import itertools
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from rows import Made, commit, write_episodes
from torch.nn.parallel import DistributedDataParallel

from infra import tracking
from infra.cluster import cluster
from infra.engine import adamw
from pipelines.checkpoint import Settings
from pipelines.dataset import dataset, to_batch
from pipelines.pretrain import plan, pretrain
from pipelines.recipe import Recipe, load_recipe
from pipelines.worker import optimizer_settings
from preprocessing.store import LatentStore

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "training.md"
EPISODES, FRAMES = 32, 100
BARE_STEPS = 150
FIRST = 100  # the step from which on is counted: Ray's own processes have started
WAYS = {
    "DDP (stage 0)": ["zero_stage=0"],
    "ZeRO 1": ["zero_stage=1"],
    "ZeRO 2": ["zero_stage=2"],
    "ZeRO 3": ["zero_stage=3"],
    "ZeRO 1, activations computed again": ["zero_stage=1", "activation_checkpointing=true"],
}
if torch.cuda.is_available():  # few CPUs compute in bfloat16: on others it takes six times as long
    WAYS["ZeRO 1, bfloat16"] = ["zero_stage=1", "precision=bfloat16"]


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


def bare(rank: int, port: int, settings: Settings, recipe: Recipe, answers: Any) -> None:
    """Plain torch, in one of two processes: seconds a step."""
    address = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in address.items()})
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(settings.build())
    optimizer, schedule = adamw(model, optimizer_settings(recipe))
    drawn = dataset(settings, validation=False, recipe=recipe).batches(0, recipe.batch_size, 0, rank, 2)
    batches = [to_batch(one.arrays, torch.device("cpu"), torch.float32) for one in itertools.islice(drawn, 16)]
    generator = torch.Generator().manual_seed(rank)
    for step in range(-10, BARE_STEPS):
        if step == 0:
            began = time.monotonic()
        optimizer.zero_grad()
        model(batches[step % len(batches)], generator).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimizer.step()
        schedule.step()
    if rank == 0:
        answers.put((time.monotonic() - began) / BARE_STEPS)
    torch.distributed.destroy_process_group()


def bare_step(settings: Settings, recipe: Recipe) -> float:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = mp.get_context("spawn").SimpleQueue()
    mp.spawn(bare, (port, settings, recipe, answers), nprocs=2)
    return answers.get()


def whole_step(store: str, recipe: Recipe, root: Path) -> tuple[float, float]:
    """A whole training: seconds a step between points of its curves, and the share of waiting for data."""
    with cluster():
        run, _ = pretrain(store, recipe, root / "runs", new=True)
    rates = [rate for step, rate in tracking.history(run, "samples_per_second") if step > FIRST]
    waits = [share for _, share in tracking.history(run, "data_wait_share")]
    return statistics.fmean(recipe.batch_size / rate for rate in rates), waits[-1]


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        os.environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}", "UWM_CACHE": str(root / "cache")}
        store = make_store(root)
        recipes = {way: load_recipe("demo_pretrain", settings) for way, settings in WAYS.items()}
        recipe = recipes["DDP (stage 0)"]
        settings = plan(store, recipe)
        before, rows = bare_step(settings, recipe), []
        for way, its in recipes.items():
            step, wait = whole_step(store, its, root)
            after = bare_step(settings, recipe)
            bare, over = f"{before * 1000:.0f}, {after * 1000:.0f}", 2 * step / (before + after) - 1
            rows.append(f"| {way} | {bare} | {step * 1000:.0f} | {over:+.1%} | {wait:.2%} |")
            print(rows[-1], file=sys.stderr)
            before = after
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    lines = [
        "# A training",
        "",
        f"`make bench-train` on {device}, torch {torch.__version__}. The recipe demo_pretrain, a batch of",
        f"{recipe.batch_size} on two workers of one thread: steps {FIRST} to {recipe.steps}, a checkpoint every",
        f"{recipe.checkpoint_every}; and {BARE_STEPS} steps of the bare loop before and after each.",
        "",
        "| how | ms a step of the bare loop, before and after | ms a step | over it | waiting for data |",
        "|---|---|---|---|---|",
        *rows,
    ]
    PAGE.write_text("\n".join([*lines, ""]))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
