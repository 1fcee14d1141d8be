"""Where data lives: a folder, or a prefix in an S3 bucket, named by one string that works on every machine.

    /path   relative/path   ~/path   file:///path
    s3://bucket/prefix?endpoint=http://127.0.0.1:8333&path_style=true&region=eu-west-1

Server options are part of the URI, so a worker on another node needs only the string and its own credentials. What the
URI leaves open is up to boto3 (environment, ~/.aws, SSO, instance roles), as for the user's other tools. Secrets are
never part of a URI, a pickle or a message.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import functools
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

import boto3
import icechunk
import pyarrow.fs
from botocore import exceptions as boto
from botocore.config import Config
from filelock import FileLock

from preprocessing.errors import UserError

T = TypeVar("T")
Content = Literal["store", "nothing", "something else"]
TRIES = 3  # to read: what breaks off on its way from a server is not damaged where it lies
ANSWER_SECONDS = 120.0  # for each step of Icechunk, which itself gives up a request after half a minute of errors
SLOWEST = 2**18  # bytes a second, of a line that is not given up
HOW_TO_SIGN_IN = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or sign in with a profile in ~/.aws (AWS_PROFILE)"


def answered(step: Callable[[], T], who: str = "the store", size: int = 0) -> T:
    """Return ``step()``, a call of Icechunk or Zarr: they would wait for ever for an answer that never comes.

    Raises UserError that names ``who`` if it takes longer than ANSWER_SECONDS, and than ``size`` bytes take at SLOWEST.
    """
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, step()))
        except BaseException as error:  # including Icechunk's panics
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)  # nothing can stop it if it hangs
    thread.start()
    thread.join(ANSWER_SECONDS + size / SLOWEST)
    if not outcome:
        raise UserError(f"{who} has not answered for {ANSWER_SECONDS + size / SLOWEST:.0f} s; is its server up?")
    done, value = outcome[0]
    if not done:
        raise value
    return value


def read_again(read: Callable[[], T]) -> T:
    """Return ``read()``; if it fails, try twice more. Raises UserError if no answer comes (``answered``)."""
    for number in range(1, TRIES + 1):
        try:
            return answered(read)
        except Exception as error:
            if number == TRIES or isinstance(error, UserError):
                raise
            time.sleep(0.1 * number)
    raise AssertionError


@contextlib.contextmanager
def served(uri: str) -> Iterator[None]:
    """Within it, an error whose cause is the server that holds the store is a UserError that says so.

    Icechunk and Zarr raise the same for a missing object, refused credentials and a server that is down, hence the
    server is asked.
    """
    try:
        yield
    except UserError:
        raise
    except Exception:
        if parse(uri).content() == "nothing":
            raise UserError(f"{uri}: nothing is there any more") from None
        raise


def parse(uri: str) -> Place:
    """Return the place that a URI names. Raises UserError if it names none. Nothing is accessed."""
    if not uri.strip() or not uri.isprintable():
        raise UserError(f"{uri!r}: not a place; give a folder or s3://bucket/prefix")
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*(?=:)", uri)
    if scheme is None:
        return Folder(_absolute(uri))
    try:
        parsed = urlsplit(uri)
    except ValueError as error:
        raise UserError(f"{_bare(uri)}: {error}") from None
    if parsed.scheme == "file" and uri.startswith("file:///") and not parsed.query and not parsed.fragment:
        return Folder(_absolute(unquote(parsed.path)))
    if parsed.scheme == "s3":
        return _parse_s3(uri, parsed)
    raise UserError(f"{_bare(uri)}: neither a folder nor an S3 URI; give /path, file:///path or s3://bucket/prefix")


@dataclass(frozen=True)
class Folder:
    """A folder on a file system that all writers share."""

    path: Path

    @property
    def uri(self) -> str:
        return str(self.path)

    def storage(self) -> icechunk.Storage:
        return icechunk.local_filesystem_storage(str(self.path))

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """Return a file system for plain files, and this place's path in it."""
        return pyarrow.fs.LocalFileSystem(), str(self.path)

    def content(self) -> Content:
        """Return what is there now. Raises UserError if it may not be read."""
        try:
            if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
                return "nothing"
        except OSError as error:
            raise UserError(f"{self.uri}: {error.strerror}; give a folder that can be read") from None
        return "store" if self.path.is_dir() and icechunk.Repository.exists(self.storage()) else "something else"

    def now(self) -> datetime.datetime:
        """Return the time of the clock that dates files there: a file server's may differ from this machine's."""
        with tempfile.NamedTemporaryFile(dir=self.path.parent) as file:
            return datetime.datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, datetime.UTC)

    @contextlib.contextmanager
    def commit_lock(self) -> Iterator[None]:
        """Hold the lock that one committer at a time has. Makes the parent folder if it is missing."""
        # Icechunk's commits to a local file system are not safe against concurrent committers (those to S3 are). The
        # lock file is next to the store, not in it: Icechunk creates repositories only in empty folders.
        lock = FileLock(self.path.parent / f".{self.path.name}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise UserError(f"{self.path.parent}: {error.strerror}; give a folder that can be written to") from None
        try:
            yield
        finally:
            lock.release()


@dataclass(frozen=True)
class Bucket:
    """A prefix in a bucket on S3 or on a compatible server that honours conditional writes.

    None means boto3's default. Icechunk tries each request ten times, over about half a minute, and reads a chunk again
    if its body breaks off; RepositoryConfig cannot change that, because the client is made before it is read. It would
    wait forever for an answer that never comes, hence ``answered``.
    """

    name: str
    prefix: str
    endpoint: str | None = None
    path_style: bool | None = None
    region: str | None = None

    @property
    def uri(self) -> str:
        options = {
            "endpoint": self.endpoint,
            "path_style": None if self.path_style is None else str(self.path_style).lower(),
            "region": self.region,
        }
        query = urlencode({key: value for key, value in options.items() if value is not None}, safe=":/[]")
        return f"s3://{self.name}/{self.prefix}" + (f"?{query}" if query else "")

    def storage(self) -> icechunk.Storage:
        """Return Icechunk's storage. Its pickle holds no secrets: the process that unpickles it finds its own."""
        with self._one_line():
            server = _client(self).meta
        endpoint = server.endpoint_url
        style = (server.config.s3 or {}).get("addressing_style")
        is_aws = (urlsplit(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
        return icechunk.s3_storage(
            bucket=self.name,
            prefix=self.prefix,
            region=server.region_name,
            endpoint_url=endpoint,
            allow_http=endpoint.startswith("http://"),
            force_path_style=style == "path" if is_aws else style != "virtual",  # like boto3
            get_credentials=_credentials,
        )

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """Return a file system for plain files, and this place's path in it.

        It holds the current credentials, which expire: call this again for each use.
        """
        with self._one_line():
            server = _client(self).meta
        now, endpoint = _credentials(), urlsplit(server.endpoint_url)
        style = (server.config.s3 or {}).get("addressing_style")
        files = pyarrow.fs.S3FileSystem(
            access_key=now.access_key_id,
            secret_key=now.secret_access_key,
            session_token=now.session_token,
            region=server.region_name,
            scheme=endpoint.scheme,
            endpoint_override=endpoint.netloc,
            force_virtual_addressing=style == "virtual",
            allow_bucket_creation=False,
        )
        return files, f"{self.name}/{self.prefix}"

    def content(self) -> Content:
        """Return what is there now. Raises UserError, within seconds, if server, bucket or credentials are wrong."""
        with self._one_line():
            if not self._list_one().get("KeyCount"):
                return "nothing"
            found = answered(lambda: icechunk.Repository.exists(self.storage()), self.uri)
            return "store" if found else "something else"

    def now(self) -> datetime.datetime:
        """Return the time of the clock that dates objects there: the server's."""
        with self._one_line():
            return email.utils.parsedate_to_datetime(self._list_one()["ResponseMetadata"]["HTTPHeaders"]["date"])

    def commit_lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold nothing: conditional writes decide between committers."""
        return contextlib.nullcontext()

    def _list_one(self) -> Any:
        return _client(self).list_objects_v2(Bucket=self.name, Prefix=f"{self.prefix}/", MaxKeys=1)

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """Turn the errors of S3, boto3 and Icechunk into a UserError of one line."""
        try:
            yield
        except boto.ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            raise UserError(f"{self.uri}: {self._complaint(code)}") from None
        except (boto.ConnectionError, boto.HTTPClientError) as error:
            where = error.kwargs.get("endpoint_url", "the server").partition("?")[0]
            raise UserError(f"{self.uri}: no answer from {where}; is the server up and the endpoint right?") from None
        except boto.BotoCoreError as error:  # a missing profile, an expired login
            raise UserError(f"{self.uri}: {' '.join(str(error).split())}") from None
        except icechunk.IcechunkError as error:
            reason = str(error).strip().splitlines()[-1].strip("` |->")
            raise UserError(f"{self.uri}: cannot be read: {reason}") from None

    def _complaint(self, code: str) -> str:
        if code == "NoSuchBucket":
            return f"there is no bucket {self.name}; create it, or name an existing one"
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
            return f"the server refuses the credentials ({code}); {HOW_TO_SIGN_IN}"
        if code in ("AccessDenied", "403"):
            return "access denied; these credentials need to list, read, write and delete under this prefix"
        if code == "RequestTimeTooSkewed":
            return "this machine's clock differs from the server's; set it"
        return f"the server answers {code}; is it an S3 server, and healthy?"


Place = Folder | Bucket


def _parse_s3(uri: str, parsed: SplitResult) -> Bucket:
    if {"@", ":"} & set(parsed.netloc):
        raise UserError(f"s3://...: a bucket name has no @ or :, and a URI no credentials; {HOW_TO_SIGN_IN}")
    uri = _bare(uri)
    prefix = parsed.path.strip("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}", parsed.netloc) or parsed.fragment:
        raise UserError(f"{uri}: not a bucket and a prefix; give s3://bucket/prefix")
    if not prefix or {"", ".", ".."} & set(prefix.split("/")):
        raise UserError(f"{uri}: needs a plain prefix after the bucket; give s3://{parsed.netloc}/some/prefix")
    options = dict(parse_qsl(parsed.query, keep_blank_values=True))
    # The message leaves out the values of unknown keys: they may be secrets.
    if unknown := sorted(options.keys() - {"endpoint", "path_style", "region"}):
        raise UserError(f"{uri}: unknown {', '.join(unknown)}; the options are endpoint, path_style and region")
    if (path_style := options.get("path_style")) not in (None, "true", "false"):
        raise UserError(f"{uri}: path_style must be true or false")
    if not re.fullmatch(r"[A-Za-z0-9-]+", options.get("region", "none")):
        raise UserError(f"{uri}: region must be a name such as eu-west-1")
    endpoint = options.get("endpoint", "http://none").rstrip("/")
    if not re.fullmatch(r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?", endpoint):
        raise UserError(f"{uri}: endpoint must be http:// or https://, a host and a port, no more; {HOW_TO_SIGN_IN}")
    return Bucket(
        name=parsed.netloc,
        prefix=prefix,
        endpoint=endpoint if "endpoint" in options else None,
        path_style=None if path_style is None else path_style == "true",
        region=options.get("region"),
    )


def _bare(uri: str) -> str:
    """Return the URI without what may be a secret: the part before an @, and the options."""
    return re.sub(r"(?<=:)(//)?.*@", r"\1", uri.partition("?")[0])


def _absolute(path: str) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except RuntimeError as error:  # ~nobody
        raise UserError(f"{path}: {error}") from None


@functools.lru_cache(maxsize=16)  # a client takes a quarter of a second
def _client(bucket: Bucket) -> Any:
    session = boto3.Session()
    if session.get_credentials() is None:
        raise UserError(f"{bucket.uri}: no S3 credentials found; {HOW_TO_SIGN_IN}")
    style = None if bucket.path_style is None else {"addressing_style": "path" if bucket.path_style else "virtual"}
    # 15 seconds at worst, so that a user's mistake is reported before Icechunk retries for half a minute.
    retries = {"mode": "standard", "total_max_attempts": 3}
    patience = Config(connect_timeout=3, read_timeout=4, retries=retries, s3=style)
    return session.client("s3", endpoint_url=bucket.endpoint, region_name=bucket.region, config=patience)


def _credentials() -> icechunk.S3StaticCredentials:
    """Return boto3's current credentials. Icechunk pickles this function by name and calls it when it needs them."""
    found = boto3.Session().get_credentials()
    if found is None:
        raise UserError(f"no S3 credentials found; {HOW_TO_SIGN_IN}")
    now = found.get_frozen_credentials()
    # boto3 renews credentials with less than ten minutes left, so these last for eight.
    expiry = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=8)
    return icechunk.S3StaticCredentials(now.access_key, now.secret_key, now.token, expiry)
