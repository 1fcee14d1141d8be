"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON line on stdout.")]
Snapshot = Annotated[str | None, typer.Option(help="Snapshot id or tag to read; the newest if left out.", metavar="ID")]
