"""The robots that a finetuned model knows: those of its parent, and those of the data; whose camera is in which slot.

A camera goes where the model knows one of its name, so that the "wrist" of a new robot finds what was learned of
wrists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipelines.models.checkpoint import Normalizers, Settings
from pipelines.recipe import Recipe
from preprocessing.dataset.embodiment import Embodiment, describe
from preprocessing.dataset.selection import by_embodiment
from preprocessing.errors import UserError
from preprocessing.store.catalogue import TrainingRow
from uwm_model.config import ModelConfig
from uwm_model.transplant import Inputs


@dataclass(frozen=True)
class Robots:
    """``known`` are the parent's and the data's, by name; ``here`` are the names of the data's. Cameras are in the
    parent's slots, and in further ones behind them.
    """

    known: dict[str, Embodiment]
    here: tuple[str, ...]
    data_statistics: dict[str, Normalizers]

    def slots(self, held: int, wanted: int | None) -> list[int]:
        """Which of the slots a model has that holds ``held`` now and is ``wanted`` to have so many (None: no fewer).

        Where there are too many, those of the data's cameras come first.
        """
        filled = {i for name in self.here for i, camera in enumerate(self.known[name].cameras) if camera}
        every = max([held, wanted or 0, *(i + 1 for i in filled)])
        by_need = sorted(range(every), key=lambda slot: (slot not in filled, slot))
        return sorted(by_need[: wanted or every])


def robots(parent: Settings, rows: list[TrainingRow], recipe: Recipe) -> Robots:
    """Of the catalogue rows; UserError where a robot is not what the parent knows by its name."""
    known, data = dict(parent.embodiments), {}
    for name, members in by_embodiment(rows).items():
        before = known.get(name)
        pretrained = before is not None and recipe.statistics == "pretrained"
        normalise = parent.recipe.get("normalise", "extremes") if pretrained else recipe.normalise  # like with like
        index = before.index if before else 1 + max((robot.index for robot in known.values()), default=-1)
        found = describe(name, members, index, None, normalise)
        data[name] = Normalizers(found.action_normalizer, found.proprio_normalizer)
        if before and (misfits := before.misfits(found, ranges=pretrained)):
            raise UserError(
                f"embodiment {name} is not as in pretraining: {'; '.join(misfits)}; if it is another robot, give "
                "it a name of its own (--contract, embodiment: NAME); if only its ranges are others, statistics=data"
            )
        cameras = _seated(found.cameras, before.cameras if before else (), [robot.cameras for robot in known.values()])
        known[name] = dataclasses.replace(before if before and pretrained else found, cameras=cameras)
    return Robots(known, tuple(data), data)


def in_slots(robot: Embodiment, slots: Sequence[int]) -> Embodiment:
    """The robot with the cameras of these slots alone, in their order."""
    cameras = [robot.cameras[slot] if slot < len(robot.cameras) else "" for slot in slots]
    while cameras and not cameras[-1]:
        cameras.pop()
    return dataclasses.replace(robot, cameras=tuple(cameras))


def inputs(
    parent: Settings, found: Robots, slots: Sequence[int], model: ModelConfig, text_encoder: str | None
) -> tuple[Inputs, Inputs]:
    """What the parent reads, and what ``model`` reads, whose cameras are in these of the slots: by name.

    Of a parent that knows no robot, every place counts as used.
    """
    spare = "spare camera" if parent.embodiments else "camera"
    old = [_cameras(parent.embodiments, slot) or f"{spare} {slot}" for slot in range(parent.model.cameras)]
    used = {slot: name for slot, name in enumerate(old) if not name.startswith("spare")}
    new = [used.get(slot) or _cameras(found.known, slot) or f"spare camera {slot}" for slot in slots]
    return (
        _read(parent.model, old, parent.embodiments, parent.text_encoder_digest),
        _read(model, new, found.known, text_encoder),
    )


def _cameras(robots: dict[str, Embodiment], slot: int) -> str:
    """What robots have in a slot, "camera 1 (wrist/gripper)"; empty where none has any."""
    held = (robot.cameras[slot] for robot in robots.values() if slot < len(robot.cameras))
    names = "/".join(dict.fromkeys(name for name in held if name))
    return names and f"camera {slot} ({names})"


def _read(model: ModelConfig, cameras: list[str], robots: dict[str, Embodiment], text_encoder: str | None) -> Inputs:
    names = {robot.index: name for name, robot in robots.items()}
    rows = [f"embodiment {names[i]}" if i in names else f"spare embodiment {i}" for i in range(model.embodiments)]
    actions = max((robot.action_dim for robot in robots.values()), default=model.action_dim)
    proprio = max((robot.proprio_dim for robot in robots.values()), default=model.proprio_dim)
    return Inputs(
        model,
        cameras,
        rows,
        actions=[f"action {i}" for i in range(actions)],
        proprio=[f"proprio {i}" for i in range(proprio)],
        text=f"text encoder {text_encoder}",
    )


def _seated(cameras: Iterable[str], own: tuple[str, ...], others: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """A camera a slot: where the robot's ``own`` were and others' of that name are, else in the first that are free."""
    seats = {slot: camera for slot, camera in enumerate(own) if camera}
    places = [(camera, slot) for robot in others for slot, camera in enumerate(robot)]
    new = [camera for camera in cameras if camera not in own]
    for camera in new:
        same = (slot for name, slot in places if name == camera and slot not in seats)
        if (slot := next(same, None)) is not None:
            seats[slot] = camera
    for camera in new:
        if camera not in seats.values():
            seats[next(slot for slot in range(len(seats) + 1) if slot not in seats)] = camera
    return tuple(seats.get(slot, "") for slot in range(1 + max(seats, default=-1)))
