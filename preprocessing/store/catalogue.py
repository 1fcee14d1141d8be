"""The catalogue of a latent store: Arrow tables, each stored as a zarr array of its bytes, and the types of their rows.

A table is written once, by one commit, and never changed. It is an Arrow IPC file (columnar, zstd), so a reader
decompresses only the columns it wants. The array's attribute ``digest`` covers the whole table: neither zarr nor
Icechunk would notice a flipped bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import zarr

from preprocessing.errors import UserError
from preprocessing.store.rows import printable
from preprocessing.store.storage import answered, read_again

LOCATION = pa.struct([("array", pa.string()), ("start", pa.int64()), ("count", pa.int64()), ("checksum", pa.string())])
NAMED = pa.list_(pa.struct([("name", pa.string()), ("width", pa.int64())]))  # consecutive columns of the steps
PICTURE = pa.struct([("camera", pa.string()), ("height", pa.int64()), ("width", pa.int64())])
SPAN = pa.struct([("first", pa.int64()), ("stop", pa.int64())])
CATALOGUE = pa.schema(
    [
        ("key", pa.string()),  # identifies the work: episode, contract, encoder, image size, rate (store/keys.py)
        ("id", pa.string()),
        ("uri", pa.string()),
        ("index", pa.int64()),
        ("format", pa.string()),
        ("frames", pa.int64()),
        ("fps", pa.float64()),
        ("embodiment", pa.string()),
        ("instruction", pa.string()),
        ("success", pa.bool_()),
        ("encoder", pa.string()),  # the name given to uwm ingest
        ("encoder_digest", pa.string()),  # of its weights, settings and precision
        ("cameras", pa.list_(pa.struct([("name", pa.string()), ("segments", pa.list_(LOCATION))]))),
        ("steps", LOCATION),
        ("action_dim", pa.int64()),
        ("action_layout", pa.string()),  # JSON list of ActionBlock
        ("proprio", NAMED),
        ("contract", pa.string()),  # JSON of the DataContract; null: as found
        ("repairs", pa.list_(pa.string())),  # what the reader guessed, mended or left out, a sentence each
        ("repair_fields", pa.list_(pa.string())),  # preprocessing.episode.RepairField of each repair
        ("source", pa.string()),  # the data set or folder in which the episode was found
        ("split", pa.string()),  # as recorded; "validation" is held out of training
        ("signals", NAMED),  # columns of the steps after those of proprio
        ("texts", pa.list_(pa.struct([("name", pa.string()), ("text", pa.string())]))),  # by field
        ("spans", pa.list_(SPAN)),  # frames that training may use, no window across two spans; null: all
        ("fingerprint", pa.string()),  # hexadecimal (quality/duplicates.py); null: not computed
        ("image_size", pa.int64()),  # pixels a side of the encoded frames; null before version 0.2
        ("fit", pa.string()),  # preprocessing.episode.Fit; null: stretch
        ("pictures", pa.list_(PICTURE)),  # of each camera (PictureRow); null before version 0.2
    ]
)
STATISTICS = pa.schema(
    [
        ("key", pa.string()),  # key of the catalogue row
        ("array", pa.string()),  # "steps", or a camera's name
        ("count", pa.int64()),  # of rows: steps, or latent vectors at all positions of all frames
        ("mean", pa.list_(pa.float64())),  # one number per column of the steps, or per channel of the latents
        ("m2", pa.list_(pa.float64())),  # sum of squared deviations from the mean
        ("min", pa.list_(pa.float64())),
        ("max", pa.list_(pa.float64())),
        ("quantiles", pa.list_(pa.float32())),  # at the RANKS (store/statistics.py) of column 0, then of column 1, ...
        ("psnr", pa.float64()),  # dB, of reconstructed frames of a camera; null: not measured
        ("psnr_frames", pa.int64()),  # how many those were
    ]
)
QUARANTINE = pa.schema(
    [
        ("key", pa.string()),  # episode and contract
        ("id", pa.string()),
        ("uri", pa.string()),
        ("index", pa.int64()),
        ("reason", pa.string()),
        ("reader", pa.string()),  # version that refused these bytes for good; null: a retry may help
        ("filter", pa.string()),  # the quality filter that refused it; null: it could not be read
    ]
)
REMOVED = pa.schema([("id", pa.string()), ("uri", pa.string()), ("index", pa.int64())])
INSTRUCTIONS = pa.schema(  # one instruction's vector by one text encoder; the store's table "sentences"
    [
        ("text", pa.string()),
        ("encoder", pa.string()),  # the name given to uwm ingest
        ("encoder_digest", pa.string()),
        ("vector", pa.list_(pa.float32())),
    ]
)
KINDS = {"latents": np.float16, "pixels": np.uint8, "steps": np.float32}  # dtypes, by the prefix of an array's name
TABLES = {
    "catalogue": CATALOGUE,
    "statistics": STATISTICS,
    "quarantine": QUARANTINE,
    "removed": REMOVED,
    "sentences": INSTRUCTIONS,
}


READERS = 16  # tables read concurrently: on an object store each costs a round trip


class DamagedError(Exception):
    """Bytes in the store differ from those written: not a user's mistake, so exit code 1."""


