"""How good a predicted image or action is, and how sure a mean or a success rate is. Arrays or CPU tensors."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def psnr(predicted: ArrayLike, true: ArrayLike) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of images [..., H, W, 3], one number an image; infinite where they are equal.

    uint8 in 0 ... 255 or float in 0 ... 1, each judged by its own dtype.
    """
    error = np.square(_unit(predicted) - _unit(true)).mean(axis=(-3, -2, -1))
    with np.errstate(divide="ignore"):
        return -10 * np.log10(error)


def ssim(predicted: ArrayLike, true: ArrayLike) -> np.ndarray:
    """Structural similarity (Wang et al. 2004) of images [..., H, W, 3], one an image: mean over 7 x 7 windows."""
    a, b = _unit(predicted), _unit(true)
    count = 49
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    unbiased = count / (count - 1)
    variance_a = unbiased * (_window_mean(a * a) - mean_a**2)
    variance_b = unbiased * (_window_mean(b * b) - mean_b**2)
    covariance = unbiased * (_window_mean(a * b) - mean_a * mean_b)
    luminance, contrast = 0.01**2, 0.03**2
    similarity = ((2 * mean_a * mean_b + luminance) * (2 * covariance + contrast)) / (
        (mean_a**2 + mean_b**2 + luminance) * (variance_a + variance_b + contrast)
    )
    return similarity.mean(axis=(-3, -2, -1))


def action_error(predicted: ArrayLike, true: ArrayLike, mask: ArrayLike) -> float:
    """Mean absolute error of [..., L, A] over the entries whose mask is True; NaN where there is none."""
    error = np.abs(np.asarray(predicted, np.float64) - np.asarray(true, np.float64))[np.asarray(mask, bool)]
    return float(error.mean()) if error.size else math.nan


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a success rate (Wilson score): honest for few trials and near 0 or 1."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes of {trials} trials")
    rate, z2 = successes / trials, Z95**2 / trials
    centre = (rate + z2 / 2) / (1 + z2)
    half = Z95 / (1 + z2) * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(values: ArrayLike, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95 % confidence interval of the mean of values [n], by the percentile bootstrap."""
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise ValueError(f"expected one value a trial, got shape {sample.shape}")
    chosen = np.random.default_rng(seed).integers(sample.size, size=(resamples, sample.size))
    low, high = np.quantile(sample[chosen].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def _unit(image: ArrayLike) -> np.ndarray:
    """float64 in 0 ... 1."""
    array = np.asarray(image)
    return array / 255 if array.dtype == np.uint8 else array.astype(np.float64)


def _window_mean(image: np.ndarray) -> np.ndarray:
    """Means of all 7 x 7 windows: [..., H, W, C] -> [..., H - 6, W - 6, C]."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (7, 7), axis=(-3, -2))
    return windows.mean(axis=(-2, -1))
