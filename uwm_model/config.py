"""Settings of the model, of its diffusion, and of how what it learns from is varied.

Plain frozen dataclasses, so that the mathematics needs no other package. ``__pydantic_config__`` is read by pydantic
where a recipe embeds them: an unknown key is refused. Every value is checked here, whichever way it came in.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the network. The defaults train on a CPU.

    The paper's LIBERO model: observed_frames=2, future_frames=2, action_chunk=16, patch=(2, 4, 4), width=768,
    depth=12, heads=12, registers=24, timestep_width=512, observation="pixels", frame_width=768, latents of (28, 28).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    # Which model it is: UWM, or one of the paper's comparisons (kinds.py).
    kind: Literal["uwm", "dp", "pad", "gr1"] = "uwm"

    # What the data decides.
    cameras: int
    latent_channels: int
    latent_size: tuple[int, int]  # (h, w)
    action_dim: int  # of the widest robot; narrower ones are padded and masked
    proprio_dim: int
    embodiments: int

    # What one sample holds.
    observed_frames: int = 2
    future_frames: int = 2
    action_chunk: int = 16

    # The transformer.
    patch: tuple[int, int, int] = (2, 4, 4)  # (frames, rows, columns) of latents in one token
    width: int = 256
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    registers: int = 8
    modulation: Literal["block", "shared"] = "block"  # each block's own (the paper's), or one with offsets
    # A vector a token (the paper's, and of kinds dp and gr1 always), or made of camera, time and place.
    position: Literal["learned", "factored"] = "learned"
    current_patches: bool = False  # a token of future latents also sees the current ones at its place; the paper's not
    timestep_width: int = 128

    # How the robot's cameras are observed: by small convolutions over the current latents, or by the paper's ResNet-18
    # over pixels, both into the condition; or as clean patches of the current latents, tokens among the others.
    observation: Literal["latents", "pixels", "tokens"] = "latents"
    frame_width: int = 128  # features of one camera's one frame
    text_width: int = 0  # values of an instruction's vector; 0: the model is told none
    condition_width: int = 256  # not of pixels, whose features lie side by side, as wide as they are

    def __post_init__(self) -> None:
        _tuples(self, latent_size=2, patch=3)
        _check_integers(self, may_be_zero=("registers", "text_width"))
        for key, size in (("future_frames", self.future_frames), ("latent_size", self.latent_size)):
            patch = self.patch[:1] if key == "future_frames" else self.patch[1:]
            sizes = (size,) if isinstance(size, int) else size
            if any(whole % part for whole, part in zip(sizes, patch, strict=True)):
                raise ValueError(f"{key}: {size} is not a multiple of the patch {self.patch}; change {key} or patch")
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide width {self.width}; change heads or width")
        if self.timestep_width < 4 or self.timestep_width % 2:
            raise ValueError(f"timestep_width: {self.timestep_width} is not an even number of at least 4")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio: {self.mlp_ratio} is not above 0")
        if self.kind not in ("uwm", "dp", "pad", "gr1"):
            raise ValueError(f"kind: {self.kind} is unknown; known: uwm, dp, pad, gr1")
        if self.modulation not in ("block", "shared"):
            raise ValueError(f"modulation: {self.modulation} is unknown; known: block, shared")
        if self.position not in ("learned", "factored"):
            raise ValueError(f"position: {self.position} is unknown; known: learned, factored")
        if self.position == "factored" and self.width % 8:
            raise ValueError(
                f"position: factored needs a width that 8 divides, not {self.width}; change width or position"
            )
        if self.modulation == "shared" and self.kind not in ("uwm", "pad"):
            raise ValueError(f"modulation: shared is not for kind {self.kind}; choose block")
        if self.observation not in ("latents", "pixels", "tokens"):
            raise ValueError(f"observation: {self.observation} is unknown; known: latents, pixels, tokens")
        if self.observation == "tokens" and self.kind not in ("uwm", "pad"):
            raise ValueError(f"observation: tokens is not for kind {self.kind}; choose latents or pixels")
        if self.observation == "pixels" and self.text_width:
            raise ValueError("text_width: a model that observes pixels is told no instruction, as the paper's")

    @property
    def condition_size(self) -> int:
        """K: values of the condition vector."""
        pixels = self.observation == "pixels"
        return self.cameras * self.observed_frames * self.frame_width if pixels else self.condition_width

    @property
    def action_shape(self) -> tuple[int, int]:
        """(L, A): of one sample's chunk of actions."""
        return (self.action_chunk, self.action_dim)

    @property
    def latents_shape(self) -> tuple[int, int, int, int, int]:
        """(V, Tf, C, h, w): of one sample's future latents."""
        return (self.cameras, self.future_frames, self.latent_channels, *self.latent_size)

    @property
    def patches(self) -> int:
        """Tokens of one camera's future latents."""
        (pt, ph, pw), (h, w) = self.patch, self.latent_size
        return (self.future_frames // pt) * (h // ph) * (w // pw)

    @property
    def observed_patches(self) -> int:
        """Tokens of one camera's current latents, all observed frames in each."""
        (_, ph, pw), (h, w) = self.patch, self.latent_size
        return (h // ph) * (w // pw) if self.observation == "tokens" else 0

    @property
    def tokens(self) -> int:
        """N: length of the transformer's sequence (actions, latents of all cameras, registers)."""
        return self.action_chunk + self.cameras * (self.patches + self.observed_patches) + self.registers


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The diffusion of actions and latents; the defaults are the paper's except where masks are concerned.

    ``marginal_timestep``: where a modality that is not asked for is held while sampling. ``last`` is pure noise
    (t = 99), where training puts the actions of action-free video. ``leading`` is the first of the sampling steps
    (t = 90 of 10), as the published code has it.
    ``schedule``: ``squaredcos_cap_v2`` is the paper's DDPM, ``flow`` is flow matching, the straight line between noise
    and clean values in continuous time.
    ``prediction``: what the network answers with: the noise (the paper); v, a mix of noise and clean values that is as
    well scaled at every t, for a flow the velocity; or the clean sample itself. Noise fills every dimension of a patch,
    clean latents do not: a network narrower than a few patches can only answer with the sample (arXiv 2511.13720).
    A flow begins at pure noise, of which a predicted noise tells nothing: it knows v and sample alone.
    ``sampler``: ``ddim`` takes first-order steps, for a flow those of Euler; ``dpm_solver`` is DPM-Solver++ of second
    order. One trained network serves both.
    ``sampling_steps``: evaluations of the network, 1 to train_timesteps; where it predicts the noise at least 2.
    ``video_steps``: how many of them move the future latents in mode ``joint``; None: all. The number of evaluations
    stays.
    ``action_free_loss``: whether samples without actions have an action loss, the noise that stands in for theirs to be
    predicted like any other, as in the published code.
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
        if self.schedule not in ("squaredcos_cap_v2", "flow"):
            raise ValueError(f"schedule: {self.schedule} is unknown; known: squaredcos_cap_v2, flow")
        if self.prediction not in ("epsilon", "v", "sample"):
            raise ValueError(f"prediction: {self.prediction} is unknown; known: epsilon, v, sample")
        if self.schedule == "flow" and self.prediction == "epsilon":
            raise ValueError("prediction: epsilon is not for schedule flow; choose v (the velocity) or sample")
        if self.sampler not in ("ddim", "dpm_solver"):
            raise ValueError(f"sampler: {self.sampler} is unknown; known: ddim, dpm_solver")
        if self.marginal_timestep not in ("leading", "last"):
            raise ValueError(f"marginal_timestep: {self.marginal_timestep} is unknown; known: leading, last")
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
        """One step begins at the last timestep, where clean values cannot be told from a predicted noise."""
        return 2 if self.prediction == "epsilon" else 1


def _tuples(config: ModelConfig, **lengths: int) -> None:
    """YAML and JSON bring lists; make them tuples of positive integers."""
    for key, length in lengths.items():
        values = getattr(config, key)
        if not isinstance(values, list | tuple) or len(values) != length or not all(_is_count(v) for v in values):
            raise ValueError(f"{key}: {values!r} is not {length} whole numbers above 0")
        object.__setattr__(config, key, tuple(values))


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How far colours of current pixels are changed: factors from 1 - x to 1 + x, hue by up to x of a turn.

    The paper's: 0.2 each. It changes the future frames' colours alike, which stored latents cannot follow. ``shared``:
    one draw for each camera serves the whole batch, as in the published code. ``untold``: the share of samples whose
    instruction is withheld, so that the model can do without one.
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


def _check_integers(config: ModelConfig | DiffusionConfig, may_be_zero: tuple[str, ...] = ()) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type == "int" and not (_is_count(value) or (field.name in may_be_zero and value == 0)):
            least = "0 or above" if field.name in may_be_zero else "above 0"
            raise ValueError(f"{field.name}: {value!r} is not a whole number {least}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
