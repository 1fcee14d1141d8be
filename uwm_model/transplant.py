"""Transfer a trained model's weights to a model with other inputs: actions, cameras, text, embodiments, horizons.

A matrix's size does not say which row belongs where. So every row and column that depends on the model's inputs has a
meaning ("action 3", "camera wrist, the frame before"), and weights are copied to where the same meaning is. All others
keep the new model's initialisation, except that a column that reads an input unknown to the old model starts at zero,
so that the new model initially predicts what the old one does.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch
from torch import Tensor

from uwm_model.config import ModelConfig
from uwm_model.observation import CHANNELS, EMBODIMENT_WIDTH, INSTRUCTION_WIDTH, PROPRIO_WIDTH

# Settings that may differ between the two models.
CHANGEABLE = {
    "cameras", "latent_size", "action_dim", "proprio_dim", "embodiments", "observed_frames", "future_frames",
    "action_chunk", "position", "current_patches", "text_width",
}  # fmt: skip

PARTS = (  # (part, substring of its parameters' names); the first match applies
    ("proprioception", "observation.proprio."),
    ("embodiments", "observation.embodiment."),
    ("instructions", "observation.instruction."),
    ("instructions", "observation.untold"),
    ("condition", "observation.join."),
    ("images", "observation."),
    ("action tokens", ".actions."),
    ("latent tokens", ".latents."),
    ("registers", ".registers"),
    ("positions", ".position"),
    ("queries", ".queries"),
    ("timesteps", ".timestep"),
    ("modulation", ".modulation."),
    ("head", ".head."),
    ("observation tokens", ".observed."),
    ("blocks", ""),
)

Meaning = tuple[Hashable, ...]  # of a row or column: words, which the report lists, and numbers, which it does not
Meanings = dict[str, dict[int, list[Meaning]]]  # by suffix of a parameter's name, then by axis


@dataclass(frozen=True)
class Inputs:
    """A model's inputs by name: the same name means the same input in two models.

    Places without a name are spare and untrained.
    """

    config: ModelConfig
    cameras: Sequence[str]
    embodiments: Sequence[str]
    actions: Sequence[str]  # one name per column
    proprio: Sequence[str]
    text: str  # the instructions' text encoder


@dataclass(frozen=True)
class TransplantedPart:
    """How many values of one part of the model were transplanted.

    ``loaded + fresh`` are the new model's, ``loaded + left`` the old one's. ``note`` lists what is fresh and left;
    ``names`` are the parameters that are fresh, entirely or partly.
    """

    part: str
    loaded: int
    fresh: int
    left: int
    note: str
    names: tuple[str, ...]


def transplant(
    weights: Mapping[str, Tensor], before: Inputs, fresh: Mapping[str, Tensor], after: Inputs
) -> dict[str, Tensor]:
    """Return the new model's state: its own ``fresh`` one, with the old ``weights`` where they mean the same.

    Raises ValueError if the two models differ in more than their inputs.
    """
    theirs, ours = _checked_meanings(before, after)
    result = dict(fresh)
    for name in fresh.keys() & weights.keys():
        old, new = weights[name], fresh[name].clone()
        matches = _matches(name, old.shape, new.shape, theirs, ours)
        if new.ndim == 2 and matches[1]:
            rows, columns = (torch.tensor([to for to, _ in axis], dtype=torch.long) for axis in matches)
            unknown = torch.ones(new.shape[1], dtype=torch.bool).index_fill(0, columns, False)
            new[rows[:, None], unknown.nonzero().flatten()] = 0
        to, back = (
            torch.meshgrid(*(torch.tensor([pair[side] for pair in axis], dtype=torch.long) for axis in matches),
                           indexing="ij")
            for side in (0, 1)
        )  # fmt: skip
        new[to] = old[back].to(new.dtype)
        result[name] = new
    return result


def plan_transplant(
    weights: Mapping[str, Tensor], before: Inputs, fresh: Mapping[str, Tensor], after: Inputs
) -> tuple[TransplantedPart, ...]:
    """Return what ``transplant`` would do to each part. Only shapes are read: tensors may be on the meta device."""
    theirs, ours = _checked_meanings(before, after)
    rows: dict[str, list[tuple[Any, ...]]] = {part: [] for part, _ in PARTS}
    for name in dict.fromkeys([*fresh, *weights]):
        old, new = (state[name].shape if name in state else None for state in (weights, fresh))
        if old is None or new is None:
            loaded, gained, lost = 0, [name] if old is None else [], [name] if new is None else []
        else:
            loaded = prod(len(axis) for axis in _matches(name, old, new, theirs, ours))
            known, wanted = _meanings_of(name, theirs), _meanings_of(name, ours)
            gained, lost = _unknown(wanted, known), _unknown(known, wanted)
        fresh_count, left_count = (0 if shape is None else prod(shape) - loaded for shape in (new, old))
        rows[part_of(name)].append((name, loaded, fresh_count, left_count, gained, lost))
    return tuple(_summary(part, found) for part, found in rows.items() if found)


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to."""
    return next(part for part, contained in PARTS if contained in name)


