"""AdamW's parameter groups, its learning-rate schedule and its moving average."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from uwm_model.optimizer import OptimizerSettings, adamw

SETTINGS = OptimizerSettings(
    learning_rate=0.1, weight_decay=0.01, warmup_steps=4, steps=14, gradient_clip=0, betas=(0.9, 0.95), decay="cosine"
)


def learning_rates(settings: OptimizerSettings, steps: int) -> list[float]:
    optimizer, schedule = adamw(nn.Linear(2, 2), settings)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_vectors_have_no_weight_decay_and_frozen_parameters_no_group() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    model[2].requires_grad_(False)
    groups = adamw(model, SETTINGS)[0].param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.01), (3, 0.0)]
    assert len(adamw(nn.Linear(2, 2, bias=False), SETTINGS)[0].param_groups) == 1


def test_warm_up_is_linear_and_then_a_cosine_to_a_tenth() -> None:
    found = learning_rates(SETTINGS, 20)
    assert found[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert found[9] == pytest.approx(0.055) and found[14:] == pytest.approx([0.01] * 6)
    assert found[4:15] == sorted(found[4:15], reverse=True)
    assert learning_rates(dataclasses.replace(SETTINGS, decay="none"), 20)[4:] == pytest.approx([0.1] * 16)


def test_the_average_follows_the_weights_with_a_rising_decay() -> None:
    layer = nn.Linear(2, 1, bias=False)
    optimizer, _ = adamw(layer, dataclasses.replace(SETTINGS, ema_decay=0.3))
    expected = None
    for step in range(1, 6):
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        decay = min(0.3, (1 + step) / (10 + step))
        weight = layer.weight.detach().clone()
        expected = weight if expected is None else expected.lerp(weight, 1 - decay)
        torch.testing.assert_close(optimizer.state[layer.weight]["average"], expected)
    plain, _ = adamw(layer, SETTINGS)
    plain.step()
    assert "average" not in plain.state[layer.weight]
