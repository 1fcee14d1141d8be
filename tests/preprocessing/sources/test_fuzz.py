"""Damaged data sets are read or refused with a reason, in bounded memory and time.

One process per format repeatedly damages a small data set and reads it as an ingest does: any of its bytes, or the
values in its metadata. Its limits are low, so that its memory use shows whether they hold. Whatever kills or stops it
fails the test, which reports the damage. Set UWM_FUZZ_EXAMPLES=2000 for a longer search.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers.formats import (
    as_lerobot_v3,
    jpeg,
    numbered,
    rlds_episode,
    write_aloha,
    write_calvin,
    write_demos,
    write_lerobot,
    write_maniskill,
    write_minari,
    write_pictures,
    write_rlds,
    write_robotwin,
    write_video,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bridge import toy as raw_bridge
from test_droid import place, toy
from test_replay_buffer import pusht, repacked
from test_ros import scene, write_bag1, write_bag2, write_mcap
from test_webdataset import shard

from preprocessing import limits
from preprocessing.errors import BadEpisode, UserError
from preprocessing.sources import episodes, load, survey

EXAMPLES = int(os.environ.get("UWM_FUZZ_EXAMPLES", "40"))
SECONDS = 20  # per data set; the slowest take one
MORE_MEMORY = 256  # MiB, besides what reading the undamaged data set takes
HARD_LIMIT = 4 * 2**30  # bytes of address space; larger allocations fail


def write(name: str, folder: Path) -> None:
    images = numbered(4, 32)

    def lerobot_v3(where: Path) -> None:
        write_lerobot(where.with_name("v2"), rows=6, episodes=2)
        as_lerobot_v3(where.with_name("v2"), where)

    def zipped(where: Path) -> None:
        repacked(pusht(images, [2, 4], where.with_name("open.zarr"))[0], where / "a.zarr.zip")

    def tar(where: Path) -> None:
        video = write_video(where / "video.mp4", images).read_bytes()
        stills = {f"b.{i}.jpg": jpeg(image) for i, image in enumerate(images)}
        shard(where / "a.tar", {"a.json": b'{"caption": "x"}', "a.mp4": video} | stills)
        (where / "video.mp4").unlink()

    def simulators(where: Path) -> None:
        write_maniskill(where / "a.h5", images[:3])
        write_minari(where / "a", images[:3])
        write_robotwin(where / "b", images[:3])

    def packed(kind: str) -> Callable[[Path], object]:
        def write(where: Path) -> None:
            inside = where.with_name("inside")
            write_demos(inside / "robot" / "a.hdf5", demos=1, steps=3)
            write_video(inside / "a.mp4", images)
            shutil.make_archive(str(where / "a"), kind, inside)

        return write

    def video_writer(suffix: str, codec: str = "libx264", pix_fmt: str = "yuv420p") -> Callable[[Path], object]:
        return lambda where: write_video(where / f"a.{suffix}", images, codec=codec, pix_fmt=pix_fmt)

    writers: dict[str, Callable[[Path], object]] = {
        "rlds": lambda where: write_rlds(where, [rlds_episode()] * 2),
        "lerobot_v2": lambda where: write_lerobot(where, rows=6, episodes=1),
        "lerobot_v3": lerobot_v3,
        "pictures": lambda where: write_pictures(where / "a"),
        "hdf5": lambda where: write_demos(where / "a.hdf5", demos=1),
        "simulators": simulators,
        "aloha": lambda where: write_aloha(where / "a.hdf5", images, compress=True),
        "droid": lambda where: toy(3, size=16).write(place(where)),
        "bridge": lambda where: raw_bridge(where, steps=3),
        "calvin": lambda where: write_calvin(where / "a", images, sentences={(358482, 358484): "push"}),
        "mcap": lambda where: write_mcap(where / "a.mcap", scene()),
        "bag2": lambda where: write_bag2(where / "a", scene()),
        "bag1": lambda where: write_bag1(where / "a.bag", scene()),
        "zarr": lambda where: pusht(images, [2, 4], where / "a.zarr"),
        "zarr_zip": zipped,
        "webdataset": tar,
        "mp4": video_writer("mp4"),
        "mkv": video_writer("mkv"),
        "avi": video_writer("avi", "mjpeg", "yuvj420p"),
        "ts": video_writer("ts"),
        "gif": video_writer("gif", "gif", "rgb8"),
        "zip": packed("zip"),
        "tar.gz": packed("gztar"),
    }
    folder.mkdir()
    writers[name](folder)


FORMATS = ["rlds", "lerobot_v2", "lerobot_v3", "hdf5", "aloha", "droid", "bridge", "calvin", "mcap", "bag2"]
FORMATS += ["bag1", "zarr", "zarr_zip", "webdataset", "mp4", "mkv", "avi", "ts", "gif", "simulators"]
ARCHIVES = ["zip", "tar.gz"]
WITH_METADATA = ["rlds", "lerobot_v3", "pictures", "droid", "bag2", "zarr"]
NUMBERS = [(2**31 - 1).to_bytes(4, "little"), (2**40).to_bytes(8, "little"), (2**40).to_bytes(8, "big")]
HOSTILE = [*NUMBERS, b"\xff" * 8, b"\0" * 8, b"-1", b"9" * 12]
EDITS = st.lists(
    st.tuples(
        st.integers(0, 999),  # which file
        st.integers(0, 255) | st.integers(0, 2**24),  # where: headers come first
        st.sampled_from(["replace", "insert", "delete", "cut"]),
        st.binary(min_size=1, max_size=8) | st.sampled_from(HOSTILE),
    ),
    min_size=1,
    max_size=4,
)


def damage(files: list[Path], edits: list[tuple[int, int, str, bytes]]) -> None:
    for which, at, how, data in edits:
        file = files[which % len(files)]
        whole = bytearray(file.read_bytes())
        at %= max(1, len(whole))
        if how == "cut":
            del whole[at:]
        else:
            whole[at : at if how == "insert" else at + len(data)] = b"" if how == "delete" else data
        file.write_bytes(whole)


VALUES = [
    None,
    True,
    0,
    -1,
    2**63,
    10**30,
    0.5,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "7",
    "\ud800",
    "../../x",
    "/",
    "*",
]
VALUES += ["{episode_index:99999999d}", "x" * 5000, "9" * 5000, [], {}, [[]], [None], {"a": None}, {"bytes": None}]
METADATA = (".json", ".jsonl", ".zarray", ".zgroup", ".yaml")
WRONG = st.tuples(
    st.integers(0, 999),  # which file
    st.lists(
        st.tuples(
            st.integers(0, 9999),  # which value
            st.sampled_from(["replace", "delete", "rename", "repeat"]),
            st.sampled_from(VALUES) | st.recursive(st.sampled_from(VALUES[:15]), st.lists, max_leaves=4),
        ),
        max_size=3,
    ),
    st.sampled_from(["", "utf-8-sig", "utf-16", "utf-32-be", "latin", "cut", "nul", "crlf", "deep", "twice"]),
)


def falsify(files: list[Path], wrong: tuple[int, list[tuple[int, str, object]], str]) -> None:
    """Change values in a file of metadata, and how it is written."""
    which, changes, dress = wrong
    metadata = [file for file in files if file.name.endswith(METADATA) or "meta/episodes" in str(file)]
    file = metadata[which % len(metadata)]
    if file.suffix == ".parquet":
        rows = pq.read_table(file).to_pylist()
        with suppress(pa.ArrowException, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            pq.write_table(pa.Table.from_pylist(_falsified(rows, changes)), file)  # what a table can hold
        return
    lines = file.suffix == ".jsonl"
    text = file.read_text()
    if file.suffix == ".yaml":
        written = yaml.safe_dump(_falsified(yaml.safe_load(text), changes))
    elif lines:
        whole = [_falsified(json.loads(line), changes) for line in text.splitlines()]
        written = "\n".join(map(json.dumps, whole))
    else:
        written = json.dumps(_falsified(json.loads(text), changes))
    data = written.encode(dress if dress.startswith("utf") else "utf-8", "replace")
    match dress:
        case "latin":
            data = data.replace(b"e", b"\xe9", 3)
        case "cut":
            data = data[: len(data) * 2 // 3]
        case "nul":
            data += b"\0" * 9
        case "crlf":
            data = data.replace(b"\n", b"\r\n") + b"\r\n \r\n"
        case "deep":
            data = data[:-1] + b', "deep": ' + b"[" * 99_999
        case "twice":
            data += b"\n" + data
    file.write_bytes(data)


def _falsified(root: Any, changes: list[tuple[int, str, object]]) -> Any:
    for which, how, value in changes:
        places: list[tuple[Any, Any]] = [*_places(root)]
        if not places:
            return value
        value = deepcopy(value)  # else it could end up within itself
        holder, key = places[which % len(places)]
        if how == "replace" or not isinstance(holder, dict):
            holder[key] = value
        elif how == "delete":
            del holder[key]
        elif how == "rename":
            holder[f"{value}"[:99]] = holder.pop(key)
        else:
            holder[key] = [holder[key]] * 3
    return root


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every value in nested lists and tables, as where it is."""
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from _places(node[key])


