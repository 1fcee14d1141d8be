"""The kind of device that a run trains on: decided once, recorded in its recipe, and the same after every restart."""

from __future__ import annotations

import os

import ray
import torch

from pipelines.recipe import Recipe
from preprocessing.errors import UserError

# Ray leaves the devices of a node visible to workers that asked for none; torch and DeepSpeed would then use them.
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": ""}


def decide(recipe: Recipe, gpus: int, recorded: str = "auto") -> tuple[Recipe, list[str]]:
    """Return the recipe with ``device`` decided and no more workers than GPUs, and notes for the user.

    ``gpus``: how many there are. ``recorded``: the decided ``device`` of the run to resume; "auto" for a new run, and
    for one of a version that recorded none. Raises UserError if the run needs GPUs that are not there.
    """
    notes = list[str]()
    device: str = recipe.device
    if device == "auto":
        device = ("gpu" if gpus else "cpu") if recorded == "auto" else recorded
        if device == "cpu" and gpus:
            notes.append("this run trained on CPUs so far, and stays there; device=gpu moves it to the GPUs")
    elif recorded not in ("auto", device):
        notes.append(f"this run trained on {recorded.upper()}s so far; from here on, on {device.upper()}s")
    if device == "cpu":
        return recipe.model_copy(update={"device": device}), notes
    if not gpus:
        other = "; --new starts another run" if recorded == "gpu" else ""
        raise UserError(f"device: this run trains on GPUs, and there is none; set device=cpu to train on CPUs{other}")
    if gpus < recipe.least_workers and not isinstance(recipe.workers, int):
        raise UserError(
            f"workers: at least {recipe.least_workers} are asked for, and there are {gpus} GPUs; ask for fewer"
        )
    workers = min(recipe.workers, gpus) if isinstance(recipe.workers, int) else recipe.workers
    if workers != recipe.workers:
        notes.append(f"{workers} worker{'s' * (workers != 1)}, not {recipe.workers}: one for each GPU")
    return recipe.model_copy(update={"device": device, "workers": workers}), notes


def decide_here(recipe: Recipe, address: str | None) -> tuple[Recipe, list[str]]:
    """Return ``decide`` for this machine, without Ray; with the address of a cluster the recipe as it is."""
    if address or os.environ.get("RAY_ADDRESS"):
        return recipe, []
    return decide(recipe, torch.cuda.device_count())


def gpus_of_cluster() -> int:
    """Return how many GPUs the connected Ray cluster has; 0 if this torch was built without them."""
    return int(ray.cluster_resources().get("GPU", 0)) if torch.distributed.is_nccl_available() else 0
