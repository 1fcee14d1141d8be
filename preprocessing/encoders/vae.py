"""Frozen VAEs, named and versioned: frames to latents at ingest, latents back to frames for viewing.

The encoder ``pixels`` stores the frames unencoded, for models that observe them in addition to the latents.

Latents are standardised: about zero mean and unit deviation over all channels. They are deterministic (the mode of the
posterior, never a sample), so a frame always has the same latents.

Torch is imported lazily: an ingest with nothing to do finishes before the import would.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError

from preprocessing.encoders.hub import digest, model_folder, read_config, require_files
from preprocessing.errors import UserError

Precision = Literal["float32", "bfloat16"]

SHIPPED = Path(__file__).parents[1] / "weights" / "tiny_vae"
PIXELS = "pixels"
HUB = {"sdxl-vae": "stabilityai/sdxl-vae", "taesdxl": "madebyollin/taesdxl"}
FILES = ("diffusion_pytorch_model.safetensors", "config.json")
CLASSES = ("AutoencoderTiny", "AutoencoderKL")
# Frames per pass. Larger batches are slower on a CPU: the system clears their memory each time.
BATCH = {"cpu": 8, "cuda": 32}


class Encoder:
    """One VAE on one device. ``digest`` identifies its settings, weights and precision."""

    def __init__(self, folder: Path, device: str, precision: Precision):
        import torch

        self.digest = _digest(folder, precision)
        self._device = device
        self._batch = BATCH[torch.device(device).type]
        self._dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        vae, config = _load(folder)
        self._vae = vae.eval().requires_grad_(False).to(device, self._dtype, memory_format=torch.channels_last)
        self._scale = float(config.get("scaling_factor") or 1.0)
        self._shift = float(config.get("shift_factor") or 0.0)
        self.channels = int(config["latent_channels"])
        self.stride = _stride(config)

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """uint8 ``[N, H, W, 3]`` RGB -> float16 ``[N, channels, H/stride, W/stride]``.

        Raises UserError if the stride does not divide the frame size.
        """
        import torch

        _, height, width, _ = frames.shape
        if height % self.stride or width % self.stride:
            raise UserError(f"frames are {height} x {width}: choose an image size divisible by {self.stride}")
        parts = []
        with torch.inference_mode():
            for start in range(0, len(frames), self._batch):
                batch = torch.tensor(frames[start : start + self._batch], device=self._device).permute(0, 3, 1, 2)
                images = (batch.to(self._dtype) / 127.5 - 1).contiguous(memory_format=torch.channels_last)
                encoded = self._vae.encode(images)
                latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded
                parts.append(((latents.float() - self._shift) * self._scale).half().cpu().numpy())
        return np.concatenate(parts)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """float ``[N, channels, h, w]`` -> uint8 ``[N, h * stride, w * stride, 3]`` RGB."""
        import torch

        parts = []
        with torch.inference_mode():
            for start in range(0, len(latents), self._batch):
                batch = torch.tensor(latents[start : start + self._batch], device=self._device).float()
                decoded = self._vae.decode((batch / self._scale + self._shift).to(self._dtype))
                images = getattr(decoded, "sample", decoded).float()
                parts.append(((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(parts)


class Pixels:
    """Stores frames unencoded, channels first, behind the interface of an Encoder."""

    digest, channels, stride = PIXELS, 3, 1

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """uint8 ``[N, H, W, 3]`` RGB -> uint8 ``[N, 3, H, W]``."""
        return np.ascontiguousarray(frames.transpose(0, 3, 1, 2))

    def decode(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 ``[N, 3, H, W]`` -> uint8 ``[N, H, W, 3]`` RGB."""
        return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def load_encoder(name: str, device: str = "cpu", precision: Precision = "float32") -> Encoder | Pixels:
    """Load ``tiny`` (shipped), ``sdxl-vae``, ``taesdxl``, a hub id, a diffusers folder, or ``pixels``.

    Raises UserError if the VAE does not exist or does not load.
    """
    if name == PIXELS:
        return Pixels()
    folder = _folder(name)
    try:
        return Encoder(folder, device, precision)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"encoder {name}: does not load from {folder} ({str(error).splitlines()[0]})") from None


def encoder_digest(name: str, precision: Precision = "float32") -> str:
    """Return the digest of ``load_encoder(name)`` without loading it."""
    return Pixels.digest if name == PIXELS else _digest(_folder(name), precision)


def encoder_stride(name: str) -> int:
    """Return the pixels per latent along one side, without loading the weights."""
    return Pixels.stride if name == PIXELS else _stride(_config(_folder(name)))


def _load(folder: Path) -> tuple[Any, Mapping[str, Any]]:
    """Return a VAE and its settings. Only AutoencoderKL needs diffusers, which takes seconds to import."""
    config = _config(folder)
    if config["_class_name"] == "AutoencoderTiny":
        from preprocessing.encoders.taesd import Taesd

        return Taesd.load(config, folder / FILES[0]), config
    import diffusers

    diffusers.utils.logging.set_verbosity_error()  # it warns about settings it wrote itself
    vae = diffusers.AutoencoderKL.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
    return vae, vae.config


def _stride(config: Mapping[str, Any]) -> int:
    return 2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1)


def _folder(name: str) -> Path:
    """Return the folder that holds the weights and settings."""
    known = ["tiny", *HUB, PIXELS]
    folder = SHIPPED if name == "tiny" else model_folder("encoder", name, HUB, FILES, known)
    require_files("encoder", name, folder, FILES, "diffusers VAE")
    if (kind := _config(folder).get("_class_name")) not in CLASSES:
        raise UserError(f"encoder {name}: {folder} holds {kind}; expected {' or '.join(CLASSES)}")
    return folder


def _config(folder: Path) -> dict[str, Any]:
    return read_config("encoder", folder)


def _digest(folder: Path, precision: str) -> str:
    settings = {
        key: value for key, value in _config(folder).items() if key not in ("_diffusers_version", "_name_or_path")
    }
    return digest([settings, precision], [folder / FILES[0]])
