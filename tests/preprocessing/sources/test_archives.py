"""Zip and tar files: the same episodes as the folder they were made of, and nothing that a hostile one asks for."""

from __future__ import annotations

import io
import os
import resource
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.formats import numbered, write_demos, write_lerobot, write_video
from helpers.readers import frames_of, refs_of
from test_fuzz import FORMATS, write

import preprocessing.cache
from preprocessing.episode import EpisodeRef
from preprocessing.errors import BadEpisode, UserError
from preprocessing.sources import digest, episodes, load, scan_cache, survey
from preprocessing.sources.untrusted import archives


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UWM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two films."""
    folder = tmp_path_factory.mktemp("films")
    write_video(folder / "a.mp4", numbered(3, 32))
    write_video(folder / "b.mp4", numbered(4, 32))
    return folder


def pack(folder: Path, kind: str) -> Path:
    """``folder`` as an archive beside it, which holds its files without the folder's name."""
    name = {".zip": "zip", ".tar": "tar", ".tar.gz": "gztar", ".tar.bz2": "bztar", ".tar.xz": "xztar"}[kind]
    return Path(shutil.make_archive(str(folder.with_name("packed")), name, folder))


def content(ref: EpisodeRef) -> dict[str, bytes]:
    episode = load(ref)
    arrays = {name: frames_of(episode, name, 32) for name in episode.cameras} | episode.proprio | episode.signals
    arrays["action"] = np.zeros(0) if episode.action is None else episode.action
    said = {"said": repr((episode.repairs, episode.texts, episode.fps, episode.embodiment)).encode()}
    return {name: values.tobytes() for name, values in arrays.items()} | said


def listed(path: Path) -> list[EpisodeRef]:
    """The episodes at a path, and what is quarantined."""
    return [ref for _, ref in episodes(survey(path), lambda _: None)]


def problems(path: Path) -> list[str | None]:
    return [ref.problem for ref in listed(path)]


@pytest.mark.parametrize("name", FORMATS)
def test_an_archive_holds_the_episodes_of_its_folder(tmp_path: Path, name: str) -> None:
    write(name, tmp_path / "raw")
    plain = listed(tmp_path / "raw")
    contents = [content(ref) for ref in plain]
    for kind in (".zip", ".tar.gz"):
        archive = pack(tmp_path / "raw", kind)
        packed = listed(archive)
        assert [(ref.id, ref.index) for ref in packed] == [(ref.id, ref.index) for ref in plain]
        assert [content(ref) for ref in packed] == contents
        assert [digest(ref) for ref in packed] == [ref.digest for ref in plain]
        if (name, kind) != ("zarr", ".zip"):  # a zipped buffer is read where it is
            assert [ref.uri for ref in packed] == [ref.uri.replace(f"{tmp_path}/raw/", f"{archive}!/") for ref in plain]


def test_data_sets_of_several_formats_and_the_tar_that_is_no_webdataset(tmp_path: Path, films: Path) -> None:
    write_lerobot(tmp_path / "all" / "robot", rows=3)
    write_demos(tmp_path / "all" / "more" / "a.hdf5")
    plain = refs_of(tmp_path / "all")
    assert {ref.id for ref in refs_of(pack(tmp_path / "all", ".tar"))} == {ref.id for ref in plain}
    shutil.copytree(films, tmp_path / "all" / "films")
    assert [ref.format for ref in refs_of(pack(tmp_path / "all", ".zip"))] == ["video"] * 2 + [
        ref.format for ref in plain
    ]
    assert [ref.format for ref in refs_of(pack(films, ".tar"))] == ["webdataset"] * 2


@pytest.mark.parametrize("kind", [".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip"])
def test_a_cut_or_damaged_archive_is_refused_as_a_whole(tmp_path: Path, films: Path, kind: str) -> None:
    file = tmp_path / f"set{kind}"
    if kind == ".tar.zst":
        with pa.output_stream(file, compression="zstd") as stream:
            stream.write(shutil.move(pack(films, ".tar"), tmp_path / "plain").read_bytes())
        (tmp_path / "plain").unlink()
    else:
        shutil.move(pack(films, kind), file)
    expected = [ref.id for ref in refs_of(films)]
    assert [ref.id for ref in refs_of(file)] == expected
    whole = file.read_bytes()
    for number in range(1, 12):
        at = len(whole) * number // 12
        file.write_bytes(whole[:at])
        [problem] = problems(file)
        assert problem and "is damaged or cut" in problem and "copy or download it again" in problem
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :])
        refs = listed(file)
        unchecked = kind == ".tar.zst"  # as pyarrow writes it, without checksums
        assert [ref.id for ref in refs] == expected or (len(refs) == 1 and refs[0].problem) or unchecked, refs


def tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for info, data in members:
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def entry(name: str, type: bytes = tarfile.REGTYPE, linkname: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = type, linkname, size
    return info


def zipped(path: Path, *members: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members:
            file.writestr(name, data)
    return path


HOSTILE: dict[str, Callable[[Path, bytes], Path]] = {
    "holds 'x/../../a.mp4', a name that leads out": lambda to, film: zipped(to / "a.zip", ("x/../../a.mp4", film)),
    "holds '../a.mp4', a name that leads out of it": lambda to, film: tar(to / "a.tgz", (entry("../a.mp4"), film)),
    "holds 'a.mp4' twice; unpack it yourself": lambda to, film: tar(to / "a.tgz", *[(entry("a.mp4"), film)] * 2),
    "holds 'x' as a file and as a folder": lambda to, film: tar(
        to / "a.tgz", (entry("x", tarfile.SYMTYPE, ".."), b""), (entry("x/a.mp4"), film)
    ),
    "would unpack to 1100 GB, more than 200 times": lambda to, film: write_bytes(
        to / "a.tgz", entry("a.mp4", size=11 * 10**11).tobuf()
    ),
    "would unpack to 2 GB, more than 200 times its own size; if it is no zip bomb": lambda to, film: bomb(to / "a.zip"),
    "is encrypted; unpack it yourself": lambda to, film: encrypted(to / "a.zip", film),
    "a.zip is empty": lambda to, film: write_bytes(to / "a.zip", b""),
    "is a Git LFS pointer; .*git lfs pull": lambda to, film: write_bytes(
        to / "a.tar.gz", b"version https://git-lfs.github.com/spec/v1"
    ),
    "is damaged or cut .File is not a zip file": lambda to, film: write_bytes(to / "a.zip", b"<html>"),
    "continues after its end mark, like joined tar files": lambda to, film: joined(to / "a.tgz", film),
    "the end mark is missing": lambda to, film: write_bytes(to / "a.tgz", entry("a.mp4").tobuf()),
    "an archive in an archive; unpack the outer one yourself": lambda to, film: zipped(to / "a.zip", ("b.zip", b"")),
}


@pytest.mark.parametrize("says", HOSTILE)
def test_a_hostile_archive_is_refused_with_a_reason(tmp_path: Path, films: Path, says: str) -> None:
    file = HOSTILE[says](tmp_path, (films / "a.mp4").read_bytes())
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    [ref] = listed(file)
    with pytest.raises(BadEpisode, match=says) as told:
        load(ref)
    assert "\n" not in str(told.value) and str(tmp_path / "cache") not in str(told.value)
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def bomb(path: Path) -> Path:
    """Four members that claim a gigabyte each."""
    whole = zipped(path, *((f"{name}.mp4", b"zero") for name in "abcde")).read_bytes()
    claimed = whole.replace(
        (4).to_bytes(4, "little") * 2, (4).to_bytes(4, "little") + (2**30 - 1).to_bytes(4, "little")
    )
    return write_bytes(path, claimed)


def encrypted(path: Path, film: bytes) -> Path:
    whole = bytearray(zipped(path, ("a.mp4", film)).read_bytes())
    whole[6] |= 1
    whole[whole.rindex(b"PK\1\2") + 8] |= 1
    return write_bytes(path, bytes(whole))


def joined(path: Path, film: bytes) -> Path:
    part = tar(path, (entry("a.mp4"), film)).read_bytes()
    return write_bytes(path, part + part)


def test_odd_members_are_left_out_or_mended(tmp_path: Path, films: Path) -> None:
    film, other = ((films / name).read_bytes() for name in ("a.mp4", "b.mp4"))
    file = tar(
        tmp_path / "a.tgz",
        (entry("/absolute/a.mp4"), film),
        (entry("absolute/" + os.fsdecode(b"\xb2\xe2.mp4")), other),
        (entry("__MACOSX/a.mp4"), b"a resource fork"),
        (entry("absolute/._a.mp4"), b"a resource fork"),
        (entry("out", tarfile.SYMTYPE, str(films)), b""),
        (entry("up", tarfile.SYMTYPE, "up/../.."), b""),
        (entry("device.mp4", tarfile.CHRTYPE), b""),
        (entry("pipe.mp4", tarfile.FIFOTYPE), b""),
        (entry("links/same.mp4", tarfile.LNKTYPE, "absolute/a.mp4"), b""),
        (entry("links/folder", tarfile.SYMTYPE, "../absolute"), b""),
    )
    refs = refs_of(file)
    assert {ref.uri.removeprefix(f"{file}!/") for ref in refs} >= {
        "absolute/a.mp4", "absolute/\udcb2\udce2.mp4", "links/same.mp4",
    }  # fmt: skip
    assert {ref.id for ref in refs} == {ref.id for ref in refs_of(films)}
    assert len(frames_of(load(refs[0]), "video")) == 3
    windows = zipped(tmp_path / "b.zip", ("deep/a.mp4", film))
    whole = windows.read_bytes().replace(b"deep/a.mp4", b"deep\\a.mp4")
    at = whole.rindex(b"PK\1\2")
    write_bytes(windows, whole[: at + 5] + b"\0" + whole[at + 6 :])  # made on Windows
    assert [ref.uri for ref in refs_of(windows)] == [f"{windows}!/deep/a.mp4"]


def test_an_archive_without_data_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no known format"):
        refs_of(zipped(tmp_path / "a.zip", ("README.md", b"raw logs")))


def test_an_unchanged_archive_is_neither_read_nor_unpacked_again(
    tmp_path: Path, films: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_cache, "AT_REST", 0)
    file = shutil.move(pack(films, ".zip"), tmp_path / "films.zip")
    before = refs_of(file)
    shutil.rmtree(cache / "shards")
    with monkeypatch.context() as patch:
        patch.setattr(archives, "_members", None)
        assert refs_of(file) == before
    assert [len(frames_of(load(ref), "video")) for ref in before] == [3, 4]  # unpacked again
    [unpacked] = (cache / "shards").glob("archive-*")

    shutil.copy(file, tmp_path / "copy")
    (tmp_path / "copy").replace(file)  # another file of the same bytes
    assert refs_of(file) == before and list((cache / "shards").glob("archive-*")) == [unpacked]
    zipped(file, ("a.mp4", (films / "a.mp4").read_bytes()), ("b.mp4", (films / "a.mp4").read_bytes() + b"more"))
    assert digest(before[0]) == before[0].digest and digest(before[1]) != before[1].digest
    zipped(file, ("a.mp4", (films / "a.mp4").read_bytes()))
    with pytest.raises(BadEpisode, match="its file was deleted"):
        digest(before[1])
    file.unlink()
    with pytest.raises(BadEpisode, match="its file was deleted"):
        digest(before[0])


def test_the_cache_is_bounded_and_keeps_what_is_used(
    tmp_path: Path, films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(film.stat().st_size for film in films.iterdir())
    monkeypatch.setattr(preprocessing.cache, "PATIENCE", 0.1)
    monkeypatch.setenv("UWM_CACHE_GB", str(1.5 * size / 1e9))
    one = shutil.move(pack(films, ".zip"), tmp_path / "one.zip")
    two = shutil.copy(one, tmp_path / "two.zip")
    refs = [*refs_of(one), *refs_of(two)]
    assert [ref.problem for ref in refs] == [None] * 4
    frames = load(refs[0]).cameras["video"].frames(32)
    next(frames)
    with pytest.raises(BadEpisode, match=r"no room for .* GB more.*raise UWM_CACHE_GB"):
        load(refs[2])
    frames.close()  # type: ignore[attr-defined]
    assert len(frames_of(load(refs[2]), "video")) == 3
    monkeypatch.setenv("UWM_CACHE_GB", str(0.5 * size / 1e9))
    with pytest.raises(BadEpisode, match=r"one.zip unpacks to .* GB, and .*shards may take .*; raise UWM_CACHE_GB, or"):
        load(refs[0])


def test_a_full_disk_is_told_in_a_line_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    file = zipped(tmp_path / "a.zip", ("a.mp4", bytes(300_000)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        [problem] = problems(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert problem and problem.startswith(
        f"a.zip cannot be unpacked in {cache}/shards: File too large; free some space"
    )
    assert not list((cache / "shards").glob("archive*"))
    assert problems(file) != [problem]


def test_messages_name_the_archive_not_the_cache(tmp_path: Path, cache: Path) -> None:
    write_lerobot(tmp_path / "raw", rows=3, episodes=2)
    next((tmp_path / "raw").rglob("episode_000001.mp4")).unlink()
    (tmp_path / "raw" / "more").mkdir()
    told = problems(pack(tmp_path / "raw", ".zip"))
    (tmp_path / "raw" / "meta" / "info.json").write_text("{")
    told += problems(pack(tmp_path / "raw", ".zip"))
    assert len(told) == 3 and told[0] is None and all(told[1:])
    assert not any(str(cache) in str(problem) for problem in told)
