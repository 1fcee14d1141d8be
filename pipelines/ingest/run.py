"""``uwm ingest``: raw robot logs and videos into the latent store, each episode once.

The driver lists episodes and drops those the store already holds before anything is decoded; what is left goes through
one Ray Data job (:mod:`pipelines.ingest.job`), which commits as it goes. An episode that cannot be read is quarantined
with its reason; the rest goes in.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from infra.cluster import cluster
from infra.progress import Meter, on_this_node, watch
from pipelines.ingest.committer import Committer
from pipelines.ingest.episode_reader import READER, Plan, Work
from pipelines.ingest.job import run
from pipelines.recipe import IngestRecipe, load_recipe
from preprocessing import limits, sources
from preprocessing.contracts.contract import DataContract
from preprocessing.contracts.interface import Interfaces
from preprocessing.encoders.text import load_text_encoder, text_encoder_digest
from preprocessing.encoders.vae import encoder_digest, encoder_stride
from preprocessing.episode import EpisodeRef
from preprocessing.errors import BadEpisode, UserError
from preprocessing.store.catalogue import QuarantineRow
from preprocessing.store.keys import work_key
from preprocessing.store.snapshot import Snapshot
from preprocessing.store.storage import parse
from preprocessing.store.store import LatentStore

ENOUGH_TO_JUDGE = 10  # bad episodes, before their share can stop a job
BUSY = 0.8  # encoders that compute so much of the time are what bounds an ingest


@dataclass
class IngestReport:
    """What an ingest did; ``uwm ingest --json`` prints it."""

    snapshot: str | None
    episodes: dict[str, int]
    frames: int = 0
    seconds: float = 0.0
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    filtered: list[dict[str, Any]] = field(default_factory=list)  # uri, index, filter, reason
    removed: int = 0  # episodes that were taken out of the store, and stay out
    notes: list[str] = field(default_factory=list)
    expected: dict[str, float] | None = None  # of a dry run: pictures to encode, seconds and bytes that it would take
    waiting: dict[str, float] = field(default_factory=dict)  # share of their time that "decode" and "encode" waited

    def refuse(self, row: QuarantineRow) -> None:
        """Count a row (QUARANTINE) of what was not let in."""
        if row["filter"]:
            self.filtered.append({key: row[key] for key in ("uri", "index", "filter", "reason")})
            self.episodes["filtered"] += 1
        else:
            self.quarantine.append({key: row[key] for key in ("uri", "index", "reason")})
            self.episodes["quarantined"] += 1

    @property
    def bound_by(self) -> str | None:
        """What an ingest would gain most from having more of; None where nothing was encoded."""
        if "encode" not in self.waiting:
            return None
        return "encoding" if 1 - self.waiting["encode"] > BUSY else "decoding"


def ingest(
    uris: list[str],
    store_uri: str,
    recipe: IngestRecipe | None = None,
    *,
    format: str = "auto",
    contract: DataContract | None = None,
    retry: bool = False,
    dry_run: bool = False,
    address: str | None = None,
    verbose: bool = False,
) -> IngestReport:
    """Bring every episode under ``uris`` into the store. Raises UserError before anything is written.

    All encoders of the recipe encode in one pass over the decoded frames. Without a contract, a source that was
    ingested before keeps the one it had. Once more than the share ``max_bad`` of all new episodes is refused (ten at
    least), the job ends with a UserError; what was good until then is committed. ``retry`` tries again what was refused
    before.
    """
    began = time.monotonic()
    recipe = recipe or load_recipe("ingest", [], IngestRecipe)
    limits.use(recipe.limits)
    places = [place for uri in uris for place in sources.find(uri, format)]
    digests = {_in_full(name): encoder_digest(name, recipe.precision) for name in recipe.encoder}
    for name in recipe.encoder:
        if recipe.image_size % (stride := encoder_stride(name)):
            raise UserError(f"image_size {recipe.image_size}: choose a multiple of {stride} for encoder {name}")
    if recipe.text_encoder:
        text_encoder_digest(recipe.text_encoder)  # fails early if the encoder is missing
    absent = dry_run and parse(store_uri).content() == "nothing"
    with TemporaryDirectory() as nowhere:  # a dry run makes no store, and compares with an empty one
        place = nowhere if absent else store_uri
        store = LatentStore.open(place) if dry_run and not absent else LatentStore.create(place)
        head = store.snapshot()
        report = IngestReport(None if absent else head.id, {"new": 0, "already": 0, "quarantined": 0, "filtered": 0})
        contracts = _contracts(head, [*map(_source, places)], contract, report)
        plan = Plan(digests, recipe, contracts, _interfaces(head, contracts))
        refs = ((_source((kind, path)), ref) for kind, path in places for ref in sources.scan(kind, path))
        work = _new_work(tqdm(refs, "scan", unit=" episodes", leave=False, delay=1), store, plan, retry, report)
        report.episodes["new"] = len(work)
        _try(work, plan)
        if work:
            with cluster(address, verbose):
                _dry_run(work, plan, head, report) if dry_run else _run(store, work, plan, report)
        if recipe.text_encoder and not dry_run:
            report.snapshot = keep_instruction_vectors(store, recipe.text_encoder)
    report.seconds = round(time.monotonic() - began, 2)
    return report


def keep_instruction_vectors(store: LatentStore, name: str) -> str:
    """The vectors of all instructions in the store that it does not hold yet; returns the id of the snapshot."""
    head, digest = store.snapshot(), text_encoder_digest(name)
    known = {row["text"] for row in head.instruction_rows() if row["encoder_digest"] == digest}
    texts = sorted({row["instruction"] for row in head.episodes(["instruction"]).to_pylist()} - known - {None, ""})
    if not texts:
        return head.id
    vectors = load_text_encoder(name).encode(texts, lambda batches: tqdm(batches, "instructions", leave=False, delay=2))
    return store.add_instruction_vectors(
        [
            {"text": text, "encoder": name, "encoder_digest": digest, "vector": vector.tolist()}
            for text, vector in zip(texts, vectors, strict=True)
        ]
    ).id


def _try(work: list[Work], plan: Plan) -> None:
    """UserError where a contract does not fit the first episode that is to be read by it: then it fits none."""
    first = {one.source: one for one in reversed(work) if plan.contracts[one.source]}
    for source, one in first.items():
        with contextlib.suppress(BadEpisode):
            sources.load(one.ref, plan.contracts[source])


def _dry_run(work: list[Work], plan: Plan, head: Snapshot, report: IngestReport) -> None:
    from pipelines.ingest.dry_run import expected, read_all

    seen = read_all(work, plan, head)
    for one in seen:
        if one.refusal:
            report.refuse(one.refusal.row(one.work))
    going = [one.row for one in seen if one.row and not one.refusal]
    report.episodes["new"] = len(going)
    report.frames = sum(row["frames"] for row in going)
    report.expected = asdict(expected(seen, plan))


def _in_full(encoder: str) -> str:
    """Workers, and whoever decodes later, stand elsewhere: a folder gets its whole path."""
    return str(Path(encoder).resolve()) if encoder != "tiny" and Path(encoder).is_dir() else encoder


def _source(place: tuple[str, Path]) -> str:
    """The folder whose episodes belong together."""
    _, path = place
    return str(path if path.is_dir() else path.parent)


def _contracts(
    head: Snapshot, names: list[str], given: DataContract | None, report: IngestReport
) -> dict[str, DataContract | None]:
    """The contract of each source: the one that is given, or the one that it was last ingested under."""
    rows = head.episodes(("source", "contract")).to_pylist()
    last = {row["source"]: row["contract"] for row in rows}
    contracts = {}
    for name in names:
        before = DataContract.model_validate_json(last[name]) if last.get(name) else None
        contracts[name] = given or before
        if given and name in last and (before is None or before.digest != given.digest):
            others = sum(row["source"] == name for row in rows)
            what = ", ".join(given.changes(before or DataContract()))
            report.notes.append(f"{name}: {others} episodes are there under another contract ({what}); read anew")
        elif before and not given:
            report.notes.append(f"{name}: read by the contract that it was ingested under before")
    return contracts


def _interfaces(head: Snapshot, contracts: dict[str, DataContract | None]) -> Interfaces:
    """What the episodes that are there already promise of those that come."""
    columns = ("source", "contract", "embodiment", "fps", "cameras", "proprio", "action_dim", "action_layout")
    interfaces = Interfaces()
    for row in head.episodes(columns).to_pylist():
        if row["source"] in contracts and row["contract"] == _as_json(contracts[row["source"]]):
            interfaces.add(row["source"], row)
    return interfaces


def _as_json(contract: DataContract | None) -> str | None:
    return contract.model_dump_json() if contract else None


def _new_work(
    refs: Iterable[tuple[str, EpisodeRef]], store: LatentStore, plan: Plan, retry: bool, report: IngestReport
) -> list[Work]:
    """What the store does not hold yet. Everything else is counted in the report."""
    head = store.snapshot()
    known, removed = head.keys(), head.removed()
    # Bytes that this version refused stay refused; a passing error, or another version, is tried again.
    refused = {row["key"]: row for row in head.quarantine() if row["reader"] == READER and not retry}
    seen: set[str] = set()
    work = []
    for source, ref in refs:
        contract, size = plan.contracts[source], plan.recipe.image_size
        rate = (
            plan.recipe.fps if ref.format in sources.ACTIONLESS else None
        )  # robot logs keep the rate of their actions
        keys = {name: work_key(ref.id, contract, d, size, rate) for name, d in plan.encoders.items()}
        missing = {name: key for name, key in keys.items() if key not in known}
        quarantine_key = work_key(ref.id, contract, plan.strictness, 0, None)
        if ref.id in removed:
            report.removed += 1
        elif ref.id in seen or not missing:
            report.episodes["already"] += 1
        elif quarantine_key in refused:
            report.refuse(refused[quarantine_key])
        else:
            work.append(Work(ref, source, missing, quarantine_key, rate))
        seen.add(ref.id)
    return work


def _run(store: LatentStore, work: list[Work], plan: Plan, report: IngestReport) -> None:
    max_bad = plan.recipe.max_bad
    # Commits keep time by reading it: it has to live as long as the driver.
    meter = Meter.options(scheduling_strategy=on_this_node(), max_restarts=-1).remote()  # type: ignore[attr-defined]
    committer = Committer(store, work, plan, most_bad=max(ENOUGH_TO_JUDGE - 1, max_bad * len(work)))
    with tqdm(total=len(work), desc="ingest", unit="ep", mininterval=0.5) as bar:

        def show(values: dict[str, float]) -> None:
            report.waiting = _waiting(values)
            bar.n = max(committer.tick(), min(int(values.get("episodes", 0)), len(work)))
            if frames := values.get("frames"):
                waits = ", ".join(f"{name}rs wait {share:.0%}" for name, share in report.waiting.items())
                bar.set_postfix_str(f"{frames:.0f} frames, {frames / bar.format_dict['elapsed']:.0f} frames/s, {waits}")
            else:
                bar.set_postfix_str("starting")

        with watch(meter, show):
            try:
                run(work, plan, committer, meter)
            except BaseException as error:
                committer.keep()
                if committer.failure:
                    reason = str(committer.failure).strip().splitlines()[0]
                    raise UserError(
                        f"stopped: commits failed ({reason}); ingest again when they can be made"
                    ) from error
                if not committer.too_bad:
                    raise
                bad = len(committer.quarantine)
                raise UserError(
                    f"stopped: {bad} of {len(work)} episodes are bad, more than --max-bad {max_bad:g}; "
                    f"{committer.episodes} good ones are in snapshot {committer.snapshot}; the reasons: "
                    f"uwm store quarantine {store.uri}"
                ) from error
    report.snapshot = committer.snapshot or report.snapshot
    report.frames = committer.frames
    report.episodes["new"] = committer.episodes
    report.episodes["already"] += committer.already
    for row in committer.quarantine:
        report.refuse(row)


def _waiting(values: dict[str, float]) -> dict[str, float]:
    """Share of their time that decode tasks and encoder actors waited for one another."""
    shares = {}
    for name in ("decode", "encode"):
        worked, waited = values.get(f"{name}_work", 0.0), values.get(f"{name}_wait", 0.0)
        if worked + waited:
            shares[name] = round(waited / (worked + waited), 3)
    return shares
