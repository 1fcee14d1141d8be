"""The embodiments of a finetuned model, its parent's and the data's, and which camera is in which slot.

A camera goes into the slot where the model already knows a camera of that name, or of its kind, so that a new
embodiment's "wrist" reuses what was learned about wrist cameras.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.models.checkpoint import Normalizers, Settings
from pipelines.recipe import Recipe
from preprocessing.dataset.embodiment import Embodiment, describe
from preprocessing.dataset.selection import by_embodiment
from preprocessing.dataset.slots import assign_slots
from preprocessing.errors import UserError
from preprocessing.store.rows import TrainingRow
from uwm_model.config import ModelConfig
from uwm_model.transplant import Inputs


@dataclass(frozen=True)
class Embodiments:
    """``known``: the parent's embodiments and the data's, by name. ``in_data``: the names of the data's.

    Cameras are in the parent's slots, and in additional slots after them.
    """

    known: dict[str, Embodiment]
    in_data: tuple[str, ...]
    data_statistics: dict[str, Normalizers]

    def slots(self, held: int, wanted: int | None) -> list[int]:
        """Return the camera slots to use for a model with ``held`` slots that should get ``wanted`` (None: all).

        If there are too many, slots of the data's cameras take precedence.
        """
        filled = {i for name in self.in_data for i, camera in enumerate(self.known[name].cameras) if camera}
        count = max([held, wanted or 0, *(i + 1 for i in filled)])
        by_need = sorted(range(count), key=lambda slot: (slot not in filled, slot))
        return sorted(by_need[: wanted or count])


def match_embodiments(parent: Settings, rows: list[TrainingRow], recipe: Recipe) -> Embodiments:
    """Match the embodiments of the catalogue rows with the parent's, by name.

    Raises UserError if an embodiment differs from the parent's of that name.
    """
    known, data = dict(parent.embodiments), {}
    for name, members in by_embodiment(rows).items():
        before = known.get(name)
        pretrained = before is not None and recipe.statistics == "pretrained"
        normalise = parent.recipe.get("normalise", "extremes") if pretrained else recipe.normalise  # to compare alike
        index = before.index if before else 1 + max((spec.index for spec in known.values()), default=-1)
        found = describe(name, members, index, None, normalise)
        data[name] = Normalizers(found.action_normalizer, found.proprio_normalizer)
        if before and (misfits := before.misfits(found, ranges=pretrained)):
            raise UserError(
                f"embodiment {name} differs from pretraining: {'; '.join(misfits)}; if it is another embodiment, give "
                "it another name (--contract, embodiment: NAME); if only its ranges differ, set statistics=data"
            )
        places = [(camera, slot) for spec in known.values() for slot, camera in enumerate(spec.cameras)]
        cameras = assign_slots(found.cameras, before.cameras if before else (), places)
        # Data that reach beyond pretraining's range keep its normalisation; samplers then clip where they end.
        spec = before.reaching(members) if before and pretrained else found
        known[name] = dataclasses.replace(spec, cameras=cameras)
    return Embodiments(known, tuple(data), data)


def keep_slots(embodiment: Embodiment, slots: Sequence[int]) -> Embodiment:
    """Return the embodiment with only the cameras in these slots, in their order."""
    cameras = [embodiment.cameras[slot] if slot < len(embodiment.cameras) else "" for slot in slots]
    while cameras and not cameras[-1]:
        cameras.pop()
    return dataclasses.replace(embodiment, cameras=tuple(cameras))


def model_inputs(
    parent: Settings, found: Embodiments, slots: Sequence[int], model: ModelConfig, text_encoder: str | None
) -> tuple[Inputs, Inputs]:
    """Name the inputs of the parent and of ``model``, whose cameras are in these slots.

    If the parent knows no embodiment, all its camera slots count as used.
    """
    spare = "spare camera" if parent.embodiments else "camera"
    old = [_slot_name(parent.embodiments, slot) or f"{spare} {slot}" for slot in range(parent.model.cameras)]
    used = {slot: name for slot, name in enumerate(old) if not name.startswith("spare")}
    new = [used.get(slot) or _slot_name(found.known, slot) or f"spare camera {slot}" for slot in slots]
    return (
        _inputs(parent.model, old, parent.embodiments, parent.text_encoder_digest),
        _inputs(model, new, found.known, text_encoder),
    )


def _slot_name(embodiments: dict[str, Embodiment], slot: int) -> str:
    """Return the cameras in a slot, like "camera 1 (wrist/gripper)"; empty if no embodiment has one there."""
    held = (spec.cameras[slot] for spec in embodiments.values() if slot < len(spec.cameras))
    names = "/".join(dict.fromkeys(name for name in held if name))
    return names and f"camera {slot} ({names})"


def _inputs(
    model: ModelConfig, cameras: list[str], embodiments: dict[str, Embodiment], text_encoder: str | None
) -> Inputs:
    names = {spec.index: name for name, spec in embodiments.items()}
    rows = [f"embodiment {names[i]}" if i in names else f"spare embodiment {i}" for i in range(model.embodiments)]
    actions = max((spec.action_dim for spec in embodiments.values()), default=model.action_dim)
    proprio = max((spec.proprio_dim for spec in embodiments.values()), default=model.proprio_dim)
    return Inputs(
        model,
        cameras,
        rows,
        actions=[f"action {i}" for i in range(actions)],
        proprio=[f"proprio {i}" for i in range(proprio)],
        text=f"text encoder {text_encoder}",
    )
