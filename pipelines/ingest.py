"""``uwm ingest``: raw robot logs and videos into the latent store, each episode once.

    refs -> decode tasks -> encoder actors -> sink -> one commit

The driver lists episodes and drops those the store already holds before anything is decoded. A decode task
turns an episode into rows of at most 64 frames of one camera, then one row with its record; an encoder actor
replaces frames by latents; each write task writes a group of its own; the driver joins rows into catalogue
entries and commits. A long ingest is several such jobs, so that a crash costs minutes, and what was committed is
skipped by the next run. An episode that cannot be read is quarantined with its reason; the rest goes in.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasink
from ray.data.datasource.datasink import WriteResult
from tqdm import tqdm

from infra.cluster import Meter, cluster, watch
from preprocessing import sources
from preprocessing.encoders import encoder_digest, load_encoder
from preprocessing.episode import BadEpisode, DataContract, Episode, EpisodeRef, UserError
from preprocessing.statistics import column_statistics
from preprocessing.store import LatentStore, Location, write_segments

STRIDE = 8  # pixels a latent, of every encoder there is a name for
BLOCK_BYTES = 16 * 2**20  # rows reach the encoders in blocks of about this size
SEGMENTS_PER_WRITE = 256
FIRST_COMMIT = 256  # episodes until the first commit; the pace of those says how many make up the next
COMMIT_MINUTES = 10  # of work that a crash may cost
READER = version("unified-world-models")

ROW = pa.schema(
    [
        ("key", pa.string()),
        ("camera", pa.string()),  # null in the row that carries the record
        ("first", pa.int64()),
        ("shape", pa.list_(pa.int64())),
        ("data", pa.large_binary()),  # uint8 frames, then float16 latents; float32 steps with the record
        ("record", pa.string()),  # JSON: a catalogue row without its locations, or {"problem": ...}
    ]
)


@dataclass
class IngestReport:
    """What an ingest did; ``uwm ingest --json`` prints it."""

    snapshot: str | None
    episodes: dict[str, int]
    frames: int = 0
    seconds: float = 0.0
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    removed: int = 0  # episodes that were taken out of the store, and stay out


def ingest(
    uris: list[str],
    store_uri: str,
    *,
    format: str = "auto",
    encoder: str = "tiny",
    image_size: int = 128,
    contract: DataContract | None = None,
    dry_run: bool = False,
    address: str | None = None,
    verbose: bool = False,
) -> IngestReport:
    """Bring every episode under ``uris`` into the store. Raises UserError before anything is written."""
    began = time.monotonic()
    if image_size % STRIDE or image_size < 4 * STRIDE:
        raise UserError(f"--image-size {image_size}: choose a multiple of {STRIDE}, at least {4 * STRIDE}")
    if encoder != "tiny" and Path(encoder).is_dir():
        encoder = str(Path(encoder).resolve())  # workers, and whoever decodes later, stand elsewhere
    places = [place for uri in uris for place in sources.find(uri, format)]
    digest = encoder_digest(encoder)
    store = LatentStore.open(store_uri) if dry_run else LatentStore.create(store_uri)
    head = store.snapshot()
    known, removed = set(head.episodes()["key"].to_pylist()), head.removed()
    # Bytes that this version refused stay refused; a passing error, or another version, is tried again.
    refused = {row["key"]: row for row in head.quarantine() if row["reader"] == READER}

    report = IngestReport(head.id, {"new": 0, "already": 0, "quarantined": 0})
    new: dict[str, EpisodeRef] = {}
    refs = (ref for kind, path in places for ref in sources.scan(kind, path))
    for ref in tqdm(refs, "scan", unit=" episodes", leave=False, delay=1):
        key = work_key(ref.id, contract, digest, image_size)
        if ref.id in removed:
            report.removed += 1
        elif key in refused:
            _quarantine(report, refused[key])
        elif key in known or key in new:
            report.episodes["already"] += 1
        else:
            new[key] = ref

    report.episodes["new"] = len(new)
    if new and not dry_run:
        with cluster(address, verbose):
            _run(store, new, report, encoder, digest, image_size, contract)
    report.seconds = round(time.monotonic() - began, 2)
    return report


def work_key(episode_id: str, contract: DataContract | None, encoder: str, image_size: int) -> str:
    """What makes a piece of work the same work: these bytes, this contract, this encoder, this size."""
    promise = contract.digest if contract else "as found"
    return hashlib.sha256(f"{episode_id}:{promise}:{encoder}:{image_size}".encode()).hexdigest()[:32]


def _quarantine(report: IngestReport, row: dict[str, Any]) -> None:
    report.quarantine.append({key: row[key] for key in ("uri", "index", "reason")})
    report.episodes["quarantined"] += 1


def _run(
    store: LatentStore,
    new: dict[str, EpisodeRef],
    report: IngestReport,
    encoder: str,
    digest: str,
    image_size: int,
    contract: DataContract | None,
) -> None:
    """One Ray Data job and one commit after the other, of as many episodes as take COMMIT_MINUTES."""
    meter = Meter.remote()  # type: ignore[attr-defined]
    left = list(new.items())
    size = FIRST_COMMIT
    with (
        tqdm(total=len(new), desc="ingest", unit="ep", mininterval=0.5) as bar,
        watch(meter, lambda values: _show(bar, values)),
    ):
        while left:
            began = time.monotonic()
            part, left = dict(left[:size]), left[size:]
            sink = LatentSink(store, part, {"encoder": encoder, "encoder_digest": digest})
            _write(part, sink, meter, encoder, image_size, contract)
            report.snapshot = store.snapshot().id
            report.frames += sink.frames
            report.episodes["new"] -= len(sink.quarantine)
            for row in sink.quarantine:
                _quarantine(report, row)
            size = max(FIRST_COMMIT, int(len(part) * COMMIT_MINUTES * 60 / (time.monotonic() - began)))


def _write(
    new: dict[str, EpisodeRef],
    sink: LatentSink,
    meter: Any,
    encoder: str,
    image_size: int,
    contract: DataContract | None,
) -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    context.print_on_execution_start = False
    cpus = int(ray.cluster_resources().get("CPU", 1))
    gpus = ray.cluster_resources().get("GPU", 0)
    work = [{"key": key, "ref": json.dumps(asdict(ref))} for key, ref in new.items()]
    promise = contract.model_dump_json() if contract else None
    rows = ray.data.from_items(work, override_num_blocks=min(len(work), 512)).map_batches(
        decode,  # type: ignore[arg-type]
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"image_size": image_size, "contract": promise},
        num_cpus=0.25,
    )
    latents = rows.map_batches(
        Encode,
        fn_constructor_args=(encoder, meter),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=max(1, int(gpus) or cpus)),
        num_cpus=0.7,
        num_gpus=1 if gpus else 0,
    )
    latents.write_datasink(sink, ray_remote_args={"num_cpus": 0.25})


def _show(bar: tqdm, values: dict[str, float]) -> None:
    bar.n = int(values.get("episodes", 0))
    frames, rate = values.get("frames", 0), bar.format_dict["elapsed"] or 1
    bar.set_postfix_str(f"{frames:.0f} frames, {frames / rate:.0f} frames/s")


def decode(batch: pa.Table, image_size: int, contract: str | None) -> Iterator[pa.Table]:
    """One episode as rows: its cameras' frames 64 at a time, then its record."""
    [work] = batch.to_pylist()
    key, ref = work["key"], EpisodeRef(**json.loads(work["ref"]))
    counts: dict[str, int] = {}
    try:
        episode = sources.load(ref, DataContract.model_validate_json(contract) if contract else None)
        for camera, video in episode.cameras.items():
            counts[camera] = 0
            for frames in video.frames(image_size):
                yield _row(key, camera, counts[camera], frames)
                counts[camera] += len(frames)
        yield _record(key, episode, counts, contract)
    except BadEpisode as problem:
        yield _refused(key, str(problem), READER)
    except Exception as error:  # one broken file must not end a job over thousands; the reason is kept
        yield _refused(key, f"{type(error).__name__}: {error}", None)


