"""The policy query: the answer of ``sample("policy", batch)``, sooner, for a robot that waits for it.

From one step to the next only the noisy action and its timestep change. So all else is computed once a query: the
condition and its part of every modulation, the tokens of latents and registers before the first block, and the
timesteps' part of every modulation, for all steps at once. The last block goes on with the action tokens alone, and
nothing is made of the others. This is exact.

Two things are not, and are off unless asked for. Fewer ``steps``, as in any sampling. And ``refresh``: the keys and
values of the tokens that are no actions (of latents, which are held as pure noise, and of registers) follow the action
only a little; where they are kept from an earlier step, a step runs the action tokens alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from uwm_model.batch import Batch
from uwm_model.blocks import Block, KeysValues
from uwm_model.randomness import unit_noise
from uwm_model.sampling import timetable
from uwm_model.schedule import Seen
from uwm_model.world_model import UnifiedWorldModel

FAST_STEPS = 5
WIDE = 512  # where bfloat16 is faster: measured at 768, and not at 128, whose products are too small to gain


def fast_query(model: UnifiedWorldModel) -> PolicyQuery:
    """The recommended way to ask sooner: few steps, keys and values kept from the first, and for wide models bfloat16.

    What it gains, and what it costs on a trained policy: docs/benchmarks/query.md, model.md. A wide model's weights are
    copied.
    """
    if model.model_config.width >= WIDE:
        model = copy.deepcopy(model).to(torch.bfloat16)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return PolicyQuery(model, min(FAST_STEPS, model.diffusion_config.sampling_steps), (0,))


class PolicyQuery:
    """Asks a model for actions; holds the model and how to ask it, and nothing of a batch.

    ``steps``: of sampling (None: the model's). ``refresh``: the steps, counted from 0, at which all tokens run, such as
    ``(0,)`` or ``(0, 5)``; the others use the keys and values of the last such step (None: all steps, which is exact).
    For bfloat16 pass a model whose weights are cast; sampling itself stays in float32. Raises ValueError for steps that
    the schedule lacks, and for ``refresh`` without 0 or past the last step.
    """

    def __init__(self, model: UnifiedWorldModel, steps: int | None = None, refresh: Iterable[int] | None = None):
        self.model = model
        self.times = model.schedule.timesteps(model.diffusion_config.sampling_steps if steps is None else steps)
        every = range(len(self.times))
        self.refresh = frozenset(every if refresh is None else refresh)
        if 0 not in self.refresh or not self.refresh <= set(every):
            raise ValueError(f"refresh: {sorted(self.refresh)}; choose 0, and others of 0 to {every[-1]}")

    @torch.inference_mode()
    def __call__(
        self,
        batch: Batch,
        generator: torch.Generator | None = None,
        noise_action: Tensor | None = None,
        noise_latents: Tensor | None = None,
    ) -> Tensor:
        """Actions float32 [B, L, A] on the weights' device, 0 where padded: those of ``model.sample``.

        Noise shaped like the actions and the future latents may be given, and comes from ``generator`` otherwise.
        The batch may come in any dtype and on any device.
        """
        model, net, config = self.model, self.model.denoiser, self.model.model_config
        device, dtype = net.registers.device, net.registers.dtype
        batch = batch.to(device, dtype)
        B, L, visible = len(batch.embodiment), config.action_chunk, batch.action_visible
        # In the order of model.sample, so that one seed gives both the same noise.
        action = unit_noise((B, *config.action_shape), generator, device) if noise_action is None else noise_action
        latents = unit_noise((B, *config.latents_shape), generator, device) if noise_latents is None else noise_latents

        condition, marginal = model.condition(batch), model.diffusion_config.marginal_timestep
        action_times, video_times = timetable("policy", model.schedule, len(self.times), marginal)
        t_action, t_video = (torch.tensor(times[:-1], device=device) for times in (action_times, video_times))
        times = net.timesteps(t_action, t_video)
        *of_blocks, of_head = net.modulations(condition, times)
        of_action, of_others = net.positions()
        others, keys = self._others(batch, latents.to(dtype), of_others)
        kept: list[KeysValues] = []
        before: Seen | None = None
        for step, t in enumerate(self.times):
            x = net.embed_action((action * visible).to(dtype), of_action)
            all_run = step in self.refresh
            if all_run:
                x, kept = torch.cat([x, others], dim=1), []
            for at, block in enumerate(net.blocks):
                assert isinstance(block, Block)
                asking = L if block is net.blocks[-1] else None
                x, own = block.modulated(x, of_blocks[at][step], keys, asking, None if all_run else kept[at])
                if all_run and self._is_followed(step):
                    kept.append([of_all[:, :, L:] for of_all in own])
            prediction = net.actions.decode(net.head.modulated(x, of_head[step]))
            # At least float32: with bfloat16 weights the network alone is coarse, never what its answers add up to.
            prediction = prediction.to(torch.promote_types(dtype, torch.float32))
            seen = Seen(action, prediction, t)
            action = model.schedule.step(*seen, action_times[step + 1], before)
            before = seen
        return action.float() * visible

    def _is_followed(self, step: int) -> bool:
        """By a step that uses its keys and values."""
        return step + 1 < len(self.times) and step + 1 not in self.refresh

    def _others(self, batch: Batch, latents: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens that are no actions [B, M, D], and which of all tokens may be attended to, bool [B, 1, 1, L + M].

        Without those of a camera that the whole batch lacks, which nobody attends to. None: to all that are left.
        """
        net = self.model.denoiser
        keys = net.keys(batch.camera_mask)
        assert keys is not None
        present = keys.any(dim=0).flatten()  # bool [N]
        others = net.embed_others(latents, batch.current_latents, positions)[:, present[net.config.action_chunk :]]
        keys = keys[..., present]
        return others, None if keys.all() else keys
