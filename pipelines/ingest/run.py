"""``uwm ingest``: encode raw robot logs and videos into the latent store, each episode once.

The driver lists the episodes and drops those that the store already holds, before anything is decoded. A few others
are encoded without Ray (:mod:`pipelines.ingest.local`), many by one Ray Data job (:mod:`pipelines.ingest.job`), which
commits as it runs. An episode that cannot be read is quarantined with its reason; the others are ingested.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from infra.progress import Meter, watch
from pipelines.ingest import local
from pipelines.ingest.committer import Committer
from pipelines.ingest.episode_reader import READER, Plan, Work
from pipelines.ingest.quality import QualityRow
from pipelines.ingest.stored import Stored
from pipelines.recipe import IngestRecipe, load_recipe
from preprocessing import limits, sources
from preprocessing.contracts.contract import DataContract
from preprocessing.contracts.interface import Interfaces
from preprocessing.encoders.text import load_text_encoder, text_encoder_digest
from preprocessing.encoders.vae import encoder_digest, encoder_stride
from preprocessing.episode import EpisodeRef
from preprocessing.errors import BadEpisode, UserError
from preprocessing.sources.walk import Survey
from preprocessing.store.keys import work_key
from preprocessing.store.rows import CountedRepair, QuarantineRow, printable
from preprocessing.store.snapshot import Snapshot
from preprocessing.store.storage import parse
from preprocessing.store.store import LatentStore

ENOUGH_TO_JUDGE = 10  # bad episodes before their share can stop a job
QUIET = 2.0  # seconds that looking at files may take without a progress bar
BUSY = 0.8  # encoders that compute for a larger share of the time than this are the bottleneck


@dataclass
class IngestReport:
    """The result of an ingest, as ``uwm ingest --json`` prints it."""

    snapshot: str | None
    episodes: dict[str, int]
    frames: int = 0
    seconds: float = 0.0
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    filtered: list[dict[str, Any]] = field(default_factory=list)  # uri, index, filter, reason
    repairs: list[CountedRepair] = field(default_factory=list)  # of new episodes
    without_action: int = 0  # new episodes of robot logs in which no action was found
    updated: int = 0  # of those already there: their contract is new, their latents are not
    quality: list[QualityRow] = field(default_factory=list)  # what the encoders lose, by camera
    removed: int = 0  # episodes skipped because they were removed from the store earlier
    notes: list[str] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)  # files of kinds that are not read, by suffix
    expected: dict[str, float] | None = None  # dry run: frames to encode ("pictures"), seconds, bytes
    waiting: dict[str, float] = field(default_factory=dict)  # share of time that "decode" and "encode" spent waiting

    def refuse(self, row: QuarantineRow) -> None:
        """Count a quarantined or filtered episode."""
        if row["filter"]:
            self.filtered.append({key: row[key] for key in ("uri", "index", "filter", "reason")})
            self.episodes["filtered"] += 1
        else:
            self.quarantine.append({key: row[key] for key in ("uri", "index", "reason")})
            self.episodes["quarantined"] += 1

    @property
    def bound_by(self) -> str | None:
        """Return the bottleneck, "encoding" or "decoding"; None if nothing was encoded."""
        if "encode" not in self.waiting or not self.frames:
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
    """Ingest every episode under ``uris``.

    All encoders of the recipe run in one pass over the decoded frames. Without ``contract``, a source keeps the
    contract it was last ingested with. ``retry`` reads quarantined and filtered episodes again.

    Raises UserError for mistaken arguments, before anything is written; and if more than the share ``max_bad`` of the
    new episodes, and at least ten, is bad: the good ones until then are committed.
    """
    began = time.monotonic()
    recipe = recipe or load_recipe("ingest", [], IngestRecipe)
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        from infra.cluster import check_address  # imported lazily: Ray takes longer than a small ingest

        check_address(address)
    limits.use(recipe.limits)
    found = _survey(uris, format)
    places = [place for survey in found for place in survey.paths]
    digests = {_absolute(name): encoder_digest(name, recipe.precision) for name in recipe.encoder}
    for name in recipe.encoder:
        stride = encoder_stride(name)
        if recipe.image_size % stride or recipe.image_size < 4 * stride:
            wanted = f"a multiple of {stride}, at least {4 * stride}"
            raise UserError(f"image_size {recipe.image_size}: choose {wanted}, for encoder {name}")
    if recipe.text_encoder:
        text_encoder_digest(recipe.text_encoder)  # fails early if the encoder is missing
    absent = dry_run and parse(store_uri).content() == "nothing"
    with TemporaryDirectory() as nowhere:  # a dry run creates no store; it compares with an empty one
        place = nowhere if absent else store_uri
        store = LatentStore.open(place) if dry_run and not absent else LatentStore.create(place)
        head = store.snapshot()
        report = IngestReport(None if absent else head.id, {"new": 0, "already": 0, "quarantined": 0, "filtered": 0})
        report.notes += [printable(note) for survey in found for note in survey.notes]
        report.unread = dict(sum((survey.unread for survey in found), Counter()))
        contracts = _contracts(head, [*map(_source, places)], contract, report)
        plan = Plan(digests, recipe, contracts, _interfaces(head, contracts), verbose)
        stored = Stored(head)
        with _shown("scan", " episodes") as (bar, label):
            work = _new_work(_episodes(found, bar, label), store, plan, stored, retry, report)
        report.episodes["new"] = len(work)
        _check_contracts(work, plan)
        if work:
            if dry_run:
                _dry_run(work, plan, head, report, address, verbose)
            else:
                _run(store, work, plan, stored, report, address, verbose)
        if recipe.text_encoder and not dry_run:
            report.snapshot = keep_instruction_vectors(store, recipe.text_encoder)
    report.seconds = round(time.monotonic() - began, 2)
    return report


def keep_instruction_vectors(store: LatentStore, name: str) -> str:
    """Encode the instructions of the store that have no vector yet; return the id of the new snapshot."""
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


def _check_contracts(work: list[Work], plan: Plan) -> None:
    """Raise UserError if a contract does not fit the first new episode of its source: then it fits none."""
    first = {one.source: one for one in reversed(work) if plan.contracts[one.source]}
    for source, one in first.items():
        with contextlib.suppress(BadEpisode):
            sources.load(one.ref, plan.contracts[source])


def _dry_run(
    work: list[Work], plan: Plan, head: Snapshot, report: IngestReport, address: str | None, verbose: bool
) -> None:
    from pipelines.ingest.dry_run import expected, read_all

    seen = read_all(work, plan, head, address, verbose)
    for one in seen:
        if one.refusal:
            report.refuse(one.refusal.row(one.work))
    going = [one for one in seen if one.row and not one.refusal]
    report.updated = sum(not one.encoders for one in going)
    report.episodes["new"] = len(going) - report.updated
    report.episodes["already"] += report.updated
    report.frames = sum(one.row["frames"] for one in going if one.row and one.encoders)
    report.expected = asdict(expected(seen, plan, address, verbose))


def _absolute(encoder: str) -> str:
    """Return an encoder's folder as an absolute path: workers and later decoders have other working directories."""
    return str(Path(encoder).resolve()) if encoder != "tiny" and Path(encoder).is_dir() else encoder


