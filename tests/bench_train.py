"""``make bench-train``: what Ray, DeepSpeed, curves and checkpoints cost. Writes docs/benchmarks/training.md.

The demo's model and batch on random latents of its shape, two workers of one thread each. The bare loop is torch alone:
two processes, DistributedDataParallel, AdamW, batches that lie in memory; it runs before and after the others, and its
mean is what they are held against. The others are whole trainings, with a curve's point every 20 steps and a checkpoint
every 100; their step is the time from a point to the next, whatever happens in between.
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
from pipelines.checkpoint import Settings
from pipelines.dataset import dataset, to_batch
from pipelines.pretrain import plan, pretrain
from pipelines.recipe import Recipe, load_recipe
from preprocessing.store import LatentStore

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "training.md"
EPISODES, FRAMES, STEPS, WARM = 32, 100, 200, 20
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=recipe.betas, fused=True)
    drawn = dataset(settings, validation=False, recipe=recipe).batches(0, recipe.batch_size, 0, rank, 2)
    batches = [to_batch(one.arrays, torch.device("cpu"), torch.float32) for one in itertools.islice(drawn, 16)]
    generator = torch.Generator().manual_seed(rank)
    for step in range(STEPS + WARM):
        if step == WARM:
            began = time.monotonic()
        optimizer.zero_grad()
        model(batches[step % len(batches)], generator).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimizer.step()
    if rank == 0:
        answers.put((time.monotonic() - began) / STEPS)
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
    run, _ = pretrain(store, recipe, root / "runs", new=True)
    rates = [rate for step, rate in tracking.history(run, "samples_per_second") if step > WARM]
    waits = [share for _, share in tracking.history(run, "data_wait_share")]
    return statistics.fmean(recipe.batch_size / rate for rate in rates), waits[-1]


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        os.environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}", "UWM_CACHE": str(root / "cache")}
        store = make_store(root)
        common = [f"steps={STEPS + WARM}", "checkpoint_every=100", f"log_every={WARM}"]
        recipes = {way: load_recipe("demo_pretrain", [*common, *settings]) for way, settings in WAYS.items()}
        first = recipes["DDP (stage 0)"]
        settings = plan(store, first)
        alone = [bare_step(settings, first)]
        with cluster():
            steps = {way: whole_step(store, recipe, root) for way, recipe in recipes.items()}
        alone.append(bare_step(settings, first))
    base = statistics.fmean(alone)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    lines = [
        "# A training",
        "",
        f"`make bench-train` on {device}, torch {torch.__version__}. The recipe demo_pretrain, a",
        f"batch of {first.batch_size} on two workers of one thread, {STEPS} steps each.",
        "",
        "| how | ms a step | over the bare loop | waiting for data |",
        "|---|---|---|---|",
        f"| bare torch loop, DDP, before and after | {', '.join(f'{1000 * each:.0f}' for each in alone)} | | |",
    ]
    for way, (seconds, wait) in steps.items():
        lines.append(f"| {way} | {1000 * seconds:.0f} | {seconds / base - 1:+.1%} | {wait:.2%} |")
    PAGE.write_text("\n".join([*lines, ""]))
    print(PAGE.read_text(), file=sys.stdout)


if __name__ == "__main__":
    main()
