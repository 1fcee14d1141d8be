"""Weights in a model with other inputs: what is copied, what is fresh, and that predictions stay the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from helpers.baselines import stirred
from helpers.models import TINY, make_batch, seeded
from torch import Tensor

from uwm_model import observation
from uwm_model.batch import Batch
from uwm_model.config import DiffusionConfig, ModelConfig
from uwm_model.kinds import Model, build
from uwm_model.transplant import Inputs, TransplantedPart, plan_transplant, transplant

NAMES = ("front", "wrist", "top")
FACTORED = dataclasses.replace(TINY, position="factored")
SEEING = dataclasses.replace(FACTORED, current_patches=True, modulation="shared")
TOKENS = dataclasses.replace(TINY, observation="tokens", position="factored")
PIXELS = dataclasses.replace(TINY, observation="pixels", frame_width=16)
KINDS = {
    "uwm": TINY,
    "factored": FACTORED,
    "shared": SEEING,
    "tokens": TOKENS,
    "told": dataclasses.replace(TINY, text_width=6),
    "pixels": PIXELS,
    "pad": dataclasses.replace(SEEING, kind="pad"),
    "pad, learned": dataclasses.replace(TINY, kind="pad"),
    "dp": dataclasses.replace(TINY, kind="dp"),
    "gr1": dataclasses.replace(TINY, kind="gr1", current_patches=True),
}


class Glance(torch.nn.Module):
    """Replaces ResNet-18, whose millions of weights do not matter here."""

    def __init__(self, features: int):
        super().__init__()
        self.fc = torch.nn.Linear(3, features)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.mean(dim=(2, 3)))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observation, "ResNet18", Glance)


every_kind = pytest.mark.parametrize("kind", KINDS)


def inputs(config: ModelConfig, cameras: Any = NAMES, text: str = "minilm", used: int = 99) -> Inputs:
    """Name all places, or the first ``used`` of each kind."""
    kinds = {"embodiments": "embodiment", "actions": "action", "proprio": "proprio"}
    names = {key: [f"{word} {i}" for i in range(min(9, used))] for key, word in kinds.items()}
    return Inputs(config, cameras[: min(config.cameras, used)], **names, text=text)


@cache
def trained(config: ModelConfig) -> Model:
    return stirred(config.kind, config).eval()


def moved(before: Inputs, after: Inputs) -> tuple[Model, Model, dict[str, TransplantedPart]]:
    """Return a trained model, the new one with its weights, and the report, checked against the weights."""
    old = trained(before.config)
    torch.manual_seed(1)
    fresh = build(after.config, DiffusionConfig())
    for parameter in fresh.parameters():  # no value coincides by chance
        torch.nn.init.normal_(parameter, std=0.1)
    held, new = old.state_dict(), fresh.state_dict()
    table = plan_transplant(held, before, new, after)
    assert sum(row.loaded + row.left for row in table) == sum(value.numel() for value in held.values())
    assert sum(row.loaded + row.fresh for row in table) == sum(value.numel() for value in new.values())
    marked = transplant({name: torch.full_like(value, 7) for name, value in held.items()}, before, new, after)
    assert sum(int((value == 7).sum()) for value in marked.values()) == sum(row.loaded for row in table)
    weights = transplant(held, before, new, after)
    fresh.load_state_dict(weights)
    return old, fresh.eval(), {row.part: row for row in table}


def padded(tensor: Tensor | None, shape: tuple[int, ...], value: float) -> Tensor:
    """Return the tensor in the first corner of a larger one."""
    assert tensor is not None
    larger = torch.full(shape, value, dtype=torch.float32).to(tensor.dtype)
    larger[tuple(slice(size) for size in tensor.shape)] = tensor
    return larger


def read_by(config: ModelConfig, batch: Batch, junk: float = 3.0) -> Batch:
    """Return the batch for a model with more inputs; the new ones are masked, and hold junk."""
    B, V, L, A = len(batch.embodiment), config.cameras, config.action_chunk, config.action_dim
    To, Tf, P, latent = (
        config.observed_frames,
        config.future_frames,
        config.proprio_dim,
        batch.current_latents.shape[3:],
    )
    pixels = batch.current_pixels
    return dataclasses.replace(
        batch,
        current_latents=padded(batch.current_latents, (B, V, To, *latent), junk),
        future_latents=padded(batch.future_latents, (B, V, Tf, *latent), junk),
        current_pixels=None if pixels is None else padded(pixels, (B, V, *pixels.shape[2:]), junk),
        camera_mask=padded(batch.camera_mask, (B, V), False),
        action=padded(batch.action, (B, L, A), junk),
        action_mask=padded(batch.action_mask, (B, L, A), False),
        proprio=padded(batch.proprio, (B, To, P), junk),
        proprio_mask=padded(batch.proprio_mask, (B, P), False),
    )


def seen_by(config: ModelConfig, size: int = 3) -> Batch:
    batch = make_batch(size, config=config)
    pixels = torch.randint(256, (size, config.cameras, 2, 3, 16, 24), generator=seeded(0), dtype=torch.uint8)
    return dataclasses.replace(batch, current_pixels=pixels) if config.observation == "pixels" else batch


def assert_alike(
    old: Model, new: Model, batch: Batch, other: Batch, cameras: Callable[[Tensor], Tensor] = lambda latents: latents
) -> None:
    """Assert equal outputs for ``batch`` and ``other`` in every mode; ``cameras`` selects the new model's latents."""
    of_action, of_latents = (
        torch.randn(shape, generator=seeded(1)) for shape in (batch.action.shape, batch.future_latents.shape)
    )
    for mode in old.modes:
        answers = []
        for model, asked in ((old, batch), (new, other)):
            noise = padded(of_action, asked.action.shape, 2.0), padded(of_latents, asked.future_latents.shape, 2.0)
            if model is new:
                noise = noise[0], cameras(noise[1])
            answers.append(model.sample(mode, asked, 2, seeded(0), noise_action=noise[0], noise_latents=noise[1]))
        (action, latents), (other_action, other_latents) = answers
        if action is not None:
            torch.testing.assert_close(other_action[..., : action.shape[2]], action, atol=1e-4, rtol=1e-4)
        if latents is not None:
            torch.testing.assert_close(cameras(other_latents)[:, : latents.shape[1]], latents, atol=1e-4, rtol=1e-4)


