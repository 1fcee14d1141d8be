"""The model's input."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from uwm_model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B samples: V camera slots, To observed and Tf future frames, latents C x h x w, L actions padded to A values.

    Empty camera slots, steps past the end of the episode and dimensions that the embodiment lacks are padded with zeros
    and False in the masks. In a sample of action-free video, ``action_mask`` is False everywhere.
    ``future_latents`` and ``action`` are required for training and by the sampling modes that are given them,
    ``current_pixels`` by a model that observes pixels. ``instruction`` None: no sample has one. Models ``check`` a
    batch before they use it.
    """

    current_latents: Tensor  # float [B, V, To, C, h, w], standardised: about unit deviation
    camera_mask: Tensor  # bool [B, V]
    action_mask: Tensor  # bool [B, L, A]
    proprio: Tensor  # float [B, To, P]
    proprio_mask: Tensor  # bool [B, P]
    embodiment: Tensor  # int64 [B]
    future_latents: Tensor | None = None  # float [B, V, Tf, C, h, w]
    action: Tensor | None = None  # float [B, L, A], most of it in [-1, 1]
    action_reach: Tensor | None = None  # float [B, A]: samplers clip clean actions to +- this, None: to +- 1
    current_pixels: Tensor | None = None  # uint8 [B, V, To, 3, H, W] RGB, or float in [0, 1]
    instruction: Tensor | None = None  # float [B, E]: a frozen text encoder's vectors
    instruction_mask: Tensor | None = None  # bool [B]: which samples have one

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        """Return it on that device, with floating-point tensors in that dtype.

        The training targets (``action``, ``future_latents``) and ``action_reach`` get at least float32: in bfloat16
        they would have three digits, and the error of a good prediction is smaller than that.
        """
        moved = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                target = field.name in ("action", "future_latents", "action_reach")
                wanted = torch.promote_types(dtype, torch.float32) if target else dtype
                tensor = tensor.to(device, wanted if tensor.is_floating_point() else None, non_blocking=True)
            moved[field.name] = tensor
        return Batch(**moved)

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError, in one line, unless all tensors have the shapes that this model reads.

        Only shapes are compared, which costs microseconds.
        """
        c, B = model, len(self.embodiment)
        frame = (c.latent_channels, *c.latent_size)
        proprio = None if c.observation == "pixels" else c.proprio_dim  # such a model reads none
        expected: dict[str, tuple[int | None, ...]] = {  # None: any size
            "current_latents": (B, c.cameras, c.observed_frames, *frame),
            "camera_mask": (B, c.cameras),
            "action_mask": (B, *c.action_shape),
            "proprio": (B, c.observed_frames, proprio),
            "proprio_mask": (B, proprio),
            "embodiment": (B,),
            "future_latents": (B, c.cameras, c.future_frames, *frame),
            "action": (B, *c.action_shape),
            "current_pixels": (B, c.cameras, c.observed_frames, 3, None, None),
            "instruction": (B, c.text_width or None),
            "instruction_mask": (B,),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is None or tensor.shape == shape:
                continue
            fits = tensor.ndim == len(shape) and all(b in (a, None) for a, b in zip(tensor.shape, shape, strict=True))
            if not fits:
                wanted = ", ".join("any" if size is None else str(size) for size in shape)
                raise ValueError(f"batch.{name}: expected [{wanted}], got {list(tensor.shape)}")

    def __getitem__(self, some: slice) -> Batch:
        """Return a slice of its samples."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: tensor[some] for name, tensor in held.items() if tensor is not None})

    @property
    def action_limit(self) -> Tensor | None:
        """float [B, 1, A]: ``action_reach`` for each step of a chunk."""
        return None if self.action_reach is None else self.action_reach[:, None]

    @property
    def action_visible(self) -> Tensor:
        """bool [B, L, A]: which action values the network sees; the others are 0.

        Those of ``action_mask``; for a sample without actions, all of them, since its input is pure noise.
        """
        return self.action_mask | ~self.action_mask.any(dim=(1, 2), keepdim=True)
