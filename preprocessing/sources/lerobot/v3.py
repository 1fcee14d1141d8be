"""LeRobot v3.0: many episodes per file.

``meta/episodes/*/*.parquet`` has a row per episode: which data file holds its rows and, for each camera, which video
holds its frames and from which second on. ``meta/tasks.parquet`` holds the instructions. The layout:
https://huggingface.co/docs/lerobot/lerobot-dataset-v3.

An episode's digest covers its rows (except indices that change when data sets are merged), its instructions, and the
coded frames of its cameras. It does not change when other episodes are added to its files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocessing.episode import EpisodeRef, Repair
from preprocessing.errors import BadEpisode, UserError
from preprocessing.sources.lerobot.meta import SLACK, CameraVideo, Meta, is_text, texts_in, wrong_template
from preprocessing.sources.lerobot.pictures import named_files
from preprocessing.sources.scan_cache import Finding, file_digest, findings, overlaps
from preprocessing.video.decode import probe_video
from preprocessing.video.excerpts import excerpt, excerpt_digests

TABLE = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"  # the default, whatever info.json says
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
PLACE_IN_DATA_SET = {"index", "episode_index", "task_index"}  # columns that change when data sets are merged
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class VideoSpan:
    """The place of one camera's frames of one episode: frames ``[first, first + count)`` of a file."""

    path: Path
    first: int
    count: int


