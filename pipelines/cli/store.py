"""``uwm store VERB``: look at a latent store and its snapshots, and change what its head names."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.options import AsJson, SnapshotId
from pipelines.console import answer, say
from preprocessing.errors import UserError

store_app = typer.Typer(help="Look at a latent store and its snapshots.", no_args_is_help=True)
StoreArgument = Annotated[str, typer.Argument(metavar="URI")]


@store_app.command("show")
def show(uri: StoreArgument, snapshot: SnapshotId = None, as_json: AsJson = False) -> None:
    """Counts by embodiment and encoder, and what is quarantined."""
    from preprocessing.store.store import LatentStore

    state = LatentStore.open(uri).snapshot(snapshot)
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for row in state.episodes(("embodiment", "encoder", "frames", "cameras")).to_pylist():
        group = groups.setdefault(
            (row["embodiment"], row["encoder"]),
            {"embodiment": row["embodiment"], "encoder": row["encoder"], "episodes": 0, "frames": 0, "cameras": []},
        )
        group["episodes"] += 1
        group["frames"] += row["frames"]
        names = [camera["name"] for camera in row["cameras"]]
        group["cameras"] += [name for name in names if name not in group["cameras"]]
    refused = state.quarantine()
    quarantine = [{key: row[key] for key in ("uri", "index", "reason")} for row in refused if not row["filter"]]
    filtered = len(refused) - len(quarantine)
    say(f"snapshot {state.id}")
    for group in groups.values():
        say(
            f"{group['embodiment']:>20}  {group['episodes']:6} episodes  {group['frames']:8} frames  "
            f"encoder {group['encoder']}  cameras {', '.join(group['cameras'])}"
        )
    for row in quarantine:
        say(f"quarantined {row['uri']} #{row['index']}: {row['reason']}")
    if filtered:
        say(f"{filtered} filtered (uwm store quarantine {uri})")
    told = {"snapshot": state.id, "embodiments": list(groups.values()), "quarantine": quarantine, "filtered": filtered}
    answer(told, as_json)


@store_app.command("log")
def log(uri: StoreArgument, as_json: AsJson = False) -> None:
    """Snapshots, the newest first."""
    from preprocessing.store.store import LatentStore

    log = LatentStore.open(uri).log()
    for entry in log:
        counts = ", ".join(f"{value} {key}" for key, value in sorted(entry["counts"].items()))
        tags = f"  [{', '.join(entry['tags'])}]" if entry["tags"] else ""
        say(f"{entry['snapshot']}  {entry['time']}  {entry['message']} ({counts}){tags}")
    answer(log, as_json)


@store_app.command("episodes")
def episodes(uri: StoreArgument, snapshot: SnapshotId = None, as_json: AsJson = False) -> None:
    """Every episode of a snapshot."""
    from preprocessing.store.store import LatentStore

    kept = ("id", "uri", "index", "format", "frames", "fps", "cameras", "action_dim", "proprio", "instruction")
    rows = []
    for row in LatentStore.open(uri).snapshot(snapshot).episodes((*kept, "embodiment")).to_pylist():
        row["cameras"] = [camera["name"] for camera in row["cameras"]]
        row["proprio"] = {part["name"]: part["width"] for part in row["proprio"]}
        rows.append({key: row[key] for key in (*kept, "embodiment")})
    if not as_json:
        for row in rows:
            say(
                f"{row['id'][:12]}  {row['embodiment']:>16}  {row['frames']:6} frames  {','.join(row['cameras'])}  "
                f"{row['instruction'] or '-'}  {row['uri']} #{row['index']}"
            )
    answer(rows, as_json)


@store_app.command("verify")
def verify(uri: StoreArgument, snapshot: SnapshotId = None, as_json: AsJson = False) -> None:
    """Read every byte back and compare it with its digest; exit code 1 where one differs."""
    from tqdm import tqdm

    from preprocessing.store.store import LatentStore

    state = LatentStore.open(uri).snapshot(snapshot)
    damage = list(state.verify(lambda pieces: tqdm(pieces, "verify", unit=" pieces", leave=False, delay=1)))
    for line in damage:
        say(f"damaged: {line}")
    say(f"{len(damage)} damaged places" if damage else "every byte is as it was written")
    answer({"damaged": damage}, as_json)
    if damage:
        raise typer.Exit(1)


@store_app.command("rollback")
def rollback(uri: StoreArgument, snapshot: Annotated[str, typer.Option(metavar="ID")], as_json: AsJson = False) -> None:
    """Make an earlier snapshot the head again."""
    from preprocessing.store.store import LatentStore

    LatentStore.open(uri).rollback(snapshot)
    say(f"head is {snapshot}")
    answer({"snapshot": snapshot}, as_json)


@store_app.command("diff")
def diff(
    uri: StoreArgument,
    older: Annotated[str, typer.Argument(metavar="A", help="Snapshot id or tag.")],
    newer: Annotated[str, typer.Argument(metavar="B", help="Snapshot id or tag.")],
    as_json: AsJson = False,
) -> None:
    """Which episodes B has and A has not, and the other way round."""
    from preprocessing.store.store import LatentStore

    store = LatentStore.open(uri)
    added, gone = store.snapshot(newer).diff(store.snapshot(older))
    for sign, rows in (("+", added), ("-", gone)):
        for row in rows:
            say(f"{sign} {row['id'][:12]}  {row['frames']:6} frames  {row['encoder']}  {row['uri']} #{row['index']}")
    say(f"{len(added)} more, {len(gone)} fewer")
    left_out = ("key", "frames")
    lists = {"added": added, "removed": gone}
    answer(
        {
            name: [{key: value for key, value in row.items() if key not in left_out} for row in rows]
            for name, rows in lists.items()
        },
        as_json,
    )


@store_app.command("tag")
def tag(
    uri: StoreArgument,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    snapshot: SnapshotId = None,
    delete: Annotated[bool, typer.Option("--delete", help="Take the name away, so that gc may collect.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give a snapshot a name that never moves; it is kept as long as the name."""
    from preprocessing.store.store import LatentStore

    store = LatentStore.open(uri)
    if delete:
        store.untag(name)
        say(f"no tag {name} any more")
        answer({"tag": None, "snapshot": None}, as_json)
        return
    tagged = store.tag(name, snapshot)
    say(f"{name} is {tagged}")
    answer({"tag": name, "snapshot": tagged}, as_json)


