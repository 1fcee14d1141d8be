"""Errors reported in one line: a user's mistake, and an unreadable episode."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: what, where, and how to fix it. Exit code 2."""


class BadEpisode(Exception):
    """An episode that cannot be read and is quarantined. The message is a reason that a person understands."""


def only(start: str, ids: Sequence[str], what: str) -> str:
    """Return the only one of ``ids`` that begins with ``start``.

    Raises UserError if there is none, or several: it lists them. ``what`` they are is plural, such as "runs".
    """
    if start in ids:
        return start
    found = sorted({one for one in ids if one.startswith(start)})
    if len(found) == 1:
        return found[0]
    listed = f": {', '.join(found[:10])}{', ...' if len(found) > 10 else ''}; give more characters" if found else ""
    raise UserError(f"{len(found) or 'no'} {what} begin with {start}{listed}")
