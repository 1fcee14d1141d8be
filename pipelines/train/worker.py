"""The training loop, as every Ray Train worker runs it.

Batches, noise and timesteps are functions of (seed, step, position in the global batch), and a checkpoint holds
everything else, so a resumed run continues as if it had not stopped. With another number of workers only rounding
differs.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from infra import engine, tracking
from pipelines.models import checkpoint
from pipelines.models.checkpoint import Settings
from pipelines.models.data import dataset
from pipelines.recipe import Recipe
from pipelines.train.agreement import Agreed, Agreement
from pipelines.train.checkpoint_writer import CheckpointWriter
from pipelines.train.checkpoints import RunFolder
from pipelines.train.mlflow_logger import MlflowLogger
from pipelines.train.setup import loss_divisors, passes, set_up
from pipelines.train.state import save_state
from pipelines.train.tally import Tally
from pipelines.train.trainable import adapters, merged
from pipelines.train.validation import MEASURED, Validation
from preprocessing.dataset.loader import Samples
from preprocessing.dataset.prefetch import Prefetch, tensors
from preprocessing.errors import UserError
from uwm_model.augment import augment
from uwm_model.batch import Batch
from uwm_model.randomness import SampleGenerators

JUDGED_BY = "validation_loss"  # lowest for the best checkpoint


class Diverged(Exception):
    """A loss or a weight is not finite, so training cannot continue."""


class Preempted(Exception):
    """A worker is about to lose its machine, and all workers have saved. The others may resume."""


def work(config: dict[str, Any]) -> None:
    """Train from the run's newest checkpoint, or from the start, until the last step or a request to stop."""
    context = ray.train.get_context()
    worker = Worker(config, context.get_world_rank(), context.get_world_size())
    try:
        worker.run()
    finally:
        worker.close()


@dataclasses.dataclass
class FinishedStep:
    """One step of this worker's share of the batch."""

    step: int
    batch: Batch
    episode: np.ndarray  # int64 [B]
    loss: Tensor  # float []
    action_per_sample: Tensor  # float [B], NaN for a sample without actions
    video_per_sample: Tensor  # float [B], NaN for a sample without video


