"""A draft contract for a source, as YAML: what its reader finds, with measurements in the comments.

Somebody who knows the robot corrects it and passes it to ``uwm ingest --contract``. What cannot be measured stays
"unknown". For a data set with a shipped contract, the draft starts from that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import yaml

from preprocessing.contracts.contract import DataContract
from preprocessing.episode import ActionBlock, Episode
from preprocessing.inspect.check import Measured, black_cameras, blocks, find_lag, looks_upside_down
from preprocessing.sources import shipped_contract


def contract_yaml(measured: Measured, title: str) -> str:
    """Return the draft contract. ``title`` names the source. Raises ValueError if no episode could be read."""
    if not measured.episodes:
        raise ValueError("no episode could be read")
    return "\n".join(_lines(measured, title)) + "\n"


def _lines(measured: Measured, title: str) -> Iterator[str]:
    episodes = measured.episodes
    shipped = shipped_contract(episodes[0]) or DataContract()
    yield f"# {title}: measured on {len(episodes)} of {measured.listed} episodes. Correct it, then pass this file to"
    yield "# uwm ingest --contract. The reader decides whatever has no line here."
    if shipped.name:
        yield f"# Based on the shipped contract {shipped.name}."
    for repair, count in measured.repairs().most_common():
        yield f"# in {count} of {len(episodes)} episodes: {repair}"
    yield _entry("embodiment", episodes[0].embodiment, _others(episode.embodiment for episode in episodes))
    yield _entry("fps", round(episodes[0].fps, 3), _others(round(episode.fps, 3) for episode in episodes))
    yield from _cameras(measured)
    yield from _columns("proprio", episodes, {name: None for e in episodes for name in e.proprio})
    yield from _action(measured, shipped)
    yield from _words(measured, shipped)


def _cameras(measured: Measured) -> Iterator[str]:
    count = len(measured.episodes)
    names = {name: sum(name in e.cameras for e in measured.episodes) for e in measured.episodes for name in e.cameras}
    yield "cameras:  # recorded name: name in the store; cameras without a line are dropped"
    black = black_cameras(measured)
    for name, having in names.items():
        found = "" if having == count else f"in {having} of {count} episodes"
        dead = "black in every episode: an ingest leaves it out" if black.get(name) == having else ""
        yield f"  {_entry(name, name, dead or found)}"
    turned = [name for name in names if any(name in e.cameras and e.cameras[name].turned for e in measured.episodes)]
    odd = sorted({camera for _, camera in looks_upside_down(measured)})
    yield _entry("flip", turned, "stored bottom-up" + (f"; {', '.join(odd)} look so in some episodes" if odd else ""))


def _columns(kind: str, episodes: list[Episode], names: Iterable[str]) -> Iterator[str]:
    found = {name: [e.proprio[name] for e in episodes if name in e.proprio] for name in names}
    yield f"{kind}:  # the robot state that the policy observes" if found else f"{kind}: {{}}"
    for name, parts in found.items():
        yield f"  {_entry(name, name, f'{parts[0].shape[1]} columns, {_range(parts)}')}"


def _action(measured: Measured, shipped: DataContract) -> Iterator[str]:
    acting = [episode for episode in measured.episodes if episode.action is not None]
    signals = {name: values.shape[1] for e in measured.episodes for name, values in e.signals.items()}
    if signals:
        widths = ", ".join(f"{name} ({width})" for name, width in signals.items())
        yield f"# also recorded at each step: {widths}"
    actions = measured.actions()
    if actions is None:
        yield "# no action was found; name the signals that make it up: action: [NAME, ...]"
        return
    lag = find_lag(acting)
    if lag:
        yield f"# {lag.said}"
    yield _entry("action", list(shipped.action or ["action"]))
    yield "action_layout:"
    found = list(blocks(acting[0], actions))
    recorded = shipped.action_layout or [block for block, _ in found]
    for block, (_, values) in zip(recorded, found, strict=True):
        yield f"- {_flow(_fields(block))}  # {_range([values])}{_habit(values)}"
    if shipped.rotations:
        yield _entry("rotations", shipped.rotations, "the ranges above are those after conversion")


def _fields(block: ActionBlock) -> dict[str, object]:
    """Return all fields that a block of this kind needs, unknown ones included, so that the reader fills them in."""
    needed = {"name", "size", "kind", "mode", "frame", "unit"}
    needed |= {"representation"} if block.kind == "rotation" else set()
    needed |= {"gripper_one_means"} if block.kind == "gripper" else set()
    return {name: value for name, value in block.model_dump().items() if name in needed}


def _habit(values: np.ndarray) -> str:
    if np.ptp(values, axis=0).max() == 0:
        return ", never changes"
    ends = [np.isclose(values, end, atol=0.02 * np.ptp(values)).mean() for end in (values.min(), values.max())]
    return ", at either end most of the time" if values.shape[1] == 1 and sum(ends) > 0.8 else ""


def _words(measured: Measured, shipped: DataContract) -> Iterator[str]:
    texts = {name: text for e in reversed(measured.episodes) for name, text in e.texts.items()}
    if texts:
        for name, text in texts.items():
            yield f"# {name}: {' '.join(text.split())[:80]}"
        chosen = next((name for name, text in texts.items() if text == measured.episodes[0].instruction), None)
        yield _entry("instruction_field", chosen) if chosen else "# instruction_field: one of these"
    elif not any(episode.instruction for episode in measured.episodes):
        yield "# instruction: none was found; set one for all episodes here"
    if all(episode.success is None for episode in measured.episodes):
        yield "# success_field: success is not recorded; set a signal here that is 1 at a step of success"
    if measured.splits:
        means = {name: "train" if name.startswith("train") else "validation" for name in sorted(measured.splits)}
        yield _entry("splits", means | (shipped.splits or {}))


def _others(values: Iterable[object]) -> str:
    different = list(dict.fromkeys(map(str, values)))
    return f"or {', '.join(different[1:6])}: episodes differ" if len(different) > 1 else ""


def _range(parts: list[np.ndarray]) -> str:
    return f"{min(part.min() for part in parts):.3g} to {max(part.max() for part in parts):.3g}"


def _entry(name: str, value: object, comment: str = "") -> str:
    return _flow({name: value})[1:-1] + (f"  # {comment}" if comment else "")


def _flow(value: object) -> str:
    """Return the value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6).strip()
