"""Settings of the model, its diffusion and its data augmentation.

Plain frozen dataclasses, so that this package does not depend on pydantic. Where a recipe embeds them, pydantic reads
``__pydantic_config__`` and rejects unknown keys. Every value is validated here, however it was set.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

Kind = Literal["uwm", "dp", "pad", "gr1"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the network. The defaults train on a CPU.

    The paper's LIBERO model: observed_frames=2, future_frames=2, action_chunk=16, patch=(2, 4, 4), width=768,
    depth=12, heads=12, registers=24, timestep_width=512, observation="pixels", frame_width=768, latents of (28, 28).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    # UWM, or one of the paper's comparisons (kinds.py).
    kind: Kind = "uwm"

    # Determined by the data.
    cameras: int
    latent_channels: int
    latent_size: tuple[int, int]  # (h, w)
    action_dim: int  # the largest of all embodiments; the others are padded and masked
    proprio_dim: int
    embodiments: int

    # One sample.
    observed_frames: int = 2
    future_frames: int = 2
    action_chunk: int = 16

    # The transformer.
    patch: tuple[int, int, int] = (2, 4, 4)  # (frames, rows, columns) of latents per token
    width: int = 256
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    registers: int = 8
    modulation: Literal["block", "shared"] = "block"  # one per block (the paper), or one for all with offsets
    # One vector per token (the paper; always for kinds dp and gr1), or composed from camera, time and place.
    position: Literal["learned", "factored"] = "learned"
    current_patches: bool = False  # add the current latents at the same place to each future token; not in the paper
    timestep_width: int = 128

    # How camera frames are observed: by small convolutions over the current latents or by the paper's ResNet-18 over
    # pixels, both into the condition; or as clean patches of the current latents, extra tokens of the sequence.
    observation: Literal["latents", "pixels", "tokens"] = "latents"
    frame_width: int = 128  # features per camera and frame
    text_width: int = 0  # length of an instruction's vector; 0: no instructions
    condition_width: int = 256  # unused with pixels, whose features are concatenated

    def __post_init__(self) -> None:
        _tuples(self, latent_size=2, patch=3)
        _check_integers(self, may_be_zero=("registers", "text_width"))
        _check_choices(self)
        for key, size in (("future_frames", self.future_frames), ("latent_size", self.latent_size)):
            patch = self.patch[:1] if key == "future_frames" else self.patch[1:]
            sizes = (size,) if isinstance(size, int) else size
            if any(whole % part for whole, part in zip(sizes, patch, strict=True)):
                raise ValueError(f"{key}: {size} is not a multiple of the patch {self.patch}; change {key} or patch")
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide width {self.width}; change heads or width")
        if self.timestep_width < 4 or self.timestep_width % 2:
            raise ValueError(f"timestep_width: {self.timestep_width} is not an even number of 4 or more")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio: {self.mlp_ratio} is not above 0")
        if self.position == "factored" and self.width % 8:
            raise ValueError(
                f"position: factored needs a width divisible by 8, not {self.width}; change width or position"
            )
        if self.modulation == "shared" and self.kind not in ("uwm", "pad"):
            raise ValueError(f"modulation: shared is not for kind {self.kind}; choose block")
        if self.observation == "tokens" and self.kind not in ("uwm", "pad"):
            raise ValueError(f"observation: tokens is not for kind {self.kind}; choose latents or pixels")
        if self.observation == "pixels" and self.text_width:
            raise ValueError(
                "text_width: a model that observes pixels takes no instructions, as in the paper; set it to 0"
            )

    @property
    def condition_size(self) -> int:
        """K: length of the condition vector."""
        pixels = self.observation == "pixels"
        return self.cameras * self.observed_frames * self.frame_width if pixels else self.condition_width

    @property
    def action_shape(self) -> tuple[int, int]:
        """(L, A): shape of one sample's action chunk."""
        return (self.action_chunk, self.action_dim)

    @property
    def latents_shape(self) -> tuple[int, int, int, int, int]:
        """(V, Tf, C, h, w): shape of one sample's future latents."""
        return (self.cameras, self.future_frames, self.latent_channels, *self.latent_size)

    @property
    def patches(self) -> int:
        """Number of tokens of one camera's future latents."""
        (pt, ph, pw), (h, w) = self.patch, self.latent_size
        return (self.future_frames // pt) * (h // ph) * (w // pw)

    @property
    def observed_patches(self) -> int:
        """Number of tokens of one camera's current latents; each holds all observed frames."""
        (_, ph, pw), (h, w) = self.patch, self.latent_size
        return (h // ph) * (w // pw) if self.observation == "tokens" else 0

    @property
    def tokens(self) -> int:
        """N: length of the transformer's sequence: actions, latents of all cameras, registers."""
        return self.action_chunk + self.cameras * (self.patches + self.observed_patches) + self.registers


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Diffusion of actions and latents. The defaults are the paper's, except for action-free samples.

    ``marginal_timestep``: the timestep of a modality that sampling ignores. ``last`` is pure noise (t = 99), the
    timestep at which training shows the actions of action-free video. ``leading`` is the first sampling step (t = 90
    for 10 steps), as in the published code.
    ``schedule``: ``squaredcos_cap_v2`` is the paper's DDPM; ``flow`` is flow matching, a straight line between noise
    and clean values in continuous time.
    ``prediction``: what the network predicts: the noise (the paper); v, a mix of noise and clean values that is equally
    scaled at every t (for a flow, the velocity); or the clean sample. Noise fills every dimension of a patch and clean
    latents do not, so a network narrower than a few patches can only predict the sample (arXiv 2511.13720). A flow
    starts at pure noise, where a predicted noise carries no information: it allows only v and sample.
    ``sampler``: ``ddim`` takes first-order steps (Euler steps for a flow); ``dpm_solver`` is second-order
    DPM-Solver++. The same trained network serves both.
    ``sampling_steps``: network evaluations per sample, 1 to train_timesteps; at least 2 if the noise is predicted.
    ``video_steps``: how many of them update the future latents in mode ``joint``; None: all. The number of evaluations
    is unchanged.
    ``action_free_loss``: whether a sample without actions has an action loss, on the noise that replaces its actions,
    as in the published code.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    train_timesteps: int = 100
    schedule: Literal["squaredcos_cap_v2", "flow"] = "squaredcos_cap_v2"
    prediction: Literal["epsilon", "v", "sample"] = "epsilon"
    sampler: Literal["ddim", "dpm_solver"] = "ddim"
    clip_sample: bool = True  # predicted clean values are clipped to [-1, 1]
    latent_divisor: float = 3.0  # standardised latents / 3 survive that clip
    sampling_steps: int = 10
    video_steps: int | None = None
    marginal_timestep: Literal["leading", "last"] = "last"
    action_free_loss: bool = False

    def __post_init__(self) -> None:
        _check_integers(self)
        _check_choices(self)
        if self.schedule == "flow" and self.prediction == "epsilon":
            raise ValueError("prediction: epsilon is not for schedule flow; choose v (the velocity) or sample")
        if self.latent_divisor <= 0:
            raise ValueError(f"latent_divisor: {self.latent_divisor} is not above 0")
        if self.train_timesteps < 2:
            raise ValueError(f"train_timesteps: {self.train_timesteps}; choose at least 2")
        if not self.fewest_steps <= self.sampling_steps <= self.train_timesteps:
            raise ValueError(
                f"sampling_steps: {self.sampling_steps}; choose {self.fewest_steps} to "
                f"train_timesteps={self.train_timesteps} where the prediction is {self.prediction}"
            )
        if self.video_steps is not None:
            if not _is_count(self.video_steps):
                raise ValueError(f"video_steps: {self.video_steps!r} is not a whole number above 0, nor empty")
            if not self.fewest_steps <= self.video_steps <= self.sampling_steps:
                raise ValueError(
                    f"video_steps: {self.video_steps}; choose {self.fewest_steps} to "
                    f"sampling_steps={self.sampling_steps} where the prediction is {self.prediction}"
                )

    @property
    def fewest_steps(self) -> int:
        """Fewest sampling steps. A single step starts at pure noise, where predicted noise does not give the sample."""
        return 2 if self.prediction == "epsilon" else 1


def _tuples(config: ModelConfig, **lengths: int) -> None:
    """Convert lists, as YAML and JSON give them, to tuples of positive integers."""
    for key, length in lengths.items():
        values = getattr(config, key)
        if not isinstance(values, list | tuple) or len(values) != length or not all(_is_count(v) for v in values):
            raise ValueError(f"{key}: {values!r} is not {length} whole numbers above 0")
        object.__setattr__(config, key, tuple(values))


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Colour jitter of the current pixels: factors from 1 - x to 1 + x, hue by up to x of a turn.

    The paper uses 0.2 for each, and changes the future frames alike, which stored latents do not allow. ``shared``: one
    draw per camera for the whole batch, as in the published code. ``untold``: the fraction of samples whose instruction
    is withheld, so that the model also works without one.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    shared: bool = False
    untold: float = 0.1

    def __post_init__(self) -> None:
        for key, most in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5), ("untold", 1)):
            if not 0 <= getattr(self, key) <= most:
                raise ValueError(f"{key}: {getattr(self, key)} is not from 0 to {most}")


def _check_choices(config: ModelConfig | DiffusionConfig) -> None:
    for key, hint in get_type_hints(type(config)).items():
        value: Any = getattr(config, key)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"{key}: {value} is unknown; known: {', '.join(get_args(hint))}")


def _check_integers(config: ModelConfig | DiffusionConfig, may_be_zero: tuple[str, ...] = ()) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type == "int" and not (_is_count(value) or (field.name in may_be_zero and value == 0)):
            least = "0 or above" if field.name in may_be_zero else "above 0"
            raise ValueError(f"{field.name}: {value!r} is not a whole number {least}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
