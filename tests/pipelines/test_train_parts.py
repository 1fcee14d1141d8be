"""Parts of the training that need no Ray: what is trained, validated and compiled."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import Uwm
from helpers.models import make_batch, seeded, stirred
from helpers.rows import Made, commit, fill, random_episode, write_episodes
from torch._dynamo.utils import counters
from tqdm import tqdm

from pipelines.models.batch import to_batch
from pipelines.models.checkpoint import Settings
from pipelines.models.data import dataset
from pipelines.recipe import Recipe, load_recipe
from pipelines.train import dry_run, pretrain, validation
from pipelines.train.devices import decide, decide_here
from pipelines.train.driver import NO_RATE, ProgressLine, trainer_of
from pipelines.train.held_out import amounts
from pipelines.train.setup import loss_divisors, prepare
from pipelines.train.validation import Validation
from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore
from uwm_model.blocks import Block
from uwm_model.randomness import SampleGenerators

SMALL = [
    "model.width=32", "model.depth=1", "model.heads=2", "model.registers=1", "model.timestep_width=16",
    "model.frame_width=8", "model.condition_width=16", "validation_share=0.3",
]  # fmt: skip


def write(folder: Path, *episodes: tuple[str, tuple[str, ...], int, int], frames: int = 40, count: int = 1) -> str:
    """Create a store of ``count`` episodes for each (embodiment, cameras, action columns, proprio columns)."""
    store, random, made = LatentStore.create(str(folder)), np.random.default_rng(0), []
    for name, cameras, action_dim, proprio in episodes:
        for i in range(count):
            latents = {camera: random.standard_normal((frames, 4, 8, 8)).astype(np.float16) for camera in cameras}
            # The column after these is another signal of the log, which no model reads.
            steps = random.standard_normal((frames, action_dim + proprio + 1)).astype(np.float32)
            state = [{"name": "state", "width": proprio}] if proprio else []
            source = "/data/kitchen" if name == "arm" else None
            columns: dict[str, Any] = {
                "source": source,
                "embodiment": name,
                "proprio": state,
                "instruction": f"do {name}",
            }
            if name == "short":  # shorter than an action chunk
                columns["spans"] = [{"first": 5, "stop": 15}]
            made.append(Made(f"{name}-{i}", latents, steps, action_dim, columns))
    fork = store.fork()
    commit(store, [(fork, *written) for written in write_episodes(fork, made)])
    return store.uri


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stores' episodes have the same keys."""
    monkeypatch.setenv("UWM_CACHE", str(tmp_path / "cache"))


# Data without columns


@pytest.mark.parametrize("normalise", ["extremes", "quantiles"])
def test_logs_without_actions_or_state_are_trained_on_as_videos(tmp_path: Path, normalise: str) -> None:
    logs = [("blind", ("top",), 0, 0), ("watched", ("top",), 0, 2), ("driven", ("top",), 3, 0), ("arm", ("top",), 3, 2)]
    recipe = load_recipe("small", [*SMALL, f"normalise={normalise}", "validation_share=0"])
    for name, some in (("alone", logs[:1]), ("both", logs[:2]), ("all", logs)):
        settings = pretrain.plan(write(tmp_path / name, *some, count=2), recipe)
        data = dataset(settings, validation=False, recipe=recipe)
        batch = next(data.batches(0, 64)).arrays
        for (_, _, action_dim, proprio), spec in zip(some, settings.embodiments.values(), strict=True):
            assert len(spec.action_normalizer.scale) == spec.action_dim == action_dim
            assert len(spec.proprio_normalizer.scale) == spec.proprio_dim == proprio
            mine = batch["embodiment"] == spec.index
            assert (batch["action_mask"][mine].sum(2).max(1) == action_dim).all() and mine.any()
            assert (batch["proprio_mask"][mine].sum(1) == proprio).all()