def _summary(part: str, rows: list[tuple[Any, ...]]) -> TransplantedPart:
    """Sum rows of (name, loaded, fresh, left, words of what is fresh, words of what is left)."""
    names, loaded, fresh, left, gained, lost = zip(*rows, strict=True)
    said = [
        f"{what}: {_join(dict.fromkeys(word for words in each for word in words))}"
        for what, each in (("fresh", gained), ("left", lost))
        if any(each)
    ]
    fresh_names = tuple(name for name, new in zip(names, fresh, strict=True) if new)
    return TransplantedPart(part, sum(loaded), sum(fresh), sum(left), "; ".join(said), fresh_names)


def _checked_meanings(before: Inputs, after: Inputs) -> tuple[Meanings, Meanings]:
    for field in fields(ModelConfig):
        old, new = (getattr(inputs.config, field.name) for inputs in (before, after))
        if old != new and field.name not in CHANGEABLE:
            raise ValueError(f"{field.name}: {new}, but the trained model has {old}, which cannot change")
    return _meanings(before), _meanings(after)


def _matches(
    name: str, old: Sequence[int], new: Sequence[int], theirs: Meanings, ours: Meanings
) -> list[list[tuple[int, int]]]:
    """Return, for each axis, the pairs of indices with the same meaning: (in the new model, in the old one)."""
    pairs = []
    for axis, (before, after) in enumerate(zip(old, new, strict=True)):
        known, wanted = (
            _meanings_of(name, of).get(axis, [(i,) for i in range(n)]) for of, n in ((theirs, before), (ours, after))
        )
        assert (len(known), len(wanted)) == (before, after), f"{name}: {tuple(old)}, {tuple(new)}"
        place = {meaning: i for i, meaning in enumerate(known)}
        pairs.append([(i, place[meaning]) for i, meaning in enumerate(wanted) if meaning in place])
    return pairs


def _meanings_of(name: str, meanings: Meanings) -> dict[int, list[Meaning]]:
    return next((axes for end, axes in meanings.items() if f".{name}".endswith(f".{end}")), {})


def _unknown(mine: dict[int, list[Meaning]], theirs: dict[int, list[Meaning]]) -> list[str]:
    """Return the words in ``mine`` that ``theirs`` lacks."""
    found: dict[str, None] = {}
    for axis, meanings in mine.items():
        known = {word for meaning in theirs.get(axis, []) for word in meaning}
        found |= {word: None for meaning in meanings for word in meaning if isinstance(word, str) and word not in known}
    return [*found]


def _join(words: Iterable[str]) -> str:
    """Join words, with runs such as ``action 5, action 6, action 7`` as ``action 5-7``."""
    runs: list[tuple[str, int, int] | str] = []
    for word in words:
        stem, _, number = word.rpartition(" ")
        last = runs[-1] if runs else ""
        if not number.isdigit():
            runs.append(word)
        elif isinstance(last, tuple) and (last[0], last[2] + 1) == (stem, int(number)):
            runs[-1] = (stem, last[1], int(number))
        else:
            runs.append((stem, int(number), int(number)))
    return ", ".join(
        run if isinstance(run, str) else f"{run[0]} {run[1]}" + (f"-{run[2]}" if run[2] > run[1] else "")
        for run in runs
    )


