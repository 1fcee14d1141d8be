"""Load published Unified World Models checkpoints without running any code in them.

Their layout: ``{"model": weights, "action_normalizer": a pickled object, "step": ...}``. Weight names start with
``noise_pred_net.`` (the transformer) or ``obs_encoder.`` (ResNet-18, and the frozen VAE, which is skipped: it is
SDXL's, which the store's encoder is too). Sizes are inferred from the weights' shapes where possible.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from torch import Tensor

from uwm_model.config import DiffusionConfig, ModelConfig
from uwm_model.world_model import UnifiedWorldModel

HEAD_WIDTH = 64  # of the published models' attention; not inferable from the weights
ASSUMED = {"heads", "proprio_dim", "embodiments"}  # not inferable from the weights, so settings may change them
PUBLISHED_DIFFUSION = {"marginal_timestep": "leading", "action_free_loss": True}  # where this project's default differs
NET, IMAGE, VAE = "noise_pred_net.", "obs_encoder.img_encoder.model.", "obs_encoder.vae."
NAMES = (  # (published, ours); the first match applies
    (rf"{IMAGE}(.+)", r"observation.image.\1"),
    (rf"{NET}pos_embed", "denoiser.position"),
    (rf"{NET}registers", "denoiser.registers"),
    (rf"{NET}action_encoder.(.+)", r"denoiser.actions.encode.\1"),
    (rf"{NET}action_decoder.(.+)", r"denoiser.actions.decode.\1"),
    (rf"{NET}obs_patchifier.patch_(encoder|decoder).(.+)", r"denoiser.latents.\1.\2"),
    (rf"{NET}timestep_embedding.proj.(.+)", r"denoiser.timesteps.mlp.\1"),
    (rf"{NET}(blocks.\d+|head).adaLN_modulation.(.+)", r"denoiser.\1.modulation.\2"),
    (rf"{NET}(blocks.\d+).attn.qkv.(.+)", r"denoiser.\1.attention.qkv.\2"),
    (rf"{NET}(blocks.\d+).attn.proj.(.+)", r"denoiser.\1.attention.out.\2"),
    (rf"{NET}(blocks.\d+).mlp.fc1.(.+)", r"denoiser.\1.mlp.0.\2"),
    (rf"{NET}(blocks.\d+).mlp.fc2.(.+)", r"denoiser.\1.mlp.2.\2"),
    (rf"{NET}head.linear.(.+)", r"denoiser.head.linear.\1"),
)

# What numpy needs to unpickle an array. With these and stand-ins for normalisers, a pickle can only hold numbers.
NUMPY = re.compile(r"numpy(\._?core\.multiarray)?\.(_reconstruct|scalar|ndarray|dtype)$")
NORMALIZER = re.compile(r"[\w.]+\.\w*Normalizer$")


@dataclasses.dataclass(frozen=True)
class Published:
    """Content of a published file; ``action_normalizer`` holds every number of the normaliser by attribute name."""

    weights: dict[str, Tensor]
    action_normalizer: dict[str, np.ndarray]
    step: int | None


def load_published(weights: Mapping[str, Any] | str | PathLike[str], **settings: Any) -> UnifiedWorldModel:
    """Return the model of a published checkpoint (a file, its content, or only its weights), in evaluation mode.

    ``settings`` are fields of ModelConfig and DiffusionConfig that override inferred ones. Not inferable, and assumed:
    heads (64 wide), observed_frames and future_frames (2), action_chunk (16), square latents. Actions are normalised as
    in the checkpoint, latents divided by its scale. Raises ValueError if the file holds another kind of model, or if a
    setting contradicts a shape; the message names both values.
    """
    content: Mapping[str, Any] = weights if isinstance(weights, Mapping) else read_published(weights).weights
    held = {name.removeprefix("module."): tensor for name, tensor in content.get("model", content).items()}
    if odd := [name for name, tensor in held.items() if not isinstance(tensor, Tensor)]:
        raise ValueError(f"{odd[0]}: not a tensor; not a published UWM checkpoint")
    ours = {our_name(name): tensor for name, tensor in held.items() if not name.startswith(VAE)}
    for name in (f"{NET}pos_embed", f"{NET}registers", f"{IMAGE}fc.weight"):
        if name not in held:
            raise ValueError(f"{name} is missing: not a published UWM checkpoint")

    diffusion = {field.name for field in dataclasses.fields(DiffusionConfig)}
    if unknown := sorted(set(settings) - diffusion - {field.name for field in dataclasses.fields(ModelConfig)}):
        raise ValueError(f"{unknown[0]}: no such setting of a model or its diffusion")
    of_diffusion: dict[str, Any] = {"latent_divisor": _latent_divisor(held)} | PUBLISHED_DIFFUSION
    of_model: dict[str, Any] = {}
    for name, value in settings.items():
        (of_diffusion if name in diffusion else of_model)[name] = value
    try:
        model = UnifiedWorldModel(_model_config(held, of_model), DiffusionConfig(**of_diffusion))
    except KeyError as error:
        raise ValueError(f"{error.args[0]}: missing in a published UWM") from None
    expected = model.state_dict()
    if odd := sorted(set(ours) ^ set(expected)):
        raise ValueError(f"{odd[0]}: {'unexpected' if odd[0] in ours else 'missing'} in a published UWM")
    # The published patch encoder is a convolution [D, C, pt, ph, pw], ours a linear layer [D, C * pt * ph * pw].
    ours["denoiser.latents.encoder.weight"] = ours["denoiser.latents.encoder.weight"].flatten(1)
    for name, tensor in ours.items():
        if tensor.shape != expected[name].shape:
            wanted = tuple(expected[name].shape)
            raise ValueError(f"{name}: {tuple(tensor.shape)} in the checkpoint, {wanted} by the settings")
    model = model.to(ours["denoiser.position"].dtype)
    model.load_state_dict(ours)
    return model.eval()


def our_name(name: str) -> str:
    """Return our name of a published parameter. Raises ValueError for one of the VAE's, or an unknown one."""
    for theirs, ours in NAMES:
        if match := re.fullmatch(theirs, name):
            return match.expand(ours)
    raise ValueError(f"{name}: not part of a published UWM that observes only images, through a ResNet-18")


