"""Errors reported in one line: a user's mistake, and an unreadable episode."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: what, where, and how to fix it. Exit code 2."""


class BadEpisode(Exception):
    """An episode that cannot be read and is quarantined. The message is a reason that a person understands."""