class Worker:
    """One worker. ``config`` is what pipelines.train.driver.train passes to all workers."""

    def __init__(self, config: dict[str, Any], rank: int, world: int):
        self.rank, self.world = rank, world
        self.settings = settings = Settings.model_validate_json(config["settings"])
        self.recipe = recipe = Recipe.model_validate_json(config["recipe"])
        self.folder, self.meter, self.identity = (
            RunFolder(config["folder"]),
            config["meter"],
            config.get("identity", ""),
        )
        tracking.connect(config["tracking_uri"])
        if torch.cuda.is_available() != (recipe.device == "gpu"):
            found = "finds no GPU; check the driver, or set device=cpu" if recipe.device == "gpu" else "sees a GPU"
            raise UserError(f"device: this run trains on {recipe.device.upper()}s, but a worker {found}")
        if not torch.cuda.is_available():
            torch.set_num_threads(1)  # a worker has one core
        self.passes = passes(recipe, world)
        self.writer = CheckpointWriter(self.folder, rank == 0, world)
        self.agreement = Agreement(rank, self.meter, self.writer)
        if rank == 0:
            for line in self.folder.sweep():
                self.meter.say.remote(line)
        complete = self.folder.complete()
        self.step = self.agreement.newest(max(complete, default=0))

        training = set_up(settings, recipe, self.folder, self.step, world)
        self.engine, self.averaged = training.engine, training.averaged
        self.device = self.engine.device
        self.dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32

        self.data = dataset(settings, validation=False, recipe=recipe, tell=self._report_copying)
        self.counts = loss_divisors(self.averaged, self.data, recipe, world).to(self.device)
        self.validation = Validation(settings, recipe, self.averaged, rank, world, self._report_copying)
        self.logger = MlflowLogger(settings.run_id, self.meter.say.remote) if rank == 0 and settings.run_id else None
        if self.logger:  # whoever wrote the checkpoint may have died before it logged these
            for step, about in complete.items():
                measured = {name: about[name] for name in MEASURED if name in about}
                if 0 < step <= self.step and measured:
                    self.logger.add(measured, step)
        carried = complete.get(self.step, {}).get("tally") if rank == 0 else None
        self.tally = Tally(self.data.source_names, self.device, carried)

    def run(self) -> None:
        recipe = self.recipe
        drawn = self.data.batches(recipe.seed, recipe.batch_size, self.step, self.rank, self.world)
        with Prefetch((Batch(**tensors(samples.arrays)), samples) for samples in drawn) as batches:
            self._train(batches)

    def close(self) -> None:
        if self.logger:
            self.logger.close()

    def _train(self, batches: Iterator[tuple[Batch, Samples]]) -> None:
        recipe = self.recipe
        began = marked = time.monotonic()
        first = self.step
        last: FinishedStep | None = None
        following = next(batches)
        if self.rank == 0:
            self.meter.put.remote(first=self.step, starting=0)
        waited = time.monotonic() - began
        while self.step < recipe.steps:
            batch, samples = following
            fetching = time.monotonic()
            if self.step + 1 < recipe.steps:
                following = next(batches)
            waited += time.monotonic() - fetching
            pending = self.agreement.begin()
            done = self._train_step(batch, samples)
            agreed = self._report(self.agreement.end(pending))
            if last:  # one step late, so that reading the loss does not wait for the step just queued
                self._check(last)
            self.step, last = self.step + 1, done
            now = time.monotonic()
            if self.step % recipe.log_every == 0 or self.step == recipe.steps:
                self._log((self.step - first) * recipe.batch_size / (now - marked), waited / (now - began))
                marked, first = now, self.step
            stops = agreed.preempted or agreed.stopped
            if stops or self.step % recipe.checkpoint_every == 0 or self.step == recipe.steps:
                self._check(done)
                self._save(judge=not stops or self.step == recipe.steps)
                if stops or self.step == recipe.steps:
                    self._wait_for_the_writer()
                if agreed.preempted:
                    raise Preempted(f"a machine is being preempted; saved step {self.step}")
                if agreed.stopped:
                    return

    def _report(self, agreed: Agreed) -> Agreed:
        """Report a checkpoint that has just become complete, or has failed."""
        if self.rank == 0 and agreed.saved is not None:
            self.folder.prune(self.recipe.keep_last, JUDGED_BY)
            self.meter.put.remote(saved=agreed.saved)
        if self.rank == 0 and agreed.problem:
            self.meter.say.remote(agreed.problem)
        return agreed

    def _train_step(self, batch: Batch, samples: Samples) -> FinishedStep:
        """Take one optimizer step, in as many passes as the recipe's micro-batches require."""
        random = SampleGenerators.of(self.recipe.seed, self.step + 1, samples.position.tolist())
        torch.manual_seed(self.recipe.seed + self.step)  # for layers that draw random numbers themselves
        batch = batch.to(self.device, self.dtype)
        batch = augment(batch, self.settings.model.latent_size, self.recipe.augment, random)
        size, found = len(batch.embodiment), []
        for number in range(self.passes):
            part = slice(size * number // self.passes, size * (number + 1) // self.passes)
            losses = self.engine(batch[part], random[part], self.counts)
            self.engine.backward(losses.total)
            self.engine.step()
            found.append(losses)
        loss = torch.stack([losses.total.detach() for losses in found]).sum()
        source = torch.from_numpy(self.data.source[samples.episode]).to(self.device)
        action, video = self.tally.add(source, found, self.world)
        return FinishedStep(self.step + 1, batch, samples.episode, loss, action, video)

    def _check(self, done: FinishedStep) -> None:
        """Raise Diverged if the loss is not finite, naming the episodes."""
        if math.isfinite(done.loss.item()):
            return
        there = (done.batch.action_mask.any(dim=(1, 2)), done.batch.camera_mask.any(dim=1))
        each = (done.action_per_sample, done.video_per_sample)
        bad = (there[0] & ~each[0].isfinite()) | (there[1] & ~each[1].isfinite())
        of_bad = {self.data.rows[i]["id"] for i in done.episode[bad.cpu().numpy()]}
        good = self.folder.newest()
        kept = f"the last good checkpoint is at step {good}" if good else "there is no checkpoint"
        raise Diverged(
            f"step {done.step}: the loss is {done.loss.item():g} in {int(bad.sum())} of {len(bad)} samples; {kept}; "
            f"try a lower learning_rate, or look at these episodes: {', '.join(sorted(of_bad))}"
        )

    def _log(self, rate: float, waiting: float) -> None:
        metrics = self.tally.means()
        if self.rank != 0:
            return
        metrics |= {
            "loss": self.averaged.total_loss(metrics["loss_action"], metrics["loss_video"]),
            "learning_rate": self.engine.get_lr()[0],
            "gradient_norm": float(self.engine.get_global_grad_norm() or 0.0),
            "samples_per_second": rate,
            "data_wait_share": waiting,
        }
        self.meter.put.remote(step=self.step, loss=metrics["loss"], rate=rate, wait=waiting)
        if self.logger:
            self.logger.add(metrics, self.step)

    def _save(self, judge: bool) -> None:
        """Start writing a checkpoint: the averaged weights, and everything needed to resume.

        With ``judge`` the averaged weights are validated first; before a preemption there is no time for that.
        """
        self._wait_for_the_writer()
        kept = [part.copied() for part in engine.parts(self.engine)]
        for part in kept:
            if not part.weight.isfinite().all():
                raise Diverged(f"step {self.step}: {part.name} is not finite; try a lower learning_rate")
        by_name = dict(self.averaged.named_parameters())
        with torch.no_grad():
            for name, values in engine.whole(self.engine, "average" if self.recipe.ema_decay else "weight"):
                by_name[name].copy_(values)
        metrics = self.validation.losses() if judge else {}
        about = {"identity": self.identity, "workers": self.world, "seed": self.recipe.seed, **metrics}
        about["tally"] = self.tally.summed()
        if judge and self.logger:
            self.logger.add(metrics, self.step)
            if found := self.validation.predicted_frames():
                self.logger.add_image(*found, self.step)
        averaged = {}
        if self.rank == 0:
            averaged = {name: values.to("cpu", copy=True) for name, values in self.averaged.state_dict().items()}
        settings = self.settings.model_copy(update={"step": self.step, "checksums": True})

        def build(folder: Path) -> None:
            if self.rank == 0:
                checkpoint.write(folder, merged(averaged, self.recipe), settings, adapters(averaged))
                if self.logger:
                    self.logger.flush()
            if self.rank == 0 or self.recipe.zero_stage:  # in stage 0 all workers hold the same
                save_state(folder / f"state-{self.rank}.safetensors", kept)

        self.writer.begin(self.step, about, build)

    def _wait_for_the_writer(self) -> None:
        while self.writer.busy:
            self._report(self.agreement.end(self.agreement.begin()))
            time.sleep(0.01)

    def _report_copying(self, done: int, total: int) -> None:
        if self.rank == 0:
            self.meter.put.remote(copied=done, copying=total)
