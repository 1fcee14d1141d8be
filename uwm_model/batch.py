"""The one thing that goes into the model."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B samples: V camera slots, To observed and Tf future frames, latents C x h x w, L actions padded to A values.

    A slot without a camera, a step past the episode's end and a dimension this robot lacks are padded with zeros and
    False in the masks. A sample of action-free video has an ``action_mask`` that is False throughout.
    ``future_latents`` and ``action`` are needed for training, and for sampling where the mode is given them;
    ``current_pixels`` by a model that observes pixels. Without ``instruction`` nobody is told anything.
    """

    current_latents: Tensor  # float [B, V, To, C, h, w], standardised: about unit deviation
    camera_mask: Tensor  # bool [B, V]
    action_mask: Tensor  # bool [B, L, A]
    proprio: Tensor  # float [B, To, P]
    proprio_mask: Tensor  # bool [B, P]
    embodiment: Tensor  # int64 [B]
    future_latents: Tensor | None = None  # float [B, V, Tf, C, h, w]
    action: Tensor | None = None  # float [B, L, A] in [-1, 1]
    current_pixels: Tensor | None = None  # uint8 [B, V, To, 3, H, W] RGB, or float in [0, 1]
    instruction: Tensor | None = None  # float [B, E]: a frozen text encoder's vectors
    instruction_mask: Tensor | None = None  # bool [B]: who is told one

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        """On that device, its floating point tensors in that dtype."""
        moved = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                tensor = tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)
            moved[field.name] = tensor
        return Batch(**moved)

    def __getitem__(self, some: slice) -> Batch:
        """Some of its samples."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: tensor[some] for name, tensor in held.items() if tensor is not None})

    @property
    def action_visible(self) -> Tensor:
        """bool [B, L, A]: which action values the network is shown; it sees 0 at the others.

        Those of ``action_mask``, and for a sample without any action all of them, since its input is pure noise.
        """
        return self.action_mask | ~self.action_mask.any(dim=(1, 2), keepdim=True)
