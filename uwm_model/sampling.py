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


def timetable(
    mode: str,
    schedule: Schedule,
    steps: int,
    marginal_timestep: Literal["leading", "last"],
    video_steps: int | None = None,
) -> tuple[list[float | None], list[float | None]]:
    """t_action and t_video of every step, and one more: a modality moves at a step after which its time is another.

    At last that is None (clean) for what is asked for.
    """
    times = schedule.timesteps(steps)
    held = times[0] if marginal_timestep == "leading" else schedule.last
    table = {Role.ASKED: [*times, None], Role.GIVEN: [0] * (steps + 1), Role.IGNORED: [held] * (steps + 1)}
    action_times, video_times = (table[role] for role in roles(mode))
    if mode == "joint" and video_steps is not None:
        if video_steps > steps:
            raise ValueError(f"video_steps: {video_steps} are more than the {steps} steps")
        slow = schedule.timesteps(video_steps)
        video_times = [*(slow[i * video_steps // steps] for i in range(steps)), None]
    return action_times, video_times


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
    action_times, video_times = timetable(mode, schedule, steps, marginal_timestep, video_steps)
    t_action, t_video = (torch.tensor(times[:-1], device=action.device) for times in (action_times, video_times))
    action_before: Seen | None = None
    video_before: Seen | None = None
    for i in range(steps):
        action_prediction, latent_prediction = denoise(action, t_action[i], latents, t_video[i])
        action, action_before = _moved(schedule, action, action_prediction, action_times[i : i + 2], action_before)
        latents, video_before = _moved(schedule, latents, latent_prediction, video_times[i : i + 2], video_before)
    return action, latents


def _moved(
    schedule: Schedule, sample: Tensor, prediction: Tensor, times: list[float | None], before: Seen | None
) -> tuple[Tensor, Seen | None]:
    """The sample at the second of two times, and what was seen at the first; as they were where the times are one."""
    now, then = times
    if now is None or now == then:
        return sample, before
    seen = Seen(sample, prediction, now)
    return schedule.step(*seen, then, before), seen
