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
from preprocessing.sources.lerobot.meta import CameraVideo, Meta, is_text, wrong_template
from preprocessing.sources.scan_cache import Finding, file_digest, findings
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
        tables, videos, problems = dict[int, Path](), dict[int, dict[str, VideoSpan]](), dict[int, str]()
        for index in self._episodes:
            try:
                tables[index], videos[index] = self._table(index)[0], self._spans(index)[0]
            except BadEpisode as error:
                problems[index] = str(error)
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
            found = [_of_episode(index, rows(tables[index]))]
            for span in videos[index].values():
                of_video = frames(span.path)
                found.append(of_video[spans[span.path].index(span) if len(of_video) == len(spans[span.path]) else 0])
            problem = next((one.problem for one in found if one.problem), None)
            digest = self._digest(index, (one.digest for one in found))
            yield EpisodeRef(str(tables[index]), "lerobot", index, digest, problem)
        for path in dict.fromkeys(tables.values()):
            for number, digest in (one.digest.split(":") for one in rows(path) if not one.problem):
                if int(number) not in self._episodes:
                    problem = "it has rows, but meta/episodes does not list it: the recording was not finished"
                    yield EpisodeRef(str(path), "lerobot", int(number), digest, problem)

    def digest(self, ref: EpisodeRef) -> str:
        rows = _Rows()
        rows.add(self.rows(ref))
        spans = self._spans(ref.index)[0].values()
        videos = (excerpt_digests(span.path, [(span.first, span.count)], self.meta.fps)[0] for span in spans)
        return self._digest(ref.index, [rows.digests()[ref.index], *(digest for digest, _ in videos)])

    def rows(self, ref: EpisodeRef) -> pa.Table:
        return pq.read_table(ref.uri, filters=[("episode_index", "=", ref.index)])

    def videos(self, index: int) -> dict[str, CameraVideo]:
        return {
            camera: CameraVideo(excerpt(span.path, span.first, span.count, self.meta.fps), span.count)
            for camera, span in self._spans(index)[0].items()
        }

    def tasks(self) -> dict[int, str]:
        file = self.meta.root / "meta" / "tasks.parquet"
        if not file.is_file():
            return {}
        table = _table_of(file)
        instructions = next((column for column in table.columns if is_text(column.type)), None)
        if instructions is None or "task_index" not in table.column_names:
            return {}
        return dict(zip(table["task_index"].to_pylist(), instructions.to_pylist(), strict=True))

    def repairs(self, index: int) -> list[Repair]:
        wrong = [self._table(index)[1], *self._spans(index)[1]]
        return [wrong_template(name, "found by default") for name in dict.fromkeys(wrong) if name]

    @cached_property
    def _episodes(self) -> dict[int, dict[str, Any]]:
        """The rows of meta/episodes by episode, without statistics."""
        folder = self.meta.root / "meta" / "episodes"
        rows = [
            row
            for file in sorted(folder.glob("*/*.parquet"))
            for row in _table_of(file, lambda name: not name.startswith("stats/")).to_pylist()
        ]
        if not rows or any("episode_index" not in row for row in rows):
            raise UserError(f"{folder}: no table of episodes; restore it or finish the recording")
        return {row["episode_index"]: row for row in sorted(rows, key=lambda row: row["episode_index"])}

    def _table(self, index: int) -> tuple[Path, str]:
        """The file, and the name of the template in info.json if that does not lead to it."""
        return self._find("data_path", TABLE, index, "data")

    def _spans(self, index: int) -> tuple[dict[str, VideoSpan], list[str]]:
        spans, wrong = dict[str, VideoSpan](), list[str]()
        for key, camera in self.meta.cameras("video"):
            if not (self.meta.root / "videos" / key).is_dir():
                continue
            try:
                path, template = self._find("video_path", VIDEO, index, f"videos/{key}", video_key=key)
                begin, end = (
                    round(float(self._episodes[index][f"videos/{key}/{name}_timestamp"]) * self.meta.fps)
                    for name in ("from", "to")
                )
                if begin >= end:
                    raise ValueError("no frame")
            except (BadEpisode, KeyError, TypeError, ValueError, OverflowError):
                raise BadEpisode(f"camera {camera} has no video for episode {index}") from None
            spans[camera] = VideoSpan(path, begin, end - begin)
            wrong.append(template)
        return spans, wrong

    def _find(self, template: str, default: str, index: int, group: str, **named: str) -> tuple[Path, str]:
        row = self._episodes[index]
        numbers = {name: row.get(f"{group}/{name}") for name in ("chunk_index", "file_index")}
        for pattern, wrong in ((self.meta.info.get(template), ""), (default, template)):
            if file := self.meta.file(pattern, **numbers, **named):
                return file, wrong
        raise BadEpisode(f"episode {index} is listed, but its file of {group} is missing")

    def _read_video(self, spans: list[VideoSpan]) -> list[Finding]:
        """One finding per span, in order."""
        path = spans[0].path
        try:
            found = excerpt_digests(path, [(span.first, span.count) for span in spans], self.meta.fps)
        except BadEpisode as error:
            return [Finding(hashlib.sha256(_name(spans).encode()).hexdigest(), f"{path.name}: {error}")] * len(spans)
        return [
            Finding(digest, None if count == span.count else f"{path.name} has only {count} of its {span.count} frames")
            for span, (digest, count) in zip(spans, found, strict=True)
        ]

    def _digest(self, index: int, spans: Iterable[str]) -> str:
        instructions = self._episodes[index].get("tasks") or []
        return hashlib.sha256(json.dumps([[*spans], [*instructions]]).encode()).hexdigest()


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
