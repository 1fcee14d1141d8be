"""A second scan reads only what changed, and finds the same whatever happens to the cache."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import threading
import time
from itertools import count
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.formats import encode_example, numbered, write_demos, write_lerobot, write_rlds, write_video
from helpers.readers import refs_of

from preprocessing.sources import scan_cache as memory
from preprocessing.sources.scan_cache import Finding, file_digest, findings

FORMATS = ["video", "rlds", "lerobot", "hdf5"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("UWM_CACHE", str(folder))
    return folder / "scans.sqlite"


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is three seconds ahead, so files just written are old enough to be cached."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3 * 10**9)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for name in "abc":
        (tmp_path / name).write_text(name)
    return sorted(tmp_path.iterdir())


class RecordingReader:
    """Returns a file's digest, and records which files it read."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, file: Path) -> list[Finding]:
        self.read.append(file.name)
        return [Finding(file_digest(file), "empty" if file.stat().st_size == 0 else None)]


def read_by(files: list[Path], reader: str = "test") -> list[str]:
    """The files that a scan reads. Its findings are checked."""
    read = RecordingReader()
    found = list(findings(reader, files, read))
    assert [(file, finding.digest) for file, [finding] in found] == [(file, file_digest(file)) for file in files]
    return sorted(read.read)


def write(format: str, folder: Path) -> Path:
    """A data set of one format, and the file with most of its 100 kB."""
    match format:
        case "video":
            return _padded(write_video(folder / "a.mp4", numbered(3)))
        case "rlds":
            write_rlds(folder, [encode_example({"noise": [np.random.default_rng(0).bytes(100_000)]})])
            return next(folder.glob("*.tfrecord*"))
        case "lerobot":
            return _padded(next(write_lerobot(folder / "robot", episodes=1).rglob("*.mp4")))
        case _:
            return write_demos(folder / "a.hdf5", demos=1, steps=10)


def _padded(path: Path) -> Path:
    with path.open("ab") as file:
        file.write(bytes(100_000))
    return path


def change(format: str, file: Path) -> None:
    """Replace the content, keeping size and times."""
    before = file.stat()
    time.sleep(0.02)  # longer than a tick of the kernel's clock
    if format == "hdf5":
        with h5py.File(file, "a") as opened:
            opened["data/demo_0/actions"][3] += 1
    else:
        with file.open("r+b") as opened:
            opened.seek(-1000, os.SEEK_END)
            opened.write(b"changed")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


def bytes_read() -> int:
    """Bytes that this process has read, by any library."""
    return int(Path("/proc/self/io").read_text().split()[1])


def _scan_each(paths: list[Path], found: multiprocessing.Queue) -> None:
    for path in paths:
        before = bytes_read()
        refs = refs_of(path)
        found.put((refs, bytes_read() - before))


@pytest.mark.parametrize("format", FORMATS)
def test_a_second_scan_reads_no_file(tmp_path: Path, format: str) -> None:
    other, path = tmp_path / "other", tmp_path / "path"
    for folder in (other, path):
        folder.mkdir()
        write(format, folder)
    time.sleep(memory.AT_REST / 1e9)
    context = multiprocessing.get_context("spawn")  # a separate process: other tests' Ray and MLflow read files, too
    found = context.Queue()
    process = context.Process(
        target=_scan_each, args=([other, path, path], found)
    )  # scanning the other one does the imports
    process.start()
    _, (first, read), (second, read_again) = [found.get(timeout=60) for _ in range(3)]
    process.join()
    assert first == second and len(first) == 1
    assert read > 100_000 and read_again < 50_000  # detecting formats reads the files' first bytes


@pytest.mark.parametrize("format", FORMATS)
def test_a_change_that_keeps_size_and_time_is_noticed(tmp_path: Path, later: None, format: str) -> None:
    file = write(format, tmp_path)
    [before], [known] = refs_of(tmp_path), refs_of(tmp_path)
    change(format, file)
    [after] = refs_of(tmp_path)
    assert before.digest == known.digest != after.digest


def test_a_recent_file_is_read_again(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_by(files) == read_by(files) == ["a", "b", "c"]
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3 * 10**9)
    os.utime(files[1], ns=(now(), now() + 3 * 10**9))  # its mtime says that it was just written
    assert read_by(files) == ["a", "b", "c"]
    assert read_by(files) == ["b"]


def test_a_file_that_changes_while_it_is_read_is_read_again(files: list[Path], later: None) -> None:
    def read(file: Path) -> list[Finding]:
        digest = file_digest(file)
        if file.name == "b":
            before = file.stat()
            time.sleep(0.02)
            file.write_text("B")
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        return [Finding(digest)]

    found = list(findings("test", files, read))
    assert found[1][1][0].digest != file_digest(files[1])
    assert read_by(files) == ["b"]


def test_a_file_with_a_problem_is_read_again(files: list[Path], later: None) -> None:
    files[1].write_text("")
    assert read_by(files) == ["a", "b", "c"]
    assert read_by(files) == ["b"]


