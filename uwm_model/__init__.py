"""Unified World Models (arXiv 2504.02792): one diffusion transformer over an action chunk and future camera latents.

Pure torch: the model, its training objective and sampling, without data or cluster code. Modules in reading order:

config       settings of the model, its diffusion and its data augmentation
batch        the model's input
randomness   generators: one per batch, or one per sample
augment      random crops and colour jitter for training
resnet       the paper's image encoder
observation  the current observation -> the condition vector
tokens       noisy actions and noisy latents -> tokens, and back
blocks       the transformer block, modulated by the condition
denoiser     the whole network: noisy actions and latents in, a prediction for each out
schedule     how noise is added, and removed step by step
objective    the training loss
sampling     one loop, five modes: policy, forward and inverse dynamics, video, joint
model        the interface of every model: ``loss(batch)`` and ``sample(mode, batch)``
world_model  UWM
baselines    the paper's comparisons
kinds        the class for each ``kind`` in the settings
optimizer    AdamW with a moving average of the weights, and its learning-rate schedule
transplant   a trained model's weights in a model with other inputs
query        the policy mode with lower latency, for a robot
metrics      errors of predicted frames and actions
published    loads published checkpoints

The names in ``__all__`` are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uwm_model.batch import Batch as Batch
    from uwm_model.config import DiffusionConfig as DiffusionConfig
    from uwm_model.config import ModelConfig as ModelConfig
    from uwm_model.kinds import build as build
    from uwm_model.model import Model as Model
    from uwm_model.published import load_published as load_published
    from uwm_model.query import PolicyQuery as PolicyQuery
    from uwm_model.world_model import UnifiedWorldModel as UnifiedWorldModel

_HOMES = {
    "Batch": "uwm_model.batch",
    "DiffusionConfig": "uwm_model.config",
    "Model": "uwm_model.model",
    "ModelConfig": "uwm_model.config",
    "PolicyQuery": "uwm_model.query",
    "UnifiedWorldModel": "uwm_model.world_model",
    "build": "uwm_model.kinds",
    "load_published": "uwm_model.published",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
