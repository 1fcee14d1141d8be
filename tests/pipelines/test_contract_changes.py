"""A contract that comes after the first ingest: new rows for the same latents, unless it changes what was encoded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.command import Uwm
from helpers.formats import moving, numbered, write_demos, write_lerobot, write_video
from helpers.rows import is_blank

from pipelines.ingest import local
from pipelines.ingest.committer import Committer, Inbox
from pipelines.ingest.episode_reader import Plan, Work
from pipelines.ingest.run import ingest
from pipelines.ingest.stages import Encode, decode, item, write
from pipelines.ingest.stored import Stored
from pipelines.recipe import IngestRecipe
from preprocessing import sources
from preprocessing.contracts.contract import DataContract
from preprocessing.contracts.interface import Interfaces
from preprocessing.encoders.vae import Encoder, encoder_digest
from preprocessing.quality.filters import Filters
from preprocessing.store.snapshot import Snapshot
from preprocessing.store.store import LatentStore

SIZE = ("--image-size", "32", "--json")


@contextmanager
def in_this_process(function: Callable[..., Any], items: list[Any], plan: Plan) -> Iterator[Iterator[Any]]:
    yield (table for one in items for table in function(one, plan=plan))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "apart", in_this_process)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Robomimic, LeRobot and a video in ``raw``, ingested into ``store``."""
    folder = tmp_path_factory.mktemp("first")
    write_demos(folder / "raw" / "demos" / "toy_demo.hdf5", demos=2, steps=20)
    write_lerobot(folder / "raw" / "lerobot", rows=20, episodes=1)
    (folder / "raw" / "films").mkdir()
    write_video(folder / "raw" / "films" / "clip.mp4", numbered(40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "apart", in_this_process)
        recipe = IngestRecipe(image_size=32, encoder=["tiny", "pixels"], fps=10)
        assert ingest([str(folder / "raw")], str(folder / "store"), recipe).episodes["new"] == 4
    return folder


@pytest.fixture
def store(first: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(first / "store", tmp_path / "store"))


def rows(snapshot: Snapshot) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["id"], row["encoder"]): row for row in snapshot.episodes().to_pylist()}


DEMOS, LEROBOT, FILMS = "demos", "lerobot", "films"


@pytest.mark.parametrize(
    ("source", "contract"),
    [
        (DEMOS, "infer"),
        (LEROBOT, "infer"),
        (FILMS, "infer"),
        (DEMOS, "embodiment: arm\nfps: 10\ncameras: {agentview: front}\ninstruction: lift\naction: [action, height]\n"),
    ],
)
def test_a_contract_changes_rows_not_latents(
    first: Path, store: str, uwm: Uwm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, contract: str
) -> None:
    raw, file = first / "raw" / source, tmp_path / "contract.yaml"
    before = LatentStore.open(store).snapshot()
    if contract == "infer":
        assert uwm("contract", "infer", raw, "--output", file)[0] == 0
    else:
        file.write_text(contract)
    count = 2 if source == DEMOS else 1
    monkeypatch.setattr(Encoder, "encode", None)  # would raise
    encoders = ("--encoder", "tiny", "--encoder", "pixels")
    arguments = ("ingest", raw, "--store", store, *SIZE, *encoders, "--fps", "10", "--contract", file)
    for options, updated in ((["--dry-run"], count), ([], count), ([], 0)):
        code, report, err = uwm(*arguments, *options)
        assert code == 0, err
        assert report["episodes"] == {"new": 0, "already": count, "quarantined": 0, "filtered": 0}
        assert (report["updated"], report["frames"]) == (updated, 0)
        if options:
            assert report["expected"]["pictures"] == 0
    after = LatentStore.open(store).snapshot()
    old, new = rows(before), rows(after)
    assert old.keys() == new.keys() and not list(after.verify())
    changed = [pair for pair in new if new[pair]["key"] != old[pair]["key"]]
    assert len(changed) == 2 * count
    asked = DataContract.load(file)
    for pair in changed:
        assert DataContract.model_validate_json(new[pair]["contract"]) == asked
        assert [c["segments"] for c in new[pair]["cameras"]] == [c["segments"] for c in old[pair]["cameras"]]
        refs = (ref for kind, path in sources.find(raw) for ref in sources.scan(kind, path))
        episode = sources.load(next(ref for ref in refs if ref.id == pair[0]), asked)
        assert [camera["name"] for camera in new[pair]["cameras"]] == [*episode.cameras]
        assert [picture["camera"] for picture in new[pair]["pictures"]] == [*episode.cameras]
        assert (new[pair]["action_dim"], new[pair]["embodiment"]) == (
            0 if episode.action is None else episode.action.shape[1],
            episode.embodiment,
        )
        if episode.action is not None:
            steps = after.read([new[pair]["steps"]])
            np.testing.assert_array_equal(steps[:, : episode.action.shape[1]], episode.action.astype(np.float32))
        if pair[1] == "tiny":
            [camera] = episode.cameras
            [stored] = [camera["name"] for camera in old[pair]["cameras"]]
            mine, theirs = after.statistics([new[pair]["key"]], camera), before.statistics([old[pair]["key"]], stored)
            assert mine and theirs and str(mine) == str(theirs)
    shown = uwm("store", "show", store, "--json")[1]
    totals: dict[str, int] = {}
    for group in shown["embodiments"]:
        totals[group["encoder"]] = totals.get(group["encoder"], 0) + group["episodes"]
    assert totals == {"tiny": 4, "pixels": 4} and shown["superseded"] == 2 * count
    assert len(uwm("store", "episodes", store, "--json")[1]) == 4
    logged = sum(entry["counts"].get("episodes", 0) for entry in LatentStore.open(store).log())
    assert logged == 4 and after.id == LatentStore.open(store).snapshot().id


