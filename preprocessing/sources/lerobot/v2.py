"""LeRobot v2.0 and v2.1: a parquet table per episode, an MP4 file per episode and camera.

Two path templates in ``meta/info.json`` locate them, ``meta/episodes.jsonl`` lists them, ``meta/tasks.jsonl`` holds the
instructions. The layout:
https://github.com/huggingface/lerobot/blob/v0.3.3/lerobot/common/datasets/lerobot_dataset.py.

An episode's digest covers its parquet file, every MP4 file, and the pictures that the table names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.episode import EpisodeRef, Repair
from preprocessing.errors import BadEpisode
from preprocessing.sources.lerobot.meta import CameraVideo, Meta, texts_in, wrong_template
from preprocessing.sources.lerobot.pictures import named_files
from preprocessing.sources.scan_cache import Finding, file_digest, findings
from preprocessing.sources.untrusted.metadata import read_lines
from preprocessing.video.decode import open_video, probe_video

# Where tables are, whatever info.json says: the last is the default layout, and comes first.
TABLES = ("*/*/episode_*.parquet", "data/episode_*.parquet", "data/*/episode_*.parquet")
LIST, TASKS = "episodes.jsonl", "tasks.jsonl"


@dataclass(frozen=True)
class LocatedFile:
    """A file, and whether the template in info.json names it."""

    path: Path
    as_templated: bool


@dataclass(frozen=True)
class FilesV2:
    meta: Meta
    _lists: dict[str, tuple[list[dict[str, Any]], str]] = field(default_factory=dict, compare=False, repr=False)

    def scan(self) -> Iterator[EpisodeRef]:
        episodes: list[tuple[int, list[Path], str]] = []
        for index in self._indices():
            try:
                episodes.append((index, self._files(index), ""))
            except BadEpisode as error:
                episodes.append((index, [], str(error)))
        found = findings("lerobot", (file for _, files, _ in episodes for file in files), _read)
        for index, files, missing in episodes:
            if missing:
                uri = str(self.meta.root / "data" / f"episode_{index:06d}.parquet")
                nothing = hashlib.sha256(f"{self.meta.root.name} {index} {missing}".encode()).hexdigest()  # no bytes
                yield EpisodeRef(uri, "lerobot", index, nothing, missing)
            else:
                parts = [part for _, [part] in islice(found, len(files))]
                problem = next((part.problem for part in parts if part.problem), None)
                yield EpisodeRef(str(files[0]), "lerobot", index, _joined(part.digest for part in parts), problem)

    def digest(self, ref: EpisodeRef) -> str:
        return _joined(map(file_digest, self._files(ref.index)))

    def rows(self, ref: EpisodeRef) -> pa.Table:
        return pq.read_table(ref.uri, memory_map=True)

    def videos(self, index: int) -> tuple[dict[str, CameraVideo], dict[str, str]]:
        found, lost = self._videos(index)
        videos = dict[str, CameraVideo]()
        for camera, file in found.items():
            try:
                info = probe_video(file.path)
                videos[camera] = CameraVideo(open_video(file.path), info.declared_frames, info.fps)
            except BadEpisode as error:
                lost[camera] = f"camera {camera}: {file.path.name} {error}"
        return videos, lost

    def tasks(self) -> dict[int, str]:
        return {
            row["task_index"]: str(row["task"]) for row in self._lines("tasks.jsonl", "task_index") if "task" in row
        }

    def own_tasks(self, index: int) -> list[str]:
        return texts_in(
            *(row.get("tasks") for row in self._lines(LIST, "episode_index") if row["episode_index"] == index)
        )

    def repairs(self, index: int) -> list[Repair]:
        videos, _ = self._videos(index)
        found = [("data_path", self._table(index)), *(("video_path", file) for file in videos.values())]
        wrong = dict.fromkeys(name for name, file in found if not file.as_templated)
        return [*(wrong_template(name, "found by searching") for name in wrong), *self._told]

    def _indices(self) -> list[int]:
        """The episodes in episodes.jsonl, and any other that has a table."""
        listed = {row["episode_index"] for row in self._lines(LIST, "episode_index")}
        numbers = (Path(name).stem.removeprefix("episode_") for name in self._tables)
        return sorted(listed | {int(number) for number in numbers if number.isdecimal()})

    def _files(self, index: int) -> list[Path]:
        """The files in an episode's digest, in order: the table, the cameras, pictures it names. Raises BadEpisode."""
        table = self._table(index).path
        found, lost = self._videos(index)
        if lost and not found and not self.meta.cameras("image"):
            raise BadEpisode(next(iter(lost.values())))
        return [table, *(file.path for file in found.values()), *named_files(table, self.meta, index)]

    def _table(self, index: int) -> LocatedFile:
        file = f"episode_{index:06d}.parquet"
        if named := self._templated("data_path", index):
            return LocatedFile(named, as_templated=True)
        if searched := self._tables.get(file):
            return LocatedFile(searched, as_templated=False)
        raise BadEpisode(f"episode {index} is listed, but {file} is missing")

    def _videos(self, index: int) -> tuple[dict[str, LocatedFile], dict[str, str]]:
        found, lost, file = dict[str, LocatedFile](), dict[str, str](), f"episode_{index:06d}.mp4"
        for key, camera in self.meta.cameras("video"):
            if named := self._templated("video_path", index, key):
                found[camera] = LocatedFile(named, as_templated=True)
            elif searched := self.meta.films.find(key, file):
                found[camera] = LocatedFile(searched, as_templated=False)
            elif self.meta.films.of_feature(key):
                lost[camera] = f"camera {camera}{self.meta.films.why_none(key, file, index)}"
        return found, lost

    def _templated(self, template: str, index: int, key: str = "") -> Path | None:
        chunk = index // self.meta.chunks_size
        return self.meta.file(self.meta.info.get(template), episode_chunk=chunk, episode_index=index, video_key=key)

    @cached_property
    def _tables(self) -> dict[str, Path]:
        """The first table of each name: folders may hold thousands."""
        return {file.name: file for pattern in TABLES for file in sorted(self.meta.root.glob(pattern), reverse=True)}

    def _lines(self, name: str, number: str) -> list[dict[str, Any]]:
        """The lines of a list that have a number."""
        return [row for row in self._read(name)[0] if isinstance(row.get(number), int) and 0 <= row[number] < 2**63]

    @cached_property
    def _told(self) -> list[Repair]:
        """What is lost of the lists."""
        return [
            Repair("instruction" if name == TASKS else "steps", text)
            for name in (LIST, TASKS)
            if (text := self._read(name)[1])
        ]

    def _read(self, name: str) -> tuple[list[dict[str, Any]], str]:
        """The rows of a list, and what of it cannot be read, if anything."""
        file = self.meta.root / "meta" / name
        if name not in self._lists:
            try:
                rows, lost = read_lines(file)
                some = ", ".join(map(str, lost[:5])) + (" ..." if len(lost) > 5 else "")
                self._lists[name] = rows, f"meta/{name}: not readable and left out: line {some}" if lost else ""
            except FileNotFoundError:
                self._lists[name] = [], ""
            except (OSError, ValueError) as error:
                self._lists[name] = [], f"meta/{name} cannot be read ({error}); left out"
        return self._lists[name]


def _read(file: Path) -> list[Finding]:
    return [Finding(file_digest(file))]


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()
