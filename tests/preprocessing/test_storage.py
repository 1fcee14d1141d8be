from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import json
import multiprocessing
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import pytest
import zarr
from filelock import FileLock, Timeout
from helpers.rows import fill
from helpers.s3 import ACCESS_KEY, S3, SECRET_KEY, FaultyProxy, Request

from preprocessing.errors import UserError
from preprocessing.store import storage
from preprocessing.store.snapshot import Snapshot
from preprocessing.store.storage import Bucket, Folder, Place, parse
from preprocessing.store.store import LatentStore

pytest_plugins = ["helpers.s3"]
ADDRESS = "http://127.0.0.1:8333"


@pytest.mark.parametrize("uri", ["{0}/a b", "file://{0}/a%20b", "{0}/x/../a b/"])
def test_a_folder_has_one_uri(tmp_path: Path, uri: str) -> None:
    place = parse(uri.format(tmp_path))
    assert place == Folder(tmp_path / "a b") and parse(place.uri) == place


def test_relative_and_home_folders_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert parse("store").uri == str(tmp_path / "store")
    assert parse("./run:1").uri == str(tmp_path / "run:1")
    assert parse("~/store").uri == str(tmp_path / "home" / "store")


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("s3://latents/a/b/", Bucket("latents", "a/b")),
        (f"s3://latents/a?endpoint={ADDRESS}/", Bucket("latents", "a", ADDRESS)),
        ("s3://latents/a?endpoint=http%3A%2F%2F%5B%3A%3A1%5D%3A9", Bucket("latents", "a", "http://[::1]:9")),
        (
            f"s3://latents/a?region=eu-west-1&path_style=false&endpoint={ADDRESS}",
            Bucket("latents", "a", ADDRESS, False, "eu-west-1"),
        ),
    ],
)
def test_an_s3_uri_carries_its_options(uri: str, place: Bucket) -> None:
    assert parse(uri) == place
    assert parse(place.uri) == place == pickle.loads(pickle.dumps(place))


@pytest.mark.parametrize(
    ("uri", "hint"),
    [
        ("", "s3://bucket/prefix"),
        ("a\nb", "s3://bucket/prefix"),
        ("gs://bucket/prefix", "an S3 URI"),
        ("file://host/path", "file:///path"),
        ("file:/path", "file:///path"),
        ("~nobody-here/x", "home"),
        ("s3:/bucket/prefix", "s3://bucket/prefix"),
        ("s3://bucket", "s3://bucket/some/prefix"),
        ("s3://bucket/a//b", "plain prefix"),
        ("s3://bucket/../b", "plain prefix"),
        ("s3://b%cket/prefix", "not a bucket"),
        ("s3://bucket/prefix#1", "not a bucket"),
        ("s3://[bucket/prefix", "IPv6"),
        ("s3://bucket/prefix?end_point=x", "unknown end_point"),
        ("s3://bucket/prefix?path_style=yes", "true or false"),
        ("s3://bucket/prefix?region=", "eu-west-1"),
        ("s3://bucket/prefix?endpoint=127.0.0.1:8333", "http://"),
        ("s3://bucket/prefix?endpoint=http://host/path", "no more"),
    ],
)
def test_a_wrong_uri_is_reported_in_one_line(uri: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint) as caught:
        parse(uri)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEY:HUSH@bucket/prefix",
        "s3://KEY:HU/SH@bucket/prefix",
        "s3://bucket/prefix?endpoint=http://KEY:HUSH@host",
        "s3://bucket/prefix?aws_secret_access_key=HUSH",
        "gs://KEY:HU/SH@bucket/prefix?token=HUSH",
    ],
)
def test_secrets_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(uri)
    assert "HU" not in str(caught.value) and "SH" not in str(caught.value)


def test_the_content_of_a_folder(tmp_path: Path) -> None:
    place = parse(f"{tmp_path}/new/store")
    assert place.content() == "nothing" and not (tmp_path / "new").exists()
    icechunk.Repository.create(place.storage())
    assert place.content() == "store"
    assert parse(f"{tmp_path}/new").content() == "something else"
    (tmp_path / "file").touch()
    assert parse(f"{tmp_path}/file").content() == "something else"


def test_one_committer_holds_the_lock_next_to_a_folder(tmp_path: Path) -> None:
    place = parse(f"{tmp_path}/new/store")
    beside = FileLock(tmp_path / "new" / ".store.lock", timeout=0)
    with place.commit_lock(), pytest.raises(Timeout):
        beside.acquire()
    beside.acquire()
    assert place.content() == "nothing"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can be written to"), parse(f"{tmp_path}/file/store").commit_lock():
        pass


def test_the_content_of_a_prefix_and_the_servers_time(s3: S3) -> None:
    place = parse(s3.uri("content/store"))
    assert place.content() == "nothing"
    icechunk.Repository.create(place.storage())
    assert place.content() == "store"
    assert parse(s3.uri("content")).content() == "something else"
    assert parse(s3.uri("content/sto")).content() == "nothing"
    assert abs(place.now() - datetime.datetime.now(datetime.UTC)) < datetime.timedelta(seconds=5)


