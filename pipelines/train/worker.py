"""The training loop, as every Ray Train worker runs it.

Batches, noise and timesteps are functions of (seed, step, place in the global batch), and a checkpoint holds all the
rest: a run goes on from its newest one as if nothing had happened. On another number of workers sums are rounded
differently, and nothing else changes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from infra import engine, tracking
from infra.engine import EngineSettings
from pipelines.models import checkpoint
from pipelines.models.checkpoint import Settings
from pipelines.models.data import dataset
from pipelines.recipe import Recipe
from pipelines.train.checkpoint_writer import Saver
from pipelines.train.checkpoints import RunFolder
from pipelines.train.mlflow_logger import Curves
from pipelines.train.preemption import told_to_stop
from pipelines.train.state import SavedState, save_state
from pipelines.train.trainable import adapt, adapters, merged
from pipelines.train.validation import Validation
from preprocessing.dataset.loader import Samples
from preprocessing.dataset.prefetch import Prefetch, tensors
from uwm_model.augment import augment
from uwm_model.batch import Batch
from uwm_model.blocks import Block
from uwm_model.objective import counted
from uwm_model.optimizer import OptimizerSettings, adamw
from uwm_model.randomness import SampleGenerators

JUDGED_BY = "validation_loss"  # the best checkpoint has the least
POLL_SECONDS = 1.0  # between looks at whether the driver wants to stop
RAY_SECONDS = 5.0  # between questions to Ray whether a node of these workers will be taken away


class Diverged(Exception):
    """A loss is not a number, or infinite: nothing that follows would mean anything."""


class Preempted(Exception):
    """A worker was told to stop, and all have saved: those that are left may go on."""


def work(config: dict[str, Any]) -> None:
    """Train from the run's newest checkpoint, or from the start, to the end or until told to stop."""
    context = ray.train.get_context()
    worker = Worker(config, context.get_world_rank(), context.get_world_size())
    try:
        worker.run()
    finally:
        worker.close()


@dataclasses.dataclass
class Done:
    """One step, of this worker's share of the batch."""

    step: int
    batch: Batch
    episode: np.ndarray  # int64 [B]
    loss: Tensor  # float []
    action_per_sample: Tensor  # float [B], NaN where there is none
    video_per_sample: Tensor  # the same