def test_cameras_of_a_name_share_a_slot_of_a_new_model(tmp_path: Path) -> None:
    rigs = (
        ("ur5", ("hand_camera",), 3, 2),
        ("panda", ("left", "right", "wrist"), 3, 2),
        ("widowx", ("wrist", "left"), 3, 2),
    )
    recipe = load_recipe("small", [*SMALL, "validation_share=0"])
    settings = pretrain.plan(write(tmp_path / "store", *rigs), recipe)
    held = {name: spec.cameras for name, spec in settings.embodiments.items()}
    assert held == {
        "ur5": ("", "", "hand_camera"),
        "panda": ("left", "right", "wrist"),
        "widowx": ("left", "", "wrist"),
    }
    batch = next(dataset(settings, False, recipe).batches(0, 64)).arrays
    for spec in settings.embodiments.values():
        masks = batch["camera_mask"][batch["embodiment"] == spec.index]
        assert (
            len(masks) and (masks == [slot < len(spec.cameras) and spec.cameras[slot] != "" for slot in range(3)]).all()
        )


def test_what_quantiles_leave_outside_can_be_acted(tmp_path: Path) -> None:
    """A gripper that is open in one step of a hundred is not between its quantiles."""
    store, steps = LatentStore.create(str(tmp_path / "store")), np.zeros((200, 2), np.float32)
    steps[:, 0], steps[7, 1] = np.linspace(-1, 1, 200), 1
    fork = store.fork()
    made = [Made("arm", {"top": np.zeros((200, 4, 8, 8), np.float16)}, steps, 2)]
    commit(store, [(fork, *written) for written in write_episodes(fork, made)])
    recipe = load_recipe("small", [*SMALL, "validation_share=0", "normalise=quantiles"])
    settings = pretrain.plan(store.uri, recipe)
    data = dataset(settings, False, recipe)
    arrays = data.gather(np.zeros(200, int), np.arange(200))
    largest = np.abs(arrays["action"]).max((0, 1))
    assert (
        largest[1] > 5
        and (arrays["action_reach"] == np.array(settings.embodiments["arm"].action_reach, np.float32)).all()
    )
    np.testing.assert_allclose(arrays["action_reach"][0], np.maximum(largest, 1), rtol=1e-4)


# Validation


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("windows", [1, 40])
def test_more_workers_than_held_out_windows_validate_the_same(
    group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: int
) -> None:
    monkeypatch.setattr(validation, "SIZE", 2)
    store = LatentStore.create(str(tmp_path / "store"))
    fill(store, [f"episode-{i}" for i in range(4)], frames=windows)
    recipe = load_recipe("small", SMALL)
    settings = pretrain.plan(store.uri, recipe)
    model = stirred(settings.model)

    def losses(rank: int, world: int) -> dict[str, float]:
        return Validation(settings, recipe, model, rank, world, lambda done, total: None).losses()

    whole, parts = losses(0, 1), [losses(rank, 4) for rank in range(4)]
    assert {name: sum(part[name] for part in parts) for name in whole} == pytest.approx(whole, rel=1e-5)
    assert parts[3]["validation_loss"] == 0 < whole["validation_loss"]


