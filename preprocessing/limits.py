"""Upper bounds on untrusted input: a file that exceeds one is refused before its memory is allocated.

The limits are those of the process: :func:`use` sets them at the start of each piece of work. They are a module global
and not a ContextVar, because the threads of a scan do not inherit a context and would silently use the defaults.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """The section ``limits`` of an ingest recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    picture_pixels: int = Field(
        default=64 * 2**20, gt=0, description="pixels of one frame, in any format; 64 Mi are 8192 x 8192"
    )
    array_bytes: int = Field(default=2**30, gt=0, description="bytes of one array or chunk, uncompressed")
    episode_steps: int = Field(default=10**7, gt=0, description="frames of one episode")


_limits = Limits()


def use(limits: Limits) -> None:
    """Set the limits of this process."""
    global _limits
    _limits = limits


def limits() -> Limits:
    """Return the limits of this process."""
    return _limits
