"""Recipes: the typed settings of an ingest or a training run, from YAML and ``KEY=VALUE``. Unknown keys are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from preprocessing.dataset.order import SHUFFLE_WINDOWS
from preprocessing.encoders.vae import Precision
from preprocessing.episode import Fit
from preprocessing.errors import UserError
from preprocessing.limits import Limits
from preprocessing.quality.filters import Filters
from uwm_model.config import AugmentConfig, DiffusionConfig, ModelConfig

Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class IngestRecipe(BaseModel):
    """Settings of one ingest: encoders, frame size and rate, quality filters and limits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "ingest"
    encoder: list[str] = Field(
        default=["tiny"], min_length=1, description="frame encoders, all run in one pass over the frames"
    )
    precision: Precision = "float32"
    text_encoder: str | None = Field(default=None, description="text encoder whose instruction vectors are stored")
    image_size: int = Field(
        default=128, ge=32, description="side of a frame in pixels, a multiple of the encoders' stride (8)"
    )
    fit: Fit = Field(
        default="stretch", description="how a frame becomes a square: stretch it, crop its centre, or pad it with black"
    )
    fps: float | None = Field(default=None, ge=0.01, description="maximum frame rate of videos without actions, in Hz")
    max_bad: float = Field(
        default=0.5, ge=0, le=1, description="stop if more than this share of the new episodes is bad"
    )
    keep_broken: bool = Field(default=False, description="keep the readable beginning of a broken video")
    local_seconds: float = Field(
        default=60, ge=0, description="encoding that takes less than this runs without Ray, unless an address is given"
    )
    quality: Filters = Filters()
    limits: Limits = Limits()


