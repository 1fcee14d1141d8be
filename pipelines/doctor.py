"""``uwm doctor``: what of this machine the verbs can use, and how to mend the rest.

Nothing heavy is imported: versions come from the installed metadata. A check is *needed* if the verbs cannot work
without it, or if the environment names something (an MLflow server, a Ray cluster) that does not answer.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from pipelines.outputs import check_writable
from preprocessing.cache import cache_folder
from preprocessing.errors import UserError

PROJECT = "unified-world-models"
EXTRAS = ("ingest", "train", "serve", "sim", "text")
SECONDS = 3.0  # to wait for an answer
GIGABYTE = 10**9


@dataclass(frozen=True)
class Symptom:
    """One line of the answer; ``mend`` says what to do unless it is right."""

    what: str
    state: Literal["ok", "missing", "wrong"]  # missing: some verbs cannot be used; wrong: needed
    found: str
    mend: str = ""


def examine() -> list[Symptom]:
    """Return everything that was looked at, in the order to mend it."""
    return [*_python(), *_extras(), *_ray(), _gpu(), _rendering(), _video(), _cache(), _memory(), _mlflow(), *_s3()]


def _python() -> Iterator[Symptom]:
    here = ".".join(map(str, sys.version_info[:3]))
    wanted = "3.11, 3.12 or 3.13"
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Symptom("python", "ok" if fits else "wrong", f"{here}, {sys.executable}", "" if fits else f"use {wanted}")
    lacking = _lacking(PROJECT, None)
    yield Symptom(
        "project",
        "wrong" if lacking else "ok",
        f"{metadata.version(PROJECT)}, torch {_version('torch')}" + (f"; lacks {_some(lacking)}" if lacking else ""),
        f"pip install '{PROJECT}'" if lacking else "",
    )


def _extras() -> Iterator[Symptom]:
    for extra in EXTRAS:
        lacking = _lacking(PROJECT, extra)
        found = f"lacks {_some(lacking)}" if lacking else "installed"
        mend = f"pip install '{PROJECT}[{extra}]'" if lacking else ""
        yield Symptom(f"extra {extra}", "missing" if lacking else "ok", found, mend)


def _ray() -> Iterator[Symptom]:
    if not (version := _version("ray")):
        return
    uses = {"data": "ingest", "train": "training", "default": "Ray's dashboard and jobs"}
    lacking = [f"{extra}, for {use} ({_some(gone)})" for extra, use in uses.items() if (gone := _lacking("ray", extra))]
    found = version + (f"; lacks {'; '.join(lacking)}" if lacking else " with data, train, default")
    mend = f"pip install 'ray[data,train,default]=={version}'" if lacking else ""
    yield Symptom("ray", "missing" if lacking else "ok", found, mend)
    if address := os.environ.get("RAY_ADDRESS"):
        host, _, port = address.removeprefix("ray://").rpartition(":")
        failure = None if address in ("auto", "local") else _unreachable(host, port)
        mend = "start the cluster, or unset RAY_ADDRESS" if failure else ""
        yield Symptom("ray cluster", "wrong" if failure else "ok", f"{address}{failure or ''}", mend)


def _gpu() -> Symptom:
    program, torch = shutil.which("nvidia-smi"), _version("torch")
    try:
        asked = [program or "nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        listed = subprocess.run(asked, capture_output=True, text=True, timeout=SECONDS, check=True).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return Symptom(
            "gpu", "missing", "none found", "if there is one: install NVIDIA's driver; CPUs train small models"
        )
    found = "; ".join(name for name in listed if name)
    if "+cpu" in torch:
        return Symptom("gpu", "wrong", f"{found}, but torch is {torch}", "pip install --force-reinstall torch")
    return Symptom("gpu", "ok", found)


def _rendering() -> Symptom:
    backend = os.environ.get("MUJOCO_GL", "egl")
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError:
        return Symptom("rendering", "missing", "no libEGL.so.1", "apt install libegl1 libgl1 libgl1-mesa-dri")
    return Symptom("rendering", "ok", f"EGL, MUJOCO_GL={backend}")


def _video() -> Symptom:
    try:
        import av
    except ImportError as error:
        return Symptom("video", "missing", f"PyAV does not load ({error})", f"pip install '{PROJECT}[ingest]'")
    lacking = sorted({"h264", "hevc", "av1", "vp9"} - {name.lower() for name in av.codecs_available})
    version = ".".join(map(str, av.library_versions["libavcodec"]))
    found = f"PyAV {av.__version__}, libavcodec {version}" + (f"; lacks {_some(lacking)}" if lacking else "")
    return Symptom(
        "video", "missing" if lacking else "ok", found, "pip install --force-reinstall av" if lacking else ""
    )


def _cache() -> Symptom:
    folder = cache_folder()
    mend = "set UWM_CACHE to a folder on a disk with space"
    try:
        check_writable(folder, "UWM_CACHE")
    except UserError as error:
        return Symptom("cache", "wrong", str(error), mend)
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
    found = f"{folder}, {free / GIGABYTE:.0f} GB free"
    return Symptom("cache", "ok", found) if free > GIGABYTE else Symptom("cache", "wrong", found, mend)


def _memory() -> Symptom:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{os.cpu_count()} cores, {total / GIGABYTE:.0f} GB"
    shared = Path("/dev/shm")
    size = shutil.disk_usage(shared).total if shared.is_dir() else 0
    found += f", {size / GIGABYTE:.1f} GB of it for /dev/shm"
    if size < GIGABYTE:
        return Symptom("memory", "missing", found, "Ray is slow: docker run --shm-size=8g")
    return Symptom("memory", "ok", found)


def _mlflow() -> Symptom:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not _version("mlflow"):
        return Symptom("mlflow", "missing", "not installed", f"pip install '{PROJECT}[train]'")
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        port = str(parts.port or (443 if parts.scheme == "https" else 80))
        failure = _unreachable(parts.hostname or "", port)
        shown = f"{parts.scheme}://{parts.hostname}:{port}"  # without a password
        mend = "start it, or mend MLFLOW_TRACKING_URI" if failure else ""
        return Symptom("mlflow", "wrong" if failure else "ok", f"{shown}{failure or ''}", mend)
    if uri and parts.scheme != "sqlite":
        return Symptom("mlflow", "ok", f"{parts.scheme or 'file'}:..., not asked")
    database = Path(uri.removeprefix("sqlite:///") or "mlflow.db").absolute()
    try:
        check_writable(database.parent, "MLFLOW_TRACKING_URI")
    except UserError as error:
        return Symptom("mlflow", "wrong", str(error), "set MLFLOW_TRACKING_URI")
    return Symptom("mlflow", "ok", f"{database}{'' if database.exists() else ', made by the first run'}")


def _s3() -> Iterator[Symptom]:
    """Look only if something points to S3: the environment, or a file of credentials."""
    asked = {"AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"} & set(os.environ)
    if not asked and not (Path.home() / ".aws").is_dir():
        return
    try:
        from botocore.session import Session
    except ImportError:
        yield Symptom("s3", "missing", "boto3 is not installed", f"pip install '{PROJECT}[ingest]'")
        return
    session = Session()
    try:
        credentials = session.get_credentials()
        method = credentials.method if credentials else ""
    except Exception as error:  # whatever a broken profile raises
        credentials, method = None, ""
        why = str(error)
    else:
        why = "no credentials"
    mend = "" if credentials else "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    yield Symptom("s3", "ok" if credentials else "wrong", f"credentials from {method}" if credentials else why, mend)
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        parts = urlsplit(endpoint)
        failure = _unreachable(parts.hostname or "", str(parts.port or (443 if parts.scheme == "https" else 80)))
        mend = "start it, or mend AWS_ENDPOINT_URL" if failure else ""
        yield Symptom("s3 endpoint", "wrong" if failure else "ok", f"{endpoint}{failure or ''}", mend)


def _unreachable(host: str, port: str) -> str | None:
    """Return why nothing answers there, None if something does."""
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS).close()
    except (OSError, OverflowError, ValueError) as error:
        return f": no answer ({error})"
    return None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _lacking(package: str, extra: str | None) -> list[str]:
    """Return the requirements of a package, or of one of its extras, that are not installed, or not in that version."""
    lacking = []
    for line in metadata.requires(package) or []:
        wanted = Requirement(line)
        if extra is None and "extra" in str(wanted.marker or ""):
            continue
        if extra is not None and not (wanted.marker and "extra" in str(wanted.marker)):
            continue
        if wanted.marker and not wanted.marker.evaluate({"extra": extra or ""}):
            continue
        if wanted.name.lower().replace("_", "-") == package:  # an extra of extras
            continue
        if not wanted.specifier.contains(_version(wanted.name) or "0", prereleases=True) or not _version(wanted.name):
            lacking.append(f"{wanted.name}{wanted.specifier}")
    return lacking


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
