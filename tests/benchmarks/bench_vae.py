"""``make bench-vae``: quality and speed of the shipped VAE. Writes docs/benchmarks/vae.md.

Speed is compared with TAESD's full width and with SDXL's shape (random weights, which do not affect speed). Quality is
the PSNR of reconstructed frames: those held out in its training, Meta-World demonstrations from initial states that
were never recorded, and all folders named on the command line.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from infra.simulators.face import episode_seed
from infra.simulators.metaworld import MetaWorld
from pipelines.demo import TASKS
from pipelines.train_vae import frames_of
from preprocessing.encoders.vae import SHIPPED, load_encoder
from uwm_model.metrics import psnr

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "vae.md"
FRAMES = 128  # at 128 x 128
ROUNDS = 3


def rate(folder: str, frames: int) -> float:
    """Return the frames/s that one single-threaded process encodes; the best of several rounds."""
    torch.set_num_threads(1)
    encoder = load_encoder(folder)
    images = np.random.default_rng(0).integers(0, 256, (frames, 128, 128, 3), dtype=np.uint8)
    encoder.encode(images[:8])
    best = 0.0
    for _ in range(ROUNDS):
        began = time.perf_counter()
        encoder.encode(images)
        best = max(best, frames / (time.perf_counter() - began))
    return best


def speed() -> list[str]:
    lines = ["| encoder | frames/s, two processes of one thread | shipped is faster by |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as place, get_context("spawn").Pool(2) as pool:
        AutoencoderTiny().save_pretrained(f"{place}/taesd")
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2
        ).save_pretrained(f"{place}/sdxl")
        shapes = [("shipped", "tiny", FRAMES), ("TAESD's shape", f"{place}/taesd", FRAMES)]
        shapes += [("SDXL's shape", f"{place}/sdxl", 4)]
        rates = {name: sum(pool.starmap(rate, [(folder, frames)] * 2, 1)) for name, folder, frames in shapes}
    return lines + [f"| {name} | {value:.1f} | {rates['shipped'] / value:.1f} |" for name, value in rates.items()]


def simulated() -> dict[str, np.ndarray]:
    found = {}
    for task in TASKS:
        simulator = MetaWorld(task, 128)
        frames: dict[str, list[np.ndarray]] = {}
        for episode in range(4):
            simulator.reset(seed=episode_seed(12345, episode))
            for step in range(64):
                simulator.rendering = step % 8 == 0
                observation, *_ = simulator.step(simulator.expert_action())
                for camera, frame in observation["images"].items():
                    frames.setdefault(camera, []).append(frame)
        found |= {f"Meta-World {task}, {camera}": np.stack(images) for camera, images in frames.items()}
    return found


def main(places: list[Path]) -> None:
    torch.set_num_threads(2)
    table = speed()
    encoder = load_encoder("tiny")
    quality = ["| frames | PSNR, dB |", "|---|---|"]
    for name, score in json.loads((SHIPPED / "reconstruction.json").read_text()).items():
        quality.append(f"| held out in training: {name} | {score:.1f} |")
    frames = simulated()
    for place in places:
        cameras: dict[str, list[np.ndarray]] = {}
        for _, camera, images in frames_of(place):
            cameras.setdefault(camera, []).append(images)
        frames |= {f"{place.name} {camera}": np.concatenate(parts) for camera, parts in cameras.items()}
    for name, images in frames.items():
        score = np.mean(psnr(encoder.decode(encoder.encode(images)), images))
        quality.append(f"| {name} ({len(images)} frames) | {score:.1f} |")
    command = "make bench-vae" + (f' PLACES="{" ".join(place.name for place in places)}"' if places else "")
    machine = f"{os.cpu_count()} CPU cores, torch {torch.__version__}"
    heading = f"# The shipped VAE\n\n`{command}` on {machine}."
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join([heading, "", "## Speed", "", *table, "", "## Quality", "", *quality, ""]))
    print(PAGE.read_text())


if __name__ == "__main__":
    main([Path(place) for place in sys.argv[1:]])
