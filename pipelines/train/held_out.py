"""How much of each embodiment a training uses and holds out, told before it starts.

Without held-out episodes nothing can be evaluated, and without windows that lie inside them no predicted frame can be
compared: better known now than after days of training.
"""

from __future__ import annotations

from typing import TypedDict

from pipelines.models.checkpoint import Settings
from pipelines.models.data import selected, window_shape
from pipelines.recipe import Recipe
from preprocessing.dataset.loader import window_limits
from preprocessing.dataset.selection import left_out, spans
from preprocessing.errors import UserError
from preprocessing.store.snapshot import Snapshot


class Amount(TypedDict):
    """Of one embodiment: episodes and windows to train on; held-out episodes, and windows inside these."""

    embodiment: str
    episodes: int
    windows: int
    held_out: int
    held_out_windows: int


def amounts(settings: Settings, recipe: Recipe) -> list[Amount]:
    """Count the episodes and windows of each embodiment. Raises UserError if there is no window to train on."""
    rows = Snapshot(settings.store, settings.snapshot).rows(settings.encoder_digest)
    shape, found = window_shape(settings.model), dict[str, Amount]()
    for validation in (False, True):
        _, least = window_limits(shape, inside=validation or recipe.windows == "inside")
        for row in selected(rows, recipe, validation):
            name = row["embodiment"]
            if name in settings.embodiments and not left_out(row, recipe.mixture):
                one = found.setdefault(
                    name, Amount(embodiment=name, episodes=0, windows=0, held_out=0, held_out_windows=0)
                )
                windows = sum(max(0, stop - first - least + 1) for first, stop in spans(row))
                one["held_out" if validation else "episodes"] += 1
                one["held_out_windows" if validation else "windows"] += windows
    if not any(one["windows"] for one in found.values()):
        _, least = window_limits(shape, inside=True)
        why = f"; with windows=inside an episode needs {least} frames" if recipe.windows == "inside" else ""
        raise UserError(f"{settings.store}: no episode has a window to train on{why}")
    return [*found.values()]


def lines(settings: Settings, recipe: Recipe, counted: list[Amount]) -> list[str]:
    """Return the amounts as text, and what follows from them for an evaluation."""
    _, least = window_limits(window_shape(settings.model), inside=True)
    text = []
    for one in counted:
        text.append(
            f"{one['embodiment']}: {one['episodes']} episodes with {one['windows']} windows to train on; held out: "
            f"{one['held_out']} with {one['held_out_windows']}"
        )
        if not one["held_out"]:
            text[-1] += f"; it cannot be evaluated: raise validation_share ({recipe.validation_share:g})"
        elif not one["held_out_windows"]:
            text[-1] += (
                f"; predicted frames cannot be judged: none of these episodes has the {least} frames of a window"
            )
    return text
