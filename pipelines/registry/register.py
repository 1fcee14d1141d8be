"""Register a checkpoint in the MLflow model registry, as a policy that MLflow can load and serve."""

from __future__ import annotations

from pathlib import Path

from infra import registry, tracking
from pipelines.models.policy import Policy


def register(checkpoint: Path, name: str, embodiment: str | None = None) -> str:
    """Register a new version of the model ``name``; return the version number."""
    tracking.connect()
    policy = Policy(checkpoint, embodiment)
    settings, spec = policy.settings, policy.spec
    assert settings.run_id, "only trained checkpoints are registered"
    observed, size = settings.model.observed_frames, policy.image_size
    inputs: dict[str, tuple[str, tuple[int, ...]]] = {
        f"image.{camera}": ("uint8", (-1, observed, size, size, 3)) for camera in spec.seen
    }
    inputs |= {f"proprio.{part}": ("float32", (-1, observed, width)) for part, width in spec.proprio}
    return registry.register(
        settings.run_id,
        name,
        checkpoint=checkpoint,
        code=Path(__file__).parents[1] / "models" / "mlflow_policy.py",
        inputs=inputs,
        output=(-1, settings.model.action_chunk, spec.action_dim),
        parameters=("contract", "instruction"),
        model_config={"embodiment": policy.embodiment, "fast": False},
        tags={"snapshot": settings.snapshot, "store": settings.store, "parent": settings.parent or "none"},
    )
