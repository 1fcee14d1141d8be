"""``uwm train-vae``: train a small VAE on any frames that ``uwm ingest`` can read.

The architecture is TAESD's (diffusers' AutoencoderTiny: 4 channels, stride 8), half as wide and without blocks at full
resolution, so that a CPU encodes at the rate a demo needs. It trains on random crops with L1 and squared error; a
penalty keeps each latent channel near zero mean and unit standard deviation, which suits both the decoder's tanh and
diffusion.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pipelines.outputs import check_writable
from preprocessing import sources
from preprocessing.dataset.selection import is_validation
from preprocessing.encoders.vae import load_encoder
from preprocessing.episode import EpisodeRef, Video
from preprocessing.errors import BadEpisode, UserError
from uwm_model.metrics import psnr

WIDTH = 32
ENCODER_BLOCKS = (0, 1, 3, 3)
DECODER_BLOCKS = (3, 3, 2, 0)
IMAGE_SIZE = 128
CROP = 64
PEAK_LEARNING_RATE = 1.5e-3
BATCH = 8
EVERY = 4  # use every fourth frame: neighbouring frames are nearly the same
FRAMES_PER_CAMERA = 256
HELD_OUT = 0.1


@dataclass
class Frames:
    """Arrays uint8 ``[n, S, S, 3]``: one per source path for training; held out, by source path and camera."""

    training: list[np.ndarray]
    held_out: dict[str, np.ndarray]


def train_vae(
    places: list[Path], output: Path, steps: int = 3000, initial: Path | None = None, seed: int = 0
) -> dict[str, float]:
    """Train on the frames at ``places``, each drawn equally often, from fresh weights or those in ``initial``.

    Write a diffusers folder; return the held-out PSNR in dB by place and camera. Raises UserError if a place has no
    frame to train on.
    """
    if output.exists() and not (output / "reconstruction.json").is_file():  # it would be replaced
        raise UserError(f"--output {output}: exists and holds no VAE of uwm train-vae; give a new folder")
    if initial and not (initial / "config.json").is_file():
        raise UserError(f"--from {initial}: no folder of VAE weights; give one that uwm train-vae wrote")
    check_writable(output.parent, "--output")
    torch.manual_seed(seed)
    vae = _fresh() if initial is None else _load(initial)  # raises its errors before the frames are read
    frames = _frames(places)
    random = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps, pct_start=0.05)
    with tqdm(range(steps), "train-vae", unit="step", mininterval=0.5) as bar:
        for step in bar:
            images = _crops(frames.training, random)
            latents = vae.encode(images).latents
            error = vae.decode(latents).sample - images
            mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
            loss = error.abs().mean() + 10 * error.square().mean() + 0.01 * (mean.square() + (std - 1).square()).sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                quality = -10 * np.log10(error.square().mean().item() / 4)
                bar.set_postfix_str(f"loss {loss.item():.4f}, {quality:.1f} dB")
    return _save(vae, frames, output)


def _fresh() -> Any:
    from diffusers import AutoencoderTiny

    vae: Any = AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * 4,
        decoder_block_out_channels=(WIDTH,) * 4,
        num_encoder_blocks=ENCODER_BLOCKS,
        num_decoder_blocks=DECODER_BLOCKS,
    )
    return vae.to(memory_format=torch.channels_last)


def _load(folder: Path) -> Any:
    from diffusers import AutoencoderTiny

    try:
        vae: Any = AutoencoderTiny.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--from {folder}: holds no weights of such a VAE ({str(error).splitlines()[0]})") from None
    return vae.to(torch.float32, memory_format=torch.channels_last)


def frames_of(place: Path) -> Iterator[tuple[EpisodeRef, str, np.ndarray]]:
    """Yield (episode, camera, some of its frames, uint8 [n, S, S, 3]) for everything readable at ``place``."""
    refs = [ref for kind, at in sources.find(place) for ref in sources.scan(kind, at)]
    for ref in tqdm(refs, f"frames of {place.name}", unit=" episodes", leave=False):
        try:
            cameras = {name: _some(video) for name, video in sources.load(ref).cameras.items()}
        except BadEpisode:
            continue
        for camera, images in cameras.items():
            yield ref, camera, images


def _frames(places: list[Path]) -> Frames:
    """Hold out robot episodes by id, and the last tenth of each video file, as it may be the only one."""
    training: list[np.ndarray] = []
    held_out: dict[str, list[np.ndarray]] = {}
    for place in places:
        parts: list[np.ndarray] = []
        for ref, camera, images in frames_of(place):
            if ref.format == "video":
                known = int(len(images) * (1 - HELD_OUT))
            else:
                known = 0 if is_validation(ref.id, HELD_OUT) else len(images)
            parts.append(images[:known])
            held_out.setdefault(f"{place.name} {camera}", []).append(images[known:])
        if not sum(map(len, parts)):
            raise UserError(f"{place}: no frame to train on; give more sources")
        training.append(np.concatenate(parts))
    return Frames(training, {kind: found for kind, parts in held_out.items() if len(found := np.concatenate(parts))})


def _some(video: Video) -> np.ndarray:
    found: list[np.ndarray] = []
    seen = 0
    for chunk in video.frames(IMAGE_SIZE):
        found += [chunk[i] for i in range(-seen % EVERY, len(chunk), EVERY)]
        seen += len(chunk)
        if len(found) >= FRAMES_PER_CAMERA:
            break
    return np.stack(found[:FRAMES_PER_CAMERA])


def _crops(places: list[np.ndarray], random: np.random.Generator) -> torch.Tensor:
    """Return random crops, float [BATCH, 3, CROP, CROP] in [-1, 1], half of them mirrored."""
    crops = []
    for place in random.integers(len(places), size=BATCH):
        frame = places[place][random.integers(len(places[place]))]
        y, x = random.integers(IMAGE_SIZE - CROP + 1, size=2)
        crop = frame[y : y + CROP, x : x + CROP]
        crops.append(crop[:, ::-1] if random.random() < 0.5 else crop)
    return _images(np.stack(crops))


def _images(frames: np.ndarray) -> torch.Tensor:
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def _save(vae: Any, frames: Frames, output: Path) -> dict[str, float]:
    sample = np.concatenate([images[:: max(1, len(images) // 128)] for images in frames.training])
    latents = torch.cat([vae.encode(part).latents for part in _images(sample).split(32)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    vae.register_to_config(_name_or_path="")  # otherwise it keeps the path of the initial weights
    building = output.with_name(f".{output.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    vae.half().save_pretrained(building, safe_serialization=True)
    encoder = load_encoder(str(building))
    quality = {
        kind: round(float(np.mean(psnr(encoder.decode(encoder.encode(images)), images))), 2)
        for kind, images in sorted(frames.held_out.items())
    }
    (building / "reconstruction.json").write_text(json.dumps(quality, indent=1))
    shutil.rmtree(output, ignore_errors=True)
    building.rename(output)
    return quality
