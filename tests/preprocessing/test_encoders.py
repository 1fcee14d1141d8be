from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.formats import REAL

from preprocessing import sources
from preprocessing.encoders.hub import read_config
from preprocessing.encoders.taesd import Taesd
from preprocessing.encoders.vae import FILES, SHIPPED, encoder_digest, load_encoder
from preprocessing.errors import UserError
from uwm_model.metrics import psnr


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny VAEs of both kinds, as diffusers writes them."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    root = tmp_path_factory.mktemp("vaes")
    torch.manual_seed(0)
    kl = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.13025,
    )
    tiny = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    for name, vae in (("kl", kl), ("tiny", tiny)):
        vae.save_pretrained(root / name, safe_serialization=True)
    return {name: root / name for name in ("kl", "tiny")}


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (37, 64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_a_folder_loads_and_batching_changes_nothing(folders: dict[str, Path], frames: np.ndarray, kind: str) -> None:
    encoder = load_encoder(str(folders[kind]))
    latents = encoder.encode(frames)
    assert latents.shape == (37, 4, 8, 8) and latents.dtype == np.float16
    one = np.concatenate([encoder.encode(frames[i : i + 1]) for i in (0, 33, 36)])
    np.testing.assert_allclose(one.astype(float), latents[[0, 33, 36]].astype(float), atol=2e-3)
    assert encoder.decode(latents).shape == frames.shape
    assert encoder.digest == encoder_digest(str(folders[kind]))


def test_tiny_vaes_are_those_of_diffusers(folders: dict[str, Path], frames: np.ndarray) -> None:
    """To the bit, with diffusers' own settings and weights."""
    from diffusers import AutoencoderTiny

    for folder in (SHIPPED, folders["tiny"]):
        theirs, ours = AutoencoderTiny.from_pretrained(folder), Taesd.load(read_config("", folder), folder / FILES[0])
        images = torch.from_numpy(frames[:3]).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.inference_mode():
            latents = ours.encode(images)
            assert latents.equal(theirs.encode(images).latents) and latents.std() > 0
            assert ours.decode(latents).equal(theirs.decode(latents).sample)
    with pytest.raises(ValueError, match="act_fn is gelu, not relu"):
        Taesd.load(read_config("", SHIPPED) | {"act_fn": "gelu"}, SHIPPED / FILES[0])


def test_the_digest_depends_on_weights_and_precision_but_not_on_the_path(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folders["tiny"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert encoder_digest(str(copy)) == encoder_digest(str(folders["tiny"]))
    assert encoder_digest(str(copy), "bfloat16") != encoder_digest(str(copy))
    weights = copy / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert encoder_digest(str(copy)) != encoder_digest(str(folders["tiny"]))


def test_an_invalid_vae_is_refused_in_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    (other / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_bytes((folders["tiny"] / "config.json").read_bytes())
    (cut / "diffusion_pytorch_model.safetensors").write_bytes(b"\x10\x00")
    for folder, word in ((tmp_path / "empty", "lacks"), (other, "UNet2DModel"), (cut, "does not load")):
        with pytest.raises(UserError, match=word) as caught:
            load_encoder(str(folder))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="divisible by 8"):
        load_encoder(str(folders["tiny"])).encode(np.zeros((1, 60, 64, 3), np.uint8))


def test_the_shipped_vae_standardises_latents_and_reconstructs_the_demo() -> None:
    from infra.simulators.face import episode_seed
    from infra.simulators.metaworld import MetaWorld

    encoder = load_encoder("tiny")
    for task in ("drawer-close", "button-press-topdown", "door-open"):
        simulator = MetaWorld(task, 128)
        simulator.reset(seed=episode_seed(12345, 0))  # an initial state that no recording has
        pictures: dict[str, list[np.ndarray]] = {"agentview": [], "eye_in_hand": []}
        for step in range(40):
            simulator.rendering = step % 8 == 0
            observation, *_ = simulator.step(simulator.expert_action())
            for camera, picture in observation["images"].items():
                pictures[camera].append(picture)
        for camera, images in pictures.items():
            true = np.stack(images)
            latents = encoder.encode(true)
            assert np.mean(psnr(encoder.decode(latents), true)) >= 27, (task, camera)
            assert 0.5 < latents.astype(np.float32).std() < 2, (task, camera)


@pytest.mark.skipif(not REAL.is_dir(), reason="real robot logs are not beside the checkout")
def test_the_shipped_vae_on_real_video() -> None:
    encoder = load_encoder("tiny")
    [ref] = [r for f, p in sources.find(REAL / "video") for r in sources.scan(f, p) if "test_clip" in r.uri]
    true = next(sources.load(ref).cameras["video"].frames(128))
    assert np.mean(psnr(encoder.decode(encoder.encode(true)), true)) >= 20
