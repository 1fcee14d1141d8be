"""Training resumes bit for bit on the same number of workers, and up to rounding on another.

Real process groups (gloo), DeepSpeed and checkpoints; a step is done as in pipelines/train/worker.py.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from infra import engine
from infra.engine import EngineSettings
from pipelines.recipe import Recipe
from pipelines.train.checkpoints import RunFolder
from pipelines.train.setup import prepare
from pipelines.train.state import SavedState, save_state
from uwm_model.augment import augment
from uwm_model.batch import Batch
from uwm_model.config import AugmentConfig, DiffusionConfig, ModelConfig
from uwm_model.optimizer import OptimizerSettings, adamw
from uwm_model.randomness import SampleGenerators
from uwm_model.world_model import UnifiedWorldModel

HALF, END, SIZE = 3, 6, 10
MODEL = ModelConfig(
    cameras=2, latent_channels=4, latent_size=(8, 8), action_dim=3, proprio_dim=4, embodiments=2, width=32, depth=2,
    heads=2, registers=2, timestep_width=16, frame_width=16, condition_width=16, position="factored",
    current_patches=True,
)  # fmt: skip
OPTIMIZER = OptimizerSettings(3e-3, 0.01, 2, 20, 1.0, (0.9, 0.95), "cosine", ema_decay=0.9)
KINDS = {
    "float32, stage 0": EngineSettings(0),
    "float32, stage 1": EngineSettings(1),
    "float32, stage 2": EngineSettings(2),
    "float32, stage 3": EngineSettings(3),
    "bfloat16, stage 1": EngineSettings(1, "bfloat16"),
    "bfloat16, stage 2": EngineSettings(2, "bfloat16"),
    "bfloat16, stage 3": EngineSettings(3, "bfloat16"),
    "two passes": EngineSettings(2, passes=2),
    "offloaded": EngineSettings(2, offload=True),
}
BY_FOUR = ("float32, stage 1", "float32, stage 3", "bfloat16, stage 2")


def fresh() -> UnifiedWorldModel:
    torch.manual_seed(0)
    model = UnifiedWorldModel(MODEL, DiffusionConfig(prediction="sample"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return model


def global_batch(step: int) -> Batch:
    """Latents larger than the model's. Some samples have no actions, so the workers' shares differ in their counts."""
    draw = torch.Generator().manual_seed(step)
    mask = torch.ones(SIZE, 16, 3, dtype=torch.bool)
    mask[::4] = False
    cameras = torch.ones(SIZE, 2, dtype=torch.bool)
    cameras[1::3, 1] = False
    return Batch(
        current_latents=torch.randn(SIZE, 2, 2, 4, 10, 10, generator=draw),
        future_latents=torch.randn(SIZE, 2, 2, 4, 10, 10, generator=draw),
        camera_mask=cameras,
        action=torch.rand(SIZE, 16, 3, generator=draw) * mask,
        action_mask=mask,
        proprio=torch.randn(SIZE, 2, 4, generator=draw),
        proprio_mask=torch.ones(SIZE, 4, dtype=torch.bool),
        embodiment=torch.zeros(SIZE, dtype=torch.long),
    )


def train(deepspeed: Any, settings: EngineSettings, first: int, stop: int) -> list[float]:
    """Return the global loss of each step, then the last gradient norm."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    found = []
    for step in range(first, stop):
        whole = global_batch(step)
        counts = deepspeed.module.loss_counts(whole) / (world * settings.passes)
        random = SampleGenerators.of(7, step, range(rank, SIZE, world))
        mine = augment(whole[rank::world].to("cpu", dtype), MODEL.latent_size, AugmentConfig(), random)
        loss, share = torch.zeros(()), len(mine.embodiment)
        for number in range(settings.passes):
            some = slice(share * number // settings.passes, share * (number + 1) // settings.passes)
            losses = deepspeed(mine[some], random[some], counts)
            deepspeed.backward(losses.total)
            deepspeed.step()
            loss += losses.total.detach().float() / (world * settings.passes)
        torch.distributed.all_reduce(loss)
        found.append(loss.item())
    return [*found, float(deepspeed.get_global_grad_norm())]


def deepspeed_engine(model: UnifiedWorldModel, settings: EngineSettings) -> Any:
    return engine.initialize(model, *adamw(model, OPTIMIZER), OPTIMIZER.gradient_clip, settings)


def resumed(settings: EngineSettings, folder: RunFolder) -> Any:
    model = fresh()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    with folder.fetched(HALF) as fetched, SavedState(fetched) as saved:
        model.load_state_dict({name: saved.read("weight", name).view(shapes[name]) for name in saved.names()})
        deepspeed = deepspeed_engine(model, settings)
        engine.restore(deepspeed, HALF, saved.read)
    return deepspeed


def everything(deepspeed: Any) -> dict[tuple[str, str], Tensor]:
    return {
        (kind, name): values.clone()
        for kind in ("weight", *engine.STATES)
        for name, values in engine.whole(deepspeed, kind)
    }


def one_of(rank: int, world: int, port: int, root: Path, begins: bool, answers: Any) -> None:
    """For each kind of engine: train half, save and train to the end; or resume from the save."""
    address = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in address.items()})
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name in BY_FOUR if world == 4 else KINDS:
        settings = KINDS[name]
        folder = RunFolder(str(root / name))
        if begins:
            deepspeed = deepspeed_engine(fresh(), settings)
            train(deepspeed, settings, 0, HALF)
            parts = [part.copied() for part in engine.parts(deepspeed)]
            folder.write(HALF, lambda made, parts=parts: save_state(made / f"state-{rank}.safetensors", parts))
            torch.distributed.barrier()
            if rank == 0:
                folder.commit(HALF, {})
            found[name] = train(deepspeed, settings, HALF, END)
            torch.distributed.barrier()
            again = resumed(settings, folder)
            assert train(again, settings, HALF, END) == found[name], name
            assert again.get_lr() == deepspeed.get_lr()
            mine, its = everything(again), everything(deepspeed)
            assert mine.keys() == its.keys() and all(mine[key].equal(its[key]) for key in mine), name
        else:
            found[name] = train(resumed(settings, folder), settings, HALF, END)
    if world == 1:
        other = resumed(EngineSettings(3), RunFolder(str(root / "float32, stage 1")))
        found["from stage 1 to 3"] = train(other, EngineSettings(3), HALF, END)
        for stage in (1, 3):
            model = fresh()
            prepare(model, Recipe(steps=1, batch_size=2, learning_rate=1, activation_checkpointing=True))
            deepspeed = deepspeed_engine(model, EngineSettings(stage))
            train(deepspeed, EngineSettings(stage), 0, HALF)
            found[f"computed again, stage {stage}"] = train(deepspeed, EngineSettings(stage), HALF, END)
    if rank == 0:
        answers.put(found)
    torch.distributed.destroy_process_group()


