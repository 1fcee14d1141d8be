"""Finetuning a trained model on data it was not made for: the new model, what learns, and what is saved."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command import Uwm
from helpers.models import make_batch, seeded
from helpers.rows import Made, commit, write_episodes
from safetensors.torch import load_file

from pipelines.models import checkpoint
from pipelines.models.checkpoint import Settings
from pipelines.models.data import dataset
from pipelines.models.policy import Policy
from pipelines.recipe import Lora, Recipe, load_recipe
from pipelines.train import finetune, pretrain
from pipelines.train.finetune import Finetuning
from pipelines.train.trainable import adapt, adapters, learning_sizes, merged
from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore

TINY = ["model.width=32", "model.depth=2", "model.heads=2", "model.frame_width=16", "model.condition_width=32"]
TINY += ["model.position=learned", "validation_share=0"]
QUICK = ["steps=2", "batch_size=4", "workers=1", "warmup_steps=0", "log_every=1", "validation_share=0"]


def write(
    folder: Path,
    embodiment: str = "arm",
    cameras: tuple[str, ...] = ("front", "wrist"),
    action_dim: int = 3,
    scale: float = 1.0,
    size: int = 8,
) -> str:
    """Create a store of three episodes of random numbers, or add three to an existing one."""
    store = LatentStore.open(str(folder)) if folder.exists() else LatentStore.create(str(folder))
    random, made = np.random.default_rng(len(embodiment)), []
    for i in range(3):
        latents = {name: random.standard_normal((40, 4, size, size)).astype(np.float16) for name in cameras}
        steps = (scale * random.standard_normal((40, action_dim + 2))).astype(np.float32)
        made.append(Made(f"{embodiment}-{i}", latents, steps, action_dim, {"embodiment": embodiment}))
    fork = store.fork()
    commit(store, [(fork, *written) for written in write_episodes(fork, made)])
    return store.uri


def add_instruction(store: str, encoder: str, width: int) -> None:
    row = {"text": "close the drawer", "encoder": encoder, "encoder_digest": encoder * 2, "vector": [0.1] * width}
    LatentStore.open(store).add_instruction_vectors([row])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an embodiment "arm" with cameras front and wrist, as if it had been trained."""
    root = tmp_path_factory.mktemp("trained")
    settings = pretrain.plan(write(root / "store"), load_recipe("small", TINY))
    torch.manual_seed(0)
    model = settings.build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    checkpoint.save(root / "checkpoint", model.state_dict(), settings)
    return root / "checkpoint"


def planned(trained: Path, store: str, *overrides: str) -> Finetuning:
    return finetune.plan(trained, store, load_recipe("finetune", [*QUICK, *overrides]))


def notes(settings: Settings) -> dict[str, str]:
    return {row["part"]: row["note"] for row in finetune.table(settings) if row["note"]}


