"""Options that several verbs share, and how their values are read."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines.console import say
from preprocessing.errors import UserError

MODEL = "Run id, checkpoint folder, models:/NAME@ALIAS, or published UWM checkpoint file."
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON on stdout.")]
SnapshotId = Annotated[
    str | None,
    typer.Option(help="Snapshot id, its first characters, or a tag (default: newest).", metavar="SNAPSHOT"),
]
SnapshotArgument = Annotated[
    str | None,
    typer.Argument(metavar="SNAPSHOT", help="As --snapshot.", show_default=False),
]
Output = Annotated[Path, typer.Option(help="Parent folder; each run gets a subfolder.")]
SomeSettings = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Recipe keys to override, e.g. steps=1000 model.depth=4."),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="The same as a bare KEY=VALUE. Repeatable.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before what cannot be undone.")]


def verbose() -> bool:
    """Whether ``uwm -v`` was given, as the level of the root logger records it."""
    return logging.getLogger().isEnabledFor(logging.INFO)


def overridden(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return (sources, overrides): what is written as KEY=VALUE and names no file is an override."""
    overrides = [one for one in arguments if re.match(r"[a-z_.]+=", one) and not Path(one).exists()]
    return [one for one in arguments if one not in overrides], overrides


def one_snapshot(argument: str | None, option: str | None) -> str | None:
    """Return the snapshot that was given in one of two ways. Raises UserError if two were given."""
    if argument and option and argument != option:
        raise UserError(f"two snapshots, {argument} and --snapshot {option}; give one")
    return argument or option


def confirm(question: str, yes: bool) -> None:
    """Ask before what cannot be undone, if someone sits at the terminal. Ends the verb with exit code 1 on a no."""
    if yes or not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return
    if not typer.confirm(question, err=True):
        say("nothing was changed")
        raise typer.Exit(1)
