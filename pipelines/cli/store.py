"""``uwm store VERB``: inspect a latent store and its snapshots, and change which snapshot is the head."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.options import AsJson, SnapshotArgument, SnapshotId, Yes, confirm, one_snapshot
from pipelines.console import Printer
from pipelines.outputs import check_writable
from preprocessing.errors import UserError

store_app = typer.Typer(help="Inspect and manage a latent store and its snapshots.", no_args_is_help=True)
StoreArgument = Annotated[str, typer.Argument(metavar="URI", help="Latent store: a folder or s3://... URI.")]


@store_app.command("show")
def show(uri: StoreArgument, at: SnapshotArgument = None, snapshot: SnapshotId = None, as_json: AsJson = False) -> None:
    """Show counts by embodiment and encoder, what encoders lose by camera, repairs, and quarantined episodes."""
    from pipelines.cli.results import show_quality, show_repairs
    from pipelines.ingest.quality import Qualities
    from preprocessing.store.rows import CountedRepairs
    from preprocessing.store.store import LatentStore

    state = LatentStore.open(uri).snapshot(one_snapshot(at, snapshot))
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    columns = ("id", "key", "embodiment", "encoder", "encoder_digest", "frames", "cameras", "action_dim", "fit")
    rows = state.episodes([*columns, "pictures", "repairs", "repair_fields"]).to_pylist()
    superseded = state.all_rows(["id"]).num_rows - len(rows)
    for row in rows:
        new: dict[str, Any] = {name: row[name] for name in ("embodiment", "encoder", "encoder_digest")}
        group = groups.setdefault(
            tuple(new.values()), new | {"episodes": 0, "with_actions": 0, "frames": 0, "cameras": []}
        )
        group["episodes"] += 1
        group["with_actions"] += row["action_dim"] > 0
        group["frames"] += row["frames"]
        names = [camera["name"] for camera in row["cameras"]]
        group["cameras"] += [name for name in names if name not in group["cameras"]]
    refused = state.quarantine()
    quarantine = [{key: row[key] for key in ("uri", "index", "reason")} for row in refused if not row["filter"]]
    filtered = len(refused) - len(quarantine)
    printer = Printer(as_json)
    printer.show(f"snapshot {state.id}")
    for group in groups.values():
        printer.show(
            f"{group['embodiment']:>20}  {group['episodes']:6} episodes  {group['with_actions']:6} with actions  "
            f"{group['frames']:8} frames  "
            f"encoder {group['encoder']}  cameras {', '.join(group['cameras'])}"
        )
    tally = Qualities()
    tally.add(rows, state.psnr())
    quality = [{k: v for k, v in row.items() if k not in ("note", "picture")} for row in tally.rows()]
    show_quality(quality, printer)
    repairs = CountedRepairs()
    repairs.add(rows)
    show_repairs(repairs.counted(), printer)
    for row in quarantine:
        printer.show(f"quarantined {row['uri']} #{row['index']}: {row['reason']}")
    if filtered:
        printer.show(f"{filtered} filtered (to list them: uwm store quarantine {uri})")
    if superseded:
        printer.show(f"{superseded} rows of earlier contracts and settings are superseded, and not counted above")
    found = {"embodiments": list(groups.values()), "repairs": repairs.counted(), "quarantine": quarantine}
    printer.answer({"snapshot": state.id, **found, "filtered": filtered, "superseded": superseded, "quality": quality})


@store_app.command("log")
def log(uri: StoreArgument, as_json: AsJson = False) -> None:
    """List snapshots, newest first."""
    from preprocessing.store.store import LatentStore

    printer, entries = Printer(as_json), LatentStore.open(uri).log()
    for entry in entries:
        counts = ", ".join(f"{value} {key}" for key, value in sorted(entry["counts"].items()))
        tags = f"  [{', '.join(entry['tags'])}]" if entry["tags"] else ""
        printer.show(f"{entry['snapshot']}  {entry['time']}  {entry['message']} ({counts}){tags}")
    printer.answer(entries)


@store_app.command("episodes")
def episodes(
    uri: StoreArgument, at: SnapshotArgument = None, snapshot: SnapshotId = None, as_json: AsJson = False
) -> None:
    """List the episodes of a snapshot."""
    from preprocessing.store.store import LatentStore

    printer = Printer(as_json)
    kept: tuple[str, ...] = ("id", "uri", "index", "format", "frames", "fps", "cameras", "action_dim", "proprio")
    kept += ("instruction", "embodiment", "repairs", "repair_fields")
    found: dict[str, dict[str, Any]] = {}  # an episode with several encoders is listed once
    for row in LatentStore.open(uri).snapshot(one_snapshot(at, snapshot)).episodes(kept).to_pylist():
        row["cameras"] = [camera["name"] for camera in row["cameras"]]
        row["proprio"] = {part["name"]: part["width"] for part in row["proprio"]}
        found[row["id"]] = {key: row[key] for key in kept}
    rows = [*found.values()]
    if not as_json:
        for row in rows:
            printer.show(
                f"{row['id'][:12]}  {row['embodiment']:>16}  {row['frames']:6} frames  {','.join(row['cameras'])}  "
                f"{row['instruction'] or '-'}  {row['uri']} #{row['index']}"
            )
    printer.answer(rows)


@store_app.command("verify")
def verify(
    uri: StoreArgument, at: SnapshotArgument = None, snapshot: SnapshotId = None, as_json: AsJson = False
) -> None:
    """Read every byte and compare it with its digest. Exit code 1 if any differs."""
    from tqdm import tqdm

    from preprocessing.store.store import LatentStore

    state = LatentStore.open(uri).snapshot(one_snapshot(at, snapshot))
    damage = list(state.verify(lambda pieces: tqdm(pieces, "verify", unit=" pieces", leave=False, delay=1)))
    printer = Printer(as_json)
    for line in damage:
        printer.show(f"damaged: {line}")
    printer.show(f"{len(damage)} damaged places" if damage else "no damage: every byte matches its digest")
    printer.answer({"damaged": damage})
    if damage:
        raise typer.Exit(1)


@store_app.command("rollback")
def rollback(
    uri: StoreArgument,
    at: SnapshotArgument = None,
    snapshot: Annotated[
        str | None,
        typer.Option(metavar="SNAPSHOT", help="Snapshot id, its first characters, or a tag, to go back to."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make an earlier snapshot the head again. Later ones stay readable until gc."""
    from preprocessing.store.store import LatentStore

    target = one_snapshot(at, snapshot)
    if target is None:
        raise UserError(f"which snapshot? give one of: uwm store log {uri}")
    store = LatentStore.open(uri)
    before, head = store.snapshot().id, store.rollback(target)
    printer = Printer(as_json)
    printer.show(f"head is now {head} (to undo: uwm store rollback {uri} {before})")
    printer.answer({"snapshot": head})


