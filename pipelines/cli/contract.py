"""``uwm contract VERB``: infer, check and look up data contracts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.options import AsJson
from pipelines.console import Printer, say
from pipelines.outputs import check_writable
from preprocessing.errors import UserError

if TYPE_CHECKING:
    from preprocessing.contracts.contract import DataContract
    from preprocessing.episode import EpisodeRef
    from preprocessing.inspect.check import Measured

FORMATS = (
    "rlds, lerobot, calvin, droid, bridge, aloha, hdf5, maniskill, minari, robotwin"
    ", ros, replay_buffer, webdataset, video"
)
contract_app = typer.Typer(
    help="Infer and check data contracts: what a source's cameras, actions and rates mean.", no_args_is_help=True
)
Source = Annotated[str, typer.Argument(metavar="SOURCE", help="File or folder, as for uwm ingest.")]
Format = Annotated[str, typer.Option(help=f"Format of the source: auto, or one of {FORMATS}.")]
Episodes = Annotated[int, typer.Option(min=1, help="Maximum number of episodes to read, evenly spread.")]


@contract_app.command("infer")
def infer(
    source: Source,
    output: Annotated[Path | None, typer.Option(help="File to write (default: stdout).")] = None,
    format: Format = "auto",
    episodes: Episodes = 16,
) -> None:
    """Infer a first contract from the data, with measurements as comments."""
    from preprocessing.inspect.infer import contract_yaml

    if output and output.exists():
        raise UserError(f"{output}: already exists; choose another file")
    if output:
        check_writable(output.parent, "--output")
    places, measured = _measure(source, format, episodes, None, one_format=True)
    if not measured.episodes:
        reason = measured.problems[0][1] if measured.problems else "it holds no episodes"
        raise UserError(f"{source}: no readable episode: {reason}")
    kind, first = places[0]
    sets = [path.name for _, path in places]
    others = f" and {len(sets) - 5} more" if len(sets) > 5 else ""
    which = f", {len(sets)} of them: {', '.join(sets[:5])}{others}" if len(sets) > 1 else f" in {first.name}"
    text = contract_yaml(measured, f"{source} ({kind}{which})")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
        say(f"written to {output}")
    else:
        typer.echo(text, nl=False)


@contract_app.command("check")
def check(
    source: Source,
    contract: Annotated[
        str | None, typer.Option(help="YAML file or shipped contract's name (default: what the reader finds).")
    ] = None,
    format: Format = "auto",
    episodes: Episodes = 64,
    picture: Annotated[
        Path | None,
        typer.Option(help="PNG or PDF file for a contact sheet: frames of some episodes with the gripper command."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check actions, frames, splits and success marks against the data. Exit code 1 if any is wrong."""
    from preprocessing.contracts.contract import DataContract
    from preprocessing.inspect.check import check as judge
    from preprocessing.inspect.check import find_lag

    if picture and (picture.suffix.lower() not in (".png", ".pdf") or not picture.parent.is_dir()):
        raise UserError(f"--picture {picture}: give a *.png or *.pdf file in an existing folder")
    _, measured = _measure(source, format, episodes, DataContract.load(contract) if contract else None)
    remarks = judge(measured)
    lag = find_lag(measured.episodes)
    printer = Printer(as_json)
    printer.show(f"{len(measured.episodes)} of {measured.listed} episodes read")
    if lag:
        printer.show(lag.said)
    for repair, count in measured.repairs().most_common():
        printer.show(f"noted in {count} episode{'s' * (count != 1)}: {repair}")
    for remark in remarks:
        printer.show(f"{'WRONG' if remark.wrong else 'look'}: {remark.line}")
    wrong = sum(remark.wrong for remark in remarks)
    printer.show(f"{wrong} wrong, {len(remarks) - wrong} to look at" if remarks else "no findings")
    if picture:
        from preprocessing.inspect.contact_sheet import contact_sheet

        contact_sheet(measured).savefig(picture)
        say(f"written to {picture}")
    lines = [remark._asdict() for remark in remarks]
    printer.answer({"episodes": len(measured.episodes), "lag": lag and lag._asdict(), "remarks": lines})
    if wrong:
        raise typer.Exit(1)


@contract_app.command("list")
def shipped(as_json: AsJson = False) -> None:
    """List shipped contracts, and the data sets that each applies to automatically."""
    from preprocessing.contracts.contract import SHIPPED, DataContract

    printer, rows = Printer(as_json), []
    for file in sorted(SHIPPED.glob("*.yaml")):
        contract = DataContract.load(file.stem)
        applies = f"applies to data sets named {contract.datasets}" if contract.datasets else "on request only"
        printer.show(f"{file.stem:>24}  {contract.embodiment or '-':>16}  {applies}")
        rows.append(contract.model_dump(mode="json", exclude_none=True) | {"name": file.stem})
    printer.answer(rows)


@contract_app.command("show")
def show(name: Annotated[str, typer.Argument(metavar="NAME", help="Shipped contract's name, or a YAML file.")]) -> None:
    """Print a contract as YAML, as a starting point for your own."""
    from preprocessing.contracts.contract import DataContract

    typer.echo(DataContract.load(name).to_yaml(), nl=False)


def _measure(
    source: str, format: str, episodes: int, contract: DataContract | None, one_format: bool = False
) -> tuple[list[tuple[str, Path]], Measured]:
    """Return the data sets found at a source, and what was measured there.

    Raises UserError if there are several formats where only ``one_format`` is wanted.
    """
    from tqdm import tqdm

    from preprocessing import sources
    from preprocessing.inspect.check import measure, spread

    refs: list[EpisodeRef] = []
    places = sources.find(source, format)
    examples = {kind: f"{kind} in {path}" for kind, path in reversed(places) if kind in sources.FORMATS}
    if one_format and len(examples) > 1:
        listed = ", ".join(examples[kind] for kind in sorted(examples))
        raise UserError(f"{source}: holds {listed}; a contract is for one of them: give its path, or --format NAME")
    for kind, path in places:
        refs += tqdm(sources.scan(kind, path), f"scan {path.name}", unit=" episodes", leave=False, delay=1)
    chosen = spread(refs, episodes)
    return places, measure(refs, contract, tqdm(chosen, "read", unit="ep", leave=False, delay=1))
