"""The class for each ``kind`` of model: UWM, or one of the paper's comparisons."""

from __future__ import annotations

from uwm_model.baselines.dp import DiffusionPolicy
from uwm_model.baselines.gr1 import GR1
from uwm_model.baselines.pad import PredictionWithAction
from uwm_model.config import DiffusionConfig, Kind, ModelConfig
from uwm_model.model import Model
from uwm_model.world_model import UnifiedWorldModel

CLASSES: dict[Kind, type[Model]] = {
    "uwm": UnifiedWorldModel,
    "dp": DiffusionPolicy,
    "pad": PredictionWithAction,
    "gr1": GR1,
}


def build(model: ModelConfig, diffusion: DiffusionConfig) -> Model:
    """Return a freshly initialised model of the kind that the settings name."""
    return CLASSES[model.kind](model, diffusion)
