"""Cameras in a table's columns: JPEG or PNG files that it holds, or names by a path inside of the data set, or numbers.

A column is a structure of ``bytes`` and ``path``, as Hugging Face's data sets write images, or plain bytes, or plain
paths, or lists of the pictures' numbers. A path may begin on the machine that wrote it: the longest end of it that is a
file of the data set counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocessing.episode import Repair, Video
from preprocessing.errors import BadEpisode
from preprocessing.sources.lerobot.meta import WIDEST, Meta, is_text
from preprocessing.video.arrays import array_video, is_picture, rows_at_once
from preprocessing.video.frames import decode_image, indexed_images_video

MAX_PARTS = 32  # of a path


def picture_video(column: pa.ChunkedArray, key: str, meta: Meta, index: int) -> Video:
    """The camera in a column; its pictures are decoded while iterated, the first one now. Raises BadEpisode."""
    places = [_place(value, key, meta, index) for value in column.to_pylist()]
    pictures = [place for place in places if place is not None]
    if len(pictures) < len(places):
        raise BadEpisode(f"{len(places) - len(pictures)} of its {len(places)} rows hold no picture")

    def read(number: int) -> bytes:
        picture = pictures[number]
        return picture if isinstance(picture, bytes) else picture.read_bytes()

    decode_image(read(0))
    return indexed_images_video(len(pictures), read)


def pixels_of(column: pa.ChunkedArray, feature: dict[str, Any]) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
    """The shape and type of the pictures whose numbers a column of lists holds; None if it holds something else.

    Lists in lists have a shape; of a flat list info.json tells it (``feature``).
    """
    values, sizes = column.slice(0, 1).combine_chunks(), list[int]()
    while pa.types.is_nested(values.type) and not pa.types.is_struct(values.type) and len(values):
        inner = values.flatten()
        sizes.append(len(inner) // len(values))
        values = inner
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return None
    told = feature.get("shape")
    if len(sizes) == 1 and isinstance(told, list) and all(type(size) is int for size in told):
        sizes = told if math.prod(told) == sizes[0] else sizes
    shape, dtype = tuple(sizes), np.dtype(values.type.to_pandas_dtype())
    return (shape, dtype) if math.prod(shape) > WIDEST and is_picture(shape, dtype) else None  # less is a vector


def pixels_video(
    column: pa.ChunkedArray, camera: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[Video, list[Repair]]:
    """The camera in a column of lists of numbers, and what was mended of it. Raises BadEpisode."""
    step = rows_at_once(shape, dtype)

    def pieces() -> Iterator[np.ndarray]:
        for start in range(0, len(column), step):
            rows = column.slice(start, step)
            values = rows.combine_chunks()
            while pa.types.is_nested(values.type):
                values = values.flatten()
            if len(values) != len(rows) * math.prod(shape):
                raise BadEpisode(f"not every row holds the numbers of a picture {shape}")
            yield values.to_numpy(zero_copy_only=False).reshape(len(rows), *shape)

    return array_video(camera, shape, dtype, pieces)


def named_files(table: Path, meta: Meta, index: int, joined: bool = False) -> list[Path]:
    """The pictures that an episode's rows name in place of holding them; none if the table cannot be read.

    ``joined`` says that the table holds several episodes.
    """
    keys = [key for key, _ in meta.cameras("image")]
    if not keys:
        return []
    try:
        with pq.ParquetFile(table) as opened:
            columns = _path_columns(opened, keys)
            if not columns:
                return []
            rows = opened.read([*columns.values(), *(["episode_index"] if joined else [])])
    except (OSError, ValueError, pa.ArrowException):
        return []
    if joined:
        rows = rows.filter(pc.equal(rows["episode_index"], index))
    found = (_place(value, key, meta, index) for key in columns for value in rows[key].to_pylist())
    return [place for place in found if isinstance(place, Path)]


def _path_columns(opened: pq.ParquetFile, keys: list[str]) -> dict[str, str]:
    """The column of paths of each camera that has rows without bytes."""
    held, there = set[str](), set[str]()  # columns whose every row has a value; all columns
    for group in range(opened.metadata.num_row_groups):
        for number in range(opened.metadata.num_columns):
            column = opened.metadata.row_group(group).column(number)
            known = column.statistics is not None and column.statistics.has_null_count
            if column.path_in_schema not in there and not (known and column.statistics.null_count):
                held.add(column.path_in_schema)
            elif known and column.statistics.null_count:
                held.discard(column.path_in_schema)
            there.add(column.path_in_schema)
    texts = {field.name for field in opened.schema_arrow if is_text(field.type)}
    paths = {key: f"{key}.path" for key in keys if f"{key}.path" in there and f"{key}.bytes" not in held}
    return paths | {key: key for key in keys if key in texts}


def _place(value: Any, key: str, meta: Meta, index: int) -> bytes | Path | None:
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        return data or None
    path = value.get("path") if isinstance(value, dict) else value
    return _file(path, f"images/{key}/episode_{index:06d}", meta) if isinstance(path, str) else None


def _file(path: str, folder: str, meta: Meta) -> Path | None:
    """The file of the data set that a path means; LeRobot writes the pictures of an episode to ``folder``."""
    parts = path.replace("\\", "/").split("/")[-MAX_PARTS:]
    ends = ("/".join(parts[start:]).lstrip("/") for start in range(len(parts)))
    return next((file for end in (*ends, f"{folder}/{parts[-1]}") if (file := meta.inside(end))), None)
