"""The registered model: what MLflow loads from a model version, and serves.

Input, by name: ``image.CAMERA`` uint8 [B, To, S, S, 3] and ``proprio.NAME`` float32 [B, To, D]. Output: float32
actions [B, L, A] in the robot's units. With the parameter ``contract`` (JSON: fps, cameras, proprio, action_dim,
action_layout) a robot says what it shows and carries out; where training knew it otherwise, it gets no action.
With ``instruction`` it says what is to be done. Loaded with ``model_config={"fast": True}`` the model answers sooner
and almost the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from pipelines.models.policy import Policy
from preprocessing.contracts.interface import Interface


class PolicyModel(PythonModel):
    def load_context(self, context: Any) -> None:
        config = context.model_config
        self._policy = Policy(Path(context.artifacts["checkpoint"]), config["embodiment"], config["fast"])

    # No type hints: MLflow would take them for a second signature, and knows no dictionary of arrays.
    def predict(self, context, model_input, params=None):
        def part(prefix: str) -> dict[str, np.ndarray]:
            return {k.removeprefix(prefix): v for k, v in model_input.items() if k.startswith(prefix)}

        if interface := (params or {}).get("contract"):
            self._policy.accept(Interface.model_validate_json(interface), "the robot that asks")
        instruction = (params or {}).get("instruction") or None
        return self._policy.act(part("image."), part("proprio."), instruction=instruction)


set_model(PolicyModel())
