"""A batch of other shapes than the model's is refused in one line, by every kind of model and way to use it."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.models import TINY, fresh, make_batch
from torch import zeros

from uwm_model.config import DiffusionConfig
from uwm_model.kinds import build
from uwm_model.query import PolicyQuery


@pytest.mark.parametrize("kind", ["uwm", "dp", "pad", "gr1"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("current_latents", (4, 2, 2, 4, 8, 8)),
        ("future_latents", (4, 2, 2, 4, 16, 24)),
        ("action", (4, 5)),
        ("action_mask", (4, 6, 3)),
        ("proprio", (4, 3)),
        ("camera_mask", (4, 1)),
        ("proprio_mask", (3,)),
        ("embodiment", (4, 1)),
        ("current_pixels", (4, 2, 2, 64, 64, 3)),
        ("instruction_mask", (4, 1)),
    ],
)
def test_a_wrong_shape_is_named_with_both(kind: str, name: str, shape: tuple[int, ...]) -> None:
    model = build(dataclasses.replace(TINY, kind=kind), DiffusionConfig())  # type: ignore[arg-type]
    batch = dataclasses.replace(make_batch(), **{name: zeros(shape)})
    for use in (lambda: model.loss(batch), lambda: model.sample(model.modes[0], batch)):
        with pytest.raises(ValueError, match=rf"^batch\.{name}: expected \[[\w, ]+\], got ") as caught:
            use()
        assert str(caught.value).endswith(str(list(shape)))


def test_the_fast_query_checks_too() -> None:
    batch = dataclasses.replace(make_batch(), proprio=zeros(4, 2, 9))
    with pytest.raises(ValueError, match=r"batch\.proprio: expected \[4, 2, 3\], got \[4, 2, 9\]"):
        PolicyQuery(fresh())(batch)