def test_a_file_that_cannot_be_opened_costs_no_other(files: list[Path], later: None) -> None:
    gone = files[0].parent / "gone"
    found = dict(findings("test", [files[0], gone, *files[1:]], RecordingReader()))
    assert found[gone][0].problem == "cannot be read: No such file or directory"
    assert [found[file] for file in files] == [[Finding(file_digest(file))] for file in files]
    assert read_by(files) == []


def test_each_reader_and_version_has_its_own_rows(
    files: list[Path], later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_by(files, "one") == read_by(files, "other") == ["a", "b", "c"]
    monkeypatch.setattr(memory, "VERSION", "next")
    assert read_by(files, "one") == ["a", "b", "c"]


def test_a_file_name_that_is_not_utf8_is_cached(tmp_path: Path, later: None) -> None:
    file = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    file.write_text("x")
    assert (len(read_by([file])), len(read_by([file]))) == (1, 0)


def test_findings_come_in_order_and_a_bounded_number_ahead(tmp_path: Path) -> None:
    def late(file: Path) -> list[Finding]:
        time.sleep(0.05 if file.name == "0" else 0)
        return [Finding(file.name)]

    for number in range(300):
        (tmp_path / str(number)).touch()
    endless = (tmp_path / str(number) for number in count())
    found = findings("test", endless, late)
    assert [next(found)[1] for _ in range(300)] == [[Finding(str(number))] for number in range(300)]
    found.close()
    assert int(next(endless).name) <= 300 + 2 * memory.LOOK_AHEAD


def test_files_are_read_in_parallel(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    together = threading.Barrier(3, timeout=10)

    def read(file: Path) -> list[Finding]:
        together.wait()  # times out unless all three are being read
        return [Finding(file.name)]

    assert [file for file, _ in findings("test", files, read)] == files


def test_findings_before_an_interruption_are_kept(files: list[Path], later: None) -> None:
    found = findings("test", files, RecordingReader())
    next(found)
    found.close()
    assert "a" not in read_by(files)


def test_a_damaged_cache_is_replaced(files: list[Path], later: None, cache: Path) -> None:
    for damage in (b"no database at all " * 100, b"SQLite format 3\0" + bytes(5000)):
        cache.write_bytes(damage)
        assert read_by(files) == ["a", "b", "c"]
        assert read_by(files) == []
    with sqlite3.connect(cache) as database:
        rows = [(os.urandom(40), "test", "", os.urandom(200).hex(), 10**6) for _ in range(200)]
        database.executemany("INSERT INTO findings VALUES (?, ?, ?, ?, ?)", rows)
    database.close()
    pages = bytearray(cache.read_bytes())
    pages[4096:] = os.urandom(len(pages) - 4096)
    cache.write_bytes(pages)
    assert read_by(files) == ["a", "b", "c"]
    assert read_by(files) == []


def test_a_locked_cache_does_not_stop_a_scan(
    files: list[Path], later: None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PATIENCE", 0.1)
    assert read_by(files[:1]) == ["a"]
    other = sqlite3.connect(cache, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert read_by(files) == ["a", "b", "c"]
    other.execute("COMMIT")
    other.execute("BEGIN IMMEDIATE")  # reading is possible, writing is not
    assert read_by(files) == ["b", "c"]
    other.execute("COMMIT")
    other.close()
    assert read_by(files) == ["b", "c"]
    assert read_by(files) == []


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none", "folder"])
def test_without_a_cache_folder_files_are_read(
    tmp_path: Path, files: list[Path], later: None, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder" / "scans.sqlite").mkdir(parents=True)
    monkeypatch.setenv("UWM_CACHE", str(tmp_path / place))
    assert read_by(files) == read_by(files) == ["a", "b", "c"]


def test_entries_unused_for_months_are_deleted(
    tmp_path: Path, files: list[Path], later: None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = files
    today = time.time()
    for days, seen in ((0, [a, b]), (70, [a]), (140, [c])):
        monkeypatch.setattr(time, "time", lambda days=days: today + days * 86400)
        list(findings("test", seen, RecordingReader()))
    with sqlite3.connect(cache) as database:
        kept = database.execute("SELECT path FROM findings ORDER BY path").fetchall()
    database.close()
    assert kept == [(bytes(a),), (bytes(c),)]


def _scan_together(files: list[Path], start: threading.Barrier, found: multiprocessing.Queue) -> None:
    start.wait(60)
    found.put(list(findings("test", files, RecordingReader())))


def test_concurrent_scans_find_and_cache_the_same(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(300)]
    for file in files:
        file.write_text(file.name)
    context = multiprocessing.get_context("spawn")
    start, found = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_scan_together, args=(files, start, found)) for _ in range(2)]
    time.sleep(memory.AT_REST / 1e9)  # before any of them reads the clock
    for process in processes:
        process.start()
    assert found.get(timeout=60) == found.get(timeout=60) == [(file, [Finding(file_digest(file))]) for file in files]
    for process in processes:
        process.join()
    assert read_by(files) == []
