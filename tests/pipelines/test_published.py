"""A published checkpoint on the command line: evaluated and finetuned on its embodiment, refused on others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers.command import Uwm
from helpers.formats import write_demos
from helpers.published import WRITER, published

from pipelines.evaluate.open_loop import HeldOut
from pipelines.ingest.run import ingest
from pipelines.models import checkpoint
from pipelines.models import published as published_module
from pipelines.models.policy import Policy
from pipelines.models.published import adopt
from pipelines.recipe import IngestRecipe
from preprocessing.dataset.embodiment import Embodiment, describe
from preprocessing.dataset.normalizer import MINIMUM_RANGE, Normalizer
from preprocessing.dataset.selection import choose_encoder
from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore
from uwm_model.published import load_published


def write(path: Path, scale: Any, offset: Any, actions: int = 7, **sizes: int) -> Path:
    """Write a checkpoint as the published code does, with a pickled normaliser of its own class; heads are 64 wide."""
    lists = (repr([float(value) for value in values]).replace("inf", "np.inf") for values in (scale, offset))
    numbers = "LinearNormalizer(np.array({}), np.array({}))".format(*lists)
    writer = WRITER.replace("LinearNormalizer(np.arange(7, dtype=np.float32), torch.ones(7))", numbers)
    assert writer != WRITER
    weights = published(**{"cameras": 1, "grid": 2, "registers": 8} | sizes)
    encoder, decoder = (f"noise_pred_net.action_{name}coder" for name in ("en", "de"))
    weights[f"{encoder}.0.weight"] = weights[f"{encoder}.0.weight"][:, :actions].clone()
    for kind in ("weight", "bias"):
        weights[f"{decoder}.2.{kind}"] = weights[f"{decoder}.2.{kind}"][:actions].clone()
    torch.save(weights, path.with_suffix(".weights"))
    with patch.object(sys, "argv", ["", path.with_suffix(".weights"), path]), patch.dict(sys.modules):
        exec(writer, {})
    return path


@pytest.fixture(scope="module")
def place(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    raw = write_demos(root / "toy_demo.hdf5", demos=6, steps=40)
    ingest([str(raw)], str(root / "store"), IngestRecipe(image_size=80, encoder=["tiny", "pixels"]))
    return root


@pytest.fixture(autouse=True)
def own_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UWM_CACHE", str(place / "cache"))
    monkeypatch.setattr(published_module, "OTHERS", ("pixels",))  # as if the published models used the tiny VAE
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")


def of_store(place: Path) -> Normalizer:
    snapshot = LatentStore.open(str(place / "store")).snapshot()
    return describe("toy", snapshot.rows(choose_encoder(snapshot, None)), 0, 1).action_normalizer


@pytest.mark.parametrize("inverse", [False, True])
def test_it_predicts_like_the_published_model_in_the_robots_units(place: Path, inverse: bool) -> None:
    seen = of_store(place)
    scale, offset = np.asarray(seen.scale) * 1.1, np.asarray(seen.offset) + 0.01
    numbers = (1 / scale, -offset / scale) if inverse else (scale, offset)
    file = write(place / f"{inverse}.pt", *numbers)
    folder = adopt(file, str(place / "store"))
    policy = Policy(folder)
    np.testing.assert_allclose(policy.spec.action_normalizer.scale, scale, rtol=1e-6)
    np.testing.assert_allclose(policy.spec.action_normalizer.offset, offset, atol=1e-6)
    assert policy.settings.step == 42 and policy.image_size == 80 and policy.spec.cameras == ("agentview",)
    batch = HeldOut(policy, str(place / "store")).batch
    expected, _ = load_published(file).sample("policy", batch, generator=torch.Generator().manual_seed(0))
    answer = policy.ask(batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-4)
    assert adopt(file, str(place / "store")) == folder


def test_it_is_evaluated_and_finetuned(place: Path, uwm: Uwm, tmp_path: Path) -> None:
    seen = of_store(place)
    file = write(place / "whole.pt", seen.scale, seen.offset)
    runs = ("--output", tmp_path / "runs")
    code, report, err = uwm("evaluate", file, "--store", place / "store", *runs, "--json")
    assert code == 0, err
    assert report["open_loop"]["psnr_forward"] and report["open_loop"]["action_error_inverse"]
    store = LatentStore.open(str(place / "store"))
    seen_then = store.snapshot().id
    store.add_instruction_vectors([{"text": "go", "encoder": "e", "encoder_digest": "e", "vector": [1.0]}])
    small = ["steps=2", "batch_size=4", "workers=1", "warmup_steps=0", "log_every=1", "--snapshot", seen_then]
    code, trained, err = uwm("finetune", "--from", file, "--store", place / "store", *runs, "--json", *small)
    assert code == 0, err
    assert store.snapshot().id != seen_then == checkpoint.load_settings(Path(trained["checkpoint"])).snapshot
    folders = (adopt(file, str(place / "store")), Path(trained["checkpoint"]))
    (before, known), (after, settings) = (checkpoint.load(folder) for folder in folders)
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    assert settings.embodiments == known.embodiments


def test_finetuning_extends_it_to_another_embodiment_and_a_dry_run_keeps_nothing(place: Path, uwm: Uwm) -> None:
    seen = of_store(place)
    before = set((place / "cache").glob("published-*"))
    for name, numbers, sizes, notes in (
        ("five.pt", (seen.scale[:5], seen.offset[:5]), {"actions": 5}, {"action tokens": "fresh: action 5-6"}),
        ("pair.pt", (seen.scale, seen.offset), {"cameras": 2}, {}),
    ):
        file = write(place / name, *numbers, **sizes)
        code, report, err = uwm("finetune", "--from", file, "--store", place / "store", "--dry-run", "--json")
        assert code == 0, err
        assert {row["part"]: row["note"] for row in report["transplant"] if row["note"]} == notes
    assert report["recipe"]["model"]["cameras"] == 2
    assert set((place / "cache").glob("published-*")) == before


def test_another_embodiment_is_refused_with_both_values(place: Path, uwm: Uwm) -> None:
    seen, store = of_store(place), str(place / "store")
    plain = (seen.scale, seen.offset)
    for name, numbers, sizes, message in (
        ("two.pt", plain, {"cameras": 2}, r"two.pt: 2 cameras; .* in .*store has 1"),
        (
            "big.pt",
            plain,
            {"grid": 4},
            r"big.pt: sees 128 pixels; .*store holds 80; ingest with --image-size 128 or more",
        ),
        ("units.pt", (np.asarray(seen.scale) * 100, seen.offset), {}, r"units.pt: its normaliser .* does not fit"),
        (
            "six.pt",
            (seen.scale[:6], seen.offset[:6]),
            {},
            r"six.pt: .* needs scale and offset of 7 actions; it has scale \(6,\)",
        ),
        ("zero.pt", (np.zeros(7), seen.offset), {}, r"zero.pt: its normaliser has a scale of 0"),
        ("nan.pt", (seen.scale, [1e999] * 7), {}, r"nan.pt: its normaliser .* not finite"),
    ):
        with pytest.raises(UserError, match=message):
            adopt(write(place / name, *numbers, **sizes), store)
    with pytest.raises(UserError, match="choose an embodiment with --embodiment; the store knows"):
        adopt(place / "two.pt", store, "elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published_module, "OTHERS", ("tiny", "pixels"))
        with pytest.raises(UserError, match="no latents of sdxl-vae; it holds tiny"):
            adopt(place / "two.pt", store)
    code, _, err = uwm("evaluate", place / "two.pt", "--env", "metaworld:reach")
    assert code == 2 and "a published checkpoint records no embodiment; give --store" in err
    (place / "text.pt").write_text("no checkpoint")
    code, _, err = uwm("evaluate", place / "text.pt", "--store", store)
    [line] = err.strip().splitlines()
    assert code == 2 and "text.pt: not written by torch.save" in line


@pytest.mark.parametrize(
    ("low", "high", "scale", "offset", "expected"),
    [
        (-1, 1, 1.0, 0.0, (1.0, 0.0)),  # both readings are the same
        (0, 1, 2.0, -1.0, (0.5, 0.5)),  # multiplied: both reach 1, but one fills [-1, 1]
        (0, 1, 0.5, 0.5, (0.5, 0.5)),
        (-1.4, 1.4, 1.4, 0.0, (1.4, 0.0)),  # exactly the range it was fitted to
        (-0.6, 0.6, 1.5, 0.0, None),  # part of the range of one reading, nearly all of the other's
    ],
)
def test_the_stores_actions_decide_whether_a_normaliser_multiplies_or_divides(
    low, high, scale, offset, expected, place
) -> None:
    half, middle = (high - low) / 2, (high + low) / 2
    still = MINIMUM_RANGE  # a third, constant column says nothing, whatever its scale
    embodiment = Embodiment(
        0, ("front",), 3, "[]", (), 10.0, Normalizer((middle, middle, 0.0), (half, half, still)), Normalizer((), ())
    )
    numbers = {"scale": np.array([scale, scale, 1e-6]), "offset": np.array([offset, offset, 0.0])}
    if expected is None:
        with pytest.raises(UserError, match=r"may multiply or divide: .* fit both"):
            published_module._normalizer(numbers, embodiment, Path("file.pt"))
    else:
        found = published_module._normalizer(numbers, embodiment, Path("file.pt"))
        assert (found.scale[0], found.offset[0]) == pytest.approx(expected)
