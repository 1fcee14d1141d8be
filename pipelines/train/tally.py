"""Losses by source since they were last logged. They stay on the device, and are reduced only when read."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from uwm_model.objective import Losses


class Tally:
    """Sums and counts of the two losses, float64 [S+1, 4]: one row per source, and a last one for the whole batch."""

    def __init__(self, sources: list[str], device: torch.device, carried: list[list[float]] | None):
        """``carried`` holds the sums that a checkpoint saved in the middle of a logging interval."""
        self._sources = sources
        self._sums = torch.zeros(len(sources) + 1, 4, dtype=torch.float64, device=device)
        if carried:
            self._sums += torch.tensor(carried, dtype=torch.float64, device=device)

    def add(self, source: Tensor, passes: list[Losses], world: int) -> tuple[Tensor, Tensor]:
        """Add one step of this worker; ``source`` int64 [B]. Return the losses by sample (action, video), float [B]."""
        by_sample = (
            torch.cat([losses.action_per_sample for losses in passes]),
            torch.cat([losses.video_per_sample for losses in passes]),
        )
        for column, each, name in ((0, by_sample[0], "action"), (2, by_sample[1], "video")):
            there = each.isfinite()  # otherwise the sample lacks the modality, or this kind of model has no such loss
            sums = torch.stack([each.double().where(there, 0), there.double()], dim=1)
            self._sums[:-1, column : column + 2].index_add_(0, source, sums)
            total = sum(getattr(losses, name).double() for losses in passes)
            self._sums[-1, column] += total / (world * len(passes))
            self._sums[-1, column + 1] += 1 / world
        return by_sample

    def summed(self) -> list[list[float]]:
        """Return the sums over all workers, without resetting them. Collective."""
        sums = self._sums.clone()
        torch.distributed.all_reduce(sums)
        return sums.tolist()

    def means(self) -> dict[str, float]:
        """Return mean losses, named like ``loss_action.SOURCE``, and reset. Collective."""
        rows = self.summed()
        self._sums.zero_()
        found: dict[str, float] = {}
        for name, row in zip([*self._sources, None], rows, strict=True):
            for modality, (total, count) in (("action", row[:2]), ("video", row[2:])):
                if count:
                    suffix = "." + re.sub(r"[^\w.-]", "_", name) if name else ""
                    found[f"loss_{modality}{suffix}"] = total / count
        return found
