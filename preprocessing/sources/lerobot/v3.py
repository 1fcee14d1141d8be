"""LeRobot v3.0: many episodes to a file.

``meta/episodes/*/*.parquet`` has a row an episode: in which data file its rows are, and for each camera in which film
its frames are, and from which second on. ``meta/tasks.parquet`` holds the sentences. The layout:
https://huggingface.co/docs/lerobot/lerobot-dataset-v3.

An episode's digest covers its rows but for the numbers that change when data sets are joined, its sentences, and the
coded frames of its cameras: it stays the same when others are added to its files.
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
from preprocessing.sources.lerobot.meta import Film, Meta, is_text, wrong_template
from preprocessing.sources.scan_cache import Finding, file_digest, findings
from preprocessing.video.excerpts import excerpt, excerpt_digests

TABLE = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"  # by default, whatever info.json says
FILM = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
PLACE_IN_DATA_SET = {"index", "episode_index", "task_index"}  # columns that joining data sets changes
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Part:
    """Where the frames of one camera of one episode are."""

    path: Path
    first: int
    count: int


@dataclass(frozen=True)
class FilesV3:
    meta: Meta

    def scan(self) -> Iterator[EpisodeRef]:
        tables, films, missing = dict[int, Path](), dict[int, dict[str, Part]](), dict[int, str]()
        for index in self._episodes:
            try:
                tables[index], films[index] = self._table(index)[0], self._films(index)[0]
            except BadEpisode as error:
                missing[index] = str(error)
        parts: dict[Path, list[Part]] = {}
        for part in (part for cameras in films.values() for part in cameras.values()):
            parts.setdefault(part.path, []).append(part)
        for film in parts.values():
            film.sort(key=lambda part: part.first)
        rows = _by_file(findings("lerobot v3", dict.fromkeys(tables.values()), _read_table))
        frames = _by_file(findings(lambda film: _name(parts[film]), parts, lambda film: self._read_film(parts[film])))

        for index in self._episodes:
            if index in missing:
                nothing = hashlib.sha256(f"{self.meta.root.name} {index} {missing[index]}".encode()).hexdigest()
                yield EpisodeRef(str(self.meta.root / "data"), "lerobot", index, nothing, missing[index])
                continue
            found = [_of_episode(index, rows(tables[index]))]
            for part in films[index].values():
                of_film = frames(part.path)
                found.append(of_film[parts[part.path].index(part) if len(of_film) == len(parts[part.path]) else 0])
            problem = next((one.problem for one in found if one.problem), None)
            digest = self._digest(index, (one.digest for one in found))
            yield EpisodeRef(str(tables[index]), "lerobot", index, digest, problem)
        for path in dict.fromkeys(tables.values()):
            for number, digest in (one.digest.split(":") for one in rows(path) if not one.problem):
                if int(number) not in self._episodes:
                    problem = "its rows are there, but meta/episodes does not list it: the recording was not finished"
                    yield EpisodeRef(str(path), "lerobot", int(number), digest, problem)

    def digest(self, ref: EpisodeRef) -> str:
        rows = _Rows()
        rows.add(self.rows(ref))
        parts = self._films(ref.index)[0].values()
        films = (excerpt_digests(part.path, [(part.first, part.count)], self.meta.fps)[0] for part in parts)
        return self._digest(ref.index, [rows.digests()[ref.index], *(digest for digest, _ in films)])

    def rows(self, ref: EpisodeRef) -> pa.Table:
        return pq.read_table(ref.uri, filters=[("episode_index", "=", ref.index)])

    def films(self, index: int) -> dict[str, Film]:
        return {
            camera: Film(excerpt(part.path, part.first, part.count, self.meta.fps), part.count)
            for camera, part in self._films(index)[0].items()
        }

    def tasks(self) -> dict[int, str]:
        file = self.meta.root / "meta" / "tasks.parquet"
        if not file.is_file():
            return {}
        table = _table_of(file)
        sentences = next((column for column in table.columns if is_text(column.type)), None)
        if sentences is None or "task_index" not in table.column_names:
            return {}
        return dict(zip(table["task_index"].to_pylist(), sentences.to_pylist(), strict=True))

    def repairs(self, index: int) -> list[Repair]:
        wrong = [self._table(index)[1], *self._films(index)[1]]
        return [wrong_template(name, "found by default") for name in dict.fromkeys(wrong) if name]

    @cached_property
    def _episodes(self) -> dict[int, dict[str, Any]]:
        """A row of meta/episodes by episode, without its statistics."""
        folder = self.meta.root / "meta" / "episodes"
        rows = [
            row
            for file in sorted(folder.glob("*/*.parquet"))
            for row in _table_of(file, lambda name: not name.startswith("stats/")).to_pylist()
        ]
        if not rows or any("episode_index" not in row for row in rows):
            raise UserError(f"{folder}: no table of episodes; restore it, or finish the recording")
        return {row["episode_index"]: row for row in sorted(rows, key=lambda row: row["episode_index"])}

    def _table(self, index: int) -> tuple[Path, str]:
        """The file, and the template that does not lead to it."""
        return self._find("data_path", TABLE, index, "data")

    def _films(self, index: int) -> tuple[dict[str, Part], list[str]]:
        parts, wrong = dict[str, Part](), list[str]()
        for key, camera in self.meta.cameras("video"):
            if not (self.meta.root / "videos" / key).is_dir():
                continue
            try:
                path, template = self._find("video_path", FILM, index, f"videos/{key}", video_key=key)
                begin, end = (
                    round(float(self._episodes[index][f"videos/{key}/{name}_timestamp"]) * self.meta.fps)
                    for name in ("from", "to")
                )
                if begin >= end:
                    raise ValueError("no frame")
            except (BadEpisode, KeyError, TypeError, ValueError, OverflowError):
                raise BadEpisode(f"camera {camera} has no video for episode {index}") from None
            parts[camera] = Part(path, begin, end - begin)
            wrong.append(template)
        return parts, wrong

    def _find(self, template: str, default: str, index: int, group: str, **named: str) -> tuple[Path, str]:
        row = self._episodes[index]
        numbers = {name: row.get(f"{group}/{name}") for name in ("chunk_index", "file_index")}
        for pattern, wrong in ((self.meta.info.get(template), ""), (default, template)):
            if file := self.meta.file(pattern, **numbers, **named):
                return file, wrong
        raise BadEpisode(f"episode {index} is listed, but its file of {group} is not there")

    def _read_film(self, parts: list[Part]) -> list[Finding]:
        """One for each, in order."""
        path = parts[0].path
        try:
            found = excerpt_digests(path, [(part.first, part.count) for part in parts], self.meta.fps)
        except BadEpisode as error:
            return [Finding(hashlib.sha256(_name(parts).encode()).hexdigest(), f"{path.name}: {error}")] * len(parts)
        return [
            Finding(digest, None if count == part.count else f"{path.name} has {count} of its {part.count} frames")
            for part, (digest, count) in zip(parts, found, strict=True)
        ]

    def _digest(self, index: int, parts: Iterable[str]) -> str:
        sentences = self._episodes[index].get("tasks") or []
        return hashlib.sha256(json.dumps([[*parts], [*sentences]]).encode()).hexdigest()


class _Rows:
    """Digests of the rows of each episode, column by column, whatever pieces they come in."""

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
    """``INDEX:DIGEST`` of each episode that has rows in the file."""
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
    return Finding(f"{index}", f"no row of episode {index} is in its table")


def _by_file(found: Iterator[tuple[Path, list[Finding]]]) -> Callable[[Path], list[Finding]]:
    """What was found in a file, which is waited for no longer than until its turn."""
    known: dict[Path, list[Finding]] = {}

    def of(path: Path) -> list[Finding]:
        while path not in known:
            file, known_of_file = next(found)
            known[file] = known_of_file
        return known[path]

    return of


def _name(parts: list[Part]) -> str:
    """What decides, beside a film, what is found in it."""
    return "lerobot v3 " + hashlib.sha256(repr([(part.first, part.count) for part in parts]).encode()).hexdigest()


def _table_of(file: Path, wanted: Callable[[str], bool] = lambda _: True) -> pa.Table:
    try:
        with pq.ParquetFile(file) as opened:
            return opened.read([name for name in opened.schema_arrow.names if wanted(name)])
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())}); restore the file") from None
