"""Random crops and colour jitter for training, and the centre crop for evaluation.

A store holds latents of whole frames. A model of smaller latents sees a crop: the same one for a camera's current
latents, future latents and pixels, aligned to the grid of the latents.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from uwm_model.batch import Batch
from uwm_model.config import AugmentConfig
from uwm_model.randomness import Random, together, uniform


def augment(batch: Batch, size: tuple[int, int], config: AugmentConfig, random: Random) -> Batch:
    """Return the batch with latents cropped to ``size`` (h, w), jittered colours and some instructions withheld."""
    if batch.instruction_mask is not None and config.untold:
        told = uniform(batch.instruction_mask.shape, random, batch.instruction_mask.device) >= config.untold
        batch = replace(batch, instruction_mask=batch.instruction_mask & told)
    spare_h, spare_w = _spare(batch, size)
    changes = (config.brightness, config.contrast, config.saturation, config.hue)
    jittered = batch.current_pixels is not None and any(changes)
    if not (spare_h or spare_w or jittered):
        return batch
    places = _draw(batch, config, random)
    top, left = (places[0] * (spare_h + 1)).long(), (places[1] * (spare_w + 1)).long()
    batch = _crop(batch, top, left, size)
    if batch.current_pixels is None or not jittered:
        return batch
    return replace(batch, current_pixels=_jitter(batch.current_pixels, places[2:], changes, random))


def centre(batch: Batch, size: tuple[int, int]) -> Batch:
    """Return the batch with latents centre-cropped to ``size`` (h, w)."""
    if _spare(batch, size) == (0, 0):
        return batch
    spare_h, spare_w = _spare(batch, size)
    shape, device = batch.camera_mask.shape, batch.camera_mask.device
    top, left = (torch.full(shape, spare // 2, device=device) for spare in (spare_h, spare_w))
    return _crop(batch, top, left, size)


def _spare(batch: Batch, size: tuple[int, int]) -> tuple[int, int]:
    h, w = batch.current_latents.shape[-2:]
    if h < size[0] or w < size[1]:
        raise ValueError(f"latents are {h} x {w}, smaller than the model's {size[0]} x {size[1]}")
    return h - size[0], w - size[1]


def _draw(batch: Batch, config: AugmentConfig, random: Random) -> Tensor:
    """Draw top, left and the four colour factors, float32 [6, B, V] in [0, 1)."""
    device, (B, V) = batch.camera_mask.device, batch.camera_mask.shape
    if config.shared:
        return uniform((6, V), together(random), device)[:, None].expand(6, B, V)
    return uniform((B, 6, V), random, device).transpose(0, 1)


def _crop(batch: Batch, top: Tensor, left: Tensor, size: tuple[int, int]) -> Batch:
    """Crop at top and left, int64 [B, V], in latents."""
    stride = 1 if batch.current_pixels is None else batch.current_pixels.shape[-1] // batch.current_latents.shape[-1]
    pixels = batch.current_pixels
    return replace(
        batch,
        current_latents=_crop_maps(batch.current_latents, top, left, size),
        future_latents=None if batch.future_latents is None else _crop_maps(batch.future_latents, top, left, size),
        current_pixels=None
        if pixels is None
        else _crop_maps(pixels, top * stride, left * stride, (size[0] * stride, size[1] * stride)),
    )


def _crop_maps(maps: Tensor, top: Tensor, left: Tensor, size: tuple[int, int]) -> Tensor:
    """maps [B, V, T, C, H, W] -> [B, V, T, C, h, w], with a crop for each sample and camera."""
    B, V = top.shape
    rows = top[:, :, None, None] + torch.arange(size[0], device=top.device)[:, None]
    columns = left[:, :, None, None] + torch.arange(size[1], device=top.device)
    b = torch.arange(B, device=top.device)[:, None, None, None]
    v = torch.arange(V, device=top.device)[:, None, None]
    return maps[b, v, :, :, rows, columns].permute(0, 1, 4, 5, 2, 3)


def _jitter(pixels: Tensor, places: Tensor, changes: tuple[float, ...], random: Random) -> Tensor:
    """uint8 or float [B, V, To, 3, H, W] -> float in [0, 1]. All frames of a sample and camera change alike."""
    from kornia import enhance  # imported lazily: takes two seconds

    images = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    To, flat = images.shape[2], images.flatten(0, 2)
    factors = ((places * 2 - 1) * torch.tensor(changes, device=places.device)[:, None, None]).flatten(1)
    brightness, contrast, saturation, hue = factors.repeat_interleave(To, dim=1)
    steps = (
        lambda x: enhance.adjust_brightness_accumulative(x, 1 + brightness),
        lambda x: enhance.adjust_contrast_with_mean_subtraction(x, 1 + contrast),
        lambda x: enhance.adjust_saturation_with_gray_subtraction(x, 1 + saturation),
        lambda x: enhance.adjust_hue(x, 2 * math.pi * hue),
    )
    order = uniform((4,), together(random), torch.device("cpu")).argsort()
    for i in order.tolist():
        if changes[i]:
            flat = steps[i](flat)
    return flat.reshape(images.shape)
