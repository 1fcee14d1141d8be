"""How a verb ends when it neither fails nor is done; the command line turns these into exit codes."""

from __future__ import annotations


class Refused(Exception):
    """A promotion gate's answer was no; exit code 4."""


class Stopped(Exception):
    """A training was ended by Ctrl-C or SIGTERM, after a checkpoint; exit code 130."""
