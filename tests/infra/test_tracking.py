"""MLflow that is not there, does not answer, or answers with errors: one line that says where, in a stated time."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Uwm

from infra import registry, tracking

ANSWERS = {  # status, body, and what is said about it
    "errors": (500, b"out of order", "does not answer, or only with errors"),
    "busy": (503, b"", "does not answer, or only with errors"),
    "forbidden": (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}', "refuses the credentials"),
    "unknown user": (401, b"Unauthorized", "refuses the credentials"),
    "another server": (404, b"<html>no such page</html>", "is no MLflow server"),
    "a portal": (200, b"<html>please log in</html>", "is no MLflow server"),
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow sets it to the place in use
    tracking.connect()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    tracking.connect(f"sqlite:///{file}")
    tracking.log_metrics(tracking.start_run("test", "run", {}), {"loss": 1.0}, 3)
    return file


@pytest.fixture
def server() -> Iterator[Callable[[int, bytes], str]]:
    """Start a server that gives everybody the same answer; return its URL."""
    started: list[Any] = []

    def start(status: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        started.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=started[-1].serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{started[-1].server_port}"

    yield start
    for each in started:
        each.shutdown()
        each.server_close()


def refusals(uri: str) -> list[str]:
    """Return what each of the lookups says."""
    tracking.connect(uri)
    lookups: list[Callable[[], Any]] = [
        lambda: registry.version_of("policy", "1"),
        lambda: registry.version_of("policy", "champion"),
        lambda: registry.download("models:/policy/1"),
        lambda: tracking.last_steps("f" * 32),
    ]
    said = []
    for look_up in lookups:
        with pytest.raises(ConnectionError) as refused:
            look_up()
        said.append(str(refused.value))
    return said


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_servers_failure_is_not_absence(server: Callable[[int, bytes], str], kind: str) -> None:
    status, body, expected = ANSWERS[kind]
    uri = server(status, body)
    for said in refusals(uri):
        assert expected in said and uri in said and "\n" not in said


def test_a_server_that_accepts_and_never_answers_is_given_up(uwm: Uwm, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert all("does not answer" in said and uri in said for said in refusals(uri))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        code, _, err = uwm("promote", "policy", "1")
        assert code == 2 and f"error: the MLflow server at {uri} does not answer" in err
        code, _, err = uwm("evaluate", "models:/policy/1", "--env", "metaworld:drawer-close")
        assert code == 2 and f"error: the MLflow server at {uri} does not answer" in err


def test_what_is_absent_is_absent(database: Path, tmp_path: Path, uwm: Uwm, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (database, tmp_path / "missing.db"):
        tracking.connect(f"sqlite:///{file}")
        assert registry.version_of("policy", "1") is registry.version_of("policy", "champion") is None
        assert registry.download("models:/policy/1") is None
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
        assert tracking.download("f" * 32, "checkpoint") is None
        code, _, err = uwm("promote", "policy", "1")
        assert code == 2 and "policy version 1: not in the registry at" in err and str(file) in err
    assert not (tmp_path / "missing.db").exists()


@pytest.mark.parametrize("damage", ["junk", "cut", "newer", "a folder", "locked"])
def test_a_database_that_cannot_be_used_is_named(database: Path, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "mlflow.db"
    shutil.copy(database, file)
    connection = sqlite3.connect(file)
    match damage:
        case "junk":
            file.write_bytes(b"no database" * 1000)
        case "cut":
            file.write_bytes(file.read_bytes()[:8192])
        case "a folder":
            file.unlink()
            file.mkdir()
        case "newer":
            connection.execute("update alembic_version set version_num = 'ffffffffffff'")
            connection.commit()
        case "locked":
            connection.execute("begin exclusive")
    tracking.connect(f"sqlite:///{file}?timeout=0.1")
    with pytest.raises(ConnectionError, match=rf"^MLflow at sqlite:///{file}\?timeout=0.1: .*; .*MLFLOW_TRACKING_URI"):
        registry.version_of("policy", "1")


def test_a_password_is_not_shown() -> None:
    tracking.connect("postgresql://user:secret@127.0.0.1:1/mlflow")
    assert tracking.place() == "postgresql://127.0.0.1:1/mlflow"
