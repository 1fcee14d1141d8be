"""The interface of every simulator: Gymnasium's ``reset`` and ``step``, with the observations of a real robot.

To add a suite, write a module that satisfies :class:`Suite` and name it in ``SUITES``.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol, TypedDict

import numpy as np

from preprocessing.contracts.interface import Interface

SUITES = {"metaworld": "infra.simulators.metaworld"}


class Observation(TypedDict):
    """What a real robot observes; never the state of objects.

    ``images`` uint8 ``[H, W, 3]`` upright by camera, empty while rendering is off; ``proprio`` float32 ``[D]`` by name.
    """

    images: dict[str, np.ndarray]
    proprio: dict[str, np.ndarray]


class Simulator(Protocol):
    """One task, with the signatures of ``gymnasium.Env`` (https://gymnasium.farama.org/api/env/)."""

    instruction: str
    rendering: bool  # may be switched off between steps: rendering costs ten times the physics

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode. The initial state depends on ``seed`` only; None draws a new one."""
        ...

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Execute an action float32 ``[A]``; return (observation, reward, terminated, truncated, info).

        ``info["success"]`` tells whether the task is solved at this step.
        """
        ...

    def close(self) -> None: ...


class Suite(Protocol):
    """A module of tasks that share a robot."""

    @property
    def INSTRUCTIONS(self) -> dict[str, str]:
        """Each task's instruction, by the task's name."""

    @property
    def INTERFACE(self) -> Interface:
        """The observations a policy must read, and the actions it must output."""

    @property
    def HORIZON(self) -> int:
        """Steps after which an episode is truncated."""

    def make(self, task: str, image_size: int) -> Simulator:
        """Return a simulator of one of the tasks, with square frames of ``image_size`` pixels."""
        ...


def load_suite(name: str) -> Suite:
    """Return the suite ``name``. Raises KeyError if it is unknown, ModuleNotFoundError if its packages are missing."""
    suite: Suite = importlib.import_module(SUITES[name])
    return suite


def episode_seed(seed: int, episode: int) -> int:
    """Return the seed of an episode's initial state, from the evaluation's seed and the episode's number."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0])