def _survey(uris: list[str], format: str) -> list[Survey]:
    """Find the data sets of every source."""
    with _shown("look", " files") as (bar, label):
        found = []
        for uri in uris:
            label(uri)
            found.append(sources.survey(uri, format, bar.update))
    return found


def _episodes(found: list[Survey], bar: tqdm[Any], label: Callable[[str], None]) -> Iterator[tuple[str, EpisodeRef]]:
    """List the episodes with their sources' names."""
    for survey in found:
        for path, ref in sources.episodes(survey, lambda path: label(str(path))):
            bar.update()
            yield _source(path), ref


@contextlib.contextmanager
def _shown(what: str, unit: str) -> Iterator[tuple[tqdm[Any], Callable[[str], None]]]:
    """A progress bar that appears after two seconds, also while one file takes longer, and a function to name it."""
    began = time.monotonic()
    with tqdm(desc=what, unit=unit, leave=False, delay=QUIET) as bar:

        def show(_: dict[str, float]) -> None:
            if time.monotonic() - began > QUIET:
                bar.refresh()

        def label(place: str) -> None:
            bar.set_postfix_str(printable(place)[-60:], refresh=False)

        with watch(dict, show):
            yield bar, label


def _source(path: Path) -> str:
    """Return the source's name: the folder whose episodes belong together."""
    return printable(sources.folder_of(path))


def _contracts(
    head: Snapshot, names: list[str], given: DataContract | None, report: IngestReport
) -> dict[str, DataContract | None]:
    """Return each source's contract: the given one, or the one it was last ingested with."""
    rows = {row["id"]: row for row in head.episodes(("id", "source", "contract")).to_pylist()}.values()
    last = {row["source"]: row["contract"] for row in rows}
    contracts = {}
    for name in names:
        before = DataContract.model_validate_json(last[name]) if last.get(name) else None
        contracts[name] = given or before
        if given and name in last and (before is None or before.digest != given.digest):
            others = sum(row["source"] == name for row in rows)
            what = ", ".join(given.changes(before or DataContract()))
            report.notes.append(
                f"{name}: {others} episodes were ingested with another contract ({what}); ingesting them again"
            )
        elif before and not given:
            report.notes.append(f"{name}: using the contract of its last ingest")
    return contracts


