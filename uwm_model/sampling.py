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
from uwm_model.schedule import Schedule, Seen

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


def require(mode: str, modes: tuple[Mode, ...], who: str) -> None:
    """ValueError unless ``mode`` is one of the ``modes`` that this model has."""
    roles(mode)
    if mode not in modes:
        raise ValueError(f"mode: {who} has no {mode}; it has {', '.join(modes)}")


def sample(
    mode: Mode,
    denoise: Denoise,
    schedule: Schedule,
    steps: int,
    marginal_timestep: Literal["leading", "last"],
    action: Tensor,
    latents: Tensor,
    video_steps: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Both after the last step: changed where asked for, else as they came.

    action [B, L, A] and latents [B, V, Tf, C, h, w] are clean values where the mode is given them, else noise.
    In mode ``joint`` the latents take ``video_steps`` of the steps (None: all) and wait in between. ValueError where
    those are more than the steps, or the schedule cannot do as many.
    """
    of_action, of_video = roles(mode)
    times = schedule.timesteps(steps)
    held = times[0] if marginal_timestep == "leading" else schedule.last
    # One more than there are steps: a modality moves at a step after which its time is another, at last None (clean).
    table = {Role.ASKED: [*times, None], Role.GIVEN: [0] * (steps + 1), Role.IGNORED: [held] * (steps + 1)}
    action_times, video_times = table[of_action], table[of_video]
    if mode == "joint" and video_steps is not None:
        if video_steps > steps:
            raise ValueError(f"video_steps: {video_steps} are more than the {steps} steps")
        slow = schedule.timesteps(video_steps)
        video_times = [*(slow[i * video_steps // steps] for i in range(steps)), None]
    t_action, t_video = (torch.tensor(times[:-1], device=action.device) for times in (action_times, video_times))
    action_before: Seen | None = None
    video_before: Seen | None = None
    for i in range(steps):
        action_prediction, latent_prediction = denoise(action, t_action[i], latents, t_video[i])
        if action_times[i + 1] != action_times[i]:
            seen = Seen(action, action_prediction, action_times[i])
            action = schedule.step(*seen, action_times[i + 1], action_before)
            action_before = seen
        if video_times[i + 1] != video_times[i]:
            seen = Seen(latents, latent_prediction, video_times[i])
            latents = schedule.step(*seen, video_times[i + 1], video_before)
            video_before = seen
    return action, latents