class Worker:
    """``config`` is what pipelines.train.driver.train hands to all workers."""

    def __init__(self, config: dict[str, Any], rank: int, world: int):
        self.rank, self.world = rank, world
        self.settings = settings = Settings.model_validate_json(config["settings"])
        self.recipe = recipe = Recipe.model_validate_json(config["recipe"])
        self.folder, self.meter = RunFolder(config["folder"]), config["meter"]
        tracking.mlflow.set_tracking_uri(config["tracking_uri"])
        if not torch.cuda.is_available():
            torch.set_num_threads(1)  # a worker is a core; more threads only fight
        self.side = torch.distributed.new_group(backend="gloo")  # numbers that no device is waited for
        self.saver = Saver(self.folder, rank == 0, world)
        if rank == 0:
            self.folder.sweep()
        about = self._newest()
        self.step = about["step"]

        torch.manual_seed(recipe.seed)
        if 0 in self.folder.complete():  # the weights that a finetuning starts from
            with self.folder.fetched(0) as start:
                model = checkpoint.load(start)[0].train()
        else:
            model = settings.build()
        adapt(model, recipe, settings.fresh)
        self.passes = math.ceil(max(1, recipe.batch_size // world) / (recipe.micro_batch_size or recipe.batch_size))
        with contextlib.ExitStack() as opened:
            saved = None
            if self.step:
                saved = opened.enter_context(SavedState(opened.enter_context(self.folder.fetched(self.step))))
                shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
                weights = {name: saved.read("weight", name).view(shapes[name]) for name in saved.names()}
                model.load_state_dict(weights, strict=False)
            self.judged = copy.deepcopy(model)  # is given the averaged weights, whole and float32
            prepare(model, recipe)
            self.engine = engine.initialize(
                model,
                *adamw(model, optimizer_settings(recipe)),
                recipe.gradient_clip,
                EngineSettings(recipe.zero_stage, recipe.precision, recipe.offload, self.passes),
            )
            if saved:
                engine.restore(self.engine, self.step, saved.read)
        self.device = self.engine.device
        self.dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32

        self.data = dataset(settings, validation=False, recipe=recipe, tell=self._copied)
        self.validation = Validation(settings, recipe, self.judged.to(self.device).eval(), rank, world, self._copied)
        self.curves = Curves(settings.run_id) if rank == 0 and settings.run_id else None
        # Since the last point of the curves: for each source, and in all, sums of the losses and numbers of them.
        self.tally = torch.zeros(len(self.data.source_names) + 1, 4, dtype=torch.float64, device=self.device)
        if rank == 0 and about.get("tally"):
            self.tally += torch.tensor(about["tally"], dtype=torch.float64, device=self.device)
        self._asked: Any = None
        self._asked_at = self._asked_ray_at = time.monotonic()

    def run(self) -> None:
        recipe = self.recipe
        drawn = self.data.batches(recipe.seed, recipe.batch_size, self.step, self.rank, self.world)
        with Prefetch((Batch(**tensors(samples.arrays)), samples) for samples in drawn) as batches:
            self._train(batches)

    def _train(self, batches: Iterator[tuple[Batch, Samples]]) -> None:
        recipe = self.recipe
        began = marked = time.monotonic()
        first = self.step
        last: Done | None = None
        following = next(batches)
        waited = time.monotonic() - began
        counts, worker_stops, driver_stops = self._agree(following[0])
        while self.step < recipe.steps:
            batch, samples = following
            fetching = time.monotonic()
            if self.step + 1 < recipe.steps:  # nobody waits for a batch after the last
                following = next(batches)
            waited += time.monotonic() - fetching
            pending = self._begin_to_agree(following[0])
            done = self._learn(batch, samples, counts)
            counts, worker_stops, driver_stops = self._agreed(pending)
            if last:  # the device has long come to it, so nobody waits
                self._check(last)
            self.step, last = self.step + 1, done
            now = time.monotonic()
            if self.step % recipe.log_every == 0 or self.step == recipe.steps:
                self._log((self.step - first) * recipe.batch_size / (now - marked), waited / (now - began))
                marked, first = now, self.step
            stops = worker_stops or driver_stops
            if stops or self.step % recipe.checkpoint_every == 0 or self.step == recipe.steps:
                self._check(done)
                self._save(judge=not stops or self.step == recipe.steps)
                if stops or self.step == recipe.steps:
                    self._wait_for_the_saver()
                if worker_stops:
                    raise Preempted(f"a machine is taken away; saved step {self.step}")
                if driver_stops:
                    return

    def close(self) -> None:
        if self.curves:
            self.curves.close()

    def _copied(self, done: int, total: int) -> None:
        if self.rank == 0:
            self.meter.put.remote(copied=done, copying=total)

    def _newest(self) -> dict[str, Any]:
        """What the newest checkpoint says of itself; all workers take the one that the first finds."""
        complete = self.folder.complete()
        step = torch.tensor([max(complete, default=0)])
        torch.distributed.broadcast(step, 0, group=self.side)
        return complete.get(int(step), {"step": int(step)})

    def _agree(self, batch: Batch | None = None) -> tuple[Tensor, bool, bool]:
        """What all workers together have to say; they wait for each other."""
        return self._agreed(self._begin_to_agree(batch))

    def _begin_to_agree(self, batch: Batch | None) -> tuple[Tensor, Any]:
        """Begin to add up what the workers have to say, while they learn."""
        action_free = self.settings.diffusion.action_free_loss and self.settings.model.kind == "uwm"
        counts = torch.zeros(2) if batch is None else counted(batch, action_free)
        asks = self.rank == 0 and time.monotonic() - self._asked_ray_at > RAY_SECONDS
        flags = [told_to_stop.is_set(), asks, self._driver_stops(), *self.saver.votes()]
        both = torch.cat([counts.double(), torch.tensor([*map(float, flags)], dtype=torch.float64)])
        return both, torch.distributed.all_reduce(both, group=self.side, async_op=True)

    def _agreed(self, pending: tuple[Tensor, Any]) -> tuple[Tensor, bool, bool]:
        """The global batch's share of one pass (objective.counted, float32 [2]), and whether anybody is to stop.

        On the way the workers learn whether all have written the checkpoint that is under way.
        """
        both, sums = pending
        sums.wait()
        worker_stops, asks, driver_stops, written, failed = both[2:].tolist()
        if asks:  # all together, for that is how Ray answers
            self._asked_ray_at = time.monotonic()
            worker_stops += ray.train.get_preemption_info() is not None
        step, problem = self.saver.settle(int(written), int(failed))
        if self.rank == 0 and step is not None:
            self.folder.prune(self.recipe.keep_last, JUDGED_BY)
            self.meter.put.remote(saved=step)
        if problem and self.rank == 0:
            self.meter.say.remote(problem)
        return (both[:2].clamp(min=1) / (self.world * self.passes)).float(), worker_stops > 0, driver_stops > 0

    def _driver_stops(self) -> bool:
        """The first worker asks once a second, and never waits for the answer."""
        if self.rank != 0:
            return False
        if self._asked is None and time.monotonic() - self._asked_at > POLL_SECONDS:
            self._asked, self._asked_at = self.meter.read.remote(), time.monotonic()
        if self._asked is None or not ray.wait([self._asked], timeout=0)[0]:
            return False
        answer, self._asked = ray.get(self._asked), None
        return bool(answer.get("stop"))

    def _learn(self, batch: Batch, samples: Samples, counts: Tensor) -> Done:
        """One step of the optimizer, in as many passes as the memory asks for."""
        random = SampleGenerators.of(self.recipe.seed, self.step + 1, samples.position.tolist())
        torch.manual_seed(self.recipe.seed + self.step)  # of what a layer may draw by itself
        batch = batch.to(self.device, self.dtype)
        batch = augment(batch, self.settings.model.latent_size, self.recipe.augment, random)
        counts, size, found = counts.to(self.device), len(batch.embodiment), []
        for number in range(self.passes):
            some = slice(size * number // self.passes, size * (number + 1) // self.passes)
            losses = self.engine(batch[some], random[some], counts)
            self.engine.backward(losses.total)
            self.engine.step()
            found.append(losses)
        share = self.world * self.passes
        loss = sum(losses.total.detach() for losses in found)
        action, video = (
            torch.cat([getattr(one, name) for one in found]) for name in ("action_per_sample", "video_per_sample")
        )
        self._count(torch.from_numpy(self.data.source[samples.episode]).to(self.device), action, video)
        for column, name in ((0, "action"), (2, "video")):
            self.tally[-1, column] += sum(getattr(one, name).double() for one in found) / share
            self.tally[-1, column + 1] += 1 / self.world
        assert isinstance(loss, Tensor)
        return Done(self.step + 1, batch, samples.episode, loss, action, video)

    def _count(self, source: Tensor, action: Tensor, video: Tensor) -> None:
        for column, each in ((0, action), (2, video)):
            there = each.isfinite()  # else the sample lacks the modality, or this kind of model has no such loss
            sums = torch.stack([each.double().where(there, 0), there.double()], dim=1)
            self.tally[:-1, column : column + 2].index_add_(0, source, sums)

    def _check(self, done: Done) -> None:
        """Raises Diverged where the loss is no number, or a weight."""
        if math.isfinite(done.loss.item()):
            return
        there = (done.batch.action_mask.any(dim=(1, 2)), done.batch.camera_mask.any(dim=1))
        each = (done.action_per_sample, done.video_per_sample)
        bad = (there[0] & ~each[0].isfinite()) | (there[1] & ~each[1].isfinite())
        of_bad = {self.data.rows[i]["id"] for i in done.episode[bad.cpu().numpy()]}
        good = self.folder.newest()
        kept = f"the last good checkpoint is of step {good}" if good else "no checkpoint was kept"
        raise Diverged(
            f"step {done.step}: the loss is {done.loss.item():g} in {int(bad.sum())} of {len(bad)} samples; {kept}; "
            f"try a lower learning_rate, or look at these episodes: {', '.join(sorted(of_bad))}"
        )

    def _log(self, rate: float, waiting: float) -> None:
        torch.distributed.all_reduce(self.tally)
        tally = self.tally.tolist()
        self.tally.zero_()
        if self.rank != 0:
            return
        metrics = {}
        for name, row in zip([*self.data.source_names, None], tally, strict=True):
            for modality, (total, count) in (("action", row[:2]), ("video", row[2:])):
                if count:
                    of_source = "." + re.sub(r"[^\w.-]", "_", name) if name else ""
                    metrics[f"loss_{modality}{of_source}"] = total / count
        metrics["loss"] = metrics["loss_action"] + metrics["loss_video"]
        metrics |= {
            "learning_rate": self.engine.get_lr()[0],
            "gradient_norm": float(self.engine.get_global_grad_norm() or 0.0),
            "samples_per_second": rate,
            "data_wait_share": waiting,
        }
        self.meter.put.remote(step=self.step, loss=metrics["loss"], rate=rate, wait=waiting)
        if self.curves:
            self.curves.add(metrics, self.step)

    def _save(self, judge: bool) -> None:
        """Begin to write a checkpoint of the averaged weights and of all that goes on from here.

        ``judge``: see how they do on the held-out windows, for which a machine that is taken away has no time.
        """
        if self.saver.busy:
            self._wait_for_the_saver()
        kept = [part.copied() for part in engine.parts(self.engine)]
        for part in kept:
            if not part.weight.isfinite().all():
                raise Diverged(f"step {self.step}: {part.name} is not finite; try a lower learning_rate")
        by_name = dict(self.judged.named_parameters())
        with torch.no_grad():
            for name, values in engine.whole(self.engine, "average" if self.recipe.ema_decay else "weight"):
                by_name[name].copy_(values)
        metrics = self.validation.losses() if judge else {}
        tally = self.tally.clone()
        torch.distributed.all_reduce(tally)
        if judge and self.curves:
            self.curves.add(metrics, self.step)
            if found := self.validation.picture():
                self.curves.picture(*found, self.step)
        about = {"workers": self.world, "seed": self.recipe.seed, "tally": tally.tolist(), **metrics}
        averaged = {}
        if self.rank == 0:
            averaged = {name: values.to("cpu", copy=True) for name, values in self.judged.state_dict().items()}
        settings = self.settings.model_copy(update={"step": self.step})

        def build(folder: Path) -> None:
            if self.rank == 0:
                checkpoint.write(folder, merged(averaged, self.recipe), settings, adapters(averaged))
                if self.curves:
                    self.curves.flush()
            if self.rank == 0 or self.recipe.zero_stage:  # in stage 0 all keep the same
                save_state(folder / f"state-{self.rank}.safetensors", kept)

        self.saver.begin(self.step, about, build)

    def _wait_for_the_saver(self) -> None:
        while self.saver.busy:
            self._agree()
            time.sleep(0.01)


def optimizer_settings(recipe: Recipe) -> OptimizerSettings:
    names = [field.name for field in dataclasses.fields(OptimizerSettings)]
    return OptimizerSettings(**{name: getattr(recipe, name) for name in names})


def prepare(model: torch.nn.Module, recipe: Recipe) -> None:
    """Its blocks as the recipe wants them computed."""
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        if recipe.activation_checkpointing:
            block.forward = functools.partial(recomputed, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        if recipe.compile:
            block.compile()
