"""The five modes (section III-C): one loop, and a table of two timestep schedules.

The two timesteps decide what the model does. A modality is asked for (its timestep runs down to 0), given (held clean
at t = 0), or ignored (held as pure noise at a high t, which marginalises it out).
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

import torch
from torch import Tensor

from uwm_model.denoiser import Denoise
from uwm_model.schedule import Evaluation, Schedule

Mode = Literal["policy", "forward_dynamics", "inverse_dynamics", "video", "joint"]


class Role(Enum):
    ASKED = "asked"
    GIVEN = "given"
    IGNORED = "ignored"


ROLES: dict[str, tuple[Role, Role]] = {  # mode: (action, future latents)
    "policy": (Role.ASKED, Role.IGNORED),  # p(a | o)
    "video": (Role.IGNORED, Role.ASKED),  # p(o' | o)
    "forward_dynamics": (Role.GIVEN, Role.ASKED),  # p(o' | o, a)
    "inverse_dynamics": (Role.ASKED, Role.GIVEN),  # p(a | o, o')
    "joint": (Role.ASKED, Role.ASKED),  # p(a, o' | o)
}


def roles(mode: str) -> tuple[Role, Role]:
    """Return the roles of action and future latents. Raises ValueError for an unknown mode."""
    if mode not in ROLES:
        raise ValueError(f"mode: {mode} is unknown; known: {', '.join(ROLES)}")
    return ROLES[mode]


def require(mode: str, modes: tuple[Mode, ...], who: str) -> None:
    """Raise ValueError unless the model called ``who`` has this mode."""
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
    """Return t_action and t_video of every step, and their values after the last step (None: clean).

    A step updates a modality only if its timestep changes.
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
    action_limit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return action and latents after the last step; only those asked for have changed.

    action [B, L, A] and latents [B, V, Tf, C, h, w] are clean where the mode is given them, and noise otherwise. In
    mode ``joint`` the latents are updated in ``video_steps`` of the steps (None: all). Clean actions are clipped to +-
    ``action_limit`` [B, 1, A] (None: 1). Raises ValueError if the video's steps exceed ``steps``, or if the schedule
    does not allow that many.
    """
    action_times, video_times = timetable(mode, schedule, steps, marginal_timestep, video_steps)
    t_action, t_video = (torch.tensor(times[:-1], device=action.device) for times in (action_times, video_times))
    action_previous: Evaluation | None = None
    video_previous: Evaluation | None = None
    for i in range(steps):
        action_prediction, latent_prediction = denoise(action, t_action[i], latents, t_video[i])
        action, action_previous = _step(
            schedule, action, action_prediction, action_times[i : i + 2], action_previous, action_limit
        )
        latents, video_previous = _step(schedule, latents, latent_prediction, video_times[i : i + 2], video_previous)
    return action, latents


def _step(
    schedule: Schedule,
    sample: Tensor,
    prediction: Tensor,
    times: list[float | None],
    previous: Evaluation | None,
    limit: Tensor | None = None,
) -> tuple[Tensor, Evaluation | None]:
    """Return the sample at the second of two times, and the evaluation at the first; unchanged if they are equal."""
    now, then = times
    if now is None or now == then:
        return sample, previous
    evaluation = Evaluation(sample, prediction, now)
    return schedule.step(*evaluation, then, previous, limit), evaluation