# All kinds


@every_kind
def test_equal_inputs_copy_everything(kind: str) -> None:
    old, new, table = moved(inputs(KINDS[kind]), inputs(KINDS[kind]))
    assert not any(row.fresh or row.left or row.note or row.names for row in table.values())
    for name, value in old.state_dict().items():
        assert torch.equal(new.state_dict()[name], value), name


@every_kind
def test_wider_actions_predict_the_same(kind: str) -> None:
    config = KINDS[kind]
    wider = dataclasses.replace(config, action_dim=8, proprio_dim=4, embodiments=4)
    old, new, table = moved(inputs(config), inputs(wider))
    batch = seen_by(config)
    batch.action_mask[1] = False  # action-free video: its action tokens are noise
    assert_alike(old, new, batch, read_by(wider, batch))
    row = table["action tokens"]
    hidden, reads = 4 * config.width, 0 if config.kind == "gr1" else 1
    assert row.fresh == 3 * (hidden * (1 + reads) + 1) and row.left == 0 and row.note == "fresh: action 5-7"
    assert sum("encode" in name for name in row.names) == reads and len(row.names) == 2 + reads
    if config.observation != "pixels":
        assert table["proprioception"].note == "fresh: proprio 3" and table["proprioception"].fresh == 3 * 128
        assert table["embodiments"].note == "fresh: embodiment 2-3" and table["embodiments"].fresh == 2 * 64


@every_kind
def test_narrower_actions_predict_the_same_if_the_rest_was_unused(kind: str) -> None:
    config = KINDS[kind]
    narrower = dataclasses.replace(config, action_dim=3, embodiments=1)
    old, new, table = moved(inputs(config), inputs(narrower))
    batch = dataclasses.replace(seen_by(narrower), embodiment=torch.zeros(3, dtype=torch.long))
    assert_alike(new, old, batch, read_by(config, batch))
    assert table["action tokens"].fresh == 0 and table["action tokens"].note == "left: action 3-4"
    if config.observation != "pixels":
        assert table["embodiments"].note == "left: embodiment 1"