@pytest.mark.parametrize(
    ("source", "contract", "encoded"),
    [
        (DEMOS, "flip: []\n", 20),
        (DEMOS, "bgr: [agentview]\n", 20),
        (LEROBOT, "flip: [top]\n", 20),
        (FILMS, "fps: 40\n", 10),  # a quarter of the frames then make 10 a second
    ],
)
def test_what_a_contract_changes_in_the_frames_is_encoded(
    first: Path, store: str, uwm: Uwm, tmp_path: Path, source: str, contract: str, encoded: int
) -> None:
    (tmp_path / "contract.yaml").write_text(contract)
    before = rows(LatentStore.open(store).snapshot())
    arguments = ("ingest", first / "raw" / source, "--store", store, *SIZE, "--fps", "10")
    code, report, err = uwm(*arguments, "--contract", tmp_path / "contract.yaml")
    count = 2 if source == DEMOS else 1
    assert code == 0 and report["episodes"]["new"] == count, err
    assert (report["updated"], report["frames"]) == (0, count * encoded)
    snapshot = LatentStore.open(store).snapshot()
    for pair, row in rows(snapshot).items():
        if row["key"] != before[pair]["key"]:
            assert row["cameras"] != before[pair]["cameras"]
    uwm("store", "remove", store, "--source", first / "raw" / source)
    assert not list(LatentStore.open(store).snapshot().verify())


def test_a_new_encoder_comes_with_a_new_contract(first: Path, store: str, uwm: Uwm, tmp_path: Path) -> None:
    (tmp_path / "contract.yaml").write_text("embodiment: arm\n")
    before = rows(LatentStore.open(store).snapshot())
    arguments = ("ingest", first / "raw" / DEMOS, "--store", store, *SIZE, "--contract", tmp_path / "contract.yaml")
    code, report, _ = uwm(*arguments, "--encoder", "tiny", "--encoder", "pixels", "--precision", "bfloat16")
    assert code == 0 and report["episodes"]["new"] == 2 and report["updated"] == 0
    after = LatentStore.open(store).snapshot().episodes().to_pylist()
    made = [row for row in after if row["embodiment"] == "arm"]
    assert sorted(row["encoder"] for row in made) == ["pixels", "pixels", "tiny", "tiny"]
    for row in made:  # the pixels are the same, bfloat16's latents are not
        same = row["cameras"] == before[row["id"], row["encoder"]]["cameras"]
        assert same == (row["encoder"] == "pixels")


def test_a_camera_that_was_left_out_stays_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, store = tmp_path / "toy_demo.hdf5", str(tmp_path / "store")
    write_demos(raw, demos=1, steps=20)
    with h5py.File(raw, "a") as file:
        file["data/demo_0/obs/black_image"] = np.zeros((20, 64, 64, 3), np.uint8)
    assert ingest([str(raw)], store, IngestRecipe(image_size=32)).episodes["new"] == 1
    monkeypatch.setattr(Encoder, "encode", None)
    report = ingest([str(raw)], store, IngestRecipe(image_size=32), contract=DataContract(embodiment="arm"))
    assert (report.updated, report.episodes["new"]) == (1, 0)
    [row] = LatentStore.open(store).snapshot().episodes().to_pylist()
    assert [camera["name"] for camera in row["cameras"]] == ["agentview"] and row["embodiment"] == "arm"
    assert sum("black in every frame" in repair for repair in row["repairs"]) == 1


def test_idle_steps_of_new_actions_are_found_without_encoding(
    first: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "encode", None)
    recipe = IngestRecipe(image_size=32, fps=10, quality=Filters(idle=3, min_frames=1))
    contract = DataContract(action=("dones",))
    report = ingest([str(first / "raw" / DEMOS)], store, recipe, contract=contract)
    idle = report.episodes["filtered"] + sum(
        row["spans"] is not None for row in LatentStore.open(store).snapshot().episodes().to_pylist()
    )
    assert report.episodes["new"] == 0 and idle


def test_rows_that_are_written_twice_take_no_space(tmp_path: Path) -> None:
    """As when a small ingest is handed to Ray in the middle of an episode."""
    write_video(tmp_path / "clip.mp4", moving(100))
    store = LatentStore.create(str(tmp_path / "store"))
    [ref] = sources.scan("video", tmp_path / "clip.mp4")
    plan = Plan({"tiny": encoder_digest("tiny")}, IngestRecipe(image_size=32), {"s": None}, Interfaces())
    one = Work(ref, "s", {"tiny": "key"}, "quarantine", None)
    encode = Encode(plan, lambda **_: None, lambda *_: None)
    tables = [encode(table) for table in decode(item(one), plan)]
    inbox, committer = Inbox(), Committer(store, [one], plan, Stored(store.snapshot()), max_bad=1)
    writings = [write(store.uri, part) for part in (tables[:1], tables[1:], tables)]
    with committer.receiving(inbox):
        for number, written in enumerate(writings):
            inbox.put(number, written)
        committer.finish()
    assert committer.episodes == 1
    head = store.snapshot()
    [row] = head.episodes().to_pylist()
    used = [*row["cameras"][0]["segments"], row["steps"]]
    places = [written["place"] for each in writings for written in each["rows"]]
    blanked = [place for place in places if place["count"] and place not in used]
    assert len(blanked) == 2 and not list(head.verify())
    assert is_blank(store, head.id, blanked) and not is_blank(store, head.id, used[:1])