@pytest.mark.parametrize("name", ["model.safetensors", "settings.json", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["bit", "cut", "missing", "header"])
def test_a_damaged_checkpoint_is_refused_in_one_line(trained: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = shutil.copytree(trained, tmp_path / "checkpoint")
    file, content = folder / name, (folder / name).read_bytes()
    middle = len(content) // 2
    changed = {
        "bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "cut": content[:-1],
        "header": bytes([content[0] ^ 4]) + content[1:],
    }
    file.write_bytes(changed[damage]) if damage in changed else file.unlink()
    for load in (Policy, checkpoint.load, lambda where: planned(where, "/no/store")):
        with pytest.raises(UserError, match=r"damaged|not a checkpoint") as refused:
            load(folder)
        assert name in str(refused.value) or name == "settings.json"
        assert "\n" not in str(refused.value) and str(folder) in str(refused.value)


def test_a_checkpoint_without_checksums_is_read_with_a_note(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(trained, tmp_path / "checkpoint")
    (folder / "checkpoint.json").unlink()
    settings = json.loads((folder / "settings.json").read_text())
    del settings["checksums"]
    (folder / "settings.json").write_text(json.dumps(settings))
    model, _ = checkpoint.load(folder)
    assert model.state_dict().keys() == checkpoint.load(trained)[0].state_dict().keys()
    assert "written by an earlier version, without checksums" in capfd.readouterr().err


# The new model


def test_the_same_embodiment_keeps_the_same_model(trained: Path, tmp_path: Path) -> None:
    settings = planned(trained, write(tmp_path / "store")).settings
    before = checkpoint.load_settings(trained)
    assert (settings.model, settings.embodiments) == (before.model, before.embodiments)
    assert notes(settings) == {} and settings.fresh == set()
    sizes = sum(parameter.numel() for parameter in before.build().parameters())
    for column in ("loaded", "learning"):
        assert sum(row[column] for row in finetune.table(settings)) == sizes


def test_another_embodiment_extends_the_model_and_finds_its_cameras_by_name(trained: Path, tmp_path: Path) -> None:
    store = write(tmp_path / "store", "humanoid", ("wrist", "top", "side"), action_dim=5)
    add_instruction(store, "minilm", 6)
    plan = planned(trained, store, "text_encoder=minilm", "model.action_chunk=20")
    settings, before = plan.settings, checkpoint.load_settings(trained)
    changed = {"cameras": 3, "action_dim": 5, "text_width": 6, "action_chunk": 20}
    assert settings.model == dataclasses.replace(before.model, **changed)
    assert settings.embodiments["arm"] == before.embodiments["arm"]
    assert settings.embodiments["humanoid"].cameras == ("top", "wrist", "side")
    assert settings.embodiments["humanoid"].index == 1
    assert (settings.text_encoder, settings.text_encoder_digest) == ("minilm", "minilmminilm")
    found = notes(settings)
    assert found["action tokens"] == "fresh: action 3-4" and found["positions"].endswith("camera 2 (side)")
    assert found["condition"] == "fresh: camera 2 (side), instruction" and found["images"] == "fresh: camera 2 (side)"
    assert found["embodiments"] == "fresh: embodiment humanoid; left: spare embodiment 1"
    assert "step 16-19" in found["positions"] and set(found) == {
        "action tokens", "positions", "condition", "images", "instructions", "embodiments"
    }  # fmt: skip
    data = dataset(settings, validation=False, recipe=load_recipe("finetune", QUICK))
    assert data.gather(np.array([0]), np.array([0]))["camera_mask"].tolist() == [[True, True, True]]


def test_a_single_camera_takes_the_slot_where_the_model_knows_it(trained: Path, tmp_path: Path) -> None:
    store = write(tmp_path / "store", "cart", ("wrist",))
    settings = planned(trained, store).settings
    assert settings.embodiments["cart"].cameras == ("", "wrist") and settings.embodiments["cart"].seen == ("wrist",)
    assert settings.embodiments["cart"].interface.cameras == ("wrist",)
    data = dataset(settings, validation=False, recipe=load_recipe("finetune", QUICK))
    assert data.gather(np.array([0]), np.array([0]))["camera_mask"].tolist() == [[False, True]]
    narrow = planned(trained, store, "model.cameras=1").settings  # slots that the data do not need are left out
    assert narrow.embodiments["cart"].cameras == narrow.embodiments["arm"].cameras == ("wrist",)
    assert notes(narrow)["positions"] == "left: camera 0 (front)"


def test_the_model_is_made_smaller_only_if_the_recipe_says_so(trained: Path, tmp_path: Path) -> None:
    store = write(tmp_path / "store", "cart", action_dim=2)
    assert planned(trained, store).settings.model.action_dim == 3
    narrow = planned(trained, store, "model.action_dim=2").settings
    assert narrow.model.action_dim == 2 and notes(narrow)["action tokens"] == "left: action 2"
    assert list(narrow.embodiments) == ["cart"]  # the other does not fit
    with pytest.raises(UserError, match=r"model.action_dim: embodiment cart needs 2; remove the key, or raise it"):
        planned(trained, store, "model.action_dim=1")


def start(plan: Finetuning, folder: Path) -> Path:
    folder.mkdir()
    finetune.write_start(plan, folder)
    return folder


def test_instructions_are_added_kept_changed_and_removed(trained: Path, tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    add_instruction(store, "minilm", 6)
    add_instruction(store, "clip", 4)
    assert planned(trained, store).settings.text_encoder is None
    start(planned(trained, store, "text_encoder=minilm"), tmp_path / "initial")
    for overrides, encoder, note in (
        ([], "minilm", None),
        (["text_encoder=clip"], "clip", "fresh: text encoder clipclip; left: text encoder minilmminilm"),
        (["model.text_width=0"], None, "left: observation.instruction.bias, observation.instruction.weight, "
                                       "observation.untold"),
    ):  # fmt: skip
        again = planned(tmp_path / "initial", store, *overrides).settings
        assert again.text_encoder == encoder and notes(again).get("instructions") == note


def test_frames_of_another_size(trained: Path, tmp_path: Path) -> None:
    larger = planned(trained, write(tmp_path / "large", size=16)).settings
    assert larger.model.latent_size == (16, 16) and larger.image_size == 128
    assert notes(larger)["positions"] == "fresh: 4 x 4 patches; left: 2 x 2 patches"
    cropped = planned(trained, write(tmp_path / "large"), "model.latent_size=[8,8]").settings
    assert cropped.model.latent_size == (8, 8) and notes(cropped) == {}
    small = write(tmp_path / "small", size=4)
    with pytest.raises(
        UserError, match=r"latents are \(4, 4\), but the model sees \(8, 8\); .*model.latent_size=\[4, 4\]"
    ):
        planned(trained, small)
    assert planned(trained, small, "model.latent_size=[4,4]").settings.model.latent_size == (4, 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.width=64", "model.width: 64, but the trained model has 32, which cannot change"),
        ("model.kind=dp", "model.kind: dp, but the trained model has uwm, which cannot change"),
        ("diffusion.sampling_steps=3", "keeps its diffusion"),
        ("freeze=[denoiser.black.*]", r"freeze: denoiser.black.\* matches no parameter; .* denoiser.blocks.\*"),
        ("freeze=['*']", "nothing is left to learn"),
        ("lora.targets=['*.mlp.7']", r"lora.targets: \*.mlp.7 matches no linear layer"),
        ("lora.rang=3", "lora.rang"),
        ("text_encoder=minilm", "of text encoder minilm: it holds none"),
    ],
)
def test_impossible_recipes_are_refused_in_one_line(trained: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        planned(trained, write(tmp_path / "store"), override)
    assert "\n" not in str(refused.value)


def test_training_starts_from_the_parents_weights(trained: Path, tmp_path: Path) -> None:
    plan = planned(trained, write(tmp_path / "store", "humanoid", ("wrist", "top"), action_dim=5))
    folder = start(plan, tmp_path / "initial")
    (old, _), (new, settings) = checkpoint.load(trained), checkpoint.load(folder)
    assert settings.model_dump_json() == plan.settings.model_dump_json()
    weight = new.denoiser.actions.encode[0].weight
    assert torch.equal(weight[:, :3], old.denoiser.actions.encode[0].weight) and not weight[:, 3:].any()
    again = checkpoint.load(start(plan, tmp_path / "again"))[0].state_dict()
    assert all(torch.equal(value, again[name]) for name, value in new.state_dict().items())
    table = (folder / "transplant.txt").read_text().splitlines()
    assert table[0].split() == ["part", "loaded", "fresh", "left", "learning", "note"] and len(table) < 20
    same = checkpoint.load(start(planned(trained, write(tmp_path / "same")), tmp_path / "unchanged"))[0].state_dict()
    assert all(torch.equal(value, same[name]) for name, value in old.state_dict().items())


# Statistics


def test_statistics_are_the_parents_unless_the_recipe_chooses_the_datas(trained: Path, tmp_path: Path) -> None:
    store, before = write(tmp_path / "store", scale=3), checkpoint.load_settings(trained).embodiments["arm"]

    def both(settings: Settings) -> list[tuple[float, ...]]:
        pretrained, data = settings.pretrained_statistics["arm"], settings.data_statistics["arm"]
        assert (pretrained.action, pretrained.proprio) == (before.action_normalizer, before.proprio_normalizer)
        np.testing.assert_allclose(data.action.scale, 3 * np.array(pretrained.action.scale), rtol=1e-5)
        return [settings.embodiments["arm"].action_normalizer.scale, pretrained.action.scale, data.action.scale]

    used, pretrained, _ = both(planned(trained, store).settings)
    assert used == pretrained
    used, _, data = both(planned(trained, store, "statistics=data").settings)
    assert used == data

    other = write(tmp_path / "other", scale=1000)
    with pytest.raises(UserError, match=r"action\[0\] is .*if only its ranges differ, set statistics=data"):
        planned(trained, other)
    assert planned(trained, other, "statistics=data").settings.embodiments["arm"].cameras == before.cameras
    with pytest.raises(UserError, match="actions have 4 columns, not 3"):
        planned(trained, write(tmp_path / "wide", action_dim=4), "statistics=data")

    settings = planned(trained, write(tmp_path / "new", "cart")).settings
    assert settings.pretrained_statistics == {} and list(settings.data_statistics) == ["cart"]
    written = settings.model_dump_json()
    assert Settings.model_validate_json(written).model_dump_json() == written
    earlier = json.loads(written)
    for key in ("pretrained_statistics", "data_statistics", "transplant"):
        del earlier[key]
    assert Settings.model_validate(earlier).transplant == ()


def test_actions_beyond_pretrainings_range_keep_its_normalisation_and_can_be_sampled(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = checkpoint.load_settings(trained).embodiments["arm"]
    assert before.action_reach == (1, 1, 1)
    for scale, farthest in ((0.5, 1), (3, 5)):
        monkeypatch.setenv("UWM_CACHE", str(tmp_path / f"cache-{scale}"))  # the stores' episodes have the same keys
        plan = planned(trained, write(tmp_path / str(scale), scale=scale))
        spec = plan.settings.embodiments["arm"]
        assert spec.action_normalizer == before.action_normalizer
        data = dataset(plan.settings, validation=False, recipe=load_recipe("finetune", QUICK))
        arrays = data.gather(np.repeat(np.arange(3), 40), np.tile(np.arange(40), 3))
        largest = np.abs(arrays["action"]).max((0, 1))
        np.testing.assert_allclose(spec.action_reach, np.maximum(largest, 1), rtol=1e-4)
        np.testing.assert_array_equal(arrays["action_reach"][0], np.float32(spec.action_reach))
        assert largest.max() <= farthest and (largest.max() > 1) == (farthest > 1)
    # what a further finetuning does not hold may still be acted
    start(plan, tmp_path / "initial")
    again = planned(tmp_path / "initial", write(tmp_path / "small", scale=0.1)).settings.embodiments["arm"]
    assert again.action_reach == spec.action_reach
    own = planned(tmp_path / "initial", write(tmp_path / "small"), "statistics=data").settings.embodiments["arm"]
    assert own.action_reach == (1, 1, 1) and own.action_normalizer != before.action_normalizer
    with pytest.raises(UserError, match=r"action\[0\] is .*set statistics=data"):
        planned(trained, write(tmp_path / "far", scale=9))


def test_a_column_that_stands_still_far_from_pretrainings_is_refused(trained: Path, tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    steps = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
    steps[:, 1] = 80
    latents = {name: np.zeros((40, 4, 8, 8), np.float16) for name in ("front", "wrist")}
    fork = store.fork()
    commit(store, [(fork, *written) for written in write_episodes(fork, [Made("arm", latents, steps, 3)])])
    with pytest.raises(UserError, match=r"embodiment arm differs from pretraining: action\[1\] is 80 ± 0.001"):
        planned(trained, store.uri)


# What learns


def test_adapters_start_at_zero_learn_alone_and_merge_into_the_plain_model(trained: Path) -> None:
    recipe = Recipe(steps=1, batch_size=2, learning_rate=1, lora=Lora(rank=4, alpha=6), freeze=["*.blocks.1.mlp.*"])
    fresh = {"denoiser.registers", "denoiser.blocks.0.mlp.0.weight"}
    plain, settings = checkpoint.load(trained)
    model, _ = checkpoint.load(trained)
    adapt(model, recipe, fresh)
    batch = make_batch(config=settings.model)
    torch.testing.assert_close(model.loss(batch, seeded(0)), plain.loss(batch, seeded(0)), rtol=0, atol=0)

    learn = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert {name for name in learn if ".lora_" not in name} == fresh
    adapted = {name.partition(".lora_")[0].removeprefix("denoiser.blocks.") for name in learn if ".lora_" in name}
    assert adapted == {"0.attention.qkv", "0.attention.out", "0.mlp.2", "1.attention.qkv", "1.attention.out"}
    assert sum(value.numel() for value in learn.values()) == sum(learning_sizes(plain, recipe, fresh).values())

    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(learn.values(), lr=0.1)
    for seed in range(2):
        optimizer.zero_grad()
        model.loss(batch, seeded(seed)).total.backward()
        optimizer.step()
    after = model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(learn)

    weights = merged(after, recipe)
    assert weights.keys() == plain.state_dict().keys()
    untouched = plain.loss(batch, seeded(0)).total
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain.loss(batch, seeded(0)), model.loss(batch, seeded(0)))
    assert not torch.allclose(plain.loss(batch, seeded(0)).total, untouched)
    of_adapters = adapters(after)
    assert len(of_adapters) == 10 and "denoiser.blocks.0.mlp.2.lora_A.weight" in of_adapters
    assert adapters(weights) == {} and merged(weights, recipe).keys() == weights.keys()


def test_frozen_parts_stay_and_the_rest_learns(trained: Path) -> None:
    model, _ = checkpoint.load(trained)
    adapt(model, Recipe(steps=1, batch_size=2, learning_rate=1, freeze=["observation.*", "*.registers"]))
    learns = {name for name, value in model.named_parameters() if value.requires_grad}
    frozen = {name for name, _ in model.named_parameters()} - learns
    assert frozen == {name for name in frozen if name.startswith("observation.")} | {"denoiser.registers"}
    assert len(frozen) > 10 < len(learns)


def test_adapters_need_trained_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lora: adapters need trained weights"):
        pretrain.plan(write(tmp_path / "store"), load_recipe("small", ["lora.rank=2"]))


# A whole finetuning


def test_a_new_embodiment_is_learned_with_adapters_and_saved_as_a_plain_model(
    ray_cluster: None, trained: Path, tmp_path: Path, uwm: Uwm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    store = write(tmp_path / "store", "humanoid", ("wrist", "top", "side"), action_dim=5)
    command = (
        "finetune",
        "--from",
        trained,
        "--store",
        store,
        "--recipe",
        "finetune_lora",
        "--output",
        tmp_path / "runs",
    )
    command = (*command, "--json", *QUICK, "ema_decay=0", "freeze=['*.blocks.1.*']", "lora.rank=2")
    code, dry, text = uwm(*command, "--dry-run")
    assert code == 0 and not (tmp_path / "runs").exists() and "fresh: action 3-4" in text
    code, report, err = uwm(*command)
    assert code == 0, err
    assert report["transplant"] == dry["transplant"] and "fresh: action 3-4" in err
    rows = {row["part"]: row for row in report["transplant"]}
    assert rows["blocks"]["learning"] == 2 * (32 * 4 + 32 * 2 + 32 * 5 * 2) and rows["registers"]["learning"] == 0

    folder = Path(report["checkpoint"])
    model, settings = checkpoint.load(folder)
    weights = {"model.safetensors", "adapter.safetensors"}
    assert {path.name for path in folder.iterdir()} == {*weights, "settings.json", "checkpoint.json"}
    assert {path.name for path in folder.parent.iterdir()} >= {"checkpoint", "recipe.yaml", "run.json"}
    assert not (folder.parent / "step-00000000").exists()
    assert settings.recipe["lora"]["rank"] == 2 and settings.model.cameras == 3 and settings.parent == str(trained)
    before, after = checkpoint.load(trained)[0].state_dict(), model.state_dict()
    held = load_file(folder / "adapter.safetensors")
    assert held["denoiser.blocks.0.attention.qkv.lora_B.weight"].any()
    alike = [name for name in before if before[name].shape == after[name].shape]
    moved = {name for name in alike if not torch.equal(after[name], before[name])}
    adapted = {f"{name.partition('.lora_')[0]}.weight" for name in held}
    assert moved - settings.fresh == adapted and len(adapted) == 4
    client = finetune.tracking.MlflowClient()
    assert "transplant.txt" in [file.path for file in client.list_artifacts(report["run_id"])]
    assert client.get_run(report["run_id"]).data.params["lora.rank"] == "2"