@store_app.command("diff")
def diff(
    uri: StoreArgument,
    older: Annotated[str, typer.Argument(metavar="A", help="The older snapshot: its id, first characters, or tag.")],
    newer: Annotated[str | None, typer.Argument(metavar="B", help="The newer snapshot (default: newest).")] = None,
    as_json: AsJson = False,
) -> None:
    """List the episodes added (+), removed (-) and changed (~: other contract or size) between snapshots A and B."""
    from preprocessing.store.store import LatentStore

    printer, store = Printer(as_json), LatentStore.open(uri)
    new, old = store.snapshot(newer).diff(store.snapshot(older))
    before, after = ({(row["id"], row["encoder_digest"]) for row in rows} for rows in (old, new))
    added = [row for row in new if (row["id"], row["encoder_digest"]) not in before]
    changed = [row for row in new if (row["id"], row["encoder_digest"]) in before]
    removed = [row for row in old if (row["id"], row["encoder_digest"]) not in after]
    for sign, rows in (("+", added), ("-", removed), ("~", changed)):
        for row in rows:
            printer.show(
                f"{sign} {row['id'][:12]}  {row['frames']:6} frames  {row['encoder']}  {row['uri']} #{row['index']}"
            )
    printer.show(f"{len(added)} added, {len(removed)} removed, {len(changed)} changed")
    left_out = ("key", "frames", "encoder_digest")
    lists = {"added": added, "removed": removed, "changed": changed}
    printer.answer(
        {
            name: [{key: value for key, value in row.items() if key not in left_out} for row in rows]
            for name, rows in lists.items()
        }
    )


