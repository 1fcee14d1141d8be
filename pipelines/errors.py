"""How a verb ends when it neither fails nor is done; the command line turns these into exit codes."""

from __future__ import annotations


class Refused(Exception):
    """A promotion gate refused; exit code 4."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended a training, after a checkpoint; exit code 130."""
