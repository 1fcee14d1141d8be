"""The verbs of the command line. Only this package imports all the others.

The names in ``__all__`` are imported when they are first used; verbs are functions of their modules, such as
``pipelines.ingest.run.ingest``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import infra  # noqa: F401  its environment defaults must be set before Ray is imported

if TYPE_CHECKING:
    from pipelines.models.policy import Policy as Policy
    from pipelines.models.session import Session as Session
    from pipelines.recipe import load_recipe as load_recipe

_HOMES = {
    "Policy": "pipelines.models.policy",
    "Session": "pipelines.models.session",
    "load_recipe": "pipelines.recipe",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
