"""``make bench-step``: cost of a training step with and without the VAE. Writes docs/benchmarks/step.md.

The paper's LIBERO shape: two cameras of 224 x 224, 2 + 2 frames, a model of 309 M parameters, a batch of 8. The first
way is the published code's: a VAE of SDXL's shape encodes the future frames at every step. The others read latents.
Weights and frames are random, because they do not affect time. One single-threaded process counts its own CPU time and
runs all ways in turn, round after round; FLOPs are those of matrix products and convolutions.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_query import LIBERO, batch_of
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from uwm_model.config import DiffusionConfig, ModelConfig
from uwm_model.optimizer import OptimizerSettings, adamw
from uwm_model.world_model import UnifiedWorldModel

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "step.md"
BATCH, ROUNDS = 8, 2
# The settings of the recipe small at the paper's size: small convolutions over latents instead of ResNet-18.
OURS = dataclasses.replace(LIBERO, observation="latents", current_patches=True, proprio_dim=9)
SDXL = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2, "sample_size": 1024}
ENCODING, STORED, LATENTS = "frames through the VAE", "stored latents", "stored latents, observed, too"


def sdxl_vae() -> AutoencoderKL:
    return AutoencoderKL(
        **SDXL,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )


def step_of(config: ModelConfig, vae: AutoencoderKL | None) -> Callable[[], None]:
    torch.manual_seed(0)
    model, batch = UnifiedWorldModel(config, DiffusionConfig()), batch_of(config, BATCH)
    optimizer: torch.optim.Optimizer
    if vae is None:
        optimizer, _ = adamw(model, OptimizerSettings(1e-4, 1e-6, 0, 1, 0, (0.9, 0.95), "none"))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-6)
    generator = torch.Generator().manual_seed(0)
    V, Tf, _, h, w = config.latents_shape
    frames = torch.rand(BATCH * V * Tf, 3, 8 * h, 8 * w)

    def step() -> None:
        seen = batch
        if vae is not None:
            with torch.no_grad():
                latents = vae.encode(frames * 2 - 1).latent_dist.sample() * vae.config.scaling_factor
            seen = dataclasses.replace(batch, future_latents=latents.reshape(BATCH, *config.latents_shape))
        optimizer.zero_grad()
        model.loss(seen, generator).total.backward()
        optimizer.step()

    return step


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = {
        ENCODING: step_of(LIBERO, sdxl_vae().eval().requires_grad_(False)),
        STORED: step_of(LIBERO, None),
        LATENTS: step_of(OURS, None),
    }
    operations: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in steps}
    with tqdm(total=(ROUNDS + 1) * len(steps), disable=None) as bar:
        for number in range(ROUNDS + 1):
            for name, step in steps.items():
                if number == 0:  # warm-up; counts FLOPs
                    with FlopCounterMode(display=False) as counter:
                        step()
                    operations[name] = counter.get_total_flops()
                else:
                    began = time.process_time()
                    step()
                    times[name].append(time.process_time() - began)
                bar.update()
    lines = [
        "# A training step",
        "",
        f"`make bench-step`, one thread of {os.cpu_count()} CPU cores, torch {torch.__version__}, float32.",
        f"The paper's LIBERO shape, a batch of {BATCH}, {ROUNDS} rounds. Ratios are medians over rounds.",
        "",
        "| the model is given | TFLOP a step | times fewer | CPU s, median | times faster |",
        "|---|---|---|---|---|",
    ]
    for name in steps:
        fewer = operations[ENCODING] / operations[name]
        faster = statistics.median(slow / own for own, slow in zip(times[name], times[ENCODING], strict=True))
        tera, seconds = operations[name] / 1e12, statistics.median(times[name])
        lines.append(f"| {name} | {tera:.2f} | {fewer:.1f} | {seconds:.1f} | {faster:.1f} |")
    lines += [
        "",
        "Row 1 uses torch's default AdamW; rows 2 and 3 use its fused version, which also saves time. Row 3 is another",
        "network: small convolutions over the current latents replace ResNet-18 on pixels, and each future token also",
        "sees the current latents at its place.",
    ]
    PAGE.write_text("\n".join([*lines, ""]))
    print(PAGE.read_text(), file=sys.stdout)


if __name__ == "__main__":
    main()
