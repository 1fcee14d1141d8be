"""A program that knows zarr, Icechunk, Arrow and docs/design/store.md, but not this project, reads a store."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from helpers.command import Uwm
from helpers.rows import fill

from preprocessing.store.store import LatentStore

PROGRAM = """
import hashlib, sys
import google_crc32c, icechunk, numpy as np, pyarrow as pa, zarr

repository = icechunk.Repository.open(icechunk.local_filesystem_storage(sys.argv[1]))
root = zarr.open_group(repository.readonly_session("main").store, mode="r")

def rows(name):
    for part in sorted(root[name].array_keys()):
        data = root[name][part][:].tobytes()
        assert hashlib.blake2b(data, digest_size=16).hexdigest() == root[name][part].attrs["digest"]
        yield from pa.ipc.open_file(data).read_all().to_pylist()

def read(location):
    values = root[location["array"]][location["start"] : location["start"] + location["count"]]
    assert f"{google_crc32c.value(values.tobytes()):08x}" == location["checksum"]
    return values

removed = {row["id"] for row in rows("removed")}
out = {}
for row in rows("catalogue"):
    if row["id"] not in removed:
        for camera in row["cameras"]:
            out[f"{row['id']} {camera['name']}"] = np.concatenate([read(at) for at in camera["segments"]])
        out[f"{row['id']} action"] = read(row["steps"])[:, : row["action_dim"]]
medians = {row["key"]: row["quantiles"][16::33] for row in rows("statistics") if row["array"] == "steps"}
assert not [name for name in sys.modules if name.split(".")[0] in ("preprocessing", "pipelines", "infra", "uwm_model")]
np.savez(sys.argv[2], medians=np.array([medians["key-apple"], medians["key-pear"]]), **out)
"""


def test_a_store_is_read_with_zarr_and_icechunk_alone(tmp_path: Path) -> None:
    store = LatentStore.create(str(tmp_path / "store"))
    fill(store, ["apple", "plum"], frames=150, cameras=("front", "wrist"))
    fill(store, ["pear"], frames=150, cameras=("front", "wrist"))
    store.remove(["plum"], [])
    subprocess.run([sys.executable, "-c", PROGRAM, store.uri, tmp_path / "out.npz"], check=True, cwd=tmp_path)
    found = np.load(tmp_path / "out.npz")
    expected = {}
    for row in store.snapshot().episodes().to_pylist():
        for camera in row["cameras"]:
            expected[f"{row['id']} {camera['name']}"] = store.snapshot().read(camera["segments"])
        expected[f"{row['id']} action"] = store.snapshot().read([row["steps"]])[:, :3]
    assert set(found.files) - {"medians"} == expected.keys() and len(expected) == 6
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    steps = [store.snapshot().read([row["steps"]]) for row in store.snapshot().episodes().to_pylist()]
    np.testing.assert_allclose(found["medians"], np.median(steps, axis=1), atol=1e-6)


def test_a_snapshot_is_exported_as_plain_zarr_and_parquet(tmp_path: Path, uwm: Uwm) -> None:
    import pyarrow.parquet as pq
    import zarr

    store = LatentStore.create(str(tmp_path / "store"))
    fill(store, ["apple", "pear"], frames=150, cameras=("front", "wrist"))
    code, report, _ = uwm("store", "export", store.uri, tmp_path / "out", "--json")
    assert code == 0 and report["episodes"] == 2
    root = zarr.open_group(tmp_path / "out" / "episodes.zarr", mode="r")
    rows = store.snapshot().episodes().to_pylist()
    table = pq.read_table(tmp_path / "out" / "episodes.parquet").to_pylist()
    assert [row["id"] for row in table] == ["apple", "pear"]
    for row, told in zip(rows, table, strict=True):
        group = root[told["group"]]
        assert group.attrs["instruction"] == row["instruction"] and told["cameras"] == ["front", "wrist"]
        steps = store.snapshot().read([row["steps"]])
        np.testing.assert_array_equal(group["action"][:], steps[:, :3])
        np.testing.assert_array_equal(group["proprio/state"][:], steps[:, 3:])
        for camera in row["cameras"]:
            np.testing.assert_array_equal(
                group[f"latents/{camera['name']}"][:], store.snapshot().read(camera["segments"])
            )
    assert uwm("store", "export", store.uri, tmp_path / "out")[0] == 2  # never overwrites
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]
