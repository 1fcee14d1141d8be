"""Files as the published code writes them: what is inferred, what is rejected, and that no code in them runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.published import WRITER, published

from uwm_model.published import load_published, our_name, read_published


@pytest.mark.parametrize(("cameras", "grid", "registers"), [(1, 2, 8), (2, 7, 8), (3, 7, 24)])
def test_sizes_are_inferred(cameras: int, grid: int, registers: int) -> None:
    model = load_published(published(cameras, grid, registers), heads=4)
    config = model.model_config
    assert (config.cameras, config.latent_size, config.registers) == (cameras, (4 * grid, 4 * grid), registers)
    assert (config.depth, config.heads, config.action_dim, config.mlp_ratio) == (2, 4, 7, 4)
    assert model.diffusion_config.latent_divisor == 3
    assert model.diffusion_config.marginal_timestep == "leading" and not model.training
    assert load_published(published(1, 4), marginal_timestep="last").diffusion_config.marginal_timestep == "last"
    oblong = load_published(published(1, 2), latent_size=(4, 16))
    assert oblong.model_config.latent_size == (4, 16)


def test_a_file_is_read_and_its_normaliser_becomes_numbers(tmp_path: Path) -> None:
    weights = published()
    torch.save(weights, tmp_path / "weights.pt")
    subprocess.run([sys.executable, "-c", WRITER, tmp_path / "weights.pt", tmp_path / "published.pt"], check=True)
    content = read_published(tmp_path / "published.pt")
    assert content.step == 42
    assert set(content.action_normalizer) == {"scale", "offset", "stats.min"}
    np.testing.assert_array_equal(content.action_normalizer["scale"], np.arange(7, dtype=np.float32))
    assert content.action_normalizer["stats.min"] == -2
    assert "datasets.utils.normalizer" not in sys.modules

    model = load_published(tmp_path / "published.pt", heads=4)
    for name, tensor in weights.items():
        if not name.startswith("obs_encoder.vae."):
            torch.testing.assert_close(model.state_dict()[our_name(name)].flatten(), tensor.flatten(), rtol=0, atol=0)


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_in_a_file_runs(tmp_path: Path) -> None:
    torch.save({"model": published(), "action_normalizer": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match=r"bomb.pt: its pickle needs posix.mkdir"):
        load_published(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()


def test_other_models_are_rejected(tmp_path: Path) -> None:
    weights = published()
    for change, message in (
        ({"obs_encoder.text_encoder.proj.weight": torch.zeros(1)}, "text_encoder.proj.weight: not part of"),
        ({"noise_pred_net.blocks.2.attn.qkv.bias": torch.zeros(192)}, "blocks.2.* missing"),
        ({"noise_pred_net.blocks.1.attn.proj.weight": torch.zeros(64, 63)}, r"\(64, 63\) in the .*, \(64, 64\) by"),
        ({"noise_pred_net.pos_embed": torch.zeros(1, 50, 64)}, "50 tokens are not 16 actions"),
        ({"noise_pred_net.head.adaLN_modulation.1.weight": torch.zeros(128, 151)}, "condition has 135 values, not 32"),
        ({"obs_encoder.vae.shift": torch.ones(1, 4, 1, 1)}, "latents are shifted by"),
    ):
        with pytest.raises(ValueError, match=message):
            load_published(weights | change)
    with pytest.raises(ValueError, match="pos_embed is missing"):
        load_published({})
    with pytest.raises(ValueError, match="cameras: 3 in the settings, 2 in the checkpoint"):
        load_published(weights, cameras=3)
    with pytest.raises(ValueError, match="dephth: no such setting"):
        load_published(weights, dephth=3)
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match=r"text.pt: not written by torch.save"):
        load_published(tmp_path / "text.pt")
    with pytest.raises(FileNotFoundError):
        load_published(tmp_path / "none.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no weights under the key model"):
        load_published(tmp_path / "list.pt")


def test_unreadable_files_raise_valueerror(tmp_path: Path) -> None:
    weights = published()
    torch.save({"model": weights, "action_normalizer": np.ones(3, np.float16)}, tmp_path / "half.pt")
    with pytest.raises(ValueError, match=r"half.pt: holds unsupported objects"):
        read_published(tmp_path / "half.pt")
    with pytest.raises(ValueError, match=r"noise_pred_net.blocks.0.mlp.fc1.weight: not a tensor"):
        load_published(weights | {"noise_pred_net.blocks.0.mlp.fc1.weight": "text"})
    less = {name: tensor for name, tensor in weights.items() if ".action_encoder." not in name}
    with pytest.raises(ValueError, match=r"action_encoder.0.weight: missing in a published UWM"):
        load_published(less)
