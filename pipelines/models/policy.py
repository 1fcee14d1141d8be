"""A trained model as a policy: frames and proprioception in, a chunk of actions out."""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from pipelines.models import checkpoint
from pipelines.models.batch import to_batch
from pipelines.models.resolve import registered_embodiment, resolve
from preprocessing.contracts.interface import Interface
from preprocessing.dataset.embodiment import Embodiment
from preprocessing.encoders.text import TextEncoder, load_text_encoder
from preprocessing.encoders.vae import load_encoder
from preprocessing.episode import Square
from preprocessing.errors import UserError
from uwm_model.augment import centre
from uwm_model.batch import Batch
from uwm_model.query import PolicyQuery, fast_query
from uwm_model.world_model import UnifiedWorldModel


class Policy:
    """Loads a checkpoint folder and its encoder. ``fast`` selects faster approximate inference (``fast_query``).

    Raises UserError if the encoder's digest differs from training, if the model has several embodiments with actions
    and none is chosen, or if its kind has no fast inference.
    """

    def __init__(self, folder: Path, embodiment: str | None = None, fast: bool = False):
        self.folder, self.fast = folder, fast
        self.model, self.settings = checkpoint.load(folder)
        self.encoder = load_encoder(self.settings.encoder)
        if self.encoder.digest != self.settings.encoder_digest:
            raise UserError(
                f"{folder}: trained on latents of encoder {self.settings.encoder} ({self.settings.encoder_digest}); "
                f"the one found here is {self.encoder.digest}"
            )
        self.embodiment = self.settings.acting(embodiment, str(folder))
        self._query: PolicyQuery | None = None  # other kinds use Model.sample
        if isinstance(self.model, UnifiedWorldModel):
            self._query = fast_query(self.model) if fast else PolicyQuery(self.model)
        elif fast:
            raise UserError(f"{folder}: a model of kind {self.settings.model.kind} has no fast inference; omit --fast")
        self._vectors: dict[str, np.ndarray] = {}
        self._warned = False

    @classmethod
    def of(cls, model: str, store_uri: str | None = None, embodiment: str | None = None, fast: bool = False) -> Policy:
        """Return the policy of a MODEL, as the command line takes it: a run id, ``models:/NAME@ALIAS``, a folder.

        A registered model acts as the embodiment that it was registered for, unless another is given. Only a published
        file needs ``store_uri``. Raises UserError also if there is no such model.
        """
        folder = resolve(model, store_uri, embodiment)
        return cls(folder, embodiment or registered_embodiment(model), fast)

    @property
    def spec(self) -> Embodiment:
        return self.settings.embodiments[self.embodiment]

    def accept(self, interface: Interface, who: str) -> None:
        """Raise UserError unless the interface of ``who`` (cameras, proprio, actions, rate) matches training."""
        self.spec.interface.require(interface, who)

    @property
    def image_size(self) -> Square:
        """The side in pixels of the square frames that the model sees, and how frames of other shapes become such."""
        return Square(self.settings.frame_size, self.settings.fit)

    def act(
        self,
        images: dict[str, np.ndarray],
        proprio: dict[str, np.ndarray],
        generator: torch.Generator | None = None,
        instruction: str | None = None,
    ) -> np.ndarray:
        """Return the next actions in the robot's units, float32 ``[B, L, action_dim]``.

        ``images`` uint8 RGB ``[B, To, S, S, 3]`` by camera, of which all but one may be missing; ``proprio`` float32
        ``[B, To, D]`` by name. To is the number of observed frames, one step of the robot's rate apart, the newest
        last (docs/robot.md). A model without language ignores ``instruction`` and warns once. Raises UserError, in one
        line, if shapes, dtypes or names do not match the model.
        """
        seen = self._observation(images, proprio)
        seen |= self._instruction_vectors(instruction, len(seen["embodiment"]))
        batch = to_batch(seen, torch.device("cpu"), torch.float32)
        batch = centre(batch, self.settings.model.latent_size)
        action = self.ask(batch, generator)
        return self.spec.action_normalizer.invert(action[:, :, : self.spec.action_dim].numpy())

    def ask(self, batch: Batch, generator: torch.Generator | None = None) -> torch.Tensor:
        """Return normalised actions, float32 [B, L, A], for a batch as in training."""
        if self._query:
            return self._query(batch, generator)
        action, _ = self.model.sample("policy", batch, generator=generator)
        assert action is not None
        return action

    def _instruction_vectors(self, instruction: str | None, count: int) -> dict[str, np.ndarray]:
        if not instruction:
            return {}
        if self.settings.text_encoder is None:
            if not self._warned:
                warnings.warn("this policy was trained without instructions and ignores them", stacklevel=3)
            self._warned = True
            return {}
        if instruction not in self._vectors:
            self._vectors = {instruction: self._text_encoder.encode([instruction])}  # the same at every step
        vectors = np.tile(self._vectors[instruction], (count, 1))
        return {"instruction": vectors, "instruction_mask": np.ones(count, bool)}

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        name, digest = self.settings.text_encoder, self.settings.text_encoder_digest
        assert name is not None
        encoder = load_text_encoder(name)
        if encoder.digest != digest:
            raise UserError(
                f"{self.folder}: trained with text encoder {name} ({digest}); the one found here is {encoder.digest}"
            )
        return encoder

    def _observation(self, images: dict[str, np.ndarray], proprio: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the model's arrays. Raises UserError, in one line, for what it was not trained on."""
        model, spec = self.settings.model, self.spec
        if not images:
            raise UserError(f"no camera: give the frames of at least one of {', '.join(spec.seen)}")
        if unknown := sorted(set(images) - set(spec.seen)):
            raise UserError(f"camera {unknown[0]}: unknown; this policy sees {', '.join(spec.seen)}")
        if unknown := sorted(set(proprio) - {name for name, _ in spec.proprio}):
            raise UserError(f"proprio {unknown[0]}: unknown; this policy reads {dict(spec.proprio)}")
        if missing := [name for name, _ in spec.proprio if name not in proprio]:
            raise UserError(f"proprio {missing[0]}: missing; this policy reads {dict(spec.proprio)}")
        count = next((len(frames) for frames in images.values() if np.ndim(frames) == 5), 1)
        expected = (count, model.observed_frames, self.image_size, self.image_size, 3)
        side = self.image_size // self.settings.stride
        slots = (count, model.cameras, model.observed_frames)
        latents = np.zeros((*slots, model.latent_channels, side, side), np.float16)
        pixels = np.zeros((*slots, 3, self.image_size, self.image_size), np.uint8)
        mask = np.zeros((count, model.cameras), bool)
        for name, frames in images.items():
            _check(f"camera {name}", frames, np.uint8, expected)
            slot = spec.cameras.index(name)
            flat = self.encoder.encode(frames.reshape(-1, *expected[2:]))
            latents[:, slot] = flat.reshape(latents[:, slot].shape)
            pixels[:, slot] = frames.transpose(0, 1, 4, 2, 3)
            mask[:, slot] = True
        for name, width in spec.proprio:
            _check(f"proprio {name}", proprio[name], np.floating, (*expected[:2], width))
            if not np.isfinite(proprio[name]).all():
                raise UserError(
                    f"proprio {name}: holds values that are not finite; leave the step out, or repeat the last"
                )
        columns = np.concatenate([proprio[name] for name, _ in spec.proprio] or [np.zeros((*expected[:2], 0))], axis=2)
        padded = np.zeros((*expected[:2], model.proprio_dim), np.float32)
        padded[:, :, : spec.proprio_dim] = spec.proprio_normalizer.apply(columns)
        action_mask = np.zeros((count, model.action_chunk, model.action_dim), bool)
        action_mask[:, :, : spec.action_dim] = True
        action_reach = np.ones((count, model.action_dim), np.float32)
        action_reach[:, : len(spec.action_reach)] = spec.action_reach
        seen = {"current_pixels": pixels} if model.observation == "pixels" else {}
        return seen | {
            "current_latents": latents,
            "camera_mask": mask,
            "proprio": padded,
            "proprio_mask": np.tile(np.arange(model.proprio_dim) < spec.proprio_dim, (count, 1)),
            "action_mask": action_mask,
            "action_reach": action_reach,
            "embodiment": np.full(count, spec.index, np.int64),
        }


def _check(what: str, given: object, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    """Raise UserError unless ``given`` is an array of this kind and shape. The line holds no values."""
    if isinstance(given, np.ndarray) and np.issubdtype(given.dtype, dtype) and given.shape == shape:
        return
    got = f"{given.dtype} {list(given.shape)}" if isinstance(given, np.ndarray) else type(given).__name__
    kind = "float32" if dtype is np.floating else np.dtype(dtype).name
    raise UserError(f"{what}: expected {kind} {list(shape)}, got {got}; see docs/robot.md")