@pytest.mark.parametrize(
    ("options", "endpoint", "path_style"),
    [
        ("region=eu-west-1", "https://s3.eu-west-1.amazonaws.com", "false"),
        ("region=eu-west-1&path_style=true", "https://s3.eu-west-1.amazonaws.com", "true"),
        (f"endpoint={ADDRESS}", ADDRESS, "true"),
        (f"endpoint={ADDRESS}&path_style=false", ADDRESS, "false"),
    ],
)
def test_addressing_is_by_host_name_on_amazon_and_by_path_elsewhere(
    monkeypatch: pytest.MonkeyPatch, options: str, endpoint: str, path_style: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    storage = repr(parse(f"s3://latents/addressing?{options}").storage())
    assert f"endpoint_url={endpoint}," in storage and f"force_path_style={path_style}," in storage


def test_another_process_reads_what_was_committed_to_s3(s3: S3) -> None:
    place = parse(s3.uri("elsewhere"))
    repository = icechunk.Repository.create(place.storage())
    _commit(repository, "a")
    secret = SECRET_KEY.encode()
    assert secret not in pickle.dumps(place) and secret not in pickle.dumps(repository)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for where in (place, repository, repository.readonly_session("main")):
            np.testing.assert_array_equal(pool.apply(_read, (where, "a")), _values("a"))


def test_concurrent_commits_all_succeed(s3: S3) -> None:
    place = parse(s3.uri("at-once"))
    icechunk.Repository.create(place.storage())

    def add(name: str) -> int:
        repository = icechunk.Repository.open(place.storage())
        for tries in range(1, 50):
            with contextlib.suppress(icechunk.ConflictError):
                _commit(repository, name)
                return tries
        raise AssertionError("no end of conflicts")

    names = [f"writer-{i}" for i in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(add, names)) > len(names)  # otherwise there was no conflict
    for name in names:
        np.testing.assert_array_equal(_read(place, name), _values(name))


def test_an_unusable_server_is_reported_at_once(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    assert "no bucket nowhere" in _refusal(s3.uri("x").replace(s3.bucket, "nowhere"))
    assert "no answer from http://127.0.0.1:1" in _refusal(s3.uri("x", "http://127.0.0.1:1"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    assert "SignatureDoesNotMatch" in _refusal(s3.uri("wrong-secret"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    assert "InvalidAccessKeyId" in _refusal(s3.uri("nobody"))
    monkeypatch.setenv("AWS_PROFILE", "missing")
    assert "missing" in _refusal(s3.uri("missing"))
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert "set AWS_ACCESS_KEY_ID" in _refusal(s3.uri("no-credentials"))
    assert time.monotonic() - start < 15


def test_endpoint_and_expiring_credentials_come_from_the_users_profile(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=30)
    answer = {"Version": 1, "AccessKeyId": ACCESS_KEY, "SecretAccessKey": SECRET_KEY, "Expiration": soon.isoformat()}
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    profile = f"credential_process = cat {tmp_path}/answer.json\nendpoint_url = {s3.endpoint}\nregion = us-east-1\n"
    (tmp_path / "config").write_text(f"[profile lab]\n{profile}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    place = parse(f"s3://{s3.bucket}/profile")
    _commit(icechunk.Repository.create(place.storage()), "a")
    np.testing.assert_array_equal(_read(place, "a"), _values("a"))
    assert place.uri == f"s3://{s3.bucket}/profile"


def test_a_commit_whose_answer_is_lost_is_made_once(s3: S3) -> None:
    with FaultyProxy(s3.port) as proxy:
        place = parse(s3.uri("lost-answer", proxy.endpoint))
        repository = icechunk.Repository.create(place.storage())
        proxy.inject("reset after", only=_moves_the_branch, times=1)
        # Icechunk retries, is refused, and takes its own commit for another's.
        with pytest.raises(icechunk.ConflictError):
            _commit(repository, "a")
        assert proxy.counts["reset after"] == 1
        assert [info.message for info in repository.ancestry(branch="main")] == ["a", "Repository initialized"]
        np.testing.assert_array_equal(_read(place, "a"), _values("a"))


@pytest.mark.parametrize("fault", ["reset before", "reset after", "500", "503", "delay", "truncate"])
def test_a_commit_through_faults_is_complete_or_absent(s3: S3, fault: str) -> None:
    with FaultyProxy(s3.port) as proxy:
        place = parse(s3.uri(f"faults/{fault.replace(' ', '-')}", proxy.endpoint))
        repository = icechunk.Repository.create(place.storage())
        _commit(repository, "before")
        done = ["before"]
        proxy.inject(fault, rate=0.2, seconds=0.1)
        for name in ("a", "b", "c"):
            try:
                _commit(repository, name)
                done.append(name)
            except icechunk.ConflictError:
                assert fault == "reset after"
            except icechunk.IcechunkError:
                assert fault == "truncate"  # while reading the branch tip; nothing is written yet
        for name in done:
            try:
                np.testing.assert_array_equal(_read(place, name), _values(name))
            except icechunk.IcechunkError:
                assert fault == "truncate"  # while reading a manifest
        assert proxy.counts[fault] > 0
        proxy.heal()
        repository = icechunk.Repository.open(place.storage())
        there = set(zarr.open_group(repository.readonly_session("main").store, mode="r").array_keys())
        assert set(done) <= there
        for name in there:
            np.testing.assert_array_equal(_read(place, name), _values(name))


def _moves_the_branch(request: Request) -> bool:
    return request.method == "PUT" and "/refs/branch.main/" in request.path


def _values(name: str) -> np.ndarray:
    return np.random.default_rng(sum(name.encode())).standard_normal(40_000).astype(np.float32)


def _commit(repository: icechunk.Repository, name: str) -> str:
    session = repository.writable_session("main")
    values = _values(name)
    array = zarr.create_array(session.store, name=name, shape=values.shape, chunks=(10_000,), dtype=values.dtype)
    array[:] = values
    return session.commit(name)


def _read(where: Place | icechunk.Repository | icechunk.Session, name: str) -> np.ndarray:
    if isinstance(where, Folder | Bucket):
        where = icechunk.Repository.open(where.storage())
    if isinstance(where, icechunk.Repository):
        where = where.readonly_session("main")
    return np.asarray(zarr.open_array(where.store, path=name, mode="r")[:])


def _refusal(uri: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(uri).content()
    message = str(caught.value)
    assert "\n" not in message and SECRET_KEY not in message
    return message


@pytest.mark.parametrize("step", ["listing a table", "reading a table", "opening", "reading latents"])
def test_what_breaks_off_on_its_way_is_read_again(s3: S3, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LatentStore.create(s3.uri("breaks-off"))
    if not store.snapshot().episodes().num_rows:
        fill(store, ["a"])
    rows = store.snapshot().rows()
    left = {"failures": 2}

    def failing(function: Any) -> Any:
        def once_or_twice(*arguments: Any, **named: Any) -> Any:
            if left["failures"]:
                left["failures"] -= 1
                raise icechunk.IcechunkError("I/O error")
            return function(*arguments, **named)

        return once_or_twice

    target, name = {
        "listing a table": (zarr, "open_group"),
        "reading a table": (zarr, "open_array"),
        "opening": (icechunk.Repository, "open"),
        "reading latents": (zarr.Array, "__getitem__"),
    }[step]
    snapshot = Snapshot(store.uri, store.snapshot().id)
    monkeypatch.setattr(target, name, failing(getattr(target, name)))
    assert [row["id"] for row in snapshot.rows()] == ["a"]
    if step == "reading latents":
        left["failures"] = 2
        assert snapshot.read(rows[0]["cameras"][0]["segments"]).shape == (70, 4, 8, 8)
    assert left["failures"] == 0


def test_a_server_that_falls_silent_is_given_up_and_is_no_damage(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyProxy(s3.port) as proxy:
        store = LatentStore.create(s3.uri("silent", proxy.endpoint))
        if not store.snapshot().episodes().num_rows:
            fill(store, ["a"])
        snapshot, fresh = store.snapshot(), store.snapshot()
        [row] = snapshot.rows()
        proxy.inject("silence", seconds=60)
        monkeypatch.setattr(storage, "ANSWER_SECONDS", 0.3)
        for step in (
            fresh.rows,
            lambda: snapshot.read([row["steps"]]),
            lambda: list(snapshot.verify()),
            store.snapshot,
            store.fork,
            store.log,
            lambda: store.tag("pinned"),
        ):
            with pytest.raises(UserError, match="has not answered for 0 s; is its server up"):
                step()


def test_credentials_that_expire_while_a_store_is_read_are_no_damage(s3: S3) -> None:
    with FaultyProxy(s3.port) as proxy:
        store = LatentStore.create(s3.uri("expiring", proxy.endpoint))
        fill(store, ["a"])
        snapshot, fresh = store.snapshot(), store.snapshot()
        [row] = snapshot.rows()
        proxy.inject("403")
        for step in (
            fresh.rows,
            lambda: snapshot.read([row["steps"]]),
            lambda: list(snapshot.verify()),
            lambda: list(fresh.verify()),
            store.log,
            store.snapshot,
        ):
            with pytest.raises(UserError, match=r"the server refuses the credentials \(ExpiredToken\)"):
                step()


def test_a_store_that_vanishes_while_it_is_read_is_told_from_damage(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    fill(store, ["a"])
    snapshot = store.snapshot()
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(UserError, match="nothing is there any more"):
        list(snapshot.verify())
