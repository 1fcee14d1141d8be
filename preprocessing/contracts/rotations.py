"""Rotations from one representation to another, and actions whose rotations are converted.

SciPy does the mathematics. Notable: a quaternion and its negative are one rotation, and come back with a real part that
is not negative; angles about axes are those of SciPy's ``"xyz"`` (about fixed axes, x first), the middle one within
+-pi/2; six numbers are made a rotation by Gram and Schmidt (arXiv 1812.07035, appendix B).
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

PARALLEL = 1e-6  # float32 keeps directions no better than to a few 1e-7


def convert_rotation(values: np.ndarray, given: Representation, wanted: Representation) -> np.ndarray:
    """float ``[T, WIDTHS[given]]`` to float64 ``[T, WIDTHS[wanted]]``; angles in radians.

    Raises BadEpisode for what is no rotation: a quaternion of length zero, six numbers that lie on one line.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or values.shape[1] != WIDTHS[given]:
        raise BadEpisode(f"a rotation as {given} has {WIDTHS[given]} numbers, this one has shape {values.shape[1:]}")
    if not np.isfinite(values).all():
        raise BadEpisode("no rotation: holds numbers that are not finite")
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
    """The action float32 ``[T, A]`` with all its rotations as ``wanted``, and the layout that it then has.

    Speeds stay as they are. UserError where there are no rotations, and where they are scaled or of no known
    representation: then nobody knows their angles.
    """
    if not any(block.kind == "rotation" for block in layout):
        raise UserError("contract: rotations: the action has no block of kind rotation (action_layout)")
    parts, blocks, start = [], [], 0
    for block in layout:
        values = action[:, start : start + block.size]
        start += block.size
        if block.kind == "rotation" and block.mode != "velocity":
            if not block.representation:
                raise UserError(f"contract: rotations: the representation of {block.name} is not known (action_layout)")
            if block.unit == "scaled":
                raise UserError(f"contract: rotations: {block.name} is scaled, so that its angles are not known")
            values = convert_rotation(
                np.deg2rad(values) if block.unit == "deg" else values, block.representation, wanted
            )
            unit = "rad" if wanted in ("euler_xyz", "axis_angle") else "unknown"
            block = block.model_copy(update={"representation": wanted, "size": WIDTHS[wanted], "unit": unit})
        parts.append(values)
        blocks.append(block)
    return np.concatenate(parts, axis=1).astype(np.float32), tuple(blocks)


def _rotation(values: np.ndarray, given: Representation) -> Rotation:
    from scipy.spatial.transform import Rotation  # takes half a second, which whoever converts nothing is spared

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
        raise ValueError("one of its directions is nil, or both are one")
    return vectors / lengths
