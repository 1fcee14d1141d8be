"""What training workers agree on in every step: whether to stop, whether a checkpoint is complete.

One all-reduce per step carries everything. It runs on the CPU group while the device computes, so it never synchronises
the device and costs no step time.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import ray
import torch
from torch import Tensor

from pipelines.train.checkpoint_writer import CheckpointWriter
from pipelines.train.preemption import sigterm_received

POLL_SECONDS = 1.0  # between polls of the driver for a request to stop
RAY_SECONDS = 5.0  # between polls of Ray for a notice of preemption


class Agreed(NamedTuple):
    """The result of one step's all-reduce. It is the same on every worker."""

    preempted: bool  # a worker is about to lose its machine
    stopped: bool  # the driver asked to stop
    saved: int | None  # step of a checkpoint that has just become complete
    problem: str | None  # why a checkpoint failed


class Pending(NamedTuple):
    """An all-reduce in progress."""

    sums: Tensor  # float64 [5]
    work: Any


class Agreement:
    """One worker's side. All workers must call ``begin`` and ``end`` equally often."""

    def __init__(self, rank: int, meter: Any, writer: CheckpointWriter):
        self._rank, self._meter, self._writer = rank, meter, writer
        self._group = torch.distributed.new_group(backend="gloo")
        self._answer: Any = None  # pending answer of the driver
        self._polled_at = self._asked_ray_at = time.monotonic()

    def newest(self, step: int) -> int:
        """Return the first worker's ``step``: a checkpoint may appear between two workers' looks."""
        first = torch.tensor([step])
        torch.distributed.broadcast(first, 0, group=self._group)
        return int(first)

    def begin(self) -> Pending:
        """Start summing flags and votes."""
        asks_ray = self._rank == 0 and time.monotonic() - self._asked_ray_at > RAY_SECONDS
        flags = [sigterm_received.is_set(), asks_ray, self._stop_requested(), *self._writer.votes()]
        sums = torch.tensor([*map(float, flags)], dtype=torch.float64)
        return Pending(sums, torch.distributed.all_reduce(sums, group=self._group, async_op=True))

    def end(self, pending: Pending) -> Agreed:
        """Wait for the sums. If they show that a checkpoint is complete, the first worker commits it."""
        pending.work.wait()
        preempted, asks_ray, stopped, written, failed = pending.sums.tolist()
        if asks_ray:  # collective: all workers must call it in the same step
            self._asked_ray_at = time.monotonic()
            preempted += ray.train.get_preemption_info() is not None
        saved, problem = self._writer.settle(int(written), int(failed))
        return Agreed(preempted > 0, stopped > 0, saved, problem)

    def _stop_requested(self) -> bool:
        """Whether the driver asked to stop. The first worker polls every POLL_SECONDS and never waits."""
        if self._rank != 0:
            return False
        if self._answer is None and time.monotonic() - self._polled_at > POLL_SECONDS:
            self._answer, self._polled_at = self._meter.read.remote(), time.monotonic()
        if self._answer is None or not ray.wait([self._answer], timeout=0)[0]:
            return False
        values, self._answer = ray.get(self._answer), None
        return bool(values.get("stop"))
