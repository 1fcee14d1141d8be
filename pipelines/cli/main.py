"""What ``uwm`` runs: the verbs, and the exit code and the line with which each way of ending is told.

Exit codes: 0 done; 2 wrong usage or configuration; 3 done, but some inputs were quarantined; 4 a promotion gate
refused; 1 anything else.
"""

from __future__ import annotations

import contextlib
import sys
from typing import NoReturn

from pipelines.cli.app import app
from pipelines.cli.options import verbose
from pipelines.console import Stderr, say
from pipelines.errors import Interrupted, Refused
from preprocessing.errors import UserError


def main() -> None:
    try:
        stderr = Stderr(sys.stderr)
    except ValueError as error:
        _fail(f"error: UWM_PROGRESS_SECONDS: {error}; give seconds, e.g. 10", 2)
    with contextlib.redirect_stderr(stderr):
        _main()


def _main() -> None:
    try:
        app(standalone_mode=True)
    except (UserError, ConnectionError) as error:
        _fail(f"error: {error}", 2)
    except ModuleNotFoundError as error:
        from pipelines.cli.extras import explain

        _fail(f"error: {explain(error, sys.argv[1:])}", 2)
    except Refused as error:
        _fail(f"refused: {error}", 4)
    except Interrupted as stopped:
        _fail(f"interrupted; {stopped}", 130)
    except SystemExit as end:
        if end.code == 130:  # Typer's own answer to Ctrl-C says nothing
            say("interrupted; nothing half-written was kept")
        raise
    except Exception as error:
        if verbose():
            raise
        lines = str(error).strip().splitlines() or [""]
        cause = lines[-1] if type(error).__module__.startswith("ray") else lines[0]  # Ray's begin with a traceback
        _fail(f"failed: {type(error).__name__}: {cause.strip('` |->')} (-v shows more)", 1)


def _fail(line: str, code: int) -> NoReturn:
    say(line)
    sys.exit(code)
