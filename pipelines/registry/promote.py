"""``uwm promote``: move the alias to a version that passes the gate.

The gate compares the success rates that ``uwm evaluate`` logged to the runs of two versions. The candidate's must not
be below the champion's on any task that the champion was evaluated on; without a champion, not below a floor.
"""

from __future__ import annotations

from dataclasses import dataclass

from infra import registry, tracking
from pipelines.errors import Refused
from preprocessing.errors import UserError

SUCCESS = "success_rate."


@dataclass
class Promotion:
    name: str
    alias: str
    version: str
    previous: str | None
    reason: str


def promote(name: str, version: str, alias: str = "champion", floor: float = 0.5) -> Promotion:
    """Move ``alias`` to this version of the registered model.

    Raises Refused if the gate refuses it, UserError if there is no such version.
    """
    if not registry.ALIAS.fullmatch(alias):
        raise UserError(f"--alias {alias!r}: no name for an alias; use letters, digits, - and _, but not latest or v1")
    tracking.connect()
    with registry.promotion_lock(name):
        candidate = registry.version_of(name, version)
        if candidate is None:
            raise UserError(
                f"{name} version {version}: not in the registry at {tracking.place()}; "
                f"register one with uwm register RUN {name}"
            )
        current = registry.version_of(name, alias)
        reason = _judge(name, candidate, current, floor)
        previous = current[0] if current else None
        registry.move_alias(name, alias, version, {"gate": reason, "previous_champion": previous or "none"})
    return Promotion(name, alias, version, previous, reason)


def _judge(name: str, candidate: tuple[str, str], current: tuple[str, str] | None, floor: float) -> str:
    scores = _scores(candidate[1])
    if not scores:
        raise Refused(
            f"{name} version {candidate[0]} has no success rate; evaluate it first: "
            f"uwm evaluate models:/{name}/{candidate[0]} --env SUITE:TASK"
        )
    bars = _scores(current[1]) if current else {}
    champion = f"version {current[0]}" if current and bars else None
    lines = []
    for task, bar in (bars or dict.fromkeys(scores, floor)).items():
        if task not in scores:
            raise Refused(f"{name} version {candidate[0]} was not evaluated on {task}, but {champion} was")
        compared = (
            f"{scores[task]:.0%} success on {task}; {f'{champion} has' if champion else 'the floor is'} {bar:.0%}"
        )
        if scores[task] < bar:
            raise Refused(f"{name} version {candidate[0]} is worse: {compared}")
        lines.append(compared)
    return "; ".join(lines)


def _scores(run_id: str) -> dict[str, float]:
    found = registry.metrics(run_id)
    return {key.removeprefix(SUCCESS): value for key, value in found.items() if key.startswith(SUCCESS)}
