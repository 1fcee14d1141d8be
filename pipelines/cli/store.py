"""``uwm store VERB``: inspect a latent store and its snapshots, and change which snapshot is the head."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.options import AsJson, SnapshotId
from pipelines.console import Printer
from preprocessing.errors import UserError

store_app = typer.Typer(help="Inspect and manage a latent store and its snapshots.", no_args_is_help=True)
StoreArgument = Annotated[str, typer.Argument(metavar="URI", help="Latent store: a folder or s3://... URI.")]


@store_app.command("show")
def show(uri: StoreArgument, snapshot: SnapshotId = None, as_json: AsJson = False) -> None:
    """Show counts by embodiment and encoder, repairs, and quarantined episodes."""
    from pipelines.cli.results import show_repairs
    from preprocessing.store.rows import CountedRepairs
    from preprocessing.store.store import LatentStore

    state = LatentStore.open(uri).snapshot(snapshot)
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    columns = ("id", "embodiment", "encoder", "encoder_digest", "frames", "cameras", "action_dim")
    rows = state.episodes([*columns, "repairs", "repair_fields"]).to_pylist()
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
    printer.answer({"snapshot": state.id, **found, "filtered": filtered, "superseded": superseded})


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
def episodes(uri: StoreArgument, snapshot: SnapshotId = None, as_json: AsJson = False) -> None:
    """List the episodes of a snapshot."""
    from preprocessing.store.store import LatentStore

    printer = Printer(as_json)
    kept: tuple[str, ...] = ("id", "uri", "index", "format", "frames", "fps", "cameras", "action_dim", "proprio")
    kept += ("instruction", "embodiment", "repairs", "repair_fields")
    found: dict[str, dict[str, Any]] = {}  # an episode with several encoders is listed once
    for row in LatentStore.open(uri).snapshot(snapshot).episodes(kept).to_pylist():
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
def verify(uri: StoreArgument, snapshot: SnapshotId = None, as_json: AsJson = False) -> None:
    """Read every byte and compare it with its digest. Exit code 1 if any differs."""
    from tqdm import tqdm

    from preprocessing.store.store import LatentStore

    state = LatentStore.open(uri).snapshot(snapshot)
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
    snapshot: Annotated[str, typer.Option(metavar="ID", help="Snapshot id or tag to go back to.")],
    as_json: AsJson = False,
) -> None:
    """Make an earlier snapshot the head again. Later ones stay readable until gc."""
    from preprocessing.store.store import LatentStore

    LatentStore.open(uri).rollback(snapshot)
    printer = Printer(as_json)
    printer.show(f"head is now {snapshot}")
    printer.answer({"snapshot": snapshot})


@store_app.command("diff")
def diff(
    uri: StoreArgument,
    older: Annotated[str, typer.Argument(metavar="A", help="Id or tag of the older snapshot.")],
    newer: Annotated[str, typer.Argument(metavar="B", help="Id or tag of the newer snapshot.")],
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
    snapshot: SnapshotId = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete the tag, so that gc may collect its snapshot.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tag a snapshot with a permanent name. A tagged snapshot is never collected."""
    from preprocessing.store.store import LatentStore

    printer, store = Printer(as_json), LatentStore.open(uri)
    if delete:
        store.untag(name)
        printer.show(f"deleted tag {name}")
        printer.answer({"tag": None, "snapshot": None})
        return
    tagged = store.tag(name, snapshot)
    printer.show(f"tagged snapshot {tagged} as {name}")
    printer.answer({"tag": name, "snapshot": tagged})


