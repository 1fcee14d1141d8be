from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
from rows import commit, fill, random_episode

from preprocessing.episode import UserError
from preprocessing.store import LatentStore


def test_a_reader_sees_all_of_an_ingest_or_none(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    transaction = store.begin()
    written = [random_episode(transaction, name, 70, ("front",)) for name in ("a", "b")]
    assert store.snapshot().episodes().num_rows == 0
    commit(transaction, written)
    assert store.snapshot().episodes()["id"].to_pylist() == ["a", "b"]


def test_an_abandoned_ingest_leaves_no_trace_for_a_reader(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    before = fill(store, ["a"])
    random_episode(store.begin(), "b", 70, ("front",))
    assert LatentStore.open(store.uri).snapshot().id == before


def test_what_is_read_is_what_was_written_across_segments(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    fill(store, ["a"], frames=150, cameras=("front", "wrist"))
    snapshot = pickle.loads(pickle.dumps(store.snapshot()))
    [row] = snapshot.episodes().to_pylist()
    random = np.random.default_rng(sum(b"a"))
    for camera in row["cameras"]:
        assert len(camera["segments"]) == 3
        expected = random.standard_normal((150, 4, 8, 8)).astype(np.float16)
        np.testing.assert_array_equal(snapshot.read(camera["segments"]), expected)
    np.testing.assert_array_equal(snapshot.read([row["steps"]]), random.standard_normal((150, 5)).astype(np.float32))
    np.testing.assert_allclose(row["mean"], snapshot.read([row["steps"]]).mean(0), rtol=1e-5)


def test_a_pinned_snapshot_does_not_move_and_rollback_is_a_new_head(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    first, second = fill(store, ["a"]), fill(store, ["b"])
    assert store.snapshot(first).episodes()["id"].to_pylist() == ["a"]
    store.rollback(first)
    assert store.snapshot().episodes()["id"].to_pylist() == ["a"]
    assert store.snapshot(second).episodes()["id"].to_pylist() == ["a", "b"]
    assert [entry["snapshot"] for entry in store.log()][:-1] == [first]


def test_two_ingests_begun_at_once_are_both_in(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    one, two = store.begin(), store.begin()
    commit(one, [random_episode(one, "a", 70, ("front",))])
    commit(two, [random_episode(two, "b", 70, ("front",)), random_episode(two, "a", 70, ("front",))])
    assert sorted(store.snapshot().episodes()["id"].to_pylist()) == ["a", "b"]


def _ingest_one(uri: str, name: str) -> None:
    fill(LatentStore.open(uri), [name])


def test_processes_that_commit_at_once_lose_nothing(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    names = [f"episode-{i}" for i in range(6)]
    with multiprocessing.get_context("spawn").Pool(6) as pool:
        pool.starmap(_ingest_one, [(store.uri, name) for name in names])
    assert sorted(store.snapshot().episodes()["id"].to_pylist()) == names
    assert not list(store.snapshot().verify())


def test_verify_finds_one_flipped_bit(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    fill(store, ["a", "b"])
    assert list(store.snapshot().verify()) == []
    chunk = max((tmp_path / "store" / "chunks").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[1000] ^= 4
    chunk.write_bytes(data)
    [line] = store.snapshot().verify()
    assert "front" in line


def test_a_tag_pins_a_snapshot_and_never_moves(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    first = fill(store, ["a"])
    assert store.tag("paper") == first
    second = fill(store, ["b"])
    assert store.snapshot("paper").id == first
    assert [entry["tags"] for entry in store.log()][:2] == [[], ["paper"]]
    for name in ("paper", "with/slash"):
        with pytest.raises(UserError, match="choose another name") as caught:
            store.tag(name)
        assert "\n" not in str(caught.value)
    added, gone = store.snapshot(second).diff(store.snapshot("paper"))
    assert [row["id"] for row in added] == ["b"] and gone == []
    added, gone = store.snapshot("paper").diff(store.snapshot())
    assert [row["id"] for row in gone] == ["b"] and added == []


def test_a_removed_episode_is_blanked_and_stays_out(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    before = fill(store, ["apple", "axe", "bee"], frames=150)
    rows = {row["id"]: row for row in store.snapshot().episodes().to_pylist()}
    for wrong in (["a"], ["nobody"]):
        with pytest.raises(UserError, match="begins with"):
            store.remove(wrong, [])
    with pytest.raises(UserError, match="no episode comes from"):
        store.remove([], ["/ra"])
    assert store.snapshot().id == before
    assert [row["id"] for row in store.remove(["ax"], ["/raw/bee"])] == ["axe", "bee"]
    head = store.snapshot()
    assert head.episodes()["id"].to_pylist() == ["apple"] and head.removed() == {"axe", "bee"}
    assert not list(head.verify())
    for name, kept in (("apple", True), ("axe", False), ("bee", False)):
        where = [*rows[name]["cameras"][0]["segments"]], [rows[name]["steps"]]
        assert [bool(head.read(places).any()) for places in where] == [kept, kept]
    assert store.snapshot(before).read(rows["axe"]["cameras"][0]["segments"]).any()
    fill(store, ["axe"])  # an ingest that did not know of the removal
    assert store.snapshot().episodes()["id"].to_pylist() == ["apple"]
    with pytest.raises(UserError, match="2 episodes were removed"):
        store.rollback(before)


def test_garbage_collection_keeps_what_is_young(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    fill(store, ["a"])
    random_episode(store.begin(), "b", 70, ("front",))
    assert store.collect_garbage() == 0
    assert not list(store.snapshot().verify())


@pytest.mark.parametrize("uri", ["missing", "folder", "file", "s3://bucket/x"])
def test_what_is_not_a_store_is_refused_in_one_line(tmp_path: Path, uri: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "note.txt").write_text("not a store")
    (tmp_path / "file").write_text("not a store")
    for attempt in (LatentStore.open, LatentStore.create) if uri != "missing" else (LatentStore.open,):
        with pytest.raises(UserError) as caught:
            attempt(uri if "://" in uri else str(tmp_path / uri))
        assert "\n" not in str(caught.value) and uri in str(caught.value)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["note.txt"]
    with pytest.raises(UserError, match="no snapshot"):
        LatentStore.create(str(tmp_path / "new")).snapshot("nonsense")
