"""``make bench-query``: latency of one policy query. Writes docs/benchmarks/query.md.

One single-threaded process runs all ways in turn, round after round, and counts its own CPU time, so that other load
on the machine is excluded or affects all alike. A ratio is the median over rounds. Weights are random, because they do
not affect time.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from uwm_model.batch import Batch
from uwm_model.config import DiffusionConfig, ModelConfig
from uwm_model.query import PolicyQuery
from uwm_model.world_model import UnifiedWorldModel

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "query.md"
DEMO = ModelConfig(
    cameras=2,
    latent_channels=4,
    latent_size=(16, 16),
    action_dim=4,
    proprio_dim=4,
    embodiments=1,
    width=128,
    depth=4,
    heads=4,
    position="factored",
    current_patches=True,
    condition_width=256,
)
LIBERO = ModelConfig(
    cameras=2,
    latent_channels=4,
    latent_size=(28, 28),
    action_dim=7,
    proprio_dim=9,
    embodiments=1,
    width=768,
    depth=12,
    heads=12,
    registers=24,
    timestep_width=512,
    observation="pixels",
    frame_width=768,
)
SIZES = {"the demo's model": (DEMO, 30), "the paper's LIBERO model": (LIBERO, 3)}  # title: (sizes, rounds)
PLAIN = "plain loop, float32, 10 steps"


def batch_of(config: ModelConfig, B: int = 1) -> Batch:
    """Return B complete samples, including what training needs."""
    V, To, (h, w) = config.cameras, config.observed_frames, config.latent_size
    return Batch(
        current_latents=torch.randn(B, V, To, config.latent_channels, h, w),
        future_latents=torch.randn(B, *config.latents_shape),
        camera_mask=torch.ones(B, V, dtype=torch.bool),
        action=torch.rand(B, *config.action_shape) * 2 - 1,
        action_mask=torch.ones(B, *config.action_shape, dtype=torch.bool),
        proprio=torch.randn(B, To, config.proprio_dim),
        proprio_mask=torch.ones(B, config.proprio_dim, dtype=torch.bool),
        embodiment=torch.zeros(B, dtype=torch.int64),
        current_pixels=torch.randint(0, 256, (B, V, To, 3, 8 * h, 8 * w), dtype=torch.uint8),
    )


def queries(model: UnifiedWorldModel) -> dict[str, PolicyQuery]:
    half = copy.deepcopy(model).to(torch.bfloat16, memory_format=torch.channels_last)
    return {
        "exact query": PolicyQuery(model),
        "keys and values kept from steps {0, 5}": PolicyQuery(model, refresh=(0, 5)),
        "keys and values kept from step 0": PolicyQuery(model, refresh=(0,)),
        "5 steps": PolicyQuery(model, 5),
        "5 steps, kept from step 0": PolicyQuery(model, 5, (0,)),
        "bfloat16": PolicyQuery(half),
        "bfloat16, 5 steps, kept from step 0": PolicyQuery(half, 5, (0,)),
        "bfloat16, 3 steps, kept from step 0": PolicyQuery(half, 3, (0,)),
    }


def ways(config: ModelConfig) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    model, batch = UnifiedWorldModel(config, DiffusionConfig()).eval(), batch_of(config)
    asked = {name: lambda query=query: query(batch) for name, query in queries(model).items()}
    return {PLAIN: lambda: model.sample("policy", batch), **asked}


def measure(title: str, config: ModelConfig, rounds: int) -> list[str]:
    times: dict[str, list[float]] = {}
    asked = ways(config)
    for number in tqdm(range(rounds + 1), title, leave=False, disable=None):
        for name, ask in asked.items():
            began = time.process_time()
            ask()
            if number:  # the first round warms up
                times.setdefault(name, []).append(time.process_time() - began)
    lines = [f"## {title[0].upper()}{title[1:]}", "", "| how | CPU ms, median | of the plain loop's |", "|---|---|---|"]
    for name, seconds in times.items():
        ratio = statistics.median(own / plain for own, plain in zip(seconds, times[PLAIN], strict=True))
        lines.append(f"| {name} | {1000 * statistics.median(seconds):.0f} | {ratio:.2f} |")
    return ["", *lines]


def main() -> None:
    torch.set_num_threads(1)
    lines = [
        "# A policy query",
        "",
        f"`make bench-query`, one thread of {os.cpu_count()} CPU cores, torch {torch.__version__}. Batch size 1.",
        "The exact query equals the plain loop up to rounding. For the error of the others on a trained policy, see",
        "[model.md](model.md#ways-to-query).",
    ]
    for title, (config, rounds) in SIZES.items():
        lines += measure(title, config, rounds)
        print("\n".join(lines), file=sys.stderr, flush=True)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join([*lines, ""]))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