def _record(key: str, episode: Episode, counts: dict[str, int], contract: str | None) -> pa.Table:
    tracks = {f"camera {camera}": count for camera, count in counts.items()}
    tracks |= {f"proprio {name}": len(values) for name, values in episode.proprio.items()}
    if episode.action is not None:
        tracks["action"] = len(episode.action)
    if not counts or len(set(tracks.values())) != 1 or 0 in tracks.values():
        lengths = ", ".join(f"{name} {count}" for name, count in tracks.items()) or "no camera"
        raise BadEpisode(f"its tracks do not have one common length: {lengths}")
    frames = next(iter(counts.values()))

    columns = [] if episode.action is None else [episode.action]
    steps = np.concatenate([*columns, *episode.proprio.values(), np.zeros((frames, 0))], axis=1, dtype=np.float32)
    if not np.isfinite(steps).all():
        raise BadEpisode("its actions or proprioception hold NaN or infinity")
    record = {
        "id": episode.id,
        "uri": episode.ref.uri,
        "index": episode.ref.index,
        "format": episode.ref.format,
        "frames": frames,
        "fps": episode.fps,
        "embodiment": episode.embodiment,
        "instruction": episode.instruction,
        "success": episode.success,
        "cameras": list(counts),
        "action_dim": 0 if episode.action is None else episode.action.shape[1],
        "action_layout": json.dumps([block.model_dump() for block in episode.action_layout]),
        "proprio": [{"name": name, "width": values.shape[1]} for name, values in episode.proprio.items()],
        "contract": contract,
        "repairs": list(episode.repairs),
    } | column_statistics(steps)
    return _row(key, None, 0, steps, json.dumps(record))


