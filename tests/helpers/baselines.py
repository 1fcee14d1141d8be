"""Small models of the paper's comparisons."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from helpers.models import TINY

from uwm_model.config import DiffusionConfig, ModelConfig
from uwm_model.kinds import Model, build


def fresh(kind: Any, config: ModelConfig = TINY, diffusion: DiffusionConfig | None = None) -> Model:
    torch.manual_seed(0)
    return build(dataclasses.replace(config, kind=kind), diffusion or DiffusionConfig())


def stirred(kind: str, config: ModelConfig = TINY) -> Model:
    """A model without zero weights, so that everything that can affect an output does."""
    model = fresh(kind, config)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model