@every_kind
def test_an_additional_camera_changes_nothing_while_it_is_missing(kind: str) -> None:
    config = KINDS[kind]
    wider = dataclasses.replace(config, cameras=3)
    old, new, table = moved(inputs(config), inputs(wider))
    batch = seen_by(config)
    if config.kind != "gr1":  # its sequence gains observation tokens, which are never masked
        assert_alike(old, new, batch, read_by(wider, batch))
    fresh = {part for part, row in table.items() if row.fresh}
    assert fresh and all(table[part].note == "fresh: top" for part in fresh)
    assert not any(row.left for row in table.values())
    grown = {
        "uwm": {"images", "condition", "positions"},
        "tokens": {"positions"},
        "pixels": {"positions", "modulation"},
        "dp": {"images", "condition"},
        "gr1": {"images", "condition", "queries", "observation tokens"},
    }
    assert fresh == grown.get(kind, fresh)
    there = read_by(wider, batch, junk=1)
    there.camera_mask[:] = True
    action, _ = new.sample("policy", there, 2, seeded(0))
    without, _ = new.sample("policy", read_by(wider, batch, junk=1), 2, seeded(0))
    assert action.isfinite().all() and (kind == "dp" or not torch.allclose(action, without))


@every_kind
def test_cameras_are_matched_by_name(kind: str) -> None:
    config = KINDS[kind]
    old, new, table = moved(inputs(config), inputs(config, ("wrist", "front")))
    assert not any(row.fresh or row.left for row in table.values())
    batch = seen_by(config)
    batch.camera_mask[0, 1] = False
    swapped = dataclasses.replace(
        batch,
        current_latents=batch.current_latents.flip(1),
        future_latents=batch.future_latents.flip(1),
        camera_mask=batch.camera_mask.flip(1),
        current_pixels=None if batch.current_pixels is None else batch.current_pixels.flip(1),
    )
    assert_alike(old, new, batch, swapped, lambda latents: latents.flip(1))


@every_kind
def test_removing_a_camera_keeps_the_rows_of_the_others(kind: str) -> None:
    config = KINDS[kind]
    narrower = dataclasses.replace(config, cameras=1)
    old, new, table = moved(inputs(config), inputs(narrower, ("wrist",)))
    assert not any(row.fresh for row in table.values())
    assert {row.note for row in table.values() if row.left} == {"left: front"}
    batch = seen_by(narrower)
    if config.kind == "gr1" or config.observation == "latents":
        return  # these encode that a camera is missing, by a learned vector or by tokens
    both = read_by(config, batch)
    both = dataclasses.replace(both, **{
        name: getattr(both, name).flip(1) for name in ("current_latents", "future_latents", "camera_mask")
    }, current_pixels=None if both.current_pixels is None else both.current_pixels.flip(1))  # fmt: skip
    assert_alike(new, old, batch, both, lambda latents: latents.flip(1))


@pytest.mark.parametrize("kind", ["uwm", "factored", "gr1"])
def test_a_spare_place_is_fresh_once_it_is_used(kind: str) -> None:
    config = KINDS[kind]
    spare, used = inputs(config, used=1), inputs(config)
    _, _, table = moved(spare, used)
    assert table["action tokens"].note == "fresh: action 1-4; left: spare action 1-4"
    assert table["proprioception"].note == "fresh: proprio 1-2; left: spare proprio 1-2"
    assert table["embodiments"].note == "fresh: embodiment 1; left: spare embodiment 1"
    assert table["images"].note == "fresh: wrist; left: spare camera 1"
    _, _, table = moved(spare, spare)
    assert not any(row.fresh or row.left for row in table.values())


# Some kinds only


@pytest.mark.parametrize("kind", ["uwm", "shared", "tokens", "pad", "dp", "gr1"])
def test_new_instructions_change_nothing_before_training(kind: str) -> None:
    config = KINDS[kind]
    told = dataclasses.replace(config, text_width=6)
    old, new, table = moved(inputs(config), inputs(told))
    batch = seen_by(config)
    words = {"instruction": torch.randn(3, 6, generator=seeded(2)), "instruction_mask": torch.ones(3, dtype=torch.bool)}
    for spoken in ({}, words):
        assert_alike(old, new, batch, dataclasses.replace(batch, **spoken))
    assert table["condition"].note == "fresh: instruction" and table["condition"].fresh == 64 * 128
    assert table["instructions"].loaded == 0 and table["instructions"].note.startswith("fresh: observation.untold, ")
    _, _, table = moved(inputs(told), inputs(config))
    assert table["condition"].note == "left: instruction" and not any(row.fresh for row in table.values())


def test_another_text_encoder_is_fresh_and_no_instruction_stays_known() -> None:
    told = KINDS["told"]
    for width in (6, 9):
        other = inputs(dataclasses.replace(told, text_width=width), text="clip")
        old, new, table = moved(inputs(told), other)
        assert table["instructions"].note == "fresh: clip; left: minilm"
        assert table["instructions"].names == ("observation.instruction.weight",)
        assert table["condition"].fresh == 0 and new.observation.instruction.weight.all()
        batch = seen_by(told)
        assert_alike(old, new, batch, batch)


