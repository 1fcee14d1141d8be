"""The policy query: ``sample("policy", batch)`` with lower latency.

Between sampling steps only the noisy action and its timestep change. Everything else is computed once per query: the
condition and its part of every modulation, the latent and register tokens before the first block, and the timesteps'
part of every modulation, for all steps at once. The last block updates only the action tokens. This is exact.

Two further options are approximate, and off by default. Fewer ``steps``, as in any sampling. And ``refresh``: the keys
and values of the latent tokens (held as pure noise) and registers depend only weakly on the action; a step that reuses
those of an earlier step runs only the action tokens.
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
from uwm_model.schedule import Evaluation
from uwm_model.world_model import UnifiedWorldModel

FAST_STEPS = 5
WIDE = 512  # from here on bfloat16 is assumed faster: measured so at 768, not at 128, whose products are too small


def fast_query(model: UnifiedWorldModel) -> PolicyQuery:
    """Return the recommended fast query: few steps, keys and values of the first step, bfloat16 for wide models.

    For the latency, and the error on a trained policy, see docs/benchmarks/query.md and model.md. The weights of a wide
    model are copied.
    """
    if model.model_config.width >= WIDE:
        model = copy.deepcopy(model).to(torch.bfloat16)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return PolicyQuery(model, min(FAST_STEPS, model.diffusion_config.sampling_steps), (0,))


class PolicyQuery:
    """Queries a model for actions. It keeps no state between calls.

    ``steps``: number of sampling steps (None: the model's). ``refresh``: the steps, counted from 0, that run all
    tokens, such as ``(0,)`` or ``(0, 5)``; the others reuse the keys and values of the last such step (None: all steps,
    which is exact). For bfloat16 pass a model with bfloat16 weights; sampling itself stays in float32. Raises
    ValueError if the schedule does not allow that many steps, or if ``refresh`` lacks 0 or exceeds the last step.
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
        """Return the actions of ``model.sample``, float32 [B, L, A] on the weights' device, 0 where padded.

        Noise, shaped like the actions and the future latents, is drawn from ``generator`` unless passed. The batch may
        have any dtype and device.
        """
        model, net, config = self.model, self.model.denoiser, self.model.model_config
        device, dtype = net.registers.device, net.registers.dtype
        batch.check(config)
        batch = batch.to(device, dtype)
        B, L, visible = len(batch.embodiment), config.action_chunk, batch.action_visible
        # Drawn in the order of model.sample, so that the same seed gives the same noise.
        action = unit_noise((B, *config.action_shape), generator, device) if noise_action is None else noise_action
        latents = unit_noise((B, *config.latents_shape), generator, device) if noise_latents is None else noise_latents

        condition, marginal = model.condition(batch), model.diffusion_config.marginal_timestep
        action_times, video_times = timetable("policy", model.schedule, len(self.times), marginal)
        t_action, t_video = (torch.tensor(times[:-1], device=device) for times in (action_times, video_times))
        times = net.timesteps(t_action, t_video)
        *block_modulations, head_modulations = net.modulations(condition, times)
        action_positions, other_positions = net.positions()
        others, keys = self._others(batch, latents.to(dtype), other_positions)
        kept: list[KeysValues] = []
        previous: Evaluation | None = None
        for step, t in enumerate(self.times):
            x = net.embed_action((action * visible).to(dtype), action_positions)
            all_run = step in self.refresh
            if all_run:
                x, kept = torch.cat([x, others], dim=1), []
            for at, block in enumerate(net.blocks):
                assert isinstance(block, Block)
                queries = L if block is net.blocks[-1] else None
                x, own = block.modulated(x, block_modulations[at][step], keys, queries, None if all_run else kept[at])
                if all_run and self._is_reused(step):
                    kept.append([all_tokens[:, :, L:] for all_tokens in own])
            prediction = net.actions.decode(net.head.modulated(x, head_modulations[step]))
            # At least float32: with bfloat16 weights only the network is rounded, not the running sample.
            prediction = prediction.to(torch.promote_types(dtype, torch.float32))
            evaluation = Evaluation(action, prediction, t)
            action = model.schedule.step(*evaluation, action_times[step + 1], previous, batch.action_limit)
            previous = evaluation
        return action.float() * visible

    def _is_reused(self, step: int) -> bool:
        """Whether the next step reuses this step's keys and values."""
        return step + 1 < len(self.times) and step + 1 not in self.refresh

    def _others(self, batch: Batch, latents: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the other tokens [B, M, D], and which tokens may be attended to, bool [B, 1, 1, L + M] (None: all).

        Tokens of a camera that the whole batch lacks are dropped: none attends to them.
        """
        net = self.model.denoiser
        keys = net.keys(batch.camera_mask)
        assert keys is not None
        present = keys.any(dim=0).flatten()  # bool [N]
        others = net.embed_others(latents, batch.current_latents, positions)[:, present[net.config.action_chunk :]]
        keys = keys[..., present]
        return others, None if keys.all() else keys
