"""``uwm contract VERB``: what a source promises, written down, checked, and looked up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.options import AsJson
from pipelines.console import answer, say
from preprocessing.contracts.contract import SHIPPED, DataContract
from preprocessing.episode import EpisodeRef
from preprocessing.errors import UserError

if TYPE_CHECKING:
    from preprocessing.inspect.check import Measured

FORMATS = "rlds, lerobot, calvin, droid, bridge, aloha, hdf5, ros, replay_buffer, webdataset, video"
contract_app = typer.Typer(help="What a source promises: write it down, check it.", no_args_is_help=True)
Source = Annotated[str, typer.Argument(metavar="SOURCE", help="A folder or a file, as for uwm ingest.")]
Format = Annotated[str, typer.Option(help=f"auto, or one of {FORMATS}.")]
Episodes = Annotated[int, typer.Option(min=1, help="Read at most so many, evenly spread.")]


@contract_app.command("infer")
def infer(
    source: Source,
    output: Annotated[Path | None, typer.Option(help="File that gets it; else it is printed on stdout.")] = None,
    format: Format = "auto",
    episodes: Episodes = 16,
) -> None:
    """Write a first contract, with what was measured in the comments."""
    from preprocessing.inspect.infer import contract_yaml

    if output and output.exists():
        raise UserError(f"{output}: is there already; give a file that is not")
    found, measured = _measure(source, format, episodes, None)
    if not measured.episodes:
        reason = measured.problems[0][1] if measured.problems else "nothing is there"
        raise UserError(f"{source}: no episode can be read: {reason}")
    text = contract_yaml(measured, f"{source} ({', '.join(found)})")
    if output:
        output.write_text(text)
        say(f"written to {output}")
    else:
        typer.echo(text, nl=False)


@contract_app.command("check")
def check(
    source: Source,
    contract: Annotated[
        str | None, typer.Option(help="YAML, or a shipped one's name; else as the reader finds.")
    ] = None,
    format: Format = "auto",
    episodes: Episodes = 64,
    picture: Annotated[
        Path | None, typer.Option(help="PNG or PDF that gets frames of some episodes, and what the gripper is told.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure whether actions, frames, splits and marks are what they should be; exit code 1 where one is not."""
    from preprocessing.inspect.check import check as judge
    from preprocessing.inspect.check import find_lag

    if picture and (picture.suffix.lower() not in (".png", ".pdf") or not picture.parent.is_dir()):
        raise UserError(f"--picture {picture}: name a *.png or *.pdf in a folder that is there")
    _, measured = _measure(source, format, episodes, DataContract.load(contract) if contract else None)
    remarks = judge(measured)
    lag = find_lag(measured.episodes)
    say(f"{len(measured.episodes)} of {measured.listed} episodes read")
    if lag:
        say(lag.said)
    for repair, count in measured.repairs().most_common():
        say(f"mended in {count}: {repair}")
    for remark in remarks:
        say(f"{'WRONG' if remark.wrong else 'look'}: {remark.line}")
    wrong = sum(remark.wrong for remark in remarks)
    say(f"{wrong} mistakes, {len(remarks) - wrong} things to look at" if remarks else "nothing to remark")
    if picture:
        from preprocessing.inspect.contact_sheet import contact_sheet

        contact_sheet(measured).savefig(picture)
        say(f"to look at: {picture}")
    lines = [remark._asdict() for remark in remarks]
    answer({"episodes": len(measured.episodes), "lag": lag and lag._asdict(), "remarks": lines}, as_json)
    if wrong:
        raise typer.Exit(1)


@contract_app.command("list")
def shipped(as_json: AsJson = False) -> None:
    """The contracts that are shipped: a name for --contract, or found by the data set's own name."""
    rows = []
    for file in sorted(SHIPPED.glob("*.yaml")):
        contract = DataContract.load(file.stem)
        by_itself = f"for data sets called {contract.datasets}" if contract.datasets else "by name only"
        say(f"{file.stem:>24}  {contract.embodiment or '-':>16}  {by_itself}")
        rows.append(contract.model_dump(mode="json", exclude_none=True) | {"name": file.stem})
    answer(rows, as_json)


@contract_app.command("show")
def show(name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped contract's name, or a file.")]) -> None:
    """Print a contract as YAML, to start one's own from."""
    typer.echo(DataContract.load(name).to_yaml(), nl=False)


def _measure(source: str, format: str, episodes: int, contract: DataContract | None) -> tuple[list[str], Measured]:
    """The formats found at a source, and what was measured there."""
    from tqdm import tqdm

    from preprocessing import sources
    from preprocessing.inspect.check import measure, spread

    refs: list[EpisodeRef] = []
    places = sources.find(source, format)
    for kind, path in places:
        refs += tqdm(sources.scan(kind, path), f"scan {path.name}", unit=" episodes", leave=False, delay=1)
    chosen = spread(refs, episodes)
    return sorted({kind for kind, _ in places}), measure(
        refs, contract, tqdm(chosen, "read", unit="ep", leave=False, delay=1)
    )
