"""Crops are the same for latents and pixels of a camera; colours change within their range."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.models import TINY, make_batch, seeded
from torch import Tensor

from uwm_model.augment import augment, centre
from uwm_model.batch import Batch
from uwm_model.config import AugmentConfig

SIZE = (6, 8)  # of latents (8, 12)


def places(batch: Batch) -> Batch:
    """Set every value of latents and pixels to its position, row * 100 + column, in latents."""
    h, w = TINY.latent_size
    grid = (torch.arange(h)[:, None] * 100.0 + torch.arange(w)).expand(*batch.current_latents.shape[:4], h, w)
    fine = grid.repeat_interleave(8, dim=-2).repeat_interleave(8, dim=-1)[:, :, :, :3] / 1000
    return replace(batch, current_latents=grid, future_latents=grid, current_pixels=fine)


def corners(maps: Tensor) -> Tensor:
    """Return the position of the first value: [B, V]."""
    return maps[:, :, 0, 0, 0, 0]


def test_a_crop_is_the_same_for_everything_of_a_camera() -> None:
    batch = places(make_batch(64))
    cut = augment(batch, SIZE, AugmentConfig(), seeded(0))
    assert cut.current_latents.shape[-2:] == cut.future_latents.shape[-2:] == SIZE
    assert cut.current_pixels.shape[-2:] == (48, 64)
    first = corners(cut.current_latents)
    torch.testing.assert_close(corners(cut.future_latents), first)
    torch.testing.assert_close(corners(cut.current_pixels), first / 1000)
    expected = first[..., None, None] + torch.arange(6)[:, None] * 100.0 + torch.arange(8)
    torch.testing.assert_close(cut.current_latents[:, :, 1, 2], expected)
    assert set(first.flatten().tolist()) == {row * 100 + column for row in range(3) for column in range(5)}
    assert (first[:, 0] != first[:, 1]).any(), "cameras are cut alike"

    shared = corners(augment(batch, SIZE, AugmentConfig(shared=True), seeded(1)).current_latents)
    assert (shared == shared[0]).all()
    again = augment(batch, SIZE, AugmentConfig(), seeded(0))
    torch.testing.assert_close(again.current_latents, cut.current_latents, rtol=0, atol=0)


def test_centre_crop_and_frames_that_need_none() -> None:
    batch = places(make_batch())
    cut = centre(batch, SIZE)
    assert (corners(cut.current_latents) == 102).all() and (corners(cut.future_latents) == 102).all()
    assert centre(batch, TINY.latent_size) is batch
    whole = augment(batch, TINY.latent_size, AugmentConfig(), seeded(0))
    assert torch.equal(whole.current_latents, batch.current_latents)
    with pytest.raises(ValueError, match="latents are 8 x 12, smaller than the model's 10 x 12"):
        centre(batch, (10, 12))


def test_colours_change_within_their_range_and_alike_in_all_frames() -> None:
    pixels = (
        torch.randint(0, 256, (64, 2, 1, 3, 64, 96), generator=seeded(0)).to(torch.uint8).expand(-1, -1, 2, -1, -1, -1)
    )
    batch = replace(make_batch(64), current_pixels=pixels)
    same = augment(batch, TINY.latent_size, AugmentConfig(), seeded(0)).current_pixels
    assert same.dtype == torch.uint8 and torch.equal(same, pixels)

    brighter = augment(batch, TINY.latent_size, AugmentConfig(brightness=0.2), seeded(0)).current_pixels
    dark = pixels < 200
    factor = torch.where(dark & (pixels > 0), brighter / (pixels / 255), 1)[:, :, 0].flatten(2)
    spread = factor.where(dark[:, :, 0].flatten(2) & (pixels[:, :, 0].flatten(2) > 0), factor.median(2)[0][..., None])
    torch.testing.assert_close(spread.amax(2), spread.amin(2))  # one factor per sample and camera
    assert 0.8 <= spread.min() < 0.85 and 1.15 < spread.max() <= 1.2001

    changed = augment(
        batch, TINY.latent_size, AugmentConfig(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2), seeded(0)
    )
    images = changed.current_pixels
    assert images.min() >= 0 and images.max() <= 1
    torch.testing.assert_close(images[:, :, 0], images[:, :, 1])
    assert not torch.allclose(images, brighter, atol=0.01)
    greys = replace(batch, current_pixels=pixels[:, :, :, :1].expand(-1, -1, -1, 3, -1, -1))
    still = augment(greys, TINY.latent_size, AugmentConfig(saturation=0.2, hue=0.2), seeded(0)).current_pixels
    torch.testing.assert_close(still, greys.current_pixels / 255, atol=2e-3, rtol=0)  # grey stays grey


def test_an_invalid_setting_is_named() -> None:
    with pytest.raises(ValueError, match=r"hue: 0.6 is not from 0 to 0.5"):
        AugmentConfig(hue=0.6)