def spawned(world: int, root: Path, begins: bool) -> dict[str, list[float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The processes are forks of one that has imported DeepSpeed, which takes each of seven several seconds.
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "pipelines.train.setup"])
    answers = context.SimpleQueue()
    mp.start_processes(one_of, (world, port, root, begins, answers), nprocs=world, start_method="forkserver")
    return answers.get()


@pytest.mark.slow
def test_two_workers_resume_and_one_or_four_take_over(tmp_path: Path) -> None:
    two = spawned(2, tmp_path, begins=True)
    for other in ("from stage 1 to 3", "computed again, stage 1", "computed again, stage 3"):
        two[other] = two["float32, stage 1"]
    assert set(KINDS) < set(two)
    for found in (spawned(1, tmp_path, begins=False), spawned(4, tmp_path, begins=False)):
        for name, losses in found.items():
            assert losses[0] == pytest.approx(two[name][0], abs=1e-4), name
            assert losses == pytest.approx(two[name], abs=3e-3 if "bfloat16" in name else 1e-4), name
    for name in ("float32, stage 1", "float32, stage 2", "float32, stage 3", "two passes", "offloaded"):
        assert two[name] == pytest.approx(two["float32, stage 0"], abs=1e-4), "a stage changes no result"
    assert two["bfloat16, stage 1"] == pytest.approx(two["float32, stage 0"], abs=3e-2)
