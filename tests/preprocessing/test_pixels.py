"""A model that observes pixels, like the paper's, from the store to a policy: on crops of whole frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bench_model import train
from helpers.formats import moving, write_demos

from pipelines.evaluate.run import evaluate
from pipelines.ingest.run import ingest
from pipelines.models import checkpoint
from pipelines.models.data import dataset
from pipelines.models.policy import Policy
from pipelines.recipe import IngestRecipe, load_recipe
from pipelines.train.pretrain import plan
from preprocessing.dataset.selection import choose_encoder
from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore

SMALL = ["encoder=tiny", "steps=2", "batch_size=4", "workers=1", "validation_share=0.3"]
SMALL += ["model.width=32", "model.depth=1", "model.heads=2", "model.frame_width=16", "model.latent_size=[8,8]"]


def test_pixels_are_stored_with_latents_and_train_a_policy(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UWM_CACHE", str(tmp_path / "cache"))
    raw, store = write_demos(tmp_path / "toy_demo.hdf5", demos=6, steps=20), str(tmp_path / "store")
    ingest([str(raw)], store, IngestRecipe(image_size=80))
    recipe = load_recipe("paper_libero", SMALL)
    with pytest.raises(UserError, match=r"holds no pixels, which this model observes; .* --encoder pixels"):
        plan(store, recipe)
    both = ingest([str(raw)], store, IngestRecipe(image_size=80, encoder=["tiny", "pixels"]))
    assert both.episodes["new"] == 6
    snapshot = LatentStore.open(store).snapshot()
    assert list(snapshot.verify()) == []
    assert choose_encoder(snapshot, None) == choose_encoder(snapshot, "tiny")

    settings = plan(store, recipe)
    assert settings.image_size == 80 and settings.model.latent_size == (8, 8)
    data = dataset(settings, validation=False, recipe=recipe)
    gathered = data.gather(np.array([0, 1]), np.array([7, 0]))
    assert gathered["current_latents"].shape == (2, 1, 2, 4, 10, 10)
    assert gathered["current_pixels"].shape == (2, 1, 2, 3, 80, 80)
    rows = {row["id"]: row for row in snapshot.rows("pixels")}
    for b, (episode, frames) in enumerate([(0, (6, 7)), (1, (0, 0))]):
        stored = snapshot.read(rows[data.rows[episode]["id"]]["cameras"][0]["segments"])
        np.testing.assert_array_equal(gathered["current_pixels"][b, 0], stored[list(frames)])
    truth = moving(20)[7].mean()  # resized but not re-encoded
    assert abs(gathered["current_pixels"][0, 0, 1].mean() - truth) < 1

    folder = tmp_path / "checkpoint"
    checkpoint.save(folder, train(settings, recipe)[0].state_dict(), settings)
    assert checkpoint.load_settings(folder).recipe["augment"]["shared"] is True
    policy = Policy(folder)
    camera = policy.spec.cameras[0]
    images = {camera: np.random.default_rng(0).integers(0, 256, (1, 2, 80, 80, 3), np.uint8)}
    proprio = {part: np.zeros((1, 2, width), np.float32) for part, width in policy.spec.proprio}

    def act(images: dict[str, np.ndarray]) -> np.ndarray:
        return policy.act(images, proprio, torch.Generator().manual_seed(0))

    torch.nn.init.normal_(policy.model.denoiser.actions.decode[2].weight)  # two training steps leave it near zero
    torch.nn.init.normal_(policy.model.denoiser.head.modulation[1].weight)
    edge, middle = ({camera: images[camera].copy()} for _ in range(2))
    edge[camera][:, :, :8] = 0  # outside the central 64 pixels
    middle[camera][:, :, 30:40] = 0
    np.testing.assert_array_equal(act(images), act(edge))
    assert not np.allclose(act(images), act(middle))

    report = evaluate(str(folder), f"file://{store}", None, 0, tmp_path / "evaluation")
    assert report["open_loop"]["psnr_ceiling"] > 15