class Lora(BaseModel):
    """Low-rank adapters (arXiv 2106.09685) in the linear layers that match ``targets``; their weights stay frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=32, gt=0, allow_inf_nan=False, description="adapters are scaled by alpha / rank")
    targets: list[str] = Field(
        default=["*.blocks.*.attention.qkv", "*.blocks.*.attention.out", "*.blocks.*.mlp.[02]"],
        min_length=1,
        description="patterns of module names",
    )


# Keys of a training recipe that affect the result. Every key is in this set or in WORK_KEYS; a test checks that.
RESULT_KEYS = {
    "name", "seed", "steps", "batch_size", "learning_rate", "weight_decay", "warmup_steps", "betas", "decay",
    "gradient_clip", "ema_decay", "precision", "validation_share", "encoder", "text_encoder", "instructions",
    "normalise", "data", "mixture", "windows", "shuffle_windows", "model", "diffusion", "augment",
    "freeze", "lora", "statistics",
}  # fmt: skip
# Keys that do not affect the result except through rounding: an interrupted run may resume with other values.
WORK_KEYS = {
    "device", "workers", "micro_batch_size", "zero_stage", "activation_checkpointing", "offload", "compile",
    "checkpoint_every", "keep_last", "worker_price", "log_every",
}  # fmt: skip


class Recipe(BaseModel):
    """Settings of one training run. ``model`` and ``diffusion`` override the defaults of uwm_model/config.py.

    Sizes that depend on the data (cameras, latent size, action and proprio width) come from the store unless the
    recipe sets them.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = Field(
        default="pretrain", pattern=r"^[\w. -]{1,100}$", description="names the run and its folder; no slashes"
    )
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0, description="samples per step over all workers")
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    warmup_steps: int = Field(default=100, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    decay: Literal["cosine", "none"] = Field(
        default="cosine", description="learning rate schedule; cosine ends at a tenth"
    )
    gradient_clip: float = Field(default=1.0, ge=0, description="maximum gradient norm; 0: no clipping")
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    device: Literal["auto", "cpu", "gpu"] = Field(
        default="auto", description="auto: GPUs if there are any; a run stays on the kind it began on"
    )
    workers: int | tuple[int, int] = Field(default=2, description="number of workers, or [least, most]")
    micro_batch_size: int | None = Field(
        default=None, gt=0, description="samples per forward pass of a worker; null: its whole share of the batch"
    )
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = Field(
        default=False, description="save memory at the cost of a second forward pass"
    )
    offload: bool = Field(default=False, description="keep the optimizer in host memory")
    compile: bool = Field(default=False, description="compile the transformer blocks with torch.compile")
    checkpoint_every: int = Field(
        default=500, gt=0, description="steps between checkpoints, validation losses and predicted frames"
    )
    keep_last: int = Field(default=2, gt=0, description="newest checkpoints to keep, besides the best")
    worker_price: float = Field(default=0.0, ge=0, description="price of a worker-hour, for --dry-run")
    validation_share: float = Field(default=0.05, ge=0, lt=1)
    log_every: int = Field(default=20, gt=0)
    encoder: str | None = Field(default=None, description="encoder whose latents to use, if the store holds several")
    text_encoder: str | None = Field(default=None, description="condition the model on instructions, encoded by this")
    instructions: list[str] | None = Field(default=None, description="train only on episodes with these instructions")
    normalise: Literal["extremes", "quantiles"] = Field(
        default="extremes", description="action values that map to -1 and 1"
    )
    data: list[str] = Field(
        default_factory=list,
        description="train only on these sources (a folder, or its name) and embodiments; empty: on everything",
    )
    windows: Literal["masked", "inside"] = Field(
        default="masked",
        description="masked: every frame starts a window, and actions past the end are masked; inside: only windows "
        "that lie inside the episode, as in the published code",
    )
    mixture: dict[str, Share] = Field(
        default_factory=dict,
        description="share of the samples by source (its folder, or that folder's name) or embodiment; 0 leaves it "
        "out. If empty, embodiments are drawn in proportion to their windows",
    )
    shuffle_windows: int = Field(default=SHUFFLE_WINDOWS, gt=0, description="windows in the shuffle buffer")
    model: dict[str, Any] = Field(default_factory=dict)
    diffusion: dict[str, Any] = Field(default_factory=dict)
    augment: AugmentConfig = AugmentConfig()
    freeze: list[str] = Field(default_factory=list, description="name patterns of parameters to freeze")
    # For finetuning only.
    lora: Lora | None = None
    statistics: Literal["pretrained", "data"] = Field(
        default="pretrained", description="statistics that normalise an embodiment the model already knows"
    )

    @field_validator("mixture")
    @classmethod
    def _of_something(cls, value: dict[str, float]) -> dict[str, float]:
        if value and not any(value.values()):
            raise ValueError("give at least one source a share above 0")
        return value

    @field_validator("model", "diffusion")
    @classmethod
    def _known(cls, value: dict[str, Any], info: Any) -> dict[str, Any]:
        known = {
            field.name for field in dataclasses.fields(ModelConfig if info.field_name == "model" else DiffusionConfig)
        }
        if unknown := sorted(set(value) - known):
            raise ValueError(f"unknown key {unknown[0]}; known: {', '.join(sorted(known))}")
        return value

    @field_validator("workers")
    @classmethod
    def _some(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        least, most = (value, value) if isinstance(value, int) else value
        if not 0 < least <= most:
            raise ValueError("choose a number above 0, or [least, most], e.g. [1, 4]")
        return value

    @model_validator(mode="after")
    def _fit(self) -> Recipe:
        if self.zero_stage == 0 and (self.offload or self.precision == "bfloat16"):
            raise ValueError("zero_stage 0 needs float32 and no offload; choose 1")
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile does not work with zero_stage 3; choose 2, or compile=false")
        if self.batch_size < self.most_workers:
            raise ValueError(f"batch_size {self.batch_size} is too small for {self.most_workers} workers")
        return self

    @property
    def least_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


Kind = TypeVar("Kind", Recipe, IngestRecipe)


def load_recipe(recipe: str | Path, overrides: list[str], kind: type[Kind] = Recipe) -> Kind:  # type: ignore[assignment]
    """Load a shipped recipe by name or a YAML file, with ``KEY=VALUE`` overrides (dots lead into sections)."""
    shipped = Path(__file__).parent / "recipes" / f"{recipe}.yaml"
    path = shipped if shipped.is_file() else Path(recipe)
    if not path.is_file():
        names = sorted(entry.stem for entry in (Path(__file__).parent / "recipes").iterdir())
        raise UserError(f"{recipe}: neither a recipe file nor a shipped recipe; shipped: {', '.join(names)}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{recipe}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{recipe}: a recipe must be a mapping of keys to values")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{override}: write an override as KEY=VALUE, e.g. steps=1000 or model.depth=4")
        section = values
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise UserError(f"{override}: {parent} is a value, not a section")
        try:
            section[last] = value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(
                f"{override}: the value is not YAML; quote what has spaces, as in KEY='[1, 2]' or KEY='{{a: 1, b: 2}}'"
            ) from None
        if isinstance(value, dict) and any(":" in str(name) and given is None for name, given in value.items()):
            raise UserError(f"{override}: write a space after each colon, as in {key}='{{a: 1, b: 2}}'")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        known = f"; known keys: {', '.join(kind.model_fields)}" if first["type"] == "extra_forbidden" else ""
        given = "" if isinstance(first["input"], dict) else f" {first['input']}"
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{recipe}: {where}{given}: {message}{known}") from None
