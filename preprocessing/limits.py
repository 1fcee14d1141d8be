"""How large what comes from outside may be. A file that asks for more is refused before anybody takes the memory.

They hold for the process: :func:`use` sets them, once for each piece of work.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """The section ``limits`` of an ingest's recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    picture_pixels: int = Field(
        default=64 * 2**20, gt=0, description="of one frame, in any format; 64 Mi are 8192 x 8192"
    )
    array_bytes: int = Field(default=2**30, gt=0, description="of one array or chunk, unpacked")
    episode_steps: int = Field(default=10**7, gt=0, description="frames of one episode")


_limits = Limits()


def use(limits: Limits) -> None:
    global _limits
    _limits = limits


def limits() -> Limits:
    return _limits
