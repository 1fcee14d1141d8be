"""How close a predicted frame or action is to the true one. Arrays or CPU tensors."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def psnr(predicted: ArrayLike, true: ArrayLike) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of images [..., H, W, 3], one value per image; infinite if they are equal.

    Each is uint8 in 0 ... 255 or float in 0 ... 1, told apart by its dtype.
    """
    error = np.square(_unit(predicted) - _unit(true)).mean(axis=(-3, -2, -1))
    with np.errstate(divide="ignore"):
        return -10 * np.log10(error)


def action_error(predicted: ArrayLike, true: ArrayLike, mask: ArrayLike) -> float:
    """Mean absolute error of [..., L, A] over the entries whose mask is True; NaN if there are none."""
    error = np.abs(np.asarray(predicted, np.float64) - np.asarray(true, np.float64))[np.asarray(mask, bool)]
    return float(error.mean()) if error.size else math.nan


def _unit(image: ArrayLike) -> np.ndarray:
    """Return it as float64 in 0 ... 1."""
    array = np.asarray(image)
    return array / 255 if array.dtype == np.uint8 else array.astype(np.float64)