def read(folder: Path) -> int:
    """How many episodes are read completely."""
    try:
        refs = [ref for _, ref in episodes(survey(folder), lambda _: None)]
    except UserError:  # no format is recognised any more
        return 0
    whole = 0
    for ref in refs:
        try:
            for video in load(ref).cameras.values():
                for _ in video.frames(32):
                    pass
            whole += 1
        except BadEpisode as error:
            assert str(error).strip(), "refused without a reason"
    return whole


def attack(name: str, top: Path, wrong_values: bool = False) -> None:
    limits.use(limits.Limits(picture_pixels=2**20, array_bytes=2**26, episode_steps=10**4))
    write(name, top / "whole")
    assert read(top / "whole") > 0
    usual = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (HARD_LIMIT, HARD_LIMIT))

    @settings(
        max_examples=EXAMPLES // 2 if wrong_values else EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(WRONG if wrong_values else EDITS)
    def once(edits: Any) -> None:
        (top / "last").write_text(repr(edits))
        shutil.copytree(top / "whole", top / "hurt")
        try:
            files = sorted(path for path in (top / "hurt").rglob("*") if path.is_file())
            falsify(files, edits) if wrong_values else damage(files, edits)
            signal.alarm(SECONDS)
            read(top / "hurt")
        finally:
            signal.alarm(0)
            shutil.rmtree(top / "hurt")
            shutil.rmtree(top / "cache", ignore_errors=True)  # of archives

    once()
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - usual) / 1024
    assert more < MORE_MEMORY, f"{more:.0f} MiB more than undamaged data take"


@pytest.mark.parametrize("name", [*FORMATS, *ARCHIVES])
def test_damaged_bytes_cost_only_their_episode(name: str, tmp_path: Path) -> None:
    run_apart(name, tmp_path)


@pytest.mark.parametrize("name", WITH_METADATA)
def test_wrong_metadata_costs_only_its_data_set(name: str, tmp_path: Path) -> None:
    run_apart(name, tmp_path, "metadata")


def run_apart(name: str, tmp_path: Path, *how: str) -> None:
    command, path = [sys.executable, __file__, name, str(tmp_path), *how], os.pathsep.join(sys.path)
    environment = os.environ | {"PYTHONPATH": path, "UWM_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    last = (tmp_path / "last").read_text() if (tmp_path / "last").exists() else "none"
    assert done.returncode == 0, f"exit {done.returncode} after the damage {last}\n{done.stderr[-4000:]}"


if __name__ == "__main__":
    attack(sys.argv[1], Path(sys.argv[2]), sys.argv[3:] == ["metadata"])