@dataclass(frozen=True)
class FilesV3:
    meta: Meta

    def scan(self) -> Iterator[EpisodeRef]:
        tables, videos, lost = dict[int, Path](), dict[int, dict[str, VideoSpan]](), dict[int, dict[str, str]]()
        problems = dict[int, str]()
        for index in self._episodes:
            try:
                tables[index] = self._table(index)[0]
                videos[index], _, lost[index] = self._spans(index)
            except BadEpisode as error:
                problems[index] = str(error)
        claimed = self._claimed_twice(videos)
        spans: dict[Path, list[VideoSpan]] = {}
        for span in (span for cameras in videos.values() for span in cameras.values()):
            spans.setdefault(span.path, []).append(span)
        for of_file in spans.values():
            of_file.sort(key=lambda span: span.first)
        rows = _by_file(findings("lerobot v3", dict.fromkeys(tables.values()), _read_table))
        frames = _by_file(
            findings(lambda video: _name(spans[video]), spans, lambda video: self._read_video(spans[video]))
        )

        for index in self._episodes:
            if index in problems:
                nothing = hashlib.sha256(f"{self.meta.root.name} {index} {problems[index]}".encode()).hexdigest()
                yield EpisodeRef(str(self.meta.root / "data"), "lerobot", index, nothing, problems[index])
                continue
            of_rows, of_cameras = _of_episode(index, rows(tables[index])), list[Finding]()
            for span in videos[index].values():
                of_video = frames(span.path)
                of_cameras.append(
                    of_video[spans[span.path].index(span) if len(of_video) == len(spans[span.path]) else 0]
                )
            problem = of_rows.problem or claimed.get(index)
            bad = [*(one.problem for one in of_cameras if one.problem), *lost[index].values()]
            if bad and len(bad) == len(of_cameras) + len(lost[index]) and not self.meta.cameras("image"):
                problem = problem or bad[0]
            named = map(file_digest, self._named_files(tables[index], index))
            digest = self._digest(index, (of_rows.digest, *(one.digest for one in of_cameras), *named))
            yield EpisodeRef(str(tables[index]), "lerobot", index, digest, problem)
        for path in dict.fromkeys(tables.values()):
            for number, digest in (one.digest.split(":") for one in rows(path) if not one.problem):
                if int(number) not in self._episodes:
                    problem = "it has rows, but meta/episodes does not list it: the recording was not finished"
                    yield EpisodeRef(str(path), "lerobot", int(number), digest, problem)

    def digest(self, ref: EpisodeRef) -> str:
        rows = _Rows()
        rows.add(self.rows(ref))
        videos = (self._read_video([span])[0].digest for span in self._spans(ref.index)[0].values())
        named = map(file_digest, self._named_files(Path(ref.uri), ref.index))
        return self._digest(ref.index, [rows.digests()[ref.index], *videos, *named])

    def rows(self, ref: EpisodeRef) -> pa.Table:
        return pq.read_table(ref.uri, filters=[("episode_index", "=", ref.index)])

    def videos(self, index: int) -> tuple[dict[str, CameraVideo], dict[str, str]]:
        spans, _, lost = self._spans(index)
        videos = dict[str, CameraVideo]()
        for camera, span in spans.items():
            [found] = self._read_video([span])
            if found.problem:
                lost[camera] = f"camera {camera}: {found.problem}"
            else:
                video = excerpt(span.path, span.first, span.count, self.meta.fps)
                videos[camera] = CameraVideo(video, span.count)
        return videos, lost

    def tasks(self) -> dict[int, str]:
        return self._tasks[0]

    def own_tasks(self, index: int) -> list[str]:
        return texts_in((self._episodes.get(index) or {}).get("tasks"))

    @cached_property
    def _tasks(self) -> tuple[dict[int, str], list[Repair]]:
        file = self.meta.root / "meta" / "tasks.parquet"
        if not file.is_file():
            return {}, []
        try:
            table = _table_of(file)
        except UserError:
            return {}, [Repair("instruction", "meta/tasks.parquet cannot be read; left out")]
        instructions = next((column for column in table.columns if is_text(column.type)), None)
        if instructions is None or "task_index" not in table.column_names:
            return {}, []
        return dict(zip(table["task_index"].to_pylist(), instructions.to_pylist(), strict=True)), []

    def repairs(self, index: int) -> list[Repair]:
        wrong = [self._table(index)[1], *self._spans(index)[1]]
        told = [
            Repair("frames", text) if " " in text else wrong_template(text, "found by default")
            for text in dict.fromkeys(wrong)
            if text
        ]
        return [*told, *self._tasks[1]]

    @cached_property
    def _episodes(self) -> dict[int, dict[str, Any]]:
        """The rows of meta/episodes by episode, without statistics."""
        folder = self.meta.root / "meta" / "episodes"
        rows, broken = list[dict[str, Any]](), ""
        for file in sorted({*folder.glob("*.parquet"), *folder.glob("*/*.parquet")}):
            try:
                rows += _table_of(file, lambda name: not name.startswith("stats/")).to_pylist()
            except UserError as error:
                broken = f": {error}"
        rows = [row for row in rows if isinstance(row.get("episode_index"), int)]
        if not rows:
            raise UserError(f"{folder}: no table of episodes{broken}; restore it or finish the recording")
        return {row["episode_index"]: row for row in sorted(rows, key=lambda row: row["episode_index"])}

    def _claimed_twice(self, videos: dict[int, dict[str, VideoSpan]]) -> dict[int, str]:
        """Why an episode is refused whose frames or rows another one claims, too; ranges may touch."""
        claims: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
        for index, row in self._episodes.items():
            first, stop = row.get("dataset_from_index"), row.get("dataset_to_index")
            if isinstance(first, int) and isinstance(stop, int) and first < stop:
                table = f"{row.get('data/chunk_index')} {row.get('data/file_index')}"
                claims.setdefault(("rows", table), []).append((first, stop, index))
            for camera, span in videos.get(index, {}).items():
                of_film = claims.setdefault((f"frames of camera {camera}", str(span.path)), [])
                of_film.append((span.first, span.first + span.count, index))
        found: dict[int, str] = {}
        for (what, _), ranges in claims.items():
            for index, other in overlaps(ranges):
                found.setdefault(index, f"episode {other} claims the same {what}; mend meta/episodes")
        return found

    def _named_files(self, table: Path, index: int) -> list[Path]:
        return named_files(table, self.meta, index, joined=True)

    def _table(self, index: int) -> tuple[Path, str]:
        """The file, and the name of the template in info.json if that does not lead to it."""
        return self._find("data_path", TABLE, index, "data")

    def _spans(self, index: int) -> tuple[dict[str, VideoSpan], list[str], dict[str, str]]:
        """The cameras' frames; what is wrong about their files' names; and cameras without frames, with the reason."""
        spans, wrong, lost = dict[str, VideoSpan](), list[str](), dict[str, str]()
        for key, camera in self.meta.cameras("video"):
            if not self.meta.films.of_feature(key):
                continue
            try:
                path, template = self._find("video_path", VIDEO, index, f"videos/{key}", video_key=key)
                begin, end = (
                    round(float(self._episodes[index][f"videos/{key}/{name}_timestamp"]) * self.meta.fps)
                    for name in ("from", "to")
                )
                if not 0 <= begin < end:
                    raise ValueError("no frame")
            except (BadEpisode, KeyError, TypeError, ValueError, OverflowError):
                number = self._episodes[index].get(f"videos/{key}/file_index")
                file = f"file-{number:03d}.mp4" if isinstance(number, int) else ""
                lost[camera] = f"camera {camera}{self.meta.films.why_none(key, file, index)}"
                continue
            spans[camera] = VideoSpan(path, begin, end - begin)
            wrong.append(template)
        return spans, wrong, lost

    def _find(self, template: str, default: str, index: int, group: str, **named: str) -> tuple[Path, str]:
        row = self._episodes[index]
        numbers = {name: row.get(f"{group}/{name}") for name in ("chunk_index", "file_index")}
        for pattern, wrong in ((self.meta.info.get(template), ""), (default, template)):
            if file := self.meta.file(pattern, **numbers, **named):
                return file, wrong
        if named and isinstance(chunk := numbers["chunk_index"], int):
            name = f"file-{numbers['file_index']:03d}.mp4"
            if file := self.meta.films.find(named["video_key"], name, chunk):
                folder = file.relative_to(self.meta.root).parts[0]
                return file, f"films are in {folder}/, not where video_path in info.json says"
        raise BadEpisode(f"episode {index} is listed, but its file of {group} is missing")

    def _read_video(self, spans: list[VideoSpan]) -> list[Finding]:
        """One finding per span, in order."""
        path = spans[0].path
        try:
            found = excerpt_digests(path, [(span.first, span.count) for span in spans], self.meta.fps)
            lacking = any(count != span.count for span, (_, count) in zip(spans, found, strict=True))
            rates = _other_rate(path, self.meta.fps) if lacking else ""
        except BadEpisode as error:
            return [Finding(file_digest(path), f"{path.name}: {error}")] * len(spans)
        return [
            Finding(
                digest,
                None if count == span.count else f"{path.name} has only {count} of its {span.count} frames{rates}",
            )
            for span, (digest, count) in zip(spans, found, strict=True)
        ]

    def _digest(self, index: int, spans: Iterable[str]) -> str:
        instructions = self._episodes[index].get("tasks") or []
        return hashlib.sha256(json.dumps([[*spans], [*instructions]]).encode()).hexdigest()


