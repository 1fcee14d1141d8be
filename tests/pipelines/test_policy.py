"""A policy tells a robot in one short line what it sent wrong, and works without what it can do without."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.rows import write_episode

import pipelines
import preprocessing
import uwm_model
from pipelines.models import checkpoint
from pipelines.models.policy import Policy
from pipelines.models.session import Session
from pipelines.recipe import load_recipe
from pipelines.train.pretrain import plan
from preprocessing.contracts.interface import Interface
from preprocessing.encoders.vae import encoder_digest
from preprocessing.errors import UserError
from preprocessing.store.store import LatentStore

SMALL = ["model.width=16", "model.depth=1", "model.heads=1", "model.registers=1", "validation_share=0"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    root = tmp_path_factory.mktemp("policy")
    store = LatentStore.create(str(root / "store"))
    latents = {"front": np.zeros((30, 4, 8, 8), np.float16), "wrist": np.zeros((30, 4, 8, 8), np.float16)}
    steps = np.random.default_rng(0).random((30, 5), np.float32)
    fork = store.fork()
    row, found = write_episode(fork, "one", latents, steps, 3, encoder_digest=encoder_digest("tiny"), image_size=64)
    store.commit("test", [fork], [row], found, [])
    settings = plan(store.uri, load_recipe("small", SMALL))
    checkpoint.save(root / "model", settings.build().state_dict(), settings)
    return Policy.of(str(root / "model"))


def sent(size: int = 64) -> tuple[dict[str, Any], dict[str, Any]]:
    images = {name: np.full((1, 2, size, size, 3), 200, np.uint8) for name in ("front", "wrist")}
    return images, {"state": np.zeros((1, 2, 2), np.float32)}


WRONG: dict[str, Any] = {
    "camera front: expected uint8 [1, 2, 64, 64, 3], got uint8 [1, 2, 480, 640, 3]": np.zeros(
        (1, 2, 480, 640, 3), np.uint8
    ),
    "got float32 [1, 2, 64, 64, 3]": np.zeros((1, 2, 64, 64, 3), np.float32),
    "got uint8 [2, 64, 64, 3]": np.zeros((2, 64, 64, 3), np.uint8),
    "got list": np.zeros((1, 2, 64, 64, 3), np.uint8).tolist(),
    "got NoneType": None,
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_frames_are_one_short_line(policy: Policy, words: str) -> None:
    images, proprio = sent()
    with pytest.raises(UserError) as caught:
        policy.act(images | {"front": WRONG[words]}, proprio)
    line = str(caught.value)
    assert words in line and "\n" not in line and len(line) < 200


@pytest.mark.parametrize(
    ("proprio", "words"),
    [
        ({}, "proprio state: missing"),
        ({"state": np.zeros((1, 2, 3), np.float32)}, "expected float32 [1, 2, 2], got float32 [1, 2, 3]"),
        ({"state": np.zeros((2, 2), np.float32)}, "got float32 [2, 2]"),
        ({"state": np.zeros((1, 2, 2), int)}, "got int64"),
        ({"state": [[[0.0, 1.0], [0.0, 1.0]]]}, "got list"),
        ({"state": np.full((1, 2, 2), np.nan, np.float32)}, "not finite"),
        ({"state": np.zeros((1, 2, 2), np.float32), "force": np.zeros((1, 2, 1), np.float32)}, "force: unknown"),
    ],
)
def test_wrong_proprioception_is_one_short_line(policy: Policy, proprio: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        policy.act(sent()[0], proprio)
    assert words in str(caught.value) and len(str(caught.value)) < 200


def test_a_camera_may_be_missing_but_not_all(policy: Policy) -> None:
    images, proprio = sent()
    both = policy.act(images, proprio)
    one = policy.act({"wrist": images["wrist"]}, proprio)
    assert one.shape == both.shape and np.isfinite(one).all()
    with pytest.raises(UserError, match="at least one of front, wrist"):
        policy.act({}, proprio)
    session = Session(policy)
    observation = {"images": {name: frames[0, 0] for name, frames in images.items()}, "proprio": {"state": np.zeros(2)}}
    assert session.act(observation).shape == (3,)
    failed = observation | {"images": {"wrist": observation["images"]["wrist"]}}
    for _ in range(9):
        assert session.act(failed).shape == (3,)


def test_an_instruction_that_is_ignored_is_told_once(policy: Policy) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            policy.act(*sent(), instruction="pick up the cup")
    assert ["without instructions" in str(one.message) for one in told] == [True]


@pytest.mark.parametrize("text", ["not json", "{}", '{"fps": "fast"}', "[]", '{"speed": 3}'])
def test_a_bad_contract_of_a_robot_is_one_line(text: str) -> None:
    with pytest.raises(UserError) as caught:
        Interface.parse(text, "parameter contract")
    line = str(caught.value)
    assert line.startswith("parameter contract: ") and "\n" not in line and "pydantic" not in line


@pytest.mark.parametrize("package", [pipelines, preprocessing, uwm_model])
def test_a_package_exports_what_it_names(package: Any, tmp_path: Path) -> None:
    assert all(getattr(package, name).__name__ == name for name in package.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = package.nothing
