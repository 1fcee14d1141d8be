"""Frozen VAEs, named and versioned: frames to latents at ingest, latents to frames for people.

One more encoder is none: ``pixels`` keeps the frames as they are, for models that observe them beside the latents.

Latents are standardised: about zero mean and unit deviation over all channels. They are deterministic (the mode of a
posterior, never a sample), so that the same frame always has the same latents.

Torch is imported by what computes: an ingest that has nothing to do is over before it would be there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from preprocessing.errors import UserError

Precision = Literal["float32", "bfloat16"]

SHIPPED = Path(__file__).parents[1] / "weights" / "tiny_vae"
PIXELS = "pixels"
HUB = {"sdxl-vae": "stabilityai/sdxl-vae", "taesdxl": "madebyollin/taesdxl"}
WEIGHTS = ("diffusion_pytorch_model.safetensors", "config.json")
CLASSES = ("AutoencoderTiny", "AutoencoderKL")
# Frames in one pass. On a CPU larger ones are slower: the system clears their memory anew each time.
BATCH = {"cpu": 8, "cuda": 32}


class Encoder:
    """One VAE on one device. ``digest`` names what its numbers depend on: settings, weights and precision."""

    def __init__(self, folder: Path, device: str, precision: Precision):
        import diffusers
        import torch

        self.digest = _digest(folder, precision)
        self._device = device
        self._batch = BATCH[torch.device(device).type]
        self._dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        kind = _config(folder)["_class_name"]
        diffusers.utils.logging.set_verbosity_error()  # it warns of settings that it wrote itself
        vae: Any = getattr(diffusers, kind).from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
        self._vae = vae.eval().requires_grad_(False).to(device, self._dtype, memory_format=torch.channels_last)
        self._scale = float(vae.config.scaling_factor or 1.0)
        self._shift = float(vae.config.get("shift_factor") or 0.0)
        self.channels = int(vae.config.latent_channels)
        self.stride = 2 ** (len(vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels) - 1)

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """uint8 ``[N, H, W, 3]`` RGB -> float16 ``[N, channels, H/stride, W/stride]``."""
        import torch

        _, height, width, _ = frames.shape
        if height % self.stride or width % self.stride:
            raise UserError(f"frames are {height} x {width}: choose an image size that {self.stride} divides")
        parts = []
        with torch.inference_mode():
            for start in range(0, len(frames), self._batch):
                batch = torch.tensor(frames[start : start + self._batch], device=self._device).permute(0, 3, 1, 2)
                images = (batch.to(self._dtype) / 127.5 - 1).contiguous(memory_format=torch.channels_last)
                encoded = self._vae.encode(images)
                latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
                parts.append(((latents.float() - self._shift) * self._scale).half().cpu().numpy())
        return np.concatenate(parts)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """float ``[N, channels, h, w]`` -> uint8 ``[N, h * stride, w * stride, 3]`` RGB."""
        import torch

        parts = []
        with torch.inference_mode():
            for start in range(0, len(latents), self._batch):
                batch = torch.tensor(latents[start : start + self._batch], device=self._device).float()
                images = self._vae.decode((batch / self._scale + self._shift).to(self._dtype)).sample.float()
                parts.append(((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(parts)


class Pixels:
    """Frames as they are, channels first, with the face of an Encoder."""

    digest, channels, stride = PIXELS, 3, 1

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """uint8 ``[N, H, W, 3]`` RGB -> uint8 ``[N, 3, H, W]``."""
        return np.ascontiguousarray(frames.transpose(0, 3, 1, 2))

    def decode(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 ``[N, 3, H, W]`` -> uint8 ``[N, H, W, 3]`` RGB."""
        return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def load_encoder(name: str, device: str = "cpu", precision: Precision = "float32") -> Encoder | Pixels:
    """``tiny`` (shipped), ``sdxl-vae``, ``taesdxl``, a hub id, a diffusers folder, or ``pixels``.

    Raises UserError where there is no such VAE, or it does not load.
    """
    if name == PIXELS:
        return Pixels()
    folder = _folder(name)
    try:
        return Encoder(folder, device, precision)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"encoder {name}: does not load from {folder} ({str(error).splitlines()[0]})") from None


def encoder_digest(name: str, precision: Precision = "float32") -> str:
    """The digest of ``load_encoder(name)``, without loading it."""
    return Pixels.digest if name == PIXELS else _digest(_folder(name), precision)


def _folder(name: str) -> Path:
    """The folder with the weights and settings; what comes from a hub is kept in its cache."""
    if name == "tiny":
        folder = SHIPPED
    elif Path(name).is_dir():
        folder = Path(name)
    else:
        folder = _from_hub(name)
    if missing := [file for file in WEIGHTS if not (folder / file).is_file()]:
        raise UserError(f"encoder {name}: {folder} lacks {missing[0]}; expected a diffusers VAE folder")
    if (kind := _config(folder).get("_class_name")) not in CLASSES:
        raise UserError(f"encoder {name}: {folder} holds {kind}; expected {' or '.join(CLASSES)}")
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    if "/" not in HUB.get(name, name):
        raise UserError(f"encoder {name}: no such folder, and not one of tiny, {', '.join(HUB)}, {PIXELS} or a hub id")
    try:
        return Path(snapshot_download(HUB.get(name, name), allow_patterns=list(WEIGHTS)))
    except Exception as error:  # the hub client raises a dozen kinds, and httpx's own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"encoder {name}: no such folder, and the hub gave none ({reason}); give a folder") from None


def _config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"encoder {folder}: config.json is not readable JSON") from None


def _digest(folder: Path, precision: str) -> str:
    settings = {
        key: value for key, value in _config(folder).items() if key not in ("_diffusers_version", "_name_or_path")
    }
    digest = hashlib.sha256(json.dumps([settings, precision], sort_keys=True).encode())
    with (folder / WEIGHTS[0]).open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
