"""LeRobot v2.0 and v2.1: a parquet table per episode, an MP4 file per episode and camera.

Two path templates in ``meta/info.json`` locate them, ``meta/episodes.jsonl`` lists them, ``meta/tasks.jsonl`` holds the
instructions. The layout:
https://github.com/huggingface/lerobot/blob/v0.3.3/lerobot/common/datasets/lerobot_dataset.py.

An episode's digest covers its parquet file and every MP4 file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.episode import EpisodeRef, Repair
from preprocessing.errors import BadEpisode, UserError
from preprocessing.sources.lerobot.meta import CameraVideo, Meta, wrong_template
from preprocessing.sources.scan_cache import Finding, file_digest, findings
from preprocessing.video.decode import open_video, probe_video

TABLES = "data/*/episode_*.parquet"  # the default layout, whatever info.json says
VIDEOS = "videos/*/{}/*.mp4"


@dataclass(frozen=True)
class LocatedFile:
    """A file, and whether the template in info.json names it."""

    path: Path
    as_templated: bool


@dataclass(frozen=True)
class FilesV2:
    meta: Meta
    _listings: dict[str, dict[str, Path]] = field(default_factory=dict, compare=False, repr=False)

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

    def videos(self, index: int) -> dict[str, CameraVideo]:
        return {
            camera: CameraVideo(open_video(file.path), probe_video(file.path).declared_frames)
            for camera, file in self._videos(index).items()
        }

    def tasks(self) -> dict[int, str]:
        return {int(row["task_index"]): str(row["task"]) for row in self._lines("tasks.jsonl")}

    def repairs(self, index: int) -> list[Repair]:
        videos = self._videos(index)
        found = [("data_path", self._table(index)), *(("video_path", file) for file in videos.values())]
        wrong = dict.fromkeys(name for name, file in found if not file.as_templated)
        return [wrong_template(name, "found by searching") for name in wrong]

    def _indices(self) -> list[int]:
        """The episodes in episodes.jsonl, and any other that has a table."""
        listed = {int(row["episode_index"]) for row in self._lines("episodes.jsonl") if "episode_index" in row}
        numbers = (Path(name).stem.removeprefix("episode_") for name in self._listing(TABLES))
        return sorted(listed | {int(number) for number in numbers if number.isdecimal()})

    def _files(self, index: int) -> list[Path]:
        """The files in an episode's digest, in order: the table, then the cameras. Raises BadEpisode."""
        return [self._table(index).path, *(file.path for file in self._videos(index).values())]

    def _table(self, index: int) -> LocatedFile:
        file = self._find("data_path", TABLES, f"episode_{index:06d}.parquet", index, "")
        if file is None:
            raise BadEpisode(f"episode {index} is listed, but episode_{index:06d}.parquet is missing")
        return file

    def _videos(self, index: int) -> dict[str, LocatedFile]:
        found = {}
        for key, camera in self.meta.cameras("video"):
            file = self._find("video_path", VIDEOS.format(key), f"episode_{index:06d}.mp4", index, key)
            if file is not None:
                found[camera] = file
            elif self._listing(VIDEOS.format(key)):
                raise BadEpisode(f"camera {camera} has no video for episode {index}")
        return found

    def _find(self, template: str, pattern: str, file: str, index: int, key: str) -> LocatedFile | None:
        chunk = index // int(self.meta.info.get("chunks_size") or 1000)
        named = self.meta.file(self.meta.info.get(template), episode_chunk=chunk, episode_index=index, video_key=key)
        if named:
            return LocatedFile(named, as_templated=True)
        searched = self._listing(pattern).get(file)
        return LocatedFile(searched, as_templated=False) if searched and searched.is_file() else None

    def _listing(self, pattern: str) -> dict[str, Path]:
        """The first file of each name that matches a pattern. Cached: folders may hold thousands of files."""
        if pattern not in self._listings:
            files = sorted(self.meta.root.glob(pattern), reverse=True)
            self._listings[pattern] = {file.name: file for file in files}
        return self._listings[pattern]

    def _lines(self, name: str) -> list[dict[str, Any]]:
        try:
            text = (self.meta.root / "meta" / name).read_text()
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise UserError(
                f"{self.meta.root / 'meta' / name}: not JSON lines ({error}); mend or restore the file"
            ) from None


def _read(file: Path) -> list[Finding]:
    return [Finding(file_digest(file))]


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()