def _interfaces(head: Snapshot, contracts: dict[str, DataContract | None]) -> Interfaces:
    """Return the interfaces of the sources' stored episodes, which new episodes must match."""
    columns = ("source", "contract", "embodiment", "fps", "cameras", "proprio", "action_dim", "action_layout")
    interfaces = Interfaces()
    for row in head.episodes(columns).to_pylist():
        if row["source"] in contracts and row["contract"] == _as_json(contracts[row["source"]]):
            interfaces.add(row["source"], row)
    return interfaces


def _as_json(contract: DataContract | None) -> str | None:
    return contract.model_dump_json() if contract else None


def _new_work(
    refs: Iterable[tuple[str, EpisodeRef]],
    store: LatentStore,
    plan: Plan,
    stored: Stored,
    retry: bool,
    report: IngestReport,
) -> list[Work]:
    """Return the episodes that the store does not hold yet; count all others in the report."""
    head = store.snapshot()
    known, removed = head.keys(), head.removed()
    # Bytes that this version refused stay refused; after a transient error, or with another version, they are retried.
    refused = {row["key"]: row for row in head.quarantine() if row["reader"] == READER and not retry}
    seen: set[str] = set()
    work = []
    for source, ref in refs:
        contract, size, fit = plan.contracts[source], plan.recipe.image_size, plan.recipe.fit
        rate = plan.recipe.fps if ref.format in sources.ACTIONLESS else None  # robot logs keep their actions' rate
        keys = {name: work_key(ref.id, contract, d, size, rate, fit) for name, d in plan.encoders.items()}
        missing = {name: key for name, key in keys.items() if key not in known}
        quarantine_key = work_key(ref.id, contract, plan.strictness, 0, None)
        if ref.id in removed:
            report.removed += 1
        elif ref.id in seen or not missing:
            report.episodes["already"] += 1
        elif quarantine_key in refused:
            report.refuse(refused[quarantine_key])
        else:
            bases = {name: stored.base(ref, plan.encoders[name], size, rate, fit) for name in missing}
            held = {name: base for name, base in bases.items() if base}
            work.append(Work(ref, source, missing, quarantine_key, rate, held))
        seen.add(ref.id)
    return work


def _run(
    store: LatentStore,
    work: list[Work],
    plan: Plan,
    stored: Stored,
    report: IngestReport,
    address: str | None,
    verbose: bool,
) -> None:
    """Encode and commit the episodes: a few in this process, many on Ray."""
    max_bad = plan.recipe.max_bad
    committer = Committer(store, work, plan, stored, max_bad=max(ENOUGH_TO_JUDGE - 1, max_bad * len(work)))
    meter = Meter()
    with tqdm(total=len(work), desc="ingest", unit="ep", mininterval=0.5) as bar:

        def show(values: dict[str, float]) -> None:
            report.waiting = _waiting(values)
            bar.n = max(committer.tick(), min(int(values.get("episodes", 0)), len(work)))
            if frames := values.get("frames"):
                waits = ", ".join(f"{name}rs wait {share:.0%}" for name, share in report.waiting.items())
                bar.set_postfix_str(f"{frames:.0f} images, {frames / bar.format_dict['elapsed']:.0f}/s, {waits}")
            else:
                bar.set_postfix_str("starting")

        try:
            left = work
            if plan.recipe.local_seconds and not address:
                with watch(meter.read, show):
                    left = local.run(work, plan, committer, meter.add)
            if left:
                from pipelines.ingest import job  # imported lazily: Ray takes longer than a small ingest

                job.run(left, plan, committer, meter, show, address, verbose)
        except Exception as error:
            if committer.failure:
                reason = str(committer.failure).strip().splitlines()[0]
                raise UserError(
                    f"stopped: commits failed ({reason}); run the same command when the store is writable again"
                ) from error
            if not committer.too_bad:
                raise
    if committer.too_bad:
        bad = len(committer.quarantine)
        raise UserError(
            f"stopped: {bad} of {len(work)} episodes are bad, more than --max-bad {max_bad:g}; "
            f"{committer.episodes} good ones are in snapshot {committer.snapshot}; for the reasons run: "
            f"uwm store quarantine {store.uri}"
        )
    report.snapshot = committer.snapshot or report.snapshot
    report.frames = committer.frames
    report.episodes["new"] = committer.episodes
    report.repairs, report.without_action = committer.repairs.counted(), committer.without_action
    report.episodes["already"] += committer.already
    report.updated = committer.updated
    report.quality = committer.quality.draw(store.place)
    for row in committer.quarantine:
        report.refuse(row)


def _waiting(values: dict[str, float]) -> dict[str, float]:
    """Return the share of time that decode tasks and encoder actors waited for each other."""
    shares = {}
    for name in ("decode", "encode"):
        worked, waited = values.get(f"{name}_work", 0.0), values.get(f"{name}_wait", 0.0)
        if worked + waited:
            shares[name] = round(waited / (worked + waited), 3)
    return shares
