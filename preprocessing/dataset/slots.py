"""Which camera slot of a model shows which camera: the same slot for cameras of the same name or kind.

So what a model learns about one robot's wrist camera serves the wrist cameras of the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

# In the names of cameras that move with the arm.
WRIST = re.compile(r"wrist|gripper|palm|(?<![a-z])hand(?!le|held)", re.IGNORECASE)


def share_slots(rigs: Sequence[Sequence[str]], slots: int) -> list[tuple[str, ...]]:
    """Return for each embodiment's cameras, at most ``slots``, the camera of each slot; "" for none.

    A name has the same slot in all embodiments: names are placed one by one, the most constrained first (DSATUR, Brelaz
    1979). Where the slots are too few for that, an embodiment's camera takes another one.
    """
    beside = {camera: {other for rig in rigs if camera in rig for other in rig} for rig in rigs for camera in rig}
    placed: dict[str, int] = {}
    while True:
        taken = {
            camera: {placed[other] for other in others if other in placed}
            for camera, others in beside.items()
            if camera not in placed
        }
        open_to = [camera for camera in taken if len(taken[camera]) < slots]
        if not open_to:
            break
        camera = max(open_to, key=lambda name: (len(taken[name]), len(beside[name])))  # the first of equals
        placed[camera] = min(set(range(slots)) - taken[camera], key=_fit(camera, placed.items()))
    return [assign_slots(rig, (), placed.items()) for rig in rigs]


def assign_slots(cameras: Iterable[str], own: tuple[str, ...], known: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    """Return the camera of each slot.

    Cameras of ``own`` keep their slots. A new camera takes the slot of a ``known`` camera of that name, or else of its
    kind (wrist cameras move with the arm, others do not), or else the first free one.
    """
    assigned = {slot: camera for slot, camera in enumerate(own) if camera}
    known, new = [*known], [camera for camera in cameras if camera not in own]
    for camera in new:
        same = (slot for name, slot in known if name == camera and slot not in assigned)
        if (slot := next(same, None)) is not None:
            assigned[slot] = camera
    count = max([len({*assigned.values(), *new}), *(slot + 1 for slot in assigned), *(slot + 1 for _, slot in known)])
    left = [camera for camera in new if camera not in assigned.values()]
    for camera in sorted(left, key=lambda name: not WRIST.search(name)):
        assigned[min(set(range(count)) - assigned.keys(), key=_fit(camera, known))] = camera
    return tuple(assigned.get(slot, "") for slot in range(1 + max(assigned, default=-1)))


def _fit(camera: str, known: Iterable[tuple[str, int]]) -> Callable[[int], tuple[int, int]]:
    """Return a key that sorts slots: those with known cameras of this one's kind, unused ones, the others."""
    kinds: dict[int, set[bool]] = {}
    for name, slot in known:
        if name:
            kinds.setdefault(slot, set()).add(bool(WRIST.search(name)))
    mine = bool(WRIST.search(camera))
    return lambda slot: (1 if slot not in kinds else 0 if mine in kinds[slot] else 2, slot)
