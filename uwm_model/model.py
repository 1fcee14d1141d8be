"""The interface of every model: ``loss(batch)`` to train it, ``sample(mode, batch)`` to use it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from uwm_model.batch import Batch
from uwm_model.config import DiffusionConfig, ModelConfig
from uwm_model.objective import Losses
from uwm_model.randomness import Random
from uwm_model.sampling import Mode

Loss = TypeVar("Loss", Tensor, float)


class Model(nn.Module, ABC):
    """UWM or one of its baselines.

    Latents are standardised outside the model; inside they are divided by ``latent_divisor``, so that clipping to
    [-1, 1] keeps them.
    """

    modes: ClassVar[tuple[Mode, ...]]  # those that ``sample`` supports

    def __init__(self, model: ModelConfig, diffusion: DiffusionConfig):
        super().__init__()
        self.model_config, self.diffusion_config = model, diffusion

    @abstractmethod
    def loss(self, batch: Batch, random: Random = None, counts: Tensor | None = None) -> Losses:
        """Return the training losses; ``random`` draws their noise and timesteps.

        ``counts`` float [2]: divisors of the action and the video loss, in place of this batch's ``loss_counts``. With
        the same divisors in all workers, passes and steps, a sample's weight does not depend on those beside it, and
        the mean of the shares' losses is the loss of the global batch. Raises ValueError if ``action`` or
        ``future_latents`` is missing and needed.
        """

    def total_loss(self, action: Loss, video: Loss) -> Loss:
        """Return the loss that is minimised: the one place that weighs the two modalities, equally."""
        return action + video

    def losses(self, action: Tensor, video: Tensor, action_per_sample: Tensor, video_per_sample: Tensor) -> Losses:
        """Return them with their total; ``action`` and ``video`` carry gradients."""
        parts = (action, video, action_per_sample, video_per_sample)
        return Losses(self.total_loss(action, video), *(part.detach() for part in parts))

    @abstractmethod
    def loss_counts(self, batch: Batch) -> Tensor:
        """Return how many action values and how many cameras have a loss in this batch, float32 [2]."""

    def expected_counts(self, action_values: float, without_actions: float, cameras: float) -> Tensor:
        """Return ``loss_counts`` of an average sample, float32 [2].

        It has ``action_values`` True entries in ``action_mask``, ``cameras`` in ``camera_mask``, and with a probability
        of ``without_actions`` it has no actions.
        """
        return torch.tensor([action_values, cameras])

    def forward(self, batch: Batch, random: Random = None, counts: Tensor | None = None) -> Losses:
        """``loss``, under the name that training engines call."""
        return self.loss(batch, random, counts)

    @abstractmethod
    def sample(
        self,
        mode: Mode,
        batch: Batch,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        noise_action: Tensor | None = None,
        noise_latents: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (action [B, L, A], future latents [B, V, Tf, C, h, w]), float32; None for what the mode does not ask.

        ``steps`` defaults to ``sampling_steps`` of the settings. Noise, shaped like the outputs, is drawn from
        ``generator`` unless passed. Padding is 0. Raises ValueError for a mode that is not in ``modes``.
        """
