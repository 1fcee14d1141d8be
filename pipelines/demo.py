"""``uwm demo``: every stage on this machine, from simulated robot logs to a promoted policy and a report.

Each stage is the verb a user would call, on data that a robot lab would have. A second run keeps the raw data, encodes
nothing, trains again, and lets the gate compare the new policy with the earlier champion.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from infra import tracking
from infra.cluster import cluster
from pipelines.console import Printer, say
from pipelines.errors import Refused
from pipelines.evaluate.run import evaluate
from pipelines.ingest.run import ingest
from pipelines.models import checkpoint
from pipelines.recipe import load_recipe
from pipelines.record import record
from pipelines.registry.promote import Promotion, promote
from pipelines.registry.register import register
from pipelines.report.page import Stage, write_report
from pipelines.train.finetune import finetune
from pipelines.train.pretrain import pretrain
from pipelines.train.run import RunOptions
from preprocessing.store.store import LatentStore

TASKS = ["drawer-close", "button-press-topdown", "door-open"]
TASK = "button-press-topdown"  # the task for finetuning, evaluation and promotion
EPISODES_PER_TASK = 24
VIDEOS_PER_TASK = 8
ROLLOUTS = 20
NAME = f"uwm-{TASK}"


def demo(output: Path, verbose: bool = False) -> None:
    """Run every stage into ``output``, then print a table and the path of the report."""
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{output / 'mlflow.db'}")
    tracking.connect()
    raw, store, runs = output / "raw", str(output / "store"), output / "runs"
    options = RunOptions(output=runs, verbose=verbose)
    stages: list[Stage] = []

    def done(name: str, began: float, summary: str) -> None:
        stages.append(Stage(name, time.monotonic() - began, summary))
        say(f"[{name}] {summary} ({stages[-1].seconds:.0f} s)")

    began = time.monotonic()
    recorded = record(raw, TASKS, EPISODES_PER_TASK, VIDEOS_PER_TASK)
    done("record", began, recorded)

    with cluster(verbose=verbose):
        began = time.monotonic()
        report = ingest([str(raw)], store, verbose=verbose)
        done("ingest", began, f"{report.episodes['new']} new episodes, {report.frames} frames")
        began = time.monotonic()
        again = ingest([str(raw)], store, verbose=verbose)
        done("ingest again", began, f"{again.episodes['new']} new, {again.episodes['already']} already there")

        began = time.monotonic()
        pretrain_run, pretrained = pretrain(store, load_recipe("demo_pretrain", []), options)
        done("pretrain", began, f"robot logs and videos together; run {pretrain_run}")

        began = time.monotonic()
        finetune_run, finetuned = finetune(str(pretrained), store, load_recipe("demo_finetune", []), options)
        done("finetune", began, f"on {TASK}; run {finetune_run}")

    began = time.monotonic()
    evaluations = {name: runs / f"evaluation-{name}-{finetune_run[:6]}" for name in ("untrained", "finetuned")}
    env = f"metaworld:{TASK}"
    untrained = evaluate(str(_untrained(finetuned)), None, env, ROLLOUTS, evaluations["untrained"], label="untrained")[
        "closed_loop"
    ]
    results = evaluate(str(finetuned), store, env, ROLLOUTS, evaluations["finetuned"], label="finetuned")
    closed, opened = results["closed_loop"], results["open_loop"]
    done("evaluate", began, f"{closed['successes']} of {ROLLOUTS} succeed; untrained {untrained['successes']}")

    began = time.monotonic()
    version = register(finetuned, NAME)
    promotion: Promotion | None = None
    try:
        promotion = promote(NAME, version)
        verdict = f"{NAME} version {version} is champion; {promotion.reason}"
    except Refused as refusal:
        verdict = f"not promoted: {refusal}"
    done("promote", began, verdict)

    page = output / "report.html"
    write_report(
        page,
        title=f"Unified World Model demo: {TASK}",
        stages=stages,
        snapshot=LatentStore.open(store).snapshot(again.snapshot),
        runs={"pretrain": pretrain_run, "finetune": finetune_run},
        evaluations=evaluations,
        promotion=promotion,
    )
    printer = Printer()
    for line in _table(stages, untrained, closed, opened, verdict):
        printer.show(line)
    printer.show(f"report: {page}")


def _untrained(finetuned: Path) -> Path:
    """Save the same model with fresh weights as a checkpoint without a run: the baseline for the success rate."""
    settings = checkpoint.load_settings(finetuned).model_copy(update={"run_id": None, "step": 0})
    torch.manual_seed(0)
    folder = finetuned.with_name("untrained")
    checkpoint.save(folder, settings.build().state_dict(), settings)
    return folder


def _table(
    stages: list[Stage], untrained: dict[str, Any], closed: dict[str, Any], opened: dict[str, Any], verdict: str
) -> list[str]:
    rows = [(stage.name, f"{stage.seconds:.0f} s") for stage in stages]
    rows += [
        ("total", f"{sum(stage.seconds for stage in stages):.0f} s"),
        ("success, finetuned", _rate(closed)),
        ("success, untrained", _rate(untrained)),
        ("action error", f"{opened['action_error_policy']:.3f} policy, {opened['action_error_inverse']:.3f} inverse "
         f"dynamics, {opened['action_error_mean']:.3f} constant mean action"),
        ("future frames", f"{opened['psnr_forward']:.1f} dB (copied frame {opened['psnr_floor']:.1f}, "
         f"VAE {opened['psnr_ceiling']:.1f})"),
        ("verdict", verdict),
    ]  # fmt: skip
    return [f"{name:>20}  {value}" for name, value in rows]


def _rate(result: dict[str, Any]) -> str:
    return (
        f"{result['successes']} of {result['episodes']} "
        f"({result['success_rate']:.0%}, 95 % interval {result['low']:.0%} to {result['high']:.0%})"
    )