@store_app.command("tag")
def tag(
    uri: StoreArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the tag.")],
    at: SnapshotArgument = None,
    snapshot: SnapshotId = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete the tag, so that gc may collect its snapshot.")
    ] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Tag a snapshot with a permanent name. A tagged snapshot is never collected."""
    from preprocessing.store.store import LatentStore

    printer, store = Printer(as_json), LatentStore.open(uri)
    if delete:
        confirm(f"Delete tag {name}? Its name cannot be used again.", yes)
        store.untag(name)
        printer.show(f"deleted tag {name}")
        printer.answer({"tag": None, "snapshot": None})
        return
    tagged = store.tag(name, one_snapshot(at, snapshot))
    printer.show(f"tagged snapshot {tagged} as {name}")
    printer.answer({"tag": name, "snapshot": tagged})


@store_app.command("quarantine")
def quarantine(
    uri: StoreArgument, at: SnapshotArgument = None, snapshot: SnapshotId = None, as_json: AsJson = False
) -> None:
    """List quarantined and filtered episodes, with reasons."""
    from preprocessing.store.store import LatentStore

    printer, rows = Printer(as_json), LatentStore.open(uri).snapshot(one_snapshot(at, snapshot)).quarantine()
    for row in rows:
        printer.show(f"{'filtered' if row['filter'] else 'quarantined'} {row['uri']} #{row['index']}: {row['reason']}")
    filtered = sum(bool(row["filter"]) for row in rows)
    printer.show(f"{len(rows) - filtered} quarantined, {filtered} filtered")
    printer.answer([{key: row[key] for key in ("uri", "index", "reason", "filter")} for row in rows])


@store_app.command("remove")
def remove(
    uri: StoreArgument,
    episode: Annotated[list[str] | None, typer.Option(help="Episode id or its first characters. Repeatable.")] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="File or folder whose episodes to remove. Repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="List what would be removed; remove nothing.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Remove episodes for good, for example after consent is withdrawn. Later ingests skip them. Cannot be undone."""
    from pipelines.ingest.quality import forget
    from preprocessing.store.store import LatentStore

    if not (episode or source):
        raise UserError("nothing to remove: give --episode ID or --source URI")
    printer, store = Printer(as_json), LatentStore.open(uri)
    uris = [one if "://" in one else str(Path(one).parent.resolve() / Path(one).name) for one in source or []]
    found = store.find(episode or [], uris)
    for row in found:
        printer.show(f"{'would remove' if dry_run else 'remove'} {row['id'][:12]}  {row['uri']} #{row['index']}")
    if not dry_run:
        confirm(f"Remove {len(found)} episodes for good? This cannot be undone.", yes)
        found = store.remove([row["id"] for row in found], [])
        forget(store.place, {row["id"] for row in found})
    head = store.snapshot().id
    if dry_run:
        printer.show(f"would remove {len(found)} episodes; nothing was changed")
    else:
        printer.show(f"removed {len(found)} episodes; snapshot {head}; earlier snapshots still hold them until gc")
    answer = {"snapshot": head, "removed": [] if dry_run else found}
    printer.answer(answer | ({"would_remove": found} if dry_run else {}))


