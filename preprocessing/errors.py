"""Errors that are told in one line: a user's mistake, and an episode that cannot be read."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that its maker can mend: one line that says what, where, and how. Exit code 2."""


class BadEpisode(Exception):
    """This episode cannot be read, and why, in words a person understands. It is quarantined."""
