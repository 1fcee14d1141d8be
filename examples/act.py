"""A policy acts, one step at a time: ``python examples/act.py models:/my-policy/1 drawer-close``.

A robot of your own takes the simulator's place: it gives the same observations and executes the same actions.
"""

from __future__ import annotations

import sys

from infra.simulators.face import load_suite
from pipelines.models.policy import Policy
from pipelines.models.session import Session


def main(model: str, task: str, seed: int = 0) -> bool:
    """Run one episode of a Meta-World task; return whether it succeeded."""
    policy, suite = Policy.of(model), load_suite("metaworld")
    policy.accept(suite.INTERFACE, "Meta-World")  # the same cameras, proprioception and actions as in training?
    simulator = suite.make(task, policy.image_size)
    session = Session(policy, seed)
    observation, _ = simulator.reset(seed=seed)
    for step in range(suite.HORIZON):
        action = session.act(observation, simulator.instruction)
        observation, _, terminated, truncated, info = simulator.step(action)
        if info["success"]:
            print(f"solved at step {step}")
        if info["success"] or terminated or truncated:
            break
    simulator.close()
    return bool(info["success"])


if __name__ == "__main__":
    main(*sys.argv[1:3])