@store_app.command("statistics")
def statistics(
    uri: StoreArgument, at: SnapshotArgument = None, snapshot: SnapshotId = None, as_json: AsJson = False
) -> None:
    """Show mean, standard deviation, range and quantiles of each action and proprioception column, by embodiment."""
    from preprocessing.dataset.embodiment import column_names
    from preprocessing.dataset.selection import by_embodiment
    from preprocessing.store.statistics import merge
    from preprocessing.store.store import LatentStore

    printer = Printer(as_json)
    every = {
        row["id"]: row for row in LatentStore.open(uri).snapshot(one_snapshot(at, snapshot)).rows()
    }  # once, whatever the encoders
    rows = [row for row in every.values() if row["statistics"]]
    answered: dict[str, list[dict[str, Any]]] = {}
    for name, members in by_embodiment(rows).items():
        names = column_names(members[0])
        total = merge(found.first(len(names)) for row in members if (found := row["statistics"]) is not None)
        low, middle, high = (total.quantile(rank) for rank in (0.01, 0.5, 0.99))
        numbers = {"mean": total.mean, "std": total.std, "min": total.min, "q01": low, "q50": middle, "q99": high}
        numbers["max"] = total.max
        printer.show(f"{name}: {len(members)} episodes, {total.count} steps")
        width = max(map(len, names), default=0)
        printer.show(" " * width + "".join(f"{number:>9}" for number in numbers))
        for i, column in enumerate(names):
            printer.show(f"{column:<{width}}" + "".join(f"{_short(values[i]):>9}" for values in numbers.values()))
        actions = members[0]["action_dim"]
        answered[name] = [
            {"column": f"action[{i}]" if i < actions else column, "name": column}
            | {number: float(values[i]) for number, values in numbers.items()}
            for i, column in enumerate(names)
        ]
    printer.answer(answered)


@store_app.command("export")
def export(
    uri: StoreArgument,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder to create, with a Parquet table and Zarr arrays.")
    ],
    at: SnapshotArgument = None,
    snapshot: SnapshotId = None,
    as_json: AsJson = False,
) -> None:
    """Export a snapshot as plain Zarr and Parquet, for use without this project."""
    from tqdm import tqdm

    from preprocessing.store.export import export as run
    from preprocessing.store.store import LatentStore

    check_writable(folder.parent, "FOLDER")
    state = LatentStore.open(uri).snapshot(one_snapshot(at, snapshot))
    count = run(state, folder, lambda rows: tqdm(rows, "export", unit="ep", delay=1))
    printer = Printer(as_json)
    printer.show(f"exported {count} episodes of snapshot {state.id} to {folder}")
    printer.answer({"snapshot": state.id, "episodes": count, "folder": str(folder)})


@store_app.command("gc")
def gc(
    uri: StoreArgument,
    keep_days: Annotated[int, typer.Option(min=1, help="Keep snapshots younger than this many days.")] = 30,
    dry_run: Annotated[bool, typer.Option(help="List the snapshots that would be deleted; delete nothing.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete old, untagged snapshots other than the newest, and data that no snapshot uses. Cannot be undone."""
    from preprocessing.store.store import LatentStore

    printer, store, keep = Printer(as_json), LatentStore.open(uri), datetime.timedelta(days=keep_days)
    old = store.expiring(keep)
    if dry_run:
        for entry in old:
            printer.show(f"would delete {entry['snapshot']}  {entry['time']}  {entry['message']}")
        printer.show(f"would delete {len(old)} snapshots of the head's history; nothing was changed")
        printer.answer({"snapshots": 0, "bytes": 0, "would_delete": [entry["snapshot"] for entry in old]})
        return
    confirm(f"Delete {len(old)} snapshots older than {keep_days} days, and what none uses? This cannot be undone.", yes)
    deleted, freed = store.collect_garbage(keep)
    printer.show(f"deleted {deleted} snapshots, freed {freed / 1e6:.1f} MB")
    printer.answer({"snapshots": deleted, "bytes": freed})


def _short(value: float) -> str:
    """Return the number with three significant digits in at most eight characters."""
    text = f"{value:.3g}"
    return text if len(text) <= 8 else f"{value:.1e}"
