"""What the workers of a training agree on in every step: loss divisors, whether to stop, what became of a checkpoint.

One all-reduce a step carries it all. It runs on the CPU group while the device computes, so it never synchronises the
device and costs no step time.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import ray
import torch
from torch import Tensor

from pipelines.train.checkpoint_writer import CheckpointWriter
from pipelines.train.preemption import told_to_stop

POLL_SECONDS = 1.0  # between asking whether the driver wants to stop
RAY_SECONDS = 5.0  # between asking Ray whether a node of these workers will be taken away


class Agreed(NamedTuple):
    """The same on every worker, ``report`` on the first one alone."""

    counts: Tensor  # float32 [2]: the global batch's loss divisors, divided by the number of shares
    preempted: bool  # a worker is about to lose its machine
    stopped: bool  # the driver wants to stop
    saved: int | None  # the step of a checkpoint that is now complete
    problem: str | None  # why a checkpoint is not


class Pending(NamedTuple):
    """An all-reduce under way."""

    sums: Tensor  # float64 [7]
    work: Any


class Agreement:
    """One worker's side. All workers call ``begin`` and ``end`` equally often."""

    def __init__(self, rank: int, shares: int, meter: Any, writer: CheckpointWriter):
        self._rank, self._shares, self._meter, self._writer = rank, shares, meter, writer
        self.group = torch.distributed.new_group(backend="gloo")
        self._answer: Any = None  # the driver's, not there yet
        self._polled_at = self._asked_ray_at = time.monotonic()

    def newest(self, step: int) -> int:
        """Return the first worker's ``step``: a checkpoint may appear between two workers' looks."""
        first = torch.tensor([step])
        torch.distributed.broadcast(first, 0, group=self.group)
        return int(first)

    def begin(self, counts: Tensor) -> Pending:
        """Start summing ``counts`` float [2] (Model.loss_counts of this worker's share), flags and votes."""
        asks_ray = self._rank == 0 and time.monotonic() - self._asked_ray_at > RAY_SECONDS
        flags = [told_to_stop.is_set(), asks_ray, self._driver_stops(), *self._writer.votes()]
        sums = torch.cat([counts.double(), torch.tensor([*map(float, flags)], dtype=torch.float64)])
        return Pending(sums, torch.distributed.all_reduce(sums, group=self.group, async_op=True))

    def end(self, pending: Pending) -> Agreed:
        """Wait for the sums. The worker that finds a checkpoint complete gives it its name."""
        pending.work.wait()
        preempted, asks_ray, stopped, written, failed = pending.sums[2:].tolist()
        if asks_ray:  # a collective call: all workers make it in the same step
            self._asked_ray_at = time.monotonic()
            preempted += ray.train.get_preemption_info() is not None
        saved, problem = self._writer.settle(int(written), int(failed))
        counts = (pending.sums[:2].clamp(min=1) / self._shares).float()
        return Agreed(counts, preempted > 0, stopped > 0, saved, problem)

    def _driver_stops(self) -> bool:
        """The first worker asks once a second and never waits for the answer."""
        if self._rank != 0:
            return False
        if self._answer is None and time.monotonic() - self._polled_at > POLL_SECONDS:
            self._answer, self._polled_at = self._meter.read.remote(), time.monotonic()
        if self._answer is None or not ray.wait([self._answer], timeout=0)[0]:
            return False
        values, self._answer = ray.get(self._answer), None
        return bool(values.get("stop"))
