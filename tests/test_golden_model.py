"""The published model's numbers: our denoiser, schedule and sampler must give them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from uwm_model.config import DiffusionConfig, ModelConfig
from uwm_model.denoiser import Denoiser
from uwm_model.sampling import sample
from uwm_model.schedule import DiffusionSchedule

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden vectors are not at {GOLDEN}")

PUBLISHED_NAMES = {  # ours: theirs, without .weight and .bias
    "registers": "registers",
    "position": "pos_embed",
    "actions.encode": "action_encoder",
    "actions.decode": "action_decoder",
    "latents.encoder": "obs_patchifier.patch_encoder",
    "latents.decoder": "obs_patchifier.patch_decoder",
    "timesteps.mlp": "timestep_embedding.proj",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "modulation": "adaLN_modulation",
}
MODES = {  # ours: theirs
    "policy": "marginal_action",
    "video": "marginal_next_obs",
    "forward_dynamics": "forward_dynamics",
    "inverse_dynamics": "inverse_dynamics",
    "joint": "joint",
}


def load(net: str, dtype: torch.dtype = torch.float32) -> Denoiser:
    with safe_open(GOLDEN / f"net_{net}.safetensors", "pt") as file:
        theirs = json.loads(file.metadata()["config"])
        config = ModelConfig(
            cameras=theirs["num_views"],
            latent_channels=theirs["num_chans"],
            latent_size=theirs["image_shape"][1:],
            action_dim=theirs["action_dim"],
            proprio_dim=1,
            embodiments=1,
            future_frames=theirs["image_shape"][0],
            action_chunk=theirs["action_len"],
            patch=theirs["patch_shape"],
            width=theirs["embed_dim"],
            depth=theirs["depth"],
            heads=theirs["num_heads"],
            mlp_ratio=theirs["mlp_ratio"],
            qkv_bias=theirs["qkv_bias"],
            registers=theirs["num_registers"],
            timestep_width=theirs["timestep_embed_dim"],
            condition_width=theirs["global_cond_dim"],
        )
        denoiser = Denoiser(config)
        denoiser.load_state_dict(
            {
                name: file.get_tensor(published(name)).reshape(parameter.shape)
                for name, parameter in denoiser.named_parameters()
            }
        )
        assert {published(name) for name, _ in denoiser.named_parameters()} == set(file.keys())
    return denoiser.to(dtype)


def published(name: str) -> str:
    if name.startswith("blocks."):
        block, index, rest = name.split(".", 2)
        return f"{block}.{index}.{_rename(rest)}"
    if name.startswith("head."):
        return "head." + _rename(name.removeprefix("head."))
    return _rename(name)


def _rename(name: str) -> str:
    for ours, theirs in PUBLISHED_NAMES.items():
        if name == ours or name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    return name


def swap(latents: np.ndarray | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[..., V, C, T, h, w] as published <-> [..., V, T, C, h, w] as in a Batch."""
    return torch.as_tensor(latents).to(dtype).transpose(-4, -3)


def close(ours: Tensor, theirs: np.ndarray, tolerance: float) -> None:
    torch.testing.assert_close(ours, torch.from_numpy(theirs).to(ours.dtype), rtol=0, atol=tolerance)


def inputs(data: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "condition": torch.from_numpy(data["in_global_cond"]).to(dtype),
        "action": torch.from_numpy(data["in_action"]).to(dtype),
        "t_action": torch.from_numpy(data["in_action_t"]),
        "latents": swap(data["in_next_obs"], dtype),
        "t_video": torch.from_numpy(data["in_next_obs_t"]),
    }