def _refused(key: str, reason: str, reader: str | None) -> pa.Table:
    record = {"problem": " ".join(reason.split()), "reader": reader}
    return _row(key, None, 0, np.zeros((0, 0), np.float32), json.dumps(record))


def _row(key: str, camera: str | None, first: int, data: np.ndarray, record: str | None = None) -> pa.Table:
    values: list[Any] = [key, camera, first, data.shape, np.ascontiguousarray(data).tobytes(), record]
    return pa.table([[value] for value in values], schema=ROW)


class Encode:
    """An actor that holds the frozen VAE and replaces frames by latents, all frames of a block in one go."""

    def __init__(self, encoder: str, meter: Any):
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._encoder = load_encoder(encoder, device=device)
        self._meter = meter

    def __call__(self, block: pa.Table) -> pa.Table:
        rows = block.to_pylist()
        images = [row for row in rows if row["camera"] is not None]
        if images:
            frames = np.concatenate([np.frombuffer(row["data"], np.uint8).reshape(row["shape"]) for row in images])
            latents = self._encoder.encode(frames)
            ends = np.cumsum([row["shape"][0] for row in images])
            for row, chunk in zip(images, np.split(latents, ends[:-1]), strict=True):
                row["data"], row["shape"] = chunk.tobytes(), list(chunk.shape)
            self._meter.add.remote(frames=len(frames))
        self._meter.add.remote(episodes=len(rows) - len(images))
        return pa.Table.from_pylist(rows, schema=ROW)


class LatentSink(Datasink):
    """Write tasks each write a group of their own; ``on_write_complete`` joins what they wrote and commits once."""

    def __init__(self, store: LatentStore, refs: dict[str, EpisodeRef], encoder: dict[str, str]):
        self._transaction = store.begin()
        self._fork = self._transaction.fork()
        self._part = self._transaction.part
        self._refs = refs
        self._encoder = encoder
        self.frames = 0
        self.quarantine: list[dict[str, Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_fork": self._fork, "_part": self._part}  # what a write task needs; the rest stays on the driver

    @property
    def min_rows_per_write(self) -> int:
        return SEGMENTS_PER_WRITE

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> dict[str, Any]:
        rows = [row for block in blocks for row in block.to_pylist()]
        full = [row for row in rows if row["shape"][0]]
        arrays = [
            np.frombuffer(row["data"], np.float32 if row["camera"] is None else np.float16).reshape(row["shape"])
            for row in full
        ]
        for row, location in zip(full, write_segments(self._fork, self._part, arrays), strict=True):
            row["location"] = location
        for row in rows:
            del row["data"]
        return {"fork": self._fork, "rows": rows}

    def on_write_complete(self, write_result: WriteResult) -> None:
        segments: dict[tuple[str, str], list[tuple[int, Location]]] = {}
        records: dict[str, dict[str, Any]] = {}
        for row in (row for written in write_result.write_returns for row in written["rows"]):
            if row["camera"] is not None:
                segments.setdefault((row["key"], row["camera"]), []).append((row["first"], row["location"]))
            else:
                records[row["key"]] = {"location": row.get("location"), **json.loads(row["record"])}
        episodes = []
        for key, ref in self._refs.items():  # in the order of the sources, whatever order tasks ended in
            record = records[key]
            if "problem" in record:
                why = {"reason": record["problem"], "reader": record["reader"]}
                self.quarantine.append({"key": key, "id": ref.id, "uri": ref.uri, "index": ref.index, **why})
                continue
            cameras = []
            for camera in record["cameras"]:
                ordered = sorted(segments[key, camera], key=lambda item: item[0])
                cameras.append({"name": camera, "segments": [asdict(location) for _, location in ordered]})
            steps = record["location"] or Location("", 0, 0, "")
            place = {"key": key, "cameras": cameras, "steps": asdict(steps)}
            episodes.append({**record, **self._encoder, **place})
        self.frames = sum(row["frames"] for row in episodes)
        message = f"ingest {len(episodes)} episodes"
        self._transaction.commit(
            [written["fork"] for written in write_result.write_returns], episodes, self.quarantine, message
        )