@store_app.command("quarantine")
def quarantine(uri: StoreArgument, snapshot: SnapshotId = None, as_json: AsJson = False) -> None:
    """List quarantined and filtered episodes, with reasons."""
    from preprocessing.store.store import LatentStore

    printer, rows = Printer(as_json), LatentStore.open(uri).snapshot(snapshot).quarantine()
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
    as_json: AsJson = False,
) -> None:
    """Remove episodes for good, for example after consent is withdrawn. Later ingests skip them."""
    from preprocessing.store.store import LatentStore

    if not (episode or source):
        raise UserError("nothing to remove: give --episode ID or --source URI")
    printer, store = Printer(as_json), LatentStore.open(uri)
    uris = [one if "://" in one else str(Path(one).parent.resolve() / Path(one).name) for one in source or []]
    removed = store.remove(episode or [], uris)
    for row in removed:
        printer.show(f"removed {row['id'][:12]}  {row['uri']} #{row['index']}")
    head = store.snapshot().id
    printer.show(f"snapshot {head}; earlier snapshots still hold these episodes")
    printer.answer({"snapshot": head, "removed": removed})


@store_app.command("statistics")
def statistics(uri: StoreArgument, snapshot: SnapshotId = None, as_json: AsJson = False) -> None:
    """Show mean, standard deviation, range and quantiles of each action and proprioception column, by embodiment."""
    from preprocessing.dataset.selection import by_embodiment
    from preprocessing.store.statistics import merge
    from preprocessing.store.store import LatentStore

    printer = Printer(as_json)
    every = {row["id"]: row for row in LatentStore.open(uri).snapshot(snapshot).rows()}  # once, whatever the encoders
    rows = [row for row in every.values() if row["statistics"]]
    answered: dict[str, list[dict[str, Any]]] = {}
    for name, members in by_embodiment(rows).items():
        columns = [f"action[{i}]" for i in range(members[0]["action_dim"])]
        columns += [f"{part['name']}[{i}]" for part in members[0]["proprio"] for i in range(part["width"])]
        total = merge(found.first(len(columns)) for row in members if (found := row["statistics"]) is not None)
        low, middle, high = (total.quantile(rank) for rank in (0.01, 0.5, 0.99))
        numbers = {"mean": total.mean, "std": total.std, "min": total.min, "q01": low, "q50": middle, "q99": high}
        numbers["max"] = total.max
        printer.show(f"{name}: {len(members)} episodes, {total.count} steps")
        printer.show(" " * 24 + "".join(f"{number:>10}" for number in numbers))
        for i, column in enumerate(columns):
            printer.show(f"{column:>24}" + "".join(f"{values[i]:10.4g}" for values in numbers.values()))
        answered[name] = [
            {"column": column, **{number: float(values[i]) for number, values in numbers.items()}}
            for i, column in enumerate(columns)
        ]
    printer.answer(answered)


@store_app.command("export")
def export(
    uri: StoreArgument,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder to create, with a Parquet table and Zarr arrays.")
    ],
    snapshot: SnapshotId = None,
    as_json: AsJson = False,
) -> None:
    """Export a snapshot as plain Zarr and Parquet, for use without this project."""
    from tqdm import tqdm

    from preprocessing.store.export import export as run
    from preprocessing.store.store import LatentStore

    state = LatentStore.open(uri).snapshot(snapshot)
    count = run(state, folder, lambda rows: tqdm(rows, "export", unit="ep", delay=1))
    printer = Printer(as_json)
    printer.show(f"exported {count} episodes of snapshot {state.id} to {folder}")
    printer.answer({"snapshot": state.id, "episodes": count, "folder": str(folder)})


@store_app.command("gc")
def gc(
    uri: StoreArgument,
    keep_days: Annotated[int, typer.Option(min=1, help="Keep snapshots younger than this many days.")] = 30,
    as_json: AsJson = False,
) -> None:
    """Delete old, untagged snapshots other than the newest, and data that no snapshot uses."""
    from preprocessing.store.store import LatentStore

    deleted, freed = LatentStore.open(uri).collect_garbage(datetime.timedelta(days=keep_days))
    printer = Printer(as_json)
    printer.show(f"deleted {deleted} snapshots, freed {freed / 1e6:.1f} MB")
    printer.answer({"snapshots": deleted, "bytes": freed})
