"""Where a store lives: a folder, or a prefix in an S3 bucket. One string says it on every machine.

    /path   relative/path   ~/path   file:///path
    s3://bucket/prefix?endpoint=http://127.0.0.1:8333&path_style=true&region=eu-west-1

What is special about a server rides in the URI, so a worker on another node needs no more than the string and
credentials of its own. What the URI leaves open boto3 decides (environment, ~/.aws, SSO, instance roles), for us as for
every other tool of the user. Secrets are never part of a URI, a pickle or a message.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import functools
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

import boto3
import icechunk
import pyarrow.fs
from botocore import exceptions as boto
from botocore.config import Config
from filelock import FileLock

from preprocessing.errors import UserError

Content = Literal["store", "nothing", "something else"]
HOW_TO_SIGN_IN = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or sign in with a profile in ~/.aws (AWS_PROFILE)"


def parse(uri: str) -> Place:
    """The place that a user's string names; UserError in one line where it names none."""
    if not uri.strip() or not uri.isprintable():
        raise UserError(f"{uri!r}: no place for a store; give a folder or s3://bucket/prefix")
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
    raise UserError(f"{_bare(uri)}: stores live in a folder or on S3; give /path, file:///path or s3://bucket/prefix")


@dataclass(frozen=True)
class Folder:
    """A folder of a file system that all writers share."""

    path: Path

    @property
    def uri(self) -> str:
        return str(self.path)

    def storage(self) -> icechunk.Storage:
        return icechunk.local_filesystem_storage(str(self.path))

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """For plain files, and where in it this place is."""
        return pyarrow.fs.LocalFileSystem(), str(self.path)

    def content(self) -> Content:
        """What is there now; UserError where nobody may look."""
        try:
            if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
                return "nothing"
        except OSError as error:
            raise UserError(f"{self.uri}: {error.strerror}; give a folder that can be read") from None
        return "store" if self.path.is_dir() and icechunk.Repository.exists(self.storage()) else "something else"

    def now(self) -> datetime.datetime:
        """The time of the clock that dates what is written there: a file server's may not be this machine's."""
        with tempfile.NamedTemporaryFile(dir=self.path.parent) as file:
            return datetime.datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, datetime.UTC)

    @contextlib.contextmanager
    def commit_lock(self) -> Iterator[None]:
        """Held by one committer at a time. Makes the parent folder where it is missing."""
        # Icechunk's commit on a local file system is not safe against concurrent committers (on S3 it is). Beside the
        # store, not in it: Icechunk only makes a repository in an empty folder.
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
    """A prefix in a bucket of S3 or of a server that speaks its protocol and honours conditional writes.

    None means: as boto3 finds it. Icechunk tries each request ten times, over about half a minute, and reads a chunk
    again where its body breaks off. RepositoryConfig cannot change that: the client is made before it is read. For an
    answer that never comes it waits without end.
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
        """Picklable without secrets: whoever unpickles it looks for credentials of its own."""
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
            force_path_style=style == "path" if is_aws else style != "virtual",  # as boto3 has it
            get_credentials=_credentials,
        )

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """For plain files, and where in it this place is. Its credentials are those of now: ask anew for each use."""
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
        """What is there now; UserError, within seconds, where the server, the bucket or the credentials are wrong."""
        with self._one_line():
            if not self._list_one().get("KeyCount"):
                return "nothing"
            return "store" if icechunk.Repository.exists(self.storage()) else "something else"

    def now(self) -> datetime.datetime:
        """The time of the clock that dates what is written there: the server's."""
        with self._one_line():
            return email.utils.parsedate_to_datetime(self._list_one()["ResponseMetadata"]["HTTPHeaders"]["date"])

    def commit_lock(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to hold: conditional writes decide between committers."""
        return contextlib.nullcontext()

    def _list_one(self) -> Any:
        return _client(self).list_objects_v2(Bucket=self.name, Prefix=f"{self.prefix}/", MaxKeys=1)

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """Turns what S3, boto3 and Icechunk raise into one line each."""
        try:
            yield
        except boto.ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            raise UserError(f"{self.uri}: {self._complaint(code)}") from None
        except (boto.ConnectionError, boto.HTTPClientError) as error:
            where = error.kwargs.get("endpoint_url", "the server").partition("?")[0]
            raise UserError(f"{self.uri}: no answer from {where}; is the server up and the endpoint right?") from None
        except boto.BotoCoreError as error:  # a profile that is not there, a session that has ended
            raise UserError(f"{self.uri}: {' '.join(str(error).split())}") from None
        except icechunk.IcechunkError as error:
            reason = str(error).strip().splitlines()[-1].strip("` |->")
            raise UserError(f"{self.uri}: cannot be read: {reason}") from None

    def _complaint(self, code: str) -> str:
        if code == "NoSuchBucket":
            return f"there is no bucket {self.name}; make it, or name one that is there"
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
            return f"the server refuses the credentials ({code}); {HOW_TO_SIGN_IN}"
        if code in ("AccessDenied", "403"):
            return "access denied; these credentials need to list, read, write and delete under this prefix"
        if code == "RequestTimeTooSkewed":
            return "this machine's clock is not the server's; set it"
        return f"the server answers {code}; is it an S3 server, and well?"


Place = Folder | Bucket


def _parse_s3(uri: str, parsed: SplitResult) -> Bucket:
    if {"@", ":"} & set(parsed.netloc):
        raise UserError(f"s3://...: a bucket's name holds no @ and no :, a URI no credentials; {HOW_TO_SIGN_IN}")
    uri = _bare(uri)
    prefix = parsed.path.strip("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}", parsed.netloc) or parsed.fragment:
        raise UserError(f"{uri}: not a bucket and a prefix; give s3://bucket/prefix")
    if not prefix or {"", ".", ".."} & set(prefix.split("/")):
        raise UserError(f"{uri}: a store needs a plain prefix of its own; give s3://{parsed.netloc}/my-store")
    options = dict(parse_qsl(parsed.query, keep_blank_values=True))
    # Values of unknown keys stay out of the message: they may be secrets.
    if unknown := sorted(options.keys() - {"endpoint", "path_style", "region"}):
        raise UserError(f"{uri}: unknown {', '.join(unknown)}; a URI may say endpoint, path_style and region")
    if (path_style := options.get("path_style")) not in (None, "true", "false"):
        raise UserError(f"{uri}: path_style is true or false")
    if not re.fullmatch(r"[A-Za-z0-9-]+", options.get("region", "none")):
        raise UserError(f"{uri}: region is a name such as eu-west-1")
    endpoint = options.get("endpoint", "http://none").rstrip("/")
    if not re.fullmatch(r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?", endpoint):
        raise UserError(f"{uri}: endpoint is http:// or https://, a host and a port, no more; {HOW_TO_SIGN_IN}")
    return Bucket(
        name=parsed.netloc,
        prefix=prefix,
        endpoint=endpoint if "endpoint" in options else None,
        path_style=None if path_style is None else path_style == "true",
        region=options.get("region"),
    )


def _bare(uri: str) -> str:
    """The URI without what may be a secret: what is before an @, and the options."""
    return re.sub(r"(?<=:)(//)?.*@", r"\1", uri.partition("?")[0])


def _absolute(path: str) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except RuntimeError as error:  # ~nobody
        raise UserError(f"{path}: {error}") from None


@functools.lru_cache(maxsize=16)  # making one takes a quarter of a second
def _client(bucket: Bucket) -> Any:
    session = boto3.Session()
    if session.get_credentials() is None:
        raise UserError(f"{bucket.uri}: no S3 credentials found; {HOW_TO_SIGN_IN}")
    style = None if bucket.path_style is None else {"addressing_style": "path" if bucket.path_style else "virtual"}
    # In the worst case 15 seconds: a user's mistake is told before Icechunk goes on trying for half a minute.
    retries = {"mode": "standard", "total_max_attempts": 3}
    patience = Config(connect_timeout=3, read_timeout=4, retries=retries, s3=style)
    return session.client("s3", endpoint_url=bucket.endpoint, region_name=bucket.region, config=patience)


def _credentials() -> icechunk.S3StaticCredentials:
    """What boto3 finds now. Icechunk pickles this function by its name and calls it where, and when, it needs them."""
    found = boto3.Session().get_credentials()
    if found is None:
        raise UserError(f"no S3 credentials found; {HOW_TO_SIGN_IN}")
    now = found.get_frozen_credentials()
    # boto3 renews what has less than ten minutes left, so these last for eight.
    expiry = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=8)
    return icechunk.S3StaticCredentials(now.access_key, now.secret_key, now.token, expiry)