@pytest.mark.parametrize("net", ["a", "b"])
@pytest.mark.parametrize(("dtype", "out", "tolerance"), [(torch.float32, "out", 1e-5), (torch.float64, "out64", 1e-9)])
def test_denoiser(net: str, dtype: torch.dtype, out: str, tolerance: float) -> None:
    data = np.load(GOLDEN / f"net_{net}.npz")
    denoiser = load(net, dtype)
    taps: dict[str, Tensor] = {}
    modules = {"temb": denoiser.timesteps, "head": denoiser.head, "action_embed": denoiser.actions.encode}
    modules |= {"next_obs_embed": denoiser.latents.encoder}
    modules |= {f"block{i}": block for i, block in enumerate(denoiser.blocks)}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, __, output, name=name: taps.__setitem__(name, output))

    given = inputs(data, dtype)
    action, latents = denoiser(**given)
    close(action, data[f"{out}_action_pred"], tolerance)
    close(swap(latents, dtype), data[f"{out}_next_obs_pred"], tolerance)
    expected = [name for name in data if name.startswith(f"{out}_tap_")]
    assert expected or dtype == torch.float64
    for name in expected:
        close(taps[name.removeprefix(f"{out}_tap_")], data[name], tolerance)

    action_loss = (action - torch.from_numpy(data["in_action_noise"])).square().mean()
    video_loss = (latents - swap(data["in_next_obs_noise"], dtype)).square().mean()
    close(action_loss, data[f"{out}_action_loss"], tolerance)
    close(video_loss, data[f"{out}_dynamics_loss"], tolerance)

    given["t_action"] = torch.tensor(data["scalar_t_action"])
    given["t_video"] = torch.tensor(data["scalar_t_next_obs"])
    action, latents = denoiser(**given)
    if out == "out":
        close(action, data["out_scalar_t_action_pred"], tolerance)
        close(swap(latents, dtype), data["out_scalar_t_next_obs_pred"], tolerance)

    everywhere = torch.ones(len(action), denoiser.config.cameras, dtype=torch.bool)
    masked_action, masked_latents = denoiser(**given, camera_mask=everywhere)
    torch.testing.assert_close(masked_action, action, rtol=0, atol=tolerance)
    torch.testing.assert_close(masked_latents, latents, rtol=0, atol=tolerance)


def test_gradients() -> None:
    data = np.load(GOLDEN / "net_a.npz")
    denoiser = load("a")
    action, latents = denoiser(**inputs(data, torch.float32))
    action_loss = (action - torch.from_numpy(data["in_action_noise"])).square().mean()
    (action_loss + (latents - swap(data["in_next_obs_noise"])).square().mean()).backward()
    with safe_open(GOLDEN / "net_a_grads.safetensors", "pt") as file:
        for name, parameter in denoiser.named_parameters():
            expected = file.get_tensor(published(name)).reshape(parameter.shape)
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n} {m}")


@pytest.mark.parametrize("net", ["a", "b"])
def test_schedule(net: str) -> None:
    data = np.load(GOLDEN / f"samplers_{net}.npz")
    schedule = DiffusionSchedule(DiffusionConfig())
    assert schedule.alphas_cumprod.dtype == torch.float32
    np.testing.assert_array_equal(schedule.alphas_cumprod.numpy(), data["alphas_cumprod"])
    for steps in (4, 10, 50):
        assert schedule.timesteps(steps) == data[f"timesteps_s{steps}"].tolist()


@pytest.mark.parametrize("net", ["a", "b"])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("steps", [10, 4, 50])
def test_samplers(net: str, mode: str, steps: int) -> None:
    data = np.load(GOLDEN / f"samplers_{net}.npz")
    for dtype, out, tolerance in (
        (torch.float32, "out", 2e-4 if steps == 50 else 5e-5),
        (torch.float64, "out64", 1e-9),
    ):
        denoiser = load(net, dtype)
        features, clean_action, noise_action = (
            torch.from_numpy(data[name]).to(dtype) for name in ("in_features", "in_action", "noise_action")
        )
        visited: list[tuple[Tensor, Tensor]] = []  # the inputs of every evaluation

        def denoise(
            action: Tensor,
            t_action: Tensor,
            latents: Tensor,
            t_video: Tensor,
            denoiser=denoiser,
            features=features,
            visited=visited,
        ) -> tuple[Tensor, Tensor]:
            visited.append((action, latents))
            return denoiser(features, action, t_action, latents, t_video)

        with torch.inference_mode():
            action, latents = sample(
                mode,
                denoise,
                DiffusionSchedule(DiffusionConfig()),
                steps=steps,
                marginal_timestep="leading",
                action=clean_action if mode == "forward_dynamics" else noise_action,
                latents=swap(data["in_next_obs_latents" if mode == "inverse_dynamics" else "noise_next_obs"], dtype),
            )
        name = f"{out}_s{steps}_{MODES[mode]}"
        if mode in ("policy", "inverse_dynamics"):
            close(action, data[name], tolerance)
        elif mode in ("video", "forward_dynamics"):
            close(swap(latents, dtype), data[name], tolerance)
        else:
            close(action, data[f"{name}_action"], tolerance)
            close(swap(latents, dtype), data[f"{name}_next_obs"], tolerance)
        trajectory = f"traj_s{steps}_{MODES[mode]}"
        if trajectory in data and dtype == torch.float32:
            acts = mode in ("policy", "inverse_dynamics")
            after = [a if acts else swap(v) for a, v in [*visited[1:], (action, latents)]]
            close(torch.stack(after), data[trajectory], tolerance)
