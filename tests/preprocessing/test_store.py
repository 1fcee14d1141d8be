from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import pickle
from pathlib import Path
from typing import Any, get_type_hints

import icechunk
import numpy as np
import pytest
from helpers.command import Uwm
from helpers.rows import commit, fill, is_blank, random_episode, write_episode

from preprocessing.contracts.interface import InterfaceRow, NamedWidth
from preprocessing.errors import UserError
from preprocessing.store import catalogue, rows
from preprocessing.store.store import LatentStore


def test_a_reader_sees_all_of_an_ingest_or_none(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    written = [random_episode(store, name, 70, ("front",)) for name in ("a", "b")]
    assert store.snapshot().episodes().num_rows == 0
    commit(store, written)
    assert store.snapshot().episodes()["id"].to_pylist() == ["a", "b"]


def test_an_abandoned_ingest_leaves_no_trace_for_a_reader(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    before = fill(store, ["a"])
    random_episode(store, "b", 70, ("front",))
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
    steps, front = (snapshot.statistics([row["key"]], array) for array in ("steps", "front"))
    assert steps and front and snapshot.statistics([row["key"]], "elsewhere") is None
    np.testing.assert_allclose(steps.mean, snapshot.read([row["steps"]]).mean(0), rtol=1e-5)
    assert steps.count == 150 and front.count == 150 * 64 and front.mean.shape == (4,)


def test_a_pinned_snapshot_does_not_move_and_rollback_is_a_new_head(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    first, second = fill(store, ["a"]), fill(store, ["b"])
    assert store.snapshot(first).episodes()["id"].to_pylist() == ["a"]
    store.rollback(first)
    assert store.snapshot().episodes()["id"].to_pylist() == ["a"]
    assert store.snapshot(second).episodes()["id"].to_pylist() == ["a", "b"]
    assert [entry["snapshot"] for entry in store.log()][:-1] == [first]


def test_two_concurrent_ingests_both_succeed(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    one, two = ([random_episode(store, name, 70, ("front",)) for name in names] for names in (["a"], ["b", "a"]))
    commit(store, one)
    commit(store, two)
    assert store.snapshot().episodes()["id"].to_pylist() == ["a", "b"]
    assert not list(store.snapshot().verify())
    [_, (_, double, _)] = two  # the second "a" takes no space
    assert is_blank(store, store.snapshot().id, double["cameras"][0]["segments"])


def test_a_commit_that_loses_a_race_is_repeated_on_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    late = [random_episode(store, name, 70, ("front",)) for name in ("a", "b", "c")]
    fill(store, ["c"])
    merge = icechunk.Session.merge

    def overtaken(session: icechunk.Session, *forks: Any) -> None:
        merge(session, *forks)
        monkeypatch.setattr(icechunk.Session, "merge", merge)
        other = LatentStore.open(store.uri)
        monkeypatch.setattr(other.place.__class__, "commit_lock", lambda place: contextlib.nullcontext())
        fill(other, ["a"])
        other.remove(["c"], [])

    monkeypatch.setattr(icechunk.Session, "merge", overtaken)
    commit(store, late)
    head = store.snapshot()
    assert sorted(head.episodes()["id"].to_pylist()) == ["a", "b"] and head.removed() == {"c"}
    assert [entry["counts"].get("episodes") for entry in store.log()][:4] == [1, None, 1, 1]
    assert not list(head.verify())
    for (_, row, _), kept in zip(late, (False, True, False), strict=True):  # those that are not needed take no space
        assert is_blank(store, head.id, row["cameras"][0]["segments"]) != kept


def test_a_commit_whose_answer_was_lost_is_made_once(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    fork, row, statistics = random_episode(store, "a", 70, ("front",))
    first = store.commit("the-name", [fork], [row], statistics, [])
    again = store.commit("the-name", [fork], [row], statistics, [])
    assert first == again and first.keys == {"key-a"}
    assert not list(store.snapshot().verify()) and len(store.log()) == 2


def test_unused_writes_take_no_space(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    (fork, row, statistics), (other, broken, _) = (random_episode(store, name, 640, ("front",)) for name in "ab")
    unused = [*broken["cameras"][0]["segments"], broken["steps"]]
    refused = {"key": "q", "id": "b", "uri": "/raw/b", "index": 0, "reason": "breaks", "reader": None}
    store.commit("name", [fork, other], [row], statistics, [refused], unused)
    store.repository.garbage_collect(datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1))
    kept = sum(file.stat().st_size for file in (tmp_path / "store" / "chunks").iterdir())
    assert kept < 1.1 * (640 * 4 * 8 * 8 * 2 + 640 * 5 * 4)
    assert [bad["id"] for bad in store.snapshot().quarantine()] == ["b"] and not list(store.snapshot().verify())


def _ingest_one(uri: str, name: str) -> None:
    fill(LatentStore.open(uri), [name])


def test_concurrent_processes_lose_nothing(tmp_path: Path) -> None:
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
    assert store.tag("paper", first) == first
    store.tag("gone")
    store.untag("gone")
    for name, why in (("paper", "already names"), ("gone", "deleted"), ("bad tag/x", "no name"), ("-x", "no name")):
        with pytest.raises(UserError, match=why) as caught:
            store.tag(name)
        assert "\n" not in str(caught.value) and ".rs" not in str(caught.value)
    assert store.snapshot(first[:9].lower()).id == first
    with pytest.raises(UserError, match=r"give more characters|no snapshots begin with"):
        store.snapshot(first[:1] if first[0] == second[0] else "0000")
    added, gone = store.snapshot(second).diff(store.snapshot("paper"))
    assert [row["id"] for row in added] == ["b"] and gone == []
    added, gone = store.snapshot("paper").diff(store.snapshot())
    assert [row["id"] for row in gone] == ["b"] and added == []


def test_an_episode_counts_once_however_often_it_was_ingested(tmp_path: Path, uwm: Uwm) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    first = fill(store, ["a", "b"], frames=20)

    def again(id: str, key: str, **columns: Any) -> Any:
        fork, random = store.fork(), np.random.default_rng(0)
        latents = {"front": random.standard_normal((20, 4, 8, 8)).astype(np.float16)}
        steps = random.standard_normal((20, 5)).astype(np.float32)
        return fork, *write_episode(fork, key, latents, steps, 3, id=id, **columns)

    commit(store, [again("a", "other contract", embodiment="leg", contract="{}")])
    commit(store, [again("a", "vae", encoder_digest="f" * 16), again("b", "vae of b", encoder_digest="f" * 16)])
    head = store.snapshot()
    current = {(row["id"], row["encoder_digest"][0]): row["embodiment"] for row in head.episodes().to_pylist()}
    assert current == {("a", "e"): "leg", ("b", "e"): "arm", ("a", "f"): "arm", ("b", "f"): "arm"}
    assert head.all_rows(["id"]).num_rows == 5 and len(head.rows()) == 4
    assert [row["embodiment"] for row in head.rows("e" * 16)] == ["leg", "arm"]
    counts = [entry["counts"] for entry in store.log()][:3]
    assert [(found["episodes"], found.get("updated"), found["frames"]) for found in counts] == [
        (0, 2, 0), (0, 1, 0), (2, None, 40),
    ]  # fmt: skip
    shown = uwm("store", "show", store.uri, "--json")[1]
    groups = {(g["embodiment"], g["encoder_digest"][0]): g["episodes"] for g in shown["embodiments"]}
    assert groups == {("leg", "e"): 1, ("arm", "e"): 1, ("arm", "f"): 2} and shown["superseded"] == 1
    assert [row["id"] for row in uwm("store", "episodes", store.uri, "--json")[1]] == ["a", "b"]
    _, statistics, told = uwm("store", "statistics", store.uri, "--json")
    assert "arm: 2 episodes, 40 steps" in told and [*statistics] == ["arm"]
    changed = uwm("store", "diff", store.uri, first, head.id, "--json")[1]
    assert {name: len(rows) for name, rows in changed.items()} == {"added": 2, "removed": 0, "changed": 1}
    store.remove(["a"], [])
    assert store.snapshot().all_rows(["id"])["id"].to_pylist() == ["b", "b"] and not list(store.snapshot().verify())
    everything = [at for row in head.all_rows().to_pylist() if row["id"] == "a" for at in row["cameras"][0]["segments"]]
    assert len(everything) == 3 and is_blank(store, store.snapshot().id, everything)


def test_a_row_that_uses_the_latents_of_another_never_blanks_them(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    empty, first = store.snapshot().id, fill(store, ["a", "b"], frames=20)
    [base, _] = store.snapshot(first).episodes().to_pylist()

    def described(key: str) -> Any:
        fork = store.fork()
        row, statistics = write_episode(fork, key, {}, np.ones((20, 5), np.float32), 3, id="a")
        row["cameras"] = base["cameras"]
        return fork, row, statistics

    def added(key: str) -> bool:
        fork, row, statistics = described(key)
        commit = store.commit(key, [fork], [row], statistics, [], bases={row["key"]: base["key"]})
        return row["key"] in commit.keys

    assert added("new") and len(store.snapshot().episodes(["id"])) == 2
    fork, twice, statistics = described("new")  # the same work of another ingest
    store.commit("late", [fork], [twice], statistics, [], bases={twice["key"]: base["key"]})
    head = store.snapshot()
    assert not list(head.verify()) and not is_blank(store, head.id, base["cameras"][0]["segments"])
    store.rollback(empty)
    assert not added("after the rollback") and not len(store.snapshot().episodes(["id"])), (
        "its latents are not in the head"
    )
    store.rollback(head.id)
    store.remove(["a"], [])
    assert not added("after the removal") and is_blank(store, store.snapshot().id, base["cameras"][0]["segments"])
    assert not list(store.snapshot().verify())


def test_a_removed_episode_is_blanked_and_stays_out(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    before = fill(store, ["apple", "axe", "bee"], frames=150)
    rows = {row["id"]: row for row in store.snapshot().episodes().to_pylist()}
    for wrong in (["a"], ["nobody"]):
        with pytest.raises(UserError, match="begin with"):
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
        assert [is_blank(store, head.id, places) for places in where] == [not kept, not kept]
    assert not is_blank(store, before, rows["axe"]["cameras"][0]["segments"])
    fill(store, ["axe"])  # an ingest unaware of the removal
    assert store.snapshot().episodes()["id"].to_pylist() == ["apple"]
    with pytest.raises(UserError, match="2 episodes were removed"):
        store.rollback(before)


def test_garbage_collection_keeps_recent_objects(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    fill(store, ["a"])
    random_episode(store, "b", 70, ("front",))
    assert store.collect_garbage(datetime.timedelta(0)) == (0, 0)
    assert not list(store.snapshot().verify())


def test_garbage_collection_expires_old_snapshots_and_keeps_tagged_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    tagged, forgotten = fill(store, ["a", "gone"], frames=640), fill(store, ["b"], frames=640)
    store.tag("paper", tagged)
    store.remove(["gone"], [])
    head = store.snapshot()

    def size() -> int:
        return sum(file.stat().st_size for file in (tmp_path / "store").rglob("*") if file.is_file())

    full, month = size(), datetime.timedelta(days=30)
    assert store.collect_garbage(month)[0] == 0 and store.snapshot(forgotten).episodes().num_rows == 3
    now = datetime.datetime.now(datetime.UTC)
    monkeypatch.setattr(type(store.place), "now", lambda place: now + 40 * datetime.timedelta(days=1))
    count, _ = store.collect_garbage(month)
    assert count >= 1 and store.snapshot().id == head.id
    with pytest.raises(UserError, match="no snapshot"):
        LatentStore.open(store.uri).snapshot(forgotten)
    for kept, ids in (("paper", ["a", "gone"]), (head.id, ["a", "b"])):
        snapshot = LatentStore.open(store.uri).snapshot(kept)
        assert snapshot.episodes(["id"])["id"].to_pylist() == ids and not list(snapshot.verify())
    store.untag("paper")
    with pytest.raises(UserError, match="no tag paper"):
        store.untag("paper")
    assert store.collect_garbage(month)[1] > 640 * 4 * 8 * 8 * 2  # removed episodes that only the tag kept
    assert size() < 0.8 * full and not list(LatentStore.open(store.uri).snapshot().verify())


@pytest.mark.parametrize("uri", ["missing", "folder", "file", "s3://bucket/x"])
def test_a_place_that_is_no_store_is_refused_in_one_line(tmp_path: Path, uri: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "note.txt").write_text("not a store")
    (tmp_path / "file").write_text("not a store")
    for attempt in (LatentStore.open, LatentStore.create) if uri != "missing" else (LatentStore.open,):
        with pytest.raises(UserError) as caught:
            attempt(uri if "://" in uri else str(tmp_path / uri))
        assert "\n" not in str(caught.value) and uri in str(caught.value)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["note.txt"]
    icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "new")))  # then the ingest was killed
    with pytest.raises(UserError, match="half-made"):
        LatentStore.open(str(tmp_path / "new"))
    with pytest.raises(UserError, match="no snapshot"):
        LatentStore.create(str(tmp_path / "new")).snapshot("nonsense")


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (rows.LocationRow, catalogue.LOCATION),
        (NamedWidth, catalogue.NAMED.value_type),
        (rows.Span, catalogue.SPAN),
        (rows.CameraRow, catalogue.CATALOGUE.field("cameras").type.value_type),
        (rows.NamedText, catalogue.CATALOGUE.field("texts").type.value_type),
        (rows.EpisodeRow, catalogue.CATALOGUE),
        (rows.StatisticsRow, catalogue.STATISTICS),
        (rows.QuarantineRow, catalogue.QUARANTINE),
        (rows.RemovedRow, catalogue.REMOVED),
        (rows.InstructionRow, catalogue.INSTRUCTIONS),
    ],
)
def test_the_types_of_rows_have_the_columns_of_the_tables(row: type, columns: Any) -> None:
    assert get_type_hints(row).keys() == {field.name for field in columns}


def test_what_a_snapshot_adds_and_lists() -> None:
    columns = set(catalogue.CATALOGUE.names)
    assert get_type_hints(rows.TrainingRow).keys() == columns | {"statistics"}
    assert get_type_hints(rows.BriefRow).keys() < columns
    assert get_type_hints(InterfaceRow).keys() < columns
