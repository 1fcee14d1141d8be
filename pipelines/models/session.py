"""A policy running on one episode: it keeps the observed frames and the unexecuted actions of the last chunk."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pipelines.models.policy import Policy
from preprocessing.errors import UserError

EXECUTED = 8  # actions of a chunk to execute before the next query


class Session:
    """Turns observations into actions, one step at a time. Create one per episode."""

    def __init__(self, policy: Policy, seed: int = 0):
        self._policy = policy
        self._generator = torch.Generator().manual_seed(seed)
        self._observed: deque[Any] = deque(maxlen=policy.settings.model.observed_frames)
        self._queue: deque[np.ndarray] = deque()

    def act(self, observation: Any, instruction: str | None = None) -> np.ndarray:
        """Return the next action, float32 ``[A]`` in the robot's units.

        ``observation`` is {"images": {camera: uint8 [S, S, 3]}, "proprio": {name: float32 [D]}}. Call once per step.
        """
        self._observed.append(observation)
        if not self._queue:
            images, proprio = stacked(self._observed, self._policy.settings.model.observed_frames)
            [chunk] = self._policy.act(images, proprio, self._generator, instruction)
            self._queue.extend(chunk[:EXECUTED])
        return self._queue.popleft()


def stacked(observations: Sequence[Any], length: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the newest ``length`` observations as a batch of one. If there are fewer, the first is repeated.

    Images uint8 ``[1, length, S, S, 3]`` by camera, proprioception float32 ``[1, length, D]`` by name.
    """
    newest = list(observations)[-length:]
    chosen = [newest[0]] * (length - len(newest)) + newest

    def stack(part: str) -> dict[str, np.ndarray]:
        names = [name for name in chosen[-1][part] if all(name in item[part] for item in chosen)]  # a camera may fail
        try:
            return {name: np.stack([item[part][name] for item in chosen])[None] for name in names}
        except ValueError:
            shapes = {name: [np.shape(item[part][name]) for item in chosen] for name in names}
            raise UserError(f"{part}: their shapes change between steps: {shapes}") from None

    return stack("images"), stack("proprio")
