"""The registered model, which MLflow loads from a model version and serves.

Input, by name: ``image.CAMERA`` uint8 [B, To, S, S, 3] and ``proprio.NAME`` float32 [B, To, D]. Output: float32
actions [B, L, A] in the robot's units. Optional parameters: ``contract`` (JSON: fps, cameras, proprio, action_dim,
action_layout) describes the calling robot, and a mismatch with training is refused; ``instruction`` is the task;
``missing`` names cameras, separated by commas, whose frames are to be ignored (MLflow itself wants every input).
``model_config={"fast": True}`` selects faster approximate inference.
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

    # No type hints: MLflow would read them as a second signature, and does not support dictionaries of arrays.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        def part(prefix: str) -> dict[str, np.ndarray]:
            return {k.removeprefix(prefix): v for k, v in model_input.items() if k.startswith(prefix)}

        asked = params or {}
        if contract := asked.get("contract"):
            self._policy.accept(Interface.parse(contract, "parameter contract"), "the calling robot")
        missing = {name.strip() for name in (asked.get("missing") or "").split(",")}
        images = {name: frames for name, frames in part("image.").items() if name not in missing}
        return self._policy.act(images, part("proprio."), instruction=asked.get("instruction") or None)


set_model(PolicyModel())