@pytest.mark.parametrize("kind", ["uwm", "factored", "tokens", "pad, learned", "dp", "gr1"])
def test_a_longer_horizon_keeps_the_weights_of_each_step(kind: str) -> None:
    config = KINDS[kind]
    longer = dataclasses.replace(config, action_chunk=8, future_frames=4)
    old, new, table = moved(inputs(config), inputs(longer))
    if config.position == "factored":
        assert not any(row.fresh or row.left for row in table.values())
        return
    fresh = 2 if kind == "dp" else 2 + 2 * 6
    part = "queries" if kind == "gr1" else "positions"
    assert table[part].fresh == fresh * 64
    assert table[part].note == ("fresh: step 6-7" if kind == "dp" else table[part].note)
    assert set(table[part].note.removeprefix("fresh: ").split(", ")) <= {"step 6-7", "future 1"}
    if kind == "uwm":
        before, after = old.denoiser.position[0], new.denoiser.position[0]
        assert torch.equal(after[:6], before[:6])  # steps
        assert torch.equal(after[8:14], before[6:12]) and torch.equal(
            after[20:26], before[12:18]
        )  # each camera's first
        assert torch.equal(after[-2:], before[-2:])  # registers


@pytest.mark.parametrize("kind", ["uwm", "tokens", "pixels", "gr1"])
def test_another_frame_size_keeps_weights_without_positions(kind: str) -> None:
    config = KINDS[kind]
    larger = dataclasses.replace(config, latent_size=(16, 12))
    _, _, table = moved(inputs(config), inputs(larger))
    notes = {part: row.note for part, row in table.items() if row.note}
    counting = "fresh: 4 x 3 patches; left: 2 x 3 patches"
    seeing = {"images": "fresh: 4 x 3 cells; left: 2 x 3 cells"}
    expected = {
        "uwm": {"positions": counting} | seeing,
        "tokens": {},
        "pixels": {"positions": counting},
        "gr1": {"queries": counting} | seeing,
    }
    assert notes == expected[kind]


@pytest.mark.parametrize("kind", ["uwm", "tokens", "pixels", "gr1"])
def test_more_observed_frames_change_nothing_before_training(kind: str) -> None:
    config = KINDS[kind]
    longer = dataclasses.replace(config, observed_frames=3)
    old, new, table = moved(inputs(config), inputs(longer))
    assert {row.note for row in table.values() if row.fresh} == {"fresh: frame -2"}
    batch = seen_by(config)

    def earlier(frames: Tensor | None) -> Tensor | None:
        return None if frames is None else torch.cat([frames[:, :, :1].flip(-1), frames], dim=2)

    wider = dataclasses.replace(
        batch,
        current_latents=earlier(batch.current_latents),
        current_pixels=earlier(batch.current_pixels),
        proprio=torch.cat([batch.proprio[:, :1].flip(1) + 1, batch.proprio], dim=1),
    )
    if kind != "gr1":
        assert_alike(old, new, batch, wider)


def test_the_other_position_embedding_is_fresh_and_named() -> None:
    _, _, table = moved(inputs(TINY), inputs(FACTORED))
    assert table["positions"].loaded == 0 and table["positions"].note.endswith("left: denoiser.position")
    _, _, table = moved(inputs(TINY), inputs(dataclasses.replace(TINY, current_patches=True)))
    assert table["latent tokens"].note == "fresh: denoiser.latents.current.weight, denoiser.latents.current.bias"


def test_the_architecture_cannot_change() -> None:
    for key, value in (("width", 32), ("depth", 3), ("patch", (1, 4, 4)), ("kind", "dp"), ("observation", "tokens")):
        other = dataclasses.replace(TINY, **{key: value})
        with pytest.raises(ValueError, match=f"{key}: .*, but the trained model has .*, which cannot change"):
            plan_transplant({}, inputs(TINY), {}, inputs(other))


def test_a_plan_needs_no_weights() -> None:
    def empty(config: ModelConfig) -> dict[str, Tensor]:
        with torch.device("meta"):
            return build(config, DiffusionConfig()).state_dict()

    wider = dataclasses.replace(SEEING, cameras=3, action_dim=9)
    *_, table = moved(inputs(SEEING), inputs(wider))
    assert plan_transplant(empty(SEEING), inputs(SEEING), empty(wider), inputs(wider)) == tuple(table.values())
