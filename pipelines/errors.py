"""Exceptions that end a verb without a failure; the command line turns them into exit codes."""

from __future__ import annotations


class Refused(Exception):
    """A promotion gate refused; exit code 4."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM stopped a training after it saved a checkpoint; exit code 130."""
