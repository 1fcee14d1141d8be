"""``uwm evaluate``: evaluate a model on held-out episodes (open loop) and in a simulator (closed loop).

Open loop: action error in policy and inverse-dynamics mode, and PSNR of forward dynamics between its floor (a copy of
the current frame) and its ceiling (the true future frame through the VAE), for the modes that the model has. Closed
loop: success rate with its interval, and a video of every episode. Results go to a folder and to the model's MLflow
run.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infra import tracking
from pipelines.console import say
from pipelines.evaluate.open_loop import open_loop
from pipelines.evaluate.rollouts import closed_loop, find_suite
from pipelines.models.policy import Policy
from pipelines.outputs import check_writable


def evaluate(
    model: str,
    store_uri: str | None,
    env: str | None,
    episodes: int,
    output: Path,
    embodiment: str | None = None,
    seed: int = 1000,
    fast: bool = False,
    label: str | None = None,
) -> dict[str, Any]:
    """Evaluate MODEL on the store, in the simulator or both; write and return ``output/evaluation.json``.

    ``label`` names the model in progress lines (default: MODEL itself).
    """
    check_writable(output, "--output")
    suite = find_suite(env) if env else None
    policy = Policy.of(model, store_uri, embodiment, fast)
    if suite:
        policy.accept(suite.INTERFACE, str(env))
    run_id = policy.settings.run_id
    if run_id and not tracking.has_run(run_id):
        say(f"run {run_id} is not in MLflow at {tracking.place()}: the results are only written to {output}")
        run_id = None
    output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "model": model,
        "run_id": policy.settings.run_id,
        "embodiment": policy.embodiment,
        "cameras": list(policy.spec.seen),
        "seed": seed,
        "fast": fast,
    }
    metrics: dict[str, float] = {}
    if store_uri:
        result, report["pictures"] = open_loop(policy, store_uri, output)
        report["open_loop"] = asdict(result)
        metrics |= {name: float(value) for name, value in asdict(result).items() if value is not None}
    if env:
        rollouts, report["videos"] = closed_loop(policy, env, episodes, output, seed, label or model)
        report["closed_loop"] = asdict(rollouts)
        metrics[f"success_rate.{env.replace(':', '.')}"] = rollouts.success_rate
    (output / "evaluation.json").write_text(json.dumps(report, indent=1))
    if fast:  # a different policy as far as the promotion gate is concerned
        affected = ("action_error_policy", "success_rate")
        metrics = {f"fast.{name}" if name.startswith(affected) else name: value for name, value in metrics.items()}
    if run_id:
        try:
            tracking.log_metrics(run_id, metrics, policy.settings.step)
            tracking.log_folder(run_id, output, "evaluation")
            for part, files in (("open_loop", "pictures"), ("closed_loop", "videos")):  # a later evaluation keeps these
                if part in report:
                    task = env.partition(":")[2] if env and part == "closed_loop" else ""
                    name = f"evaluation/{part}{task and f'-{task}'}{'-fast' * fast}.json"
                    told = {key: report[key] for key in ("model", "embodiment", "cameras", "seed", "fast", part, files)}
                    tracking.log_text(run_id, json.dumps(told, indent=1), name)
        except ConnectionError as error:
            say(f"not logged, so that uwm promote will not know of it: {error}")
    return report


def timestamped(folder: Path) -> Path:
    """Return the path of a new evaluation's folder inside ``folder``."""
    return folder / time.strftime("evaluation-%Y%m%d-%H%M%S")
