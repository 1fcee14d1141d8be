"""Which class a model's settings ask for: ``kind`` is UWM, or one of the paper's comparisons."""

from __future__ import annotations

from uwm_model.baselines.dp import DiffusionPolicy
from uwm_model.baselines.gr1 import GR1
from uwm_model.baselines.pad import PredictionWithAction
from uwm_model.config import DiffusionConfig, ModelConfig
from uwm_model.world_model import UnifiedWorldModel

Model = UnifiedWorldModel | DiffusionPolicy | PredictionWithAction | GR1

CLASSES: dict[str, type[Model]] = {
    "uwm": UnifiedWorldModel,
    "dp": DiffusionPolicy,
    "pad": PredictionWithAction,
    "gr1": GR1,
}


def build(model: ModelConfig, diffusion: DiffusionConfig) -> Model:
    """A fresh model of that kind: ``loss(batch)``, ``sample(mode, batch)`` for each of its ``modes``."""
    return CLASSES[model.kind](model, diffusion)
