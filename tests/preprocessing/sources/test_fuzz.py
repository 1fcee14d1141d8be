"""Damaged data sets are read or refused with a reason, in bounded memory and time.

One process per format repeatedly damages a small data set and reads it as an ingest does. Its limits are low, so that
its memory use shows whether they hold. Whatever kills or stops it fails the test, which reports the damage. Set
UWM_FUZZ_EXAMPLES=2000 for a longer search.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
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
from preprocessing.sources import find, load, scan

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

    def video_writer(suffix: str, codec: str = "libx264", pix_fmt: str = "yuv420p") -> Callable[[Path], object]:
        return lambda where: write_video(where / f"a.{suffix}", images, codec=codec, pix_fmt=pix_fmt)

    writers: dict[str, Callable[[Path], object]] = {
        "rlds": lambda where: write_rlds(where, [rlds_episode()] * 2),
        "lerobot_v2": lambda where: write_lerobot(where, rows=6, episodes=1),
        "lerobot_v3": lerobot_v3,
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
    }
    folder.mkdir()
    writers[name](folder)


FORMATS = ["rlds", "lerobot_v2", "lerobot_v3", "hdf5", "aloha", "droid", "bridge", "calvin", "mcap", "bag2"]
FORMATS += ["bag1", "zarr", "zarr_zip", "webdataset", "mp4", "mkv", "avi", "ts", "gif", "simulators"]
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


def read(folder: Path) -> int:
    """How many episodes are read completely."""
    try:
        found = find(folder)
    except UserError:  # no format is recognised any more
        return 0
    whole = 0
    for ref in (ref for format, path in found for ref in scan(format, path)):
        try:
            for video in load(ref).cameras.values():
                for _ in video.frames(32):
                    pass
            whole += 1
        except BadEpisode as error:
            assert str(error).strip(), "refused without a reason"
    return whole


def attack(name: str, top: Path) -> None:
    limits.use(limits.Limits(picture_pixels=2**20, array_bytes=2**26, episode_steps=10**4))
    write(name, top / "whole")
    assert read(top / "whole") > 0
    usual = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (HARD_LIMIT, HARD_LIMIT))

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(EDITS)
    def once(edits: list[tuple[int, int, str, bytes]]) -> None:
        (top / "last").write_text(repr(edits))
        shutil.copytree(top / "whole", top / "hurt")
        damage(sorted(path for path in (top / "hurt").rglob("*") if path.is_file()), edits)
        signal.alarm(SECONDS)
        try:
            read(top / "hurt")
        finally:
            signal.alarm(0)
            shutil.rmtree(top / "hurt")

    once()
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - usual) / 1024
    assert more < MORE_MEMORY, f"{more:.0f} MiB more than undamaged data take"


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_bytes_cost_only_their_episode(name: str, tmp_path: Path) -> None:
    command, path = [sys.executable, __file__, name, str(tmp_path)], os.pathsep.join(sys.path)
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    last = (tmp_path / "last").read_text() if (tmp_path / "last").exists() else "none"
    assert done.returncode == 0, f"exit {done.returncode} after the damage {last}\n{done.stderr[-4000:]}"


if __name__ == "__main__":
    attack(sys.argv[1], Path(sys.argv[2]))