@store_app.command("quarantine")
def quarantine(uri: StoreArgument, snapshot: SnapshotId = None, as_json: AsJson = False) -> None:
    """What was refused or filtered and is not in the store since, with its reason."""
    from preprocessing.store.store import LatentStore

    rows = LatentStore.open(uri).snapshot(snapshot).quarantine()
    for row in rows:
        say(f"{'filtered' if row['filter'] else 'quarantined'} {row['uri']} #{row['index']}: {row['reason']}")
    filtered = sum(bool(row["filter"]) for row in rows)
    say(f"{len(rows) - filtered} quarantined, {filtered} filtered")
    answer([{key: row[key] for key in ("uri", "index", "reason", "filter")} for row in rows], as_json)


@store_app.command("remove")
def remove(
    uri: StoreArgument,
    episode: Annotated[list[str] | None, typer.Option(help="Id, or the beginning of one; any number of times.")] = None,
    source: Annotated[list[str] | None, typer.Option(help="URI of a file or folder; any number of times.")] = None,
    as_json: AsJson = False,
) -> None:
    """Take episodes out for good, as when a person withdraws consent: ingesting them again does not bring them back."""
    from preprocessing.store.store import LatentStore

    if not (episode or source):
        raise UserError("nothing to remove: give --episode ID or --source URI")
    store = LatentStore.open(uri)
    uris = [one if "://" in one else str(Path(one).parent.resolve() / Path(one).name) for one in source or []]
    removed = store.remove(episode or [], uris)
    for row in removed:
        say(f"removed {row['id'][:12]}  {row['uri']} #{row['index']}")
    say(f"snapshot {store.snapshot().id}; earlier snapshots still hold what they held")
    answer({"snapshot": store.snapshot().id, "removed": removed}, as_json)


@store_app.command("statistics")
def statistics(uri: StoreArgument, snapshot: SnapshotId = None, as_json: AsJson = False) -> None:
    """Mean, deviation, range and quantiles of every action and proprioception column, by embodiment."""
    from preprocessing.dataset.selection import by_embodiment
    from preprocessing.store.statistics import merge
    from preprocessing.store.store import LatentStore

    rows = [row for row in LatentStore.open(uri).snapshot(snapshot).rows() if row["statistics"]]
    answered: dict[str, list[dict[str, Any]]] = {}
    for name, members in by_embodiment(rows).items():
        columns = [f"action[{i}]" for i in range(members[0]["action_dim"])]
        columns += [f"{part['name']}[{i}]" for part in members[0]["proprio"] for i in range(part["width"])]
        total = merge(found.first(len(columns)) for row in members if (found := row["statistics"]) is not None)
        low, middle, high = (total.quantile(rank) for rank in (0.01, 0.5, 0.99))
        numbers = {"mean": total.mean, "std": total.std, "min": total.min, "q01": low, "q50": middle, "q99": high}
        numbers["max"] = total.max
        say(f"{name}: {len(members)} episodes, {total.count} steps")
        say(" " * 24 + "".join(f"{number:>10}" for number in numbers))
        for i, column in enumerate(columns):
            say(f"{column:>24}" + "".join(f"{values[i]:10.4g}" for values in numbers.values()))
        answered[name] = [
            {"column": column, **{number: float(values[i]) for number, values in numbers.items()}}
            for i, column in enumerate(columns)
        ]
    answer(answered, as_json)


@store_app.command("export")
def export(
    uri: StoreArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Gets a parquet table and zarr arrays.")],
    snapshot: SnapshotId = None,
    as_json: AsJson = False,
) -> None:
    """Write a snapshot as plain zarr and parquet, for programs that know nothing of this one."""
    from tqdm import tqdm

    from preprocessing.store.export import export as run
    from preprocessing.store.store import LatentStore

    state = LatentStore.open(uri).snapshot(snapshot)
    count = run(state, folder, lambda rows: tqdm(rows, "export", unit="ep", delay=1))
    say(f"{count} episodes of snapshot {state.id} are in {folder}")
    answer({"snapshot": state.id, "episodes": count, "folder": str(folder)}, as_json)


@store_app.command("gc")
def gc(
    uri: StoreArgument,
    keep_days: Annotated[int, typer.Option(min=1, help="Snapshots younger than this stay readable.")] = 30,
    as_json: AsJson = False,
) -> None:
    """Forget old snapshots that are neither tagged nor the newest, and delete what nothing reaches any more."""
    from preprocessing.store.store import LatentStore

    forgotten, freed = LatentStore.open(uri).collect_garbage(datetime.timedelta(days=keep_days))
    say(f"forgot {forgotten} snapshots, freed {freed / 1e6:.1f} MB")
    answer({"snapshots": forgotten, "bytes": freed}, as_json)
