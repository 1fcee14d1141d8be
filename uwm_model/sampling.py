"""The five modes (section III-C): one loop, and a table of two timestep schedules.

What the two timesteps are is what the model is. A modality is asked for (its time runs down to 0), given (held clean
at t = 0), or ignored (held as pure noise at a high t, which marginalises it out).
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

import torch
from torch import Tensor

from uwm_model.denoiser import Denoise
from uwm_model.schedule import DiffusionSchedule

Mode = Literal["policy", "forward_dynamics", "inverse_dynamics", "video", "joint"]


class Role(Enum):
    ASKED = "asked"
    GIVEN = "given"
    IGNORED = "ignored"


ROLES: dict[str, tuple[Role, Role]] = {  # mode: (of the action, of the future latents)
    "policy": (Role.ASKED, Role.IGNORED),  # p(a | o)
    "video": (Role.IGNORED, Role.ASKED),  # p(o' | o)
    "forward_dynamics": (Role.GIVEN, Role.ASKED),  # p(o' | o, a)
    "inverse_dynamics": (Role.ASKED, Role.GIVEN),  # p(a | o, o')
    "joint": (Role.ASKED, Role.ASKED),  # p(a, o' | o)
}


def roles(mode: str) -> tuple[Role, Role]:
    """The row of the table; ValueError for a mode that is not in it."""
    if mode not in ROLES:
        raise ValueError(f"mode: {mode} is unknown; known: {', '.join(ROLES)}")
    return ROLES[mode]


def timetable(
    mode: str, schedule: DiffusionSchedule, steps: int, marginal_timestep: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """t_action and t_video of every step, int64 [steps] each."""
    times = schedule.timesteps(steps)
    held = times[0] if marginal_timestep == "leading" else schedule.last
    table = {Role.ASKED: times, Role.GIVEN: [0] * steps, Role.IGNORED: [held] * steps}
    of_action, of_video = (torch.tensor(table[role], device=device) for role in roles(mode))
    return of_action, of_video


def sample(
    mode: Mode,
    denoise: Denoise,
    schedule: DiffusionSchedule,
    steps: int,
    marginal_timestep: Literal["leading", "last"],
    action: Tensor,
    latents: Tensor,
) -> tuple[Tensor, Tensor]:
    """Both after the last step: changed where asked for, else as they came.

    action [B, L, A] and latents [B, V, Tf, C, h, w] are clean values where the mode is given them, else noise.
    """
    of_action, of_video = roles(mode)
    times = schedule.timesteps(steps)
    t_action, t_video = timetable(mode, schedule, steps, marginal_timestep, action.device)
    for i, t in enumerate(times):
        action_prediction, latent_prediction = denoise(action, t_action[i], latents, t_video[i])
        t_next = times[i + 1] if i + 1 < steps else None
        if of_action is Role.ASKED:
            action = schedule.step(action, action_prediction, t, t_next)
        if of_video is Role.ASKED:
            latents = schedule.step(latents, latent_prediction, t, t_next)
    return action, latents
