"""Metrics against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from uwm_model.metrics import action_error, psnr


def test_psnr_of_a_constant_error() -> None:
    true = np.full((2, 8, 8, 3), 100, np.uint8)
    np.testing.assert_allclose(psnr(true + np.uint8(10), true), [20 * math.log10(255 / 10)] * 2)
    np.testing.assert_allclose(psnr(true - np.uint8(10), true), [20 * math.log10(255 / 10)] * 2)  # no wrap-around


def test_psnr_takes_each_image_range_from_its_dtype() -> None:
    true = np.full((8, 8, 3), 51, np.uint8)
    assert psnr(np.full((8, 8, 3), 0.3, np.float32), true) == pytest.approx(20, abs=1e-5)
    assert psnr(true, true) == math.inf


def test_action_error_counts_only_entries_whose_mask_is_true() -> None:
    true, predicted = np.zeros((1, 2, 2)), np.array([[[1.0, 100], [-3, 100]]])
    mask = np.array([[[True, False], [True, False]]])
    assert action_error(predicted, true, mask) == 2
    assert math.isnan(action_error(predicted, true, np.zeros_like(mask)))
