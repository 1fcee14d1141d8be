"""Convert arrays of windows to the model's batch."""

from __future__ import annotations

import numpy as np
import torch

from preprocessing.dataset.prefetch import tensors
from uwm_model.batch import Batch


def to_batch(arrays: dict[str, np.ndarray], device: torch.device, dtype: torch.dtype) -> Batch:
    """Convert the arrays of LatentDataset.gather to a Batch."""
    return Batch(**tensors(arrays)).to(device, dtype)
