"""Register a checkpoint in the MLflow model registry, as a policy that MLflow can load and serve."""

from __future__ import annotations

from pathlib import Path

from infra import registry, tracking
from pipelines.models.policy import Policy
from preprocessing.errors import UserError


def check_name(name: str) -> None:
    """Raise UserError unless MLflow accepts the name of a model."""
    if not registry.NAME.fullmatch(name):
        raise UserError(f"{name!r}: no name for a model; use letters, digits, spaces, dots, hyphens and underscores")


def register(checkpoint: Path, name: str, embodiment: str | None = None) -> str:
    """Register a new version of the model ``name``; return the version number.

    Raises UserError if the name or the embodiment does not fit, or if MLflow does not know the checkpoint's run.
    """
    check_name(name)
    policy = Policy(checkpoint, embodiment)
    settings, spec = policy.settings, policy.spec
    if not settings.run_id or not tracking.has_run(settings.run_id):
        where = f"not in MLflow at {tracking.connect()}; check MLFLOW_TRACKING_URI"
        raise UserError(
            f"{checkpoint}: "
            + (
                f"its run {settings.run_id} is {where}"
                if settings.run_id
                else "it has no run; only what uwm trained can be registered"
            )
        )
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
        parameters=("contract", "instruction", "missing"),
        model_config={"embodiment": policy.embodiment, "fast": False},
        tags={"snapshot": settings.snapshot, "store": settings.store, "parent": settings.parent or "none"},
    )
