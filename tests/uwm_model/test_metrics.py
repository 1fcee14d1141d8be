"""Metrics against values that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from uwm_model.metrics import action_error, bootstrap_interval, psnr, ssim, wilson_interval


def test_psnr_of_a_constant_error() -> None:
    true = np.full((2, 8, 8, 3), 100, np.uint8)
    np.testing.assert_allclose(psnr(true + np.uint8(10), true), [20 * math.log10(255 / 10)] * 2)
    np.testing.assert_allclose(psnr(true - np.uint8(10), true), [20 * math.log10(255 / 10)] * 2)  # no wrap-around


def test_psnr_judges_every_image_by_its_own_dtype() -> None:
    true = np.full((8, 8, 3), 51, np.uint8)
    assert psnr(np.full((8, 8, 3), 0.3, np.float32), true) == pytest.approx(20, abs=1e-5)
    assert psnr(true, true) == math.inf


def test_ssim() -> None:
    random = np.random.default_rng(0)
    image = random.random((3, 32, 32, 3))
    noisy = np.clip(image + random.normal(0, 0.1, image.shape), 0, 1)
    noisier = np.clip(image + random.normal(0, 0.3, image.shape), 0, 1)
    np.testing.assert_allclose(ssim(image, image), 1)
    assert (ssim(noisier, image) < ssim(noisy, image)).all()
    # Flat images: only the means differ.
    flat = ssim(np.full((16, 16, 3), 0.2), np.full((16, 16, 3), 0.4))
    assert flat == pytest.approx((2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4))


def test_action_error_counts_only_what_is_masked_true() -> None:
    true, predicted = np.zeros((1, 2, 2)), np.array([[[1.0, 100], [-3, 100]]])
    mask = np.array([[[True, False], [True, False]]])
    assert action_error(predicted, true, mask) == 2
    assert math.isnan(action_error(predicted, true, np.zeros_like(mask)))


def test_wilson_interval() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611252), abs=1e-6)
    assert wilson_interval(20, 20)[1] == 1
    for successes, trials in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="trials"):
            wilson_interval(successes, trials)


def test_bootstrap_interval_is_about_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(values.mean() - 1.96 * 0.1, abs=0.04)
    assert high == pytest.approx(values.mean() + 1.96 * 0.1, abs=0.04)
    assert bootstrap_interval(values) == (low, high)
    with pytest.raises(ValueError, match="shape"):
        bootstrap_interval([])