def read_published(path: str | PathLike[str]) -> Published:
    """Read a published file as numbers. Raises ValueError if its pickle needs more than arrays and a normaliser."""
    allowed: list[Any] = []
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(fspath(path))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{fspath(path)}: not written by torch.save ({str(error).splitlines()[0]})") from None
    for name in names:
        if NUMPY.match(name):
            allowed.append((_NUMPY_PARTS[name.rpartition(".")[2]], name))
        elif NORMALIZER.match(name):
            allowed.append((type("Numbers", (_Numbers,), {}), name))
        else:
            raise ValueError(f"{fspath(path)}: its pickle needs {name}; only arrays and normalisers are supported")
    allowed += [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{fspath(path)}: holds unsupported objects ({reason})") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{fspath(path)}: no weights under the key model; not a published UWM checkpoint")
    numbers = dict(_numbers(content.get("action_normalizer"), ""))
    step = content.get("step")
    return Published(content["model"], numbers, step if isinstance(step, int) else None)


class _Numbers:
    """Stand-in for a class of the published code: holds the pickled attributes and has no behaviour."""


_NUMPY_PARTS = {
    "_reconstruct": multiarray._reconstruct,
    "scalar": multiarray.scalar,
    "ndarray": np.ndarray,
    "dtype": np.dtype,
}


def _numbers(value: Any, name: str) -> list[tuple[str, np.ndarray]]:
    """Return every number in a normaliser with its dotted attribute name."""
    if isinstance(value, _Numbers):
        value = vars(value)
    if isinstance(value, Mapping):
        parts = (_numbers(part, f"{name}.{key}".lstrip(".")) for key, part in value.items())
        return [pair for part in parts for pair in part]
    if isinstance(value, Tensor):
        value = value.detach().numpy()
    array = np.asarray(value) if isinstance(value, np.ndarray | np.generic | int | float | list | tuple) else None
    return [] if array is None or array.dtype.kind not in "fiub" else [(name, array)]


def _model_config(held: Mapping[str, Tensor], settings: dict[str, Any]) -> ModelConfig:
    net = {name.removeprefix(NET): tensor for name, tensor in held.items() if name.startswith(NET)}
    width, hidden = net["pos_embed"].shape[2], net["action_encoder.0.weight"].shape[0]
    _, channels, *patch = net["obs_patchifier.patch_encoder.weight"].shape
    timestep_width = net["timestep_embedding.proj.2.weight"].shape[0]
    registers = net["registers"].shape[1]
    frame_width = held[f"{IMAGE}fc.weight"].shape[0]
    condition = net["head.adaLN_modulation.1.weight"].shape[1] - timestep_width
    sizes: dict[str, Any] = {"observed_frames": 2, "future_frames": 2, "action_chunk": 16} | settings
    frames_seen, odd = divmod(condition, frame_width)
    cameras, odd_frames = divmod(frames_seen, sizes["observed_frames"])
    if odd or odd_frames or cameras == 0:
        raise ValueError(
            f"the condition has {condition} values, not {frame_width} for each of {sizes['observed_frames']} observed "
            "frames and camera; models with low-dimensional observations or language are not supported"
        )
    if "latent_size" not in sizes:
        per_camera, rest = divmod(net["pos_embed"].shape[1] - sizes["action_chunk"] - registers, cameras)
        side = round((per_camera * patch[0] / sizes["future_frames"]) ** 0.5)
        if rest or side**2 * sizes["future_frames"] != per_camera * patch[0]:
            raise ValueError(
                f"{net['pos_embed'].shape[1]} tokens are not {sizes['action_chunk']} actions, {registers} registers "
                f"and square latents of {cameras} cameras; set latent_size, action_chunk or future_frames"
            )
        sizes["latent_size"] = (side * patch[1], side * patch[2])
    inferred = {
        "cameras": cameras,
        "latent_channels": channels,
        "action_dim": net["action_encoder.0.weight"].shape[1],
        "proprio_dim": 1,
        "embodiments": 1,
        "patch": tuple(patch),
        "width": width,
        "depth": len({name.split(".")[1] for name in net if name.startswith("blocks.")}),
        "heads": max(1, width // HEAD_WIDTH),
        "mlp_ratio": hidden / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in net,
        "registers": registers,
        "timestep_width": timestep_width,
        "observation": "pixels",
        "frame_width": frame_width,
    }
    for name, value in settings.items():
        if name in inferred.keys() - ASSUMED and value != inferred[name]:
            raise ValueError(f"{name}: {value} in the settings, {inferred[name]} in the checkpoint")
    return ModelConfig(**(inferred | sizes))


def _latent_divisor(held: Mapping[str, Tensor]) -> float:
    """Return what standardised latents are divided by. Published code supports a shift too, but does not use it."""
    shift, scale = held.get(f"{VAE}shift", torch.zeros(1)), held.get(f"{VAE}scale", torch.full((1,), 3.0))
    if shift.any() or (scale != scale.flatten()[0]).any():
        raise ValueError(f"latents are shifted by {shift.flatten().tolist()} and scaled by {scale.flatten().tolist()}")
    return float(scale.flatten()[0])
