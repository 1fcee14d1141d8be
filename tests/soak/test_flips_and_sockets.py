"""Every flipped bit of a checkpoint or a store is found, and nothing that starts on this machine is open to others."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import LOOPBACK, listening, wait_for
from helpers.rows import fill
from helpers.soak import FLIPS, chances

from infra.engine import ParameterSlice
from pipelines.models import checkpoint
from pipelines.recipe import load_recipe
from pipelines.train.checkpoints import RunFolder
from pipelines.train.pretrain import plan
from pipelines.train.state import save_state
from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore

TINY = [
    "model.width=32", "model.depth=1", "model.heads=2", "model.registers=1", "model.timestep_width=16",
    "model.frame_width=8", "model.condition_width=16", "validation_share=0.2",
]  # fmt: skip


@pytest.mark.soak
def test_flipped_bits_are_found_wherever_they_are(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    fill(store, ["a", "b", "c"], cameras=("front", "wrist"))
    settings = plan(store.uri, load_recipe("small", TINY))
    weights = settings.build().state_dict()
    checkpoint.save(tmp_path / "policy", weights, settings)
    run = RunFolder(str(tmp_path / "run"))

    def build(folder: Path) -> None:
        checkpoint.write(folder, weights, settings.model_copy(update={"checksums": True}))
        for rank in range(2):
            save_state(folder / f"state-{rank}.safetensors", [ParameterSlice("w", rank, torch.randn(99), {})])

    run.write(8, build)
    run.commit(8, {"validation_loss": 0.25, "tally": [[1.5]]})

    def of_policy() -> Any:
        try:
            return checkpoint.load_intact(tmp_path / "policy").model_dump_json()
        except UserError:
            return None

    def of_run() -> Any:
        [about] = run._listed().values()
        return None if isinstance(about, str) or run.damage(8, about) else about

    def of_store() -> Any:
        try:
            snapshot = LatentStore.open(store.uri).snapshot()
            if list(snapshot.verify()):
                return None
            rows = snapshot.episodes().to_pylist()
            return rows, [snapshot.read([row["steps"]]).tobytes() for row in rows]
        except BaseException:  # including Icechunk's panics
            return None

    chance = chances("flips")
    readers: dict[str, Callable[[], Any]] = {"policy": of_policy, "run": of_run, "store": of_store}
    good = {name: read() for name, read in readers.items()}
    assert all(value is not None for value in good.values())
    for number in range(FLIPS):
        place = [*readers][number % 3]
        path = chance.choice([path for path in sorted((tmp_path / place).rglob("*")) if path.is_file()])
        kept = path.read_bytes()
        bit = chance.randrange(8 * len(kept))
        path.write_bytes(kept[: bit // 8] + bytes([kept[bit // 8] ^ 1 << bit % 8]) + kept[bit // 8 + 1 :])
        # What reads as it did before, such as another white space, is no damage.
        assert readers[place]() in (None, good[place]), f"bit {bit} of {path} is not found"
        path.write_bytes(kept)
    assert {name: read() for name, read in readers.items()} == good


@pytest.mark.soak
def test_a_training_listens_to_this_machine_alone(tmp_path: Path) -> None:
    fill(LatentStore.create(str(tmp_path / "store")), [f"episode-{i}" for i in range(12)], frames=40)
    sizes = [*TINY, "workers=2", "batch_size=8", "steps=100000", "checkpoint_every=100000", "log_every=1"]
    arguments = ["--store", tmp_path / "store", "--output", tmp_path / "runs", *sizes]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}", "UWM_PROGRESS_SECONDS": "0.1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "from pipelines.cli import main; main()", "pretrain", *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=environment,
        )
    seen: set[tuple[str, str]] = set()

    def found() -> bool:
        seen.update(listening(process.pid))
        return bool(re.search(r"loss \d", (tmp_path / "log").read_text()))

    try:
        wait_for(found, process, seconds=300)
        found()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)
    assert len(seen) > 4 and not [each for each in seen if each[1] not in LOOPBACK], seen
