"""``uwm train-vae``: a small VAE of one's own, from any frames that ``uwm ingest`` can read.

The shape is TAESD's (diffusers' AutoencoderTiny: 4 channels, stride 8), half as wide and without blocks at full
resolution, so that a CPU encodes at the rate a demo needs. Trained on random crops with L1 and squared error; a
penalty keeps each latent channel near zero mean and unit deviation, which the decoder's tanh and diffusion both want.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from preprocessing import sources
from preprocessing.encoders import load_encoder
from preprocessing.episode import BadEpisode, UserError
from preprocessing.windows import is_validation
from uwm_model.metrics import psnr

WIDTH = 32
ENCODER_BLOCKS = (0, 2, 3, 3)
DECODER_BLOCKS = (3, 3, 2, 0)
IMAGE_SIZE = 128
CROP = 64
PEAK = 1.5e-3  # learning rate
BATCH = 8
FRAMES_PER_CAMERA = 24  # neighbours in a video are nearly the same picture
HELD_OUT = 0.1


def train_vae(
    places: list[Path], output: Path, steps: int = 3000, initial: Path | None = None, seed: int = 0
) -> dict[str, float]:
    """Train on the frames at ``places``, from the weights in the folder ``initial`` if one is given.

    Writes a diffusers folder; returns held-out PSNR in dB by kind of frame.
    """
    frames = _frames(places)
    training = np.concatenate([images for images, held in frames.values() if not held])
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    vae = _fresh() if initial is None else _load(initial)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps, pct_start=0.05)
    with tqdm(range(steps), "train-vae", unit="step", mininterval=0.5) as bar:
        for step in bar:
            images = _crops(training, random)
            latents = vae.encode(images).latents
            error = vae.decode(latents).sample - images
            mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
            loss = error.abs().mean() + 2 * error.square().mean() + 0.01 * (mean.square() + (std - 1).square()).sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                quality = -10 * np.log10(error.square().mean().item() / 4)
                bar.set_postfix_str(f"loss {loss.item():.4f}, {quality:.1f} dB")
    return _save(vae, training, frames, output)


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

    vae: Any = AutoencoderTiny.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
    return vae.to(torch.float32, memory_format=torch.channels_last)


def _frames(places: list[Path]) -> dict[tuple[str, str], tuple[np.ndarray, bool]]:
    """(kind of frame, episode id) -> frames uint8 [n, S, S, 3], and whether the episode is held out."""
    found: dict[tuple[str, str], tuple[np.ndarray, bool]] = {}
    refs = [ref for place in places for kind, path in sources.find(place) for ref in sources.scan(kind, path)]
    for ref in tqdm(refs, "frames", unit=" episodes", leave=False):
        try:
            for camera, video in sources.load(ref).cameras.items():
                images = np.concatenate(list(video.frames(IMAGE_SIZE)))
                some = images[np.linspace(0, len(images) - 1, FRAMES_PER_CAMERA).astype(int)]
                found[f"{ref.format} {camera}", ref.id] = some, is_validation(ref.id, HELD_OUT)
        except BadEpisode:
            continue
    if all(held for _, held in found.values()):
        raise UserError(f"{places[0]}: too few episodes to train on; give more sources")
    return found


def _crops(frames: np.ndarray, random: np.random.Generator) -> torch.Tensor:
    """float [BATCH, 3, CROP, CROP] in [-1, 1]: random places, half of them mirrored."""
    crops = []
    for i in random.integers(len(frames), size=BATCH):
        y, x = random.integers(IMAGE_SIZE - CROP + 1, size=2)
        crop = frames[i, y : y + CROP, x : x + CROP]
        crops.append(crop[:, ::-1] if random.random() < 0.5 else crop)
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def _save(
    vae: Any, training: np.ndarray, frames: dict[tuple[str, str], tuple[np.ndarray, bool]], output: Path
) -> dict[str, float]:
    sample = torch.from_numpy(training[:: max(1, len(training) // 256)]).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = torch.cat([vae.encode(part).latents for part in sample.split(32)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    building = output.with_name(f".{output.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    vae.half().save_pretrained(building, safe_serialization=True)
    quality = _reconstruction(building, frames)
    (building / "reconstruction.json").write_text(json.dumps(quality, indent=1))
    shutil.rmtree(output, ignore_errors=True)
    building.rename(output)
    return quality


def _reconstruction(folder: Path, frames: dict[tuple[str, str], tuple[np.ndarray, bool]]) -> dict[str, float]:
    encoder = load_encoder(str(folder))
    scores: dict[str, list[float]] = {}
    for (kind, _), (images, held) in frames.items():
        if held:
            rebuilt = encoder.decode(encoder.encode(images))
            scores.setdefault(kind, []).append(float(np.mean(np.asarray(psnr(rebuilt, images)))))
    return {kind: round(float(np.mean(values)), 2) for kind, values in sorted(scores.items())}
