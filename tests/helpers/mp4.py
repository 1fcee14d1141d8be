"""Patch boxes of MP4 files in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def patch_mp4(path: Path, box: bytes, offset: int, values: bytes) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(box) + 4 + offset
    data[at : at + len(values)] = values
    path.write_bytes(data)


# Display matrices (a b; c d) of ISO/IEC 14496-12, 8.3.2, as phones write them, and what the viewer sees.
TURNS = {
    "clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "half": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "counter-clockwise": ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "transposed": ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
}