def parts(store: Any, group: str) -> list[str]:
    """Return the names of a group's tables in commit order; none if the store predates the group.

    ``store`` is an Icechunk session's store.
    """

    def read() -> list[str]:
        root = zarr.open_group(store, mode="r")
        return sorted(zarr.open_group(store, path=group, mode="r").array_keys()) if group in root else []

    return read_again(read)


def as_table(group: str, rows: Sequence[Mapping[str, object]]) -> pa.Table:
    """Return rows as a table of a group; text that is not Unicode is escaped. Raises what Arrow raises for others."""
    try:
        return pa.Table.from_pylist(rows, schema=TABLES[group])
    except UnicodeEncodeError:
        return pa.Table.from_pylist([_printable(row) for row in rows], schema=TABLES[group])


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {name: _printable(inner) for name, inner in value.items()}
    return [_printable(inner) for inner in value] if isinstance(value, list) else value


def write_table(store: Any, group: str, part: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Write the rows as the table ``group/part``; without rows, write nothing."""
    if not rows:
        return
    sink, table = pa.BufferOutputStream(), as_table(group, rows)
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    data = np.frombuffer(sink.getvalue(), np.uint8)

    def write() -> None:
        array = zarr.create_array(
            store,
            name=f"{group}/{part}",
            shape=data.shape,
            chunks=data.shape,
            dtype="uint8",
            compressors=None,
            attributes={"digest": _digest(data)},
            overwrite=True,  # a commit that lost a race writes its table again
        )
        array[:] = data

    answered(write, size=data.nbytes)


def read_tables(store: Any, group: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return all rows of a group in commit order, with all columns or the given ones.

    Raises DamagedError if a table is not as it was written.
    """
    schema = TABLES[group]
    wanted = [name for name in schema.names if columns is None or name in columns]
    empty = pa.schema([schema.field(name) for name in wanted]).empty_table()
    with ThreadPoolExecutor(READERS) as pool:
        tables = pool.map(lambda part: read_table(store, group, part, wanted), parts(store, group))
        return pa.concat_tables([empty, *tables])


def read_table(store: Any, group: str, part: str, columns: Sequence[str]) -> pa.Table:
    """Return these columns of one table. Raises DamagedError if it is not as it was written."""

    def read() -> np.ndarray:
        array = zarr.open_array(store, path=f"{group}/{part}", mode="r")
        data = np.asarray(array[:])
        if _digest(data) != array.attrs["digest"]:
            raise ValueError("its digest differs")
        return data

    try:
        data = read_again(read)
        written = pa.ipc.open_file(pa.py_buffer(data)).schema
        fields = [index for name in columns if (index := written.get_field_index(name)) >= 0]
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        table = pa.ipc.open_file(pa.py_buffer(data), options=options).read_all()
        for name in columns:  # earlier versions wrote fewer columns
            if written.get_field_index(name) < 0:
                table = table.append_column(
                    TABLES[group].field(name), pa.nulls(len(table), TABLES[group].field(name).type)
                )
        return table.select([*columns])
    except UserError:  # a server that does not answer
        raise
    except Exception as error:  # zarr, Icechunk and Arrow each raise their own
        raise DamagedError(f"table {group}/{part} is not as it was written: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """Return an error's text without the line breaks and the trace that Icechunk puts in it."""
    return " ".join(str(error).partition("|")[0].split()).removeprefix("x ")


def _digest(data: np.ndarray) -> str:
    return hashlib.blake2b(data.data, digest_size=16).hexdigest()