def test_an_empty_share_of_a_batch_has_the_arrays_of_the_others(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    fill(store, ["a", "b"], frames=3)
    recipe = load_recipe("small", ["validation_share=0"])
    data = dataset(pretrain.plan(store.uri, recipe), validation=False, recipe=recipe)
    some, none = (next(data.batches(0, 2, rank=rank, world=3)) for rank in (0, 2))
    assert len(none.position) == len(none.episode) == 0
    for name, array in some.arrays.items():
        assert none.arrays[name].shape == (0, *array.shape[1:]) and none.arrays[name].dtype == array.dtype


# What is trained on


def test_how_much_is_trained_on_and_held_out_is_told_before_training(tmp_path: Path, uwm: Uwm) -> None:
    store = write(tmp_path / "store", ("arm", ("top",), 3, 2), ("short", ("top",), 3, 2), count=12)
    opened = LatentStore.open(store)
    fork, row, statistics = random_episode(opened, "only", 40, ("top",))
    commit(opened, [(fork, {**row, "embodiment": "rare"}, statistics)])
    code, plan, text = uwm("pretrain", "--store", store, "--dry-run", "--json", *SMALL, "batch_size=2")
    assert code == 0, text
    found = {one["embodiment"]: one for one in plan["data"]}
    data = [
        dataset(settings, validation, recipe) for settings, recipe in [planned(store)] for validation in (False, True)
    ]
    for name, one in found.items():
        for each, episodes, windows in zip(
            data, ("episodes", "held_out"), ("windows", "held_out_windows"), strict=True
        ):
            mine = np.array([row["embodiment"] == name for row in each.rows])
            assert one[episodes] == mine.sum()  # type: ignore[literal-required]
            inside = each.frames if windows == "windows" else np.maximum(each.frames - 18, 0)
            assert one[windows] == inside[mine].sum()  # type: ignore[literal-required]
    assert found["arm"]["held_out"] > 0
    assert "short:" in text and "predicted frames cannot be judged: none of these episodes has the 19 frames" in text
    assert "rare: 1 episodes with 40 windows to train on; held out: 0 with 0; it cannot be evaluated: raise" in text


def planned(store: str, *overrides: str) -> tuple[Settings, Recipe]:
    recipe = load_recipe("small", [*SMALL, *overrides])
    return pretrain.plan(store, recipe), recipe


def test_windows_inside_the_episode_have_nothing_masked(tmp_path: Path) -> None:
    store = write(tmp_path / "store", ("arm", ("top",), 3, 2), ("short", ("top",), 3, 2))
    settings, recipe = planned(store, "windows=inside", "validation_share=0")
    data = dataset(settings, False, recipe)
    assert data.windows.tolist() == [40 - 18]  # the episode of ten frames has none
    seen = next(data.batches(0, 22)).arrays
    assert seen["action_mask"].all() and loss_divisors(settings.build(), data, recipe, 1)[0] == 64 * 16 * 3
    alike = dataset(settings, False, recipe)
    every = alike.gather(np.zeros(22, int), np.arange(1, 23))  # the observed frame before the first is in the episode
    order = np.lexsort(seen["action"][:, 0].T), np.lexsort(every["action"][:, 0].T)
    np.testing.assert_array_equal(seen["future_latents"][order[0]], every["future_latents"][order[1]])
    assert load_recipe("paper_libero", []).windows == "inside" and amounts(settings, recipe)[0]["windows"] == 22
    settings, recipe = planned(store, "windows=inside", "data=[short]", "validation_share=0")
    with pytest.raises(UserError, match=r"no episode has a window to train on; with windows=inside .* 19 frames"):
        amounts(settings, recipe)


def test_data_restricts_a_training_to_sources_and_embodiments(tmp_path: Path) -> None:
    store = write(tmp_path / "store", ("arm", ("top",), 3, 2), ("cart", ("top",), 2, 2), ("video", ("top",), 0, 0))
    for names, kept in (("[cart]", ["cart"]), ("[kitchen]", ["arm"]), ("[/data/kitchen, video]", ["arm", "video"])):
        settings, recipe = planned(store, f"data={names}", "validation_share=0")
        assert [*settings.embodiments] == kept
        assert {row["embodiment"] for row in dataset(settings, False, recipe).rows} == {*kept}
    with pytest.raises(
        UserError, match="data: kichen is no source or embodiment of the store; there are /data/kitchen, arm"
    ):
        planned(store, "data=[kichen]")
    with pytest.raises(UserError, match=r"mixture: video is no source or embodiment to train on; there are .*cart"):
        planned(store, "data=[cart]", "mixture={cart: 1, video: 1}", "validation_share=0")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mixture={arm:1,video:0}", r"a space after each colon, as in mixture='\{a: 1, b: 2\}'"),
        ("model={width:32}", "a space after each colon, as in model="),
        ("mixture={arm:", r"quote what has spaces, as in KEY='\[1, 2\]' or KEY='\{a: 1, b: 2\}'"),
    ],
)
def test_a_mapping_without_spaces_is_explained(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("small", [override])


def test_progress_counts_from_where_the_workers_began() -> None:
    with tqdm(total=60, desc="pretrain", unit="step", bar_format=NO_RATE, file=io.StringIO()) as bar:
        line = ProgressLine(bar, None, (1, 2))
        line({"starting": 1})
        assert str(bar) == "pretrain: 0/60, starting 1 to 2 workers, 0 s"
        line({"starting": 1, "copied": 1e6, "copying": 3e6})
        assert str(bar) == "pretrain: 0/60, copying the store to the local cache: 1.00MB of 3.00MB"
        line({"first": 20.0, "starting": 0})
        assert "20/60" in str(bar) and bar.initial == 20
        bar.start_t -= 10  # seconds
        line({"first": 20.0, "step": 40.0, "loss": 1.0, "rate": 8.0, "wait": 0.0})
        assert "40/60 [00:10<00:10,  2.00step/s" in str(bar)
        line({"first": 20.0, "step": 40.0, "loss": 1.0, "rate": 8.0, "wait": 0.0, "starting": 1})  # one was lost
        assert "40/60" in str(bar) and "starting 1 to 2 workers, 0 s" in str(bar)


# Weights of samples


def test_losses_are_divided_by_what_a_share_holds_on_average(tmp_path: Path) -> None:
    logs = ("arm", ("top", "wrist"), 3, 2), ("short", ("top",), 2, 0), ("video", ("top",), 0, 0)
    store = write(tmp_path / "store", *logs, count=2)
    for override in ("seed=0", "diffusion.action_free_loss=true", "mixture={arm: 1, short: 2, video: 97}"):
        recipe = load_recipe("small", [*SMALL, "validation_share=0", "batch_size=120", override])
        settings = pretrain.plan(store, recipe)
        data, model = dataset(settings, validation=False, recipe=recipe), settings.build()
        size = 3000 if recipe.mixture else int(data.frames.sum())  # an epoch has every window once
        batch = to_batch(next(data.batches(0, size)).arrays, torch.device("cpu"), torch.float32)
        found = loss_divisors(model, data, recipe, 1)
        rounded = 0.05 if recipe.mixture else 1e-6
        torch.testing.assert_close(found * size / 120, model.loss_counts(batch), rtol=rounded, atol=0)
        torch.testing.assert_close(loss_divisors(model, data, recipe, 4) * 4, found)


@pytest.mark.parametrize("kind", ["uwm", "dp", "pad", "gr1"])
def test_a_rare_samples_weight_does_not_depend_on_the_others(tmp_path: Path, kind: str) -> None:
    store = write(tmp_path / "store", ("arm", ("top",), 3, 2), ("video", ("top",), 0, 0))
    overrides = [*SMALL, "model.current_patches=false", f"model.kind={kind}", "batch_size=8"]
    recipe = load_recipe("small", [*overrides, "validation_share=0", "mixture={arm: 1, video: 7}"])
    settings = pretrain.plan(store, recipe)
    data, model = dataset(settings, validation=False, recipe=recipe), settings.build()
    counts = loss_divisors(model, data, recipe, 1)
    arm, video = ([int(i) for i, row in enumerate(data.rows) if row["embodiment"] == name] for name in ("arm", "video"))

    def action_loss(robots: int) -> float:
        episode = np.array(arm * robots + video * (8 - robots))
        batch = to_batch(data.gather(episode, np.zeros(8, int)), torch.device("cpu"), torch.float32)
        return float(model.loss(batch, SampleGenerators.of(0, 1, [0] * 8), counts).action)

    one = action_loss(1)
    assert one > 0 and [action_loss(n) for n in (0, 2, 5)] == pytest.approx([0, 2 * one, 5 * one], rel=1e-5)
    if kind != "dp":
        video_only = load_recipe("small", [*overrides, "mixture={arm: 0, video: 1}"])
        assert loss_divisors(model, dataset(settings, False, video_only), video_only, 1).tolist() == [1, 8]


# Devices


@pytest.mark.parametrize(
    ("overrides", "gpus", "recorded", "device", "workers", "note"),
    [
        ([], 0, "auto", "cpu", 2, ""),
        ([], 1, "auto", "gpu", 1, "1 worker, not 2: one for each GPU"),
        ([], 8, "auto", "gpu", 2, ""),
        (["workers=4"], 3, "auto", "gpu", 3, "3 workers, not 4: one for each GPU"),
        (["workers=[1, 4]"], 2, "auto", "gpu", (1, 4), ""),
        (["device=cpu"], 8, "auto", "cpu", 2, ""),
        # resumed
        ([], 0, "cpu", "cpu", 2, ""),
        ([], 1, "cpu", "cpu", 2, "trained on CPUs so far, and stays there; device=gpu moves"),
        ([], 1, "gpu", "gpu", 1, "1 worker, not 2"),
        (["device=cpu"], 0, "gpu", "cpu", 2, "trained on GPUs so far; from here on, on CPUs"),
        (["device=gpu"], 2, "cpu", "gpu", 2, "trained on CPUs so far; from here on, on GPUs"),
    ],
)
def test_a_run_decides_once_what_it_trains_on(
    overrides: list[str], gpus: int, recorded: str, device: str, workers: Any, note: str
) -> None:
    decided, notes = decide(load_recipe("small", overrides), gpus, recorded)
    assert (decided.device, decided.workers) == (device, workers)
    assert note in "".join(notes) and len(notes) == bool(note)
    again, _ = decide(decided, gpus, decided.device)  # the recorded recipe, asked for again
    assert again == decided


@pytest.mark.parametrize(
    ("override", "gpus", "recorded", "message"),
    [
        ("seed=0", 0, "gpu", "trains on GPUs, and there is none; set device=cpu .*; --new starts another"),
        ("device=gpu", 0, "auto", "trains on GPUs, and there is none; set device=cpu to train on CPUs$"),
        ("workers=[3, 4]", 2, "auto", "workers: at least 3 are asked for, and there are 2 GPUs"),
    ],
)
def test_a_run_without_its_gpus_is_refused(override: str, gpus: int, recorded: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        decide(load_recipe("small", [override]), gpus, recorded)


def test_workers_on_cpus_see_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for device, backend, uses in (("cpu", "gloo", False), ("gpu", "nccl", True)):
        trainer = trainer_of(load_recipe("small", [f"device={device}"]), {}, str(tmp_path))
        assert trainer.scaling_config.use_gpu is uses and trainer.backend_config.backend == backend
        assert (trainer.run_config.worker_runtime_env["env_vars"].get("CUDA_VISIBLE_DEVICES") == "") is not uses
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a workstation
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert decide_here(load_recipe("small", []), None)[0].workers == 1
    assert decide_here(load_recipe("small", []), "cluster:6379")[0].device == "auto"


def test_a_gpu_is_waited_for_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(str(device)))
    monkeypatch.setattr(dry_run.time, "monotonic", lambda: float(len(done)))
    assert dry_run.now(torch.device("cuda")) == 1 and dry_run.now(torch.device("cpu")) == 1 and done == ["cuda"]


# Compilation


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_block_is_one_graph_also_where_it_is_computed_again(
    monkeypatch: pytest.MonkeyPatch, checkpointed: bool
) -> None:
    plain, model, batch = stirred(), stirred(), make_batch()
    monkeypatch.setattr(Block, "compile", partialmethod(Block.compile, backend="eager"))
    recipe = Recipe(steps=1, batch_size=2, learning_rate=1, compile=True, activation_checkpointing=checkpointed)
    prepare(model, recipe)
    torch._dynamo.reset()
    counters.clear()
    gradients: list[Any] = []
    for each in (plain, model):
        each.loss(batch, seeded(0)).total.backward()
        gradients.append([value.grad for value in each.parameters()])
    torch.testing.assert_close(*gradients)
    # The blocks are alike, so that one graph serves all of them.
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