def _places(names: Sequence[str], what: str, size: int) -> list[str]:
    return [*names[:size], *(f"spare {what} {i}" for i in range(len(names), size))]


def _meanings(of: Inputs) -> Meanings:
    """Return the meanings of every row and column that depends on the inputs, in the network's own order."""
    c, (h, w), (pt, ph, pw) = of.config, of.config.latent_size, of.config.patch
    frames = [f"frame {t}" for t in range(1 - c.observed_frames, 1)]  # frame 0 is now
    actions: list[Meaning] = [(name,) for name in _places(of.actions, "action", c.action_dim)]
    embodiments: list[Meaning] = [(name,) for name in _places(of.embodiments, "embodiment", c.embodiments)]
    slots = _places(of.cameras, "camera", c.cameras)
    cameras: list[Meaning] = [(camera,) for camera in slots]
    camera_features: list[Meaning] = [(camera, t, i) for camera in slots for t in frames for i in range(c.frame_width)]
    # A place in a frame has the same meaning only in a frame of the same size.
    places = f"{h // ph} x {w // pw} patches"
    rows, columns = -(-h // 4), -(-w // 4)  # of the observation's map
    cells: list[Meaning] = [(f"{rows} x {columns} cells", i) for i in range(CHANNELS[1] * rows * columns)]
    proprio: list[Meaning] = [
        (name, t) for t in [*frames, "known"] for name in _places(of.proprio, "proprio", c.proprio_dim)
    ]

    joined = camera_features if c.observation == "latents" else []
    joined = [*joined, *[("body", i) for i in range(PROPRIO_WIDTH + EMBODIMENT_WIDTH)]]
    joined += [("instruction", i) for i in range(INSTRUCTION_WIDTH if c.text_width else 0)]
    condition: list[Meaning] = (
        camera_features if c.observation == "pixels" else [(i,) for i in range(c.condition_width)]
    )
    timesteps = 0 if c.kind == "gr1" else c.timestep_width
    modulated = [*condition, *[("timestep", i) for i in range(timesteps)]]

    # Steps and future frames are counted from the first: one model's third future frame is the other's third.
    steps: list[Meaning] = [(f"step {i}",) for i in range(c.action_chunk)]
    patches = (h // ph) * (w // pw)
    future: list[Meaning] = [
        (camera, f"future {t}", places, i)
        for camera in slots
        for t in range(c.future_frames // pt)
        for i in range(patches)
    ]
    present: list[Meaning] = [(camera, "present", places, i) for camera in slots for i in range(c.observed_patches)]
    registers: list[Meaning] = [("register", i) for i in range(c.registers)]
    patch: list[Meaning] = [(t, i) for t in frames for i in range(c.latent_channels * ph * pw)]
    observed: list[Meaning] = [(camera, t, i) for camera in slots for t in frames for i in range(c.width)]
    return {
        "observation.camera.weight": {0: cameras},
        "observation.rest.6.weight": {1: cells},
        "observation.proprio.0.weight": {1: proprio},
        "observation.embodiment.weight": {0: embodiments},
        "observation.instruction.weight": {1: [(of.text, i) for i in range(c.text_width)]},
        "observation.join.0.weight": {1: joined},
        "modulation.1.weight": {1: modulated},
        "actions.encode.0.weight": {1: actions},
        "actions.decode.2.weight": {0: actions},
        "actions.decode.2.bias": {0: actions},
        "latents.current.weight": {1: patch},
        "latents.observed.weight": {1: patch},
        "position.camera": {0: cameras},
        "position": {1: steps if c.kind == "dp" else [*steps, *future, *present, *registers]},
        "transformer.observed.weight": {0: observed, 1: condition},
        "transformer.observed.bias": {0: observed},
        "transformer.queries": {1: [*future, *steps]},
    }
