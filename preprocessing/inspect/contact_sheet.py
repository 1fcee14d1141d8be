"""Frames of some episodes as a policy would see them, captioned with the gripper command.

A glance shows what no number does: a rotated camera, red and blue exchanged, a gripper that opens when commanded to
close.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from preprocessing.episode import Episode
from preprocessing.inspect.check import Measured, blocks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EPISODES = 3
FRAMES = 6  # of each camera, from the first to the last


def contact_sheet(measured: Measured) -> Figure:
    """Return a figure with a row for each camera of up to three episodes; empty if none could be read."""
    from matplotlib.figure import Figure  # imported lazily: half a second

    places = _spread(len(measured.episodes), EPISODES)
    rows = [(measured.episodes[i], camera, count) for i in places for camera, count in measured.frames[i].items()]
    figure = Figure(figsize=(2 * FRAMES, 2.3 * max(1, len(rows))), dpi=100)
    figure.set_layout_engine("constrained", h_pad=0.15)  # inches: room for titles
    grid = figure.subplots(max(1, len(rows)), FRAMES, squeeze=False)
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for axes, (episode, camera, count) in zip(grid, rows, strict=False):
        frames = _frames(episode, camera, _spread(count, FRAMES))
        for axis, (number, frame) in zip(axes, frames.items(), strict=False):
            axis.imshow(frame)
            axis.set_xlabel(f"{number}{_gripper(episode, number)}", fontsize=7)
        where = f"{Path(episode.ref.uri).name} #{episode.ref.index}"
        title = f"{where}: {episode.instruction or 'no instruction'}"
        axes[0].text(0, 1.03, title, transform=axes[0].transAxes, fontsize=8, in_layout=False)  # wider than its axes
        axes[0].set_ylabel(camera, fontsize=8)
    return figure


def _frames(episode: Episode, camera: str, wanted: list[int]) -> dict[int, np.ndarray]:
    """Return the wanted frames, uint8 ``[H, W, 3]``, by number."""
    found: dict[int, np.ndarray] = {}
    first = 0
    for chunk in episode.cameras[camera].frames(None):
        found |= {number: chunk[number - first] for number in wanted if first <= number < first + len(chunk)}
        first += len(chunk)
    return found


def _gripper(episode: Episode, step: int) -> str:
    if episode.action is None or step >= len(episode.action):
        return ""
    grippers = [
        (block, values[step, 0]) for block, values in blocks(episode, episode.action) if block.kind == "gripper"
    ]
    return "".join(
        f", {block.name} {value:.2f}" + (f" (1 is {block.gripper_one_means})" if block.gripper_one_means else "")
        for block, value in grippers
    )


def _spread(count: int, most: int) -> list[int]:
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})
