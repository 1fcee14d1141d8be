"""Conversion between representations of rotations, and of the rotations in an action.

SciPy does the mathematics. Notable: quaternions are returned with a non-negative real part; Euler angles are SciPy's
``"xyz"`` (about fixed axes, x first), the middle one within +-pi/2; rotation_6d is orthonormalised by Gram-Schmidt
(arXiv 1812.07035, appendix B).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from preprocessing.episode import ActionBlock, Representation
from preprocessing.errors import BadEpisode, UserError

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

WIDTHS: dict[Representation, int] = {
    "euler_xyz": 3,
    "quaternion_xyzw": 4,
    "quaternion_wxyz": 4,
    "axis_angle": 3,
    "matrix": 9,
    "rotation_6d": 6,
}

PARALLEL = 1e-6  # float32 directions are accurate only to a few 1e-7


def convert_rotation(values: np.ndarray, given: Representation, wanted: Representation) -> np.ndarray:
    """Convert float ``[T, WIDTHS[given]]`` to float64 ``[T, WIDTHS[wanted]]``; angles in radians.

    Raises BadEpisode if a row is not a rotation: a quaternion of length zero, parallel vectors in rotation_6d.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or values.shape[1] != WIDTHS[given]:
        raise BadEpisode(
            f"a rotation as {given} has {WIDTHS[given]} numbers, but this one has shape {values.shape[1:]}"
        )
    if not np.isfinite(values).all():
        raise BadEpisode("no rotation: it holds NaN or infinity")
    try:
        rotation = _rotation(values, given)
    except ValueError as error:
        raise BadEpisode(f"no rotation: {error}") from None
    match wanted:
        case "euler_xyz":
            return rotation.as_euler("xyz")
        case "quaternion_xyzw":
            return rotation.as_quat(canonical=True)
        case "quaternion_wxyz":
            return rotation.as_quat(canonical=True, scalar_first=True)
        case "axis_angle":
            return rotation.as_rotvec()
        case "matrix":
            return rotation.as_matrix().reshape(-1, 9)
        case "rotation_6d":
            return rotation.as_matrix()[:, :2].reshape(-1, 6)


def with_rotations(
    action: np.ndarray, layout: tuple[ActionBlock, ...], wanted: Representation
) -> tuple[np.ndarray, tuple[ActionBlock, ...]]:
    """Return the action float32 ``[T, A]`` with all its rotations as ``wanted``, and its new layout.

    Velocities are unchanged. Raises UserError if there are no rotations, or if one is scaled or of unknown
    representation, so that its angles are unknown.
    """
    if not any(block.kind == "rotation" for block in layout):
        raise UserError("contract: rotations: the action has no block of kind rotation (action_layout)")
    parts, blocks, start = [], [], 0
    for block in layout:
        values = action[:, start : start + block.size]
        start += block.size
        if block.kind == "rotation" and block.mode != "velocity":
            if not block.representation:
                raise UserError(f"contract: rotations: the representation of {block.name} is unknown (action_layout)")
            if block.unit == "scaled":
                raise UserError(f"contract: rotations: {block.name} is scaled, so its angles are unknown")
            values = convert_rotation(
                np.deg2rad(values) if block.unit == "deg" else values, block.representation, wanted
            )
            unit = "rad" if wanted in ("euler_xyz", "axis_angle") else "unknown"
            block = block.model_copy(update={"representation": wanted, "size": WIDTHS[wanted], "unit": unit})
        parts.append(values)
        blocks.append(block)
    return np.concatenate(parts, axis=1).astype(np.float32), tuple(blocks)


def _rotation(values: np.ndarray, given: Representation) -> Rotation:
    from scipy.spatial.transform import Rotation  # imported lazily: half a second

    match given:
        case "euler_xyz":
            return Rotation.from_euler("xyz", values)
        case "quaternion_xyzw":
            return Rotation.from_quat(values)
        case "quaternion_wxyz":
            return Rotation.from_quat(values, scalar_first=True)
        case "axis_angle":
            return Rotation.from_rotvec(values)
        case "matrix":
            return Rotation.from_matrix(values.reshape(-1, 3, 3))
        case "rotation_6d":
            first, second = values[:, :3], values[:, 3:]
            x = _unit(first)
            y = _unit(second)
            y = _unit(y - (x * y).sum(axis=1, keepdims=True) * x)
            return Rotation.from_matrix(np.stack([x, y, np.cross(x, y)], axis=1))


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if (lengths < PARALLEL).any():
        raise ValueError("one of its vectors is zero, or both are parallel")
    return vectors / lengths
