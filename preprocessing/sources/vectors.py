"""Recorded numbers as float32, which is what episodes hold.

Float32 has 24 bits: a clock of 1.7e9 s advances there in steps of two minutes. Where an offset would swallow the steps
between rows, the column counts from its first row instead.
"""

from __future__ import annotations

import numpy as np

from preprocessing.episode import Repair

OFFSET = 1e4  # columns that start closer to 0 are left as they are
LOST = 0.05  # of the median step between rows


def as_vectors(values: np.ndarray, name: str) -> tuple[np.ndarray, list[Repair]]:
    """Return numbers ``[T, ...]`` of any kind as float32 ``[T, D]``, and a repair if a column counts from its first
    row: it has an offset, as clocks do, beside which float32 cannot hold its steps. Its unit stays as recorded."""
    rows = values.reshape(len(values), -1)
    converted = rows.astype(np.float32)
    wide = [place for place in range(rows.shape[1]) if rows.dtype.itemsize > 2 and _is_swallowed(rows[:, place])]
    for place in wide:
        converted[:, place] = _from_first(rows[:, place])
    if not wide:
        return converted, []
    which = "" if rows.shape[1] == 1 else f" (columns {', '.join(map(str, wide))})"
    text = f"{name}{which} now counts from the first step: float32 cannot hold the time of day, or any such offset"
    return converted, [Repair("steps", text)]


def _is_swallowed(column: np.ndarray) -> bool:
    """Whether float32 would lose the steps between the rows of a column because of its offset."""
    if column.dtype.kind not in "fiu" or column.dtype == np.float32 or len(column) < 2:
        return False
    finite = column[np.isfinite(column)] if column.dtype.kind == "f" else column
    if len(finite) < 2 or abs(float(finite[0])) < OFFSET:
        return False
    moved = np.abs(_from_first(finite, np.float64))
    steps = np.abs(np.diff(moved))
    if not (steps > 0).any() or moved.max() > abs(float(finite[0])) / 4:
        return False
    rounded = finite.astype(np.float32).astype(np.float64)
    errors = np.abs(rounded - rounded[0] - _from_first(finite, np.float64))
    return bool(errors.max() > LOST * np.median(steps[steps > 0]))


def _from_first(column: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    """The column minus its first finite value; integers are subtracted as such, which float64 could not hold."""
    if column.dtype.kind == "u":
        column = column.astype(np.int64) if column.max(initial=0) < 2**63 else column.astype(np.float64)
    known = column[np.isfinite(column)] if column.dtype.kind == "f" else column
    return (column - known[0]).astype(dtype)