def _other_rate(film: Path, fps: float) -> str:
    rate = probe_video(film).fps
    return f": it has {rate:g} frames a second, and info.json says {fps:g}" if abs(rate / fps - 1) > SLACK else ""


class _Rows:
    """Digests of each episode's rows, column by column, independent of how the table is split."""

    def __init__(self) -> None:
        self._hashes: dict[int, dict[str, Any]] = {}

    def add(self, table: pa.Table) -> None:
        for index in pc.unique(table["episode_index"]).to_pylist():
            rows = table.filter(pc.equal(table["episode_index"], index))
            hashes = self._hashes.setdefault(index, {})
            for name, column in zip(rows.column_names, rows.columns, strict=True):
                if name not in PLACE_IN_DATA_SET:
                    _update(hashes.setdefault(f"{name} {column.type}", hashlib.sha256()), column.combine_chunks())

    def digests(self) -> dict[int, str]:
        return {
            index: hashlib.sha256(
                json.dumps([(name, sha.hexdigest()) for name, sha in sorted(hashes.items())]).encode()
            ).hexdigest()
            for index, hashes in self._hashes.items()
        }


def _update(sha: Any, column: pa.Array) -> None:
    while pa.types.is_nested(column.type) and not pa.types.is_struct(column.type):
        column = column.flatten()
    if pa.types.is_primitive(column.type):
        sha.update(column.to_numpy(zero_copy_only=False).tobytes())
        return
    for value in column.to_pylist():
        image = value.get("bytes") if isinstance(value, dict) else value
        sha.update(image if isinstance(image, bytes) else json.dumps(value, default=repr).encode())


def _read_table(file: Path) -> list[Finding]:
    """``INDEX:DIGEST`` of each episode with rows in the file."""
    rows = _Rows()
    try:
        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(ROWS_AT_ONCE):
                rows.add(pa.Table.from_batches([batch]))
    except (OSError, KeyError, pa.ArrowException) as error:
        return [Finding(file_digest(file), f"{file.name} cannot be read: {' '.join(str(error).split())}")]
    return [Finding(f"{index}:{digest}") for index, digest in rows.digests().items()]


def _of_episode(index: int, found: list[Finding]) -> Finding:
    for one in found:
        number, _, digest = one.digest.partition(":")
        if one.problem or number == f"{index}":
            return Finding(digest or one.digest, one.problem)
    return Finding(f"{index}", f"its table has no rows of episode {index}")


def _by_file(found: Iterator[tuple[Path, list[Finding]]]) -> Callable[[Path], list[Finding]]:
    """Look up findings by file, consuming the iterator only as far as needed."""
    known: dict[Path, list[Finding]] = {}

    def of(path: Path) -> list[Finding]:
        while path not in known:
            file, known_of_file = next(found)
            known[file] = known_of_file
        return known[path]

    return of


def _name(spans: list[VideoSpan]) -> str:
    """The cache key for a video's findings: besides the file, they depend on the spans."""
    return "lerobot v3 " + hashlib.sha256(repr([(span.first, span.count) for span in spans]).encode()).hexdigest()


def _table_of(file: Path, wanted: Callable[[str], bool] = lambda _: True) -> pa.Table:
    try:
        with pq.ParquetFile(file) as opened:
            return opened.read([name for name in opened.schema_arrow.names if wanted(name)])
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())}); restore the file") from None
