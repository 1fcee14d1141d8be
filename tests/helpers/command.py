"""Type of the fixture ``uwm`` in tests/conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Uwm = Callable[..., tuple[int, Any, str]]
