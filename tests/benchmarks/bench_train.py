"""``make bench-train``: overhead of Ray, DeepSpeed, metrics and checkpoints. Writes docs/benchmarks/training.md.

The demo's pretraining on random latents, on single-threaded workers, with its metrics and checkpoints, is compared with
a bare loop in torch: as many processes, DistributedDataParallel, the same optimizer with its average of the weights,
batches in memory. A machine's speed drifts, so each training is compared with the bare loops just before and just after
it. (Pausing one while the other runs would not work: Ray's processes wake a hundred times a second and catch up after a
pause.)
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from helpers.rows import Made, commit, write_episodes
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from infra import tracking
from pipelines.models.batch import to_batch
from pipelines.models.checkpoint import Settings
from pipelines.models.data import dataset
from pipelines.recipe import Recipe, load_recipe
from pipelines.train.pretrain import plan
from pipelines.train.setup import optimizer_settings
from preprocessing.store.store import LatentStore
from uwm_model.optimizer import adamw

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "training.md"
EPISODES, FRAMES = 32, 100
FIRST, STEPS = 100, 600  # measured from the first to the second, with one checkpoint in between
BARE_FIRST, BARE_STEPS = 20, 220
ROUNDS = 2
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


def bare(rank: int, port: int, settings: Settings, recipe: Recipe, answers: Any) -> None:
    """Train with plain torch, in one of the processes; the first one reports its seconds per step."""
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
    for step, batch in zip(range(BARE_STEPS), itertools.cycle(batches), strict=False):
        if step == BARE_FIRST:
            began = time.monotonic()
        optimizer.zero_grad()
        model(batch, generator).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimizer.step()
        schedule.step()
    if rank == 0:
        answers.put((time.monotonic() - began) / (BARE_STEPS - BARE_FIRST))
    torch.distributed.destroy_process_group()


def bare_step(settings: Settings, recipe: Recipe) -> float:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = mp.get_context("spawn").SimpleQueue()
    mp.spawn(bare, (port, settings, recipe, answers), nprocs=recipe.most_workers)
    return answers.get()


def whole_step(store: str, root: Path, overrides: list[str]) -> tuple[float, float]:
    """Return a training's seconds per step, and the share of its time spent waiting for data."""
    command = [sys.executable, "-c", "from pipelines.cli import main; main()", "pretrain", "--store", store, "--json"]
    command += ["--recipe", "demo_pretrain", "--output", str(root / "runs"), "--new", *overrides]
    training = subprocess.run(command, capture_output=True, text=True)
    assert training.returncode == 0, training.stderr[-2000:]
    run = json.loads(training.stdout.splitlines()[-1])["run_id"]
    points = {point.step: point for point in tracking.MlflowClient().get_metric_history(run, "data_wait_share")}
    seconds = (points[STEPS].timestamp - points[FIRST].timestamp) / 1000
    return seconds / (STEPS - FIRST), points[STEPS].value


def measure(way: str, store: str, root: Path, bar: tqdm) -> str:
    """Return the row of the page."""
    overrides = [*WAYS[way], f"steps={STEPS}"]
    recipe = load_recipe("demo_pretrain", overrides)
    settings = plan(store, recipe)
    bare_steps, steps, waits = [bare_step(settings, recipe)], [], []
    for _ in range(ROUNDS):
        step, wait = whole_step(store, root, overrides)
        steps.append(step)
        waits.append(wait)
        bare_steps.append(bare_step(settings, recipe))
        bar.update()
    over = [2 * step / sum(around) - 1 for step, around in zip(steps, itertools.pairwise(bare_steps), strict=True)]
    shown = [", ".join(f"{seconds * 1000:.0f}" for seconds in column) for column in (bare_steps, steps)]
    shown += [", ".join(f"{share:+.1%}" for share in over), f"{max(waits):.2%}"]
    return f"| {way} | {' | '.join(shown)} |"


def main() -> None:
    with tempfile.TemporaryDirectory() as made, tqdm(total=ROUNDS * len(WAYS), unit="training") as bar:
        root, rows = Path(made), []
        os.environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}", "UWM_CACHE": str(root / "cache")}
        tracking.connect()
        store = make_store(root)
        for way in WAYS:
            bar.set_description(way)
            rows.append(measure(way, store, root, bar))
            bar.write(rows[-1], file=sys.stderr)
    recipe = load_recipe("demo_pretrain", [])
    lines = [
        "# Training overhead",
        "",
        f"`make bench-train` on {os.cpu_count()} CPU cores, torch {torch.__version__}. Recipe demo_pretrain, a batch",
        f"of {recipe.batch_size} on two single-threaded workers, {STEPS - FIRST} steps with one checkpoint. Each of",
        f"{ROUNDS} trainings is compared with bare torch loops (DDP) just before and just after it.",
        "",
        "| how | ms a step of the bare loops | ms a step | over them | waiting for data |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "Two workers fill both cores, so Ray's own processes and the frames drawn at a checkpoint slow them down. One",
        "worker leaves a core free, as is usual next to a GPU.",
    ]
    PAGE.write_text("\n".join([*lines, ""]))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
