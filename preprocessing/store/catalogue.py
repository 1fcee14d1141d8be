"""What a latent store knows about its episodes: Arrow tables, each kept in a zarr array of its bytes.

A table is written once, by one commit, and never changed. It is an Arrow IPC file (columnar, zstd), so that a reader
takes the columns it wants and leaves the others packed. The array's attribute ``digest`` is that of the whole table:
neither zarr nor Icechunk would notice a flipped bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import zarr

LOCATION = pa.struct([("array", pa.string()), ("start", pa.int64()), ("count", pa.int64()), ("checksum", pa.string())])
NAMED = pa.list_(pa.struct([("name", pa.string()), ("width", pa.int64())]))  # columns of the steps, in their order
SPAN = pa.struct([("first", pa.int64()), ("stop", pa.int64())])
CATALOGUE = pa.schema(
    [
        ("key", pa.string()),  # what makes it this work and no other: episode, contract, encoder, image size, rate
        ("id", pa.string()),
        ("uri", pa.string()),
        ("index", pa.int64()),
        ("format", pa.string()),
        ("frames", pa.int64()),
        ("fps", pa.float64()),
        ("embodiment", pa.string()),
        ("instruction", pa.string()),
        ("success", pa.bool_()),
        ("encoder", pa.string()),  # as it was named to uwm ingest
        ("encoder_digest", pa.string()),  # its weights, settings and precision
        ("cameras", pa.list_(pa.struct([("name", pa.string()), ("segments", pa.list_(LOCATION))]))),
        ("steps", LOCATION),
        ("action_dim", pa.int64()),
        ("action_layout", pa.string()),  # JSON list of ActionBlock
        ("proprio", NAMED),
        ("contract", pa.string()),  # JSON of the DataContract that was given; null where none was
        ("repairs", pa.list_(pa.string())),
        ("source", pa.string()),  # the data set, or the folder, that the episode was found in
        ("split", pa.string()),  # the recorded one; "validation" is held out of training
        ("signals", NAMED),  # what else was recorded at each step; behind the proprioception
        ("texts", pa.list_(pa.struct([("name", pa.string()), ("text", pa.string())]))),  # every sentence, by its field
        ("spans", pa.list_(SPAN)),  # the frames that training may use, no window over two of them; null: all
        ("fingerprint", pa.string()),  # hexadecimal, of preprocessing.quality.duplicates; null where nobody asked
    ]
)
STATISTICS = pa.schema(
    [
        ("key", pa.string()),  # of the catalogue row
        ("array", pa.string()),  # "steps", or a camera's name
        ("count", pa.int64()),  # rows: steps, or latents of all places of all frames
        ("mean", pa.list_(pa.float64())),  # one number for each column of the steps, or channel of the latents
        ("m2", pa.list_(pa.float64())),
        ("min", pa.list_(pa.float64())),
        ("max", pa.list_(pa.float64())),
        (
            "quantiles",
            pa.list_(pa.float32()),
        ),  # preprocessing.store.statistics.RANKS of column 0, then of column 1, ...
    ]
)
QUARANTINE = pa.schema(
    [
        ("key", pa.string()),  # episode and contract
        ("id", pa.string()),
        ("uri", pa.string()),
        ("index", pa.int64()),
        ("reason", pa.string()),
        ("reader", pa.string()),  # version that refused these bytes for good; null where trying again may help
        ("filter", pa.string()),  # that took it for not worth encoding; null where it could not be read
    ]
)
REMOVED = pa.schema([("id", pa.string()), ("uri", pa.string()), ("index", pa.int64())])
SENTENCES = pa.schema(  # an instruction as a text encoder has it
    [
        ("text", pa.string()),
        ("encoder", pa.string()),  # as it was named to uwm ingest
        ("encoder_digest", pa.string()),
        ("vector", pa.list_(pa.float32())),
    ]
)
KINDS = {"latents": np.float16, "pixels": np.uint8, "steps": np.float32}  # of segments, by their arrays' names
TABLES = {
    "catalogue": CATALOGUE,
    "statistics": STATISTICS,
    "quarantine": QUARANTINE,
    "removed": REMOVED,
    "sentences": SENTENCES,
}

READERS = 16  # tables read at a time: on an object store each costs a round trip


class DamagedError(Exception):
    """Bytes of the store are not as they were written. Nobody who uses it did that: exit code 1."""


def parts(store: Any, group: str) -> list[str]:
    """Names of a group's tables in the order of their commits; none of a group that an earlier version did not know.

    ``store`` is a session's.
    """
    root = zarr.open_group(store, mode="r")
    return sorted(zarr.open_group(store, path=group, mode="r").array_keys()) if group in root else []


def write_table(store: Any, group: str, part: str, rows: list[dict[str, Any]]) -> None:
    """Keep the rows as the table ``group/part``; nothing where there is none."""
    if not rows:
        return
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows, schema=TABLES[group])
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    data = np.frombuffer(sink.getvalue(), np.uint8)
    array = zarr.create_array(
        store,
        name=f"{group}/{part}",
        shape=data.shape,
        chunks=data.shape,
        dtype="uint8",
        compressors=None,
        attributes={"digest": _digest(data)},
        overwrite=True,  # a commit that another one overtook writes its table again
    )
    array[:] = data


def read_tables(store: Any, group: str, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of a group, in the order of their commits; only the named columns, where any are named.

    Raises DamagedError where a table is not as it was written.
    """
    schema = TABLES[group]
    wanted = [name for name in schema.names if columns is None or name in columns]
    empty = pa.schema([schema.field(name) for name in wanted]).empty_table()
    with ThreadPoolExecutor(READERS) as pool:
        tables = pool.map(lambda part: read_table(store, group, part, wanted), parts(store, group))
        return pa.concat_tables([empty, *tables])


def read_table(store: Any, group: str, part: str, columns: Sequence[str]) -> pa.Table:
    """These columns of one table. Raises DamagedError where it is not as it was written."""
    try:
        array = zarr.open_array(store, path=f"{group}/{part}", mode="r")
        data = np.asarray(array[:])
        if _digest(data) != array.attrs["digest"]:
            raise ValueError("its digest is another")
        written = pa.ipc.open_file(pa.py_buffer(data)).schema
        fields = [index for name in columns if (index := written.get_field_index(name)) >= 0]
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        table = pa.ipc.open_file(pa.py_buffer(data), options=options).read_all()
        for name in columns:  # an earlier version may have written fewer
            if written.get_field_index(name) < 0:
                table = table.append_column(
                    TABLES[group].field(name), pa.nulls(len(table), TABLES[group].field(name).type)
                )
        return table.select([*columns])
    except Exception as error:  # zarr, Icechunk and Arrow each have their own for the same thing
        raise DamagedError(f"table {group}/{part} is not as it was written: {error}") from None


def _digest(data: np.ndarray) -> str:
    return hashlib.blake2b(data.data, digest_size=16).hexdigest()
