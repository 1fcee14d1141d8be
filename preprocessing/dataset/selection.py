"""Selection from a store: training and held-out episodes, usable frames, sources of a mixture, encoders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from preprocessing.encoders.vae import PIXELS
from preprocessing.errors import UserError
from preprocessing.store.rows import EpisodeRow, TrainingRow
from preprocessing.store.snapshot import Snapshot

HELD_OUT = ("val", "test")


def by_embodiment(rows: Iterable[TrainingRow]) -> dict[str, list[TrainingRow]]:
    """Group catalogue rows by embodiment."""
    groups: dict[str, list[TrainingRow]] = {}
    for row in rows:
        groups.setdefault(row["embodiment"], []).append(row)
    return groups


def split(
    rows: Iterable[TrainingRow], instructions: list[str] | None, share: float, validation: bool
) -> list[TrainingRow]:
    """Return the training or the held-out rows, limited to the given instructions if any are given.

    What the data set itself holds out (its split's name starts with "val" or "test") is never trained on.
    """
    return [
        row
        for row in rows
        if (instructions is None or row["instruction"] in instructions)
        and ((row["split"] or "").startswith(HELD_OUT) or is_validation(row["id"], share)) == validation
    ]


def spans(row: EpisodeRow) -> list[tuple[int, int]]:
    """Return the frames ``[first, stop)`` that windows may use; no window crosses from one span to another."""
    found = [(span["first"], span["stop"]) for span in row["spans"] or ()]
    return found if row["spans"] is not None else [(0, row["frames"])]


def source_of(row: EpisodeRow, mixture: dict[str, float]) -> str | None:
    """Return the name under which a row is sampled: the first key of the mixture that equals its source, its source's
    folder name, or its embodiment; None if no key does. Without a mixture, its embodiment.
    """
    if not mixture:
        return row["embodiment"]
    return next((key for key in mixture if key in _names(row)), None)


def only_from(rows: Iterable[TrainingRow], names: Sequence[str]) -> list[TrainingRow]:
    """Return the rows of these sources (a folder, or its name) and embodiments; without names, all."""
    return [row for row in rows if not names or _names(row) & {*names}]


def check_names(rows: Sequence[EpisodeRow], names: Iterable[str]) -> None:
    """Raise UserError if one of the names is no row's source or embodiment."""
    known = {name for row in rows for name in _names(row)}
    if unknown := [name for name in names if name not in known]:
        held = ", ".join(sorted({name for row in rows for name in (row["source"], row["embodiment"]) if name}))
        raise UserError(f"data: {unknown[0]} is no source or embodiment of the store; there are {held}")


def _names(row: EpisodeRow) -> set[str]:
    source = row["source"] or ""
    return {source, PurePath(source).name, row["embodiment"]} - {""}


def source_names(rows: Sequence[EpisodeRow], mixture: dict[str, float]) -> list[str]:
    """Return ``source_of`` each row. Raises UserError if the mixture misses a row or names no row."""
    named = [source_of(row, mixture) for row in rows]
    for row, name in zip(rows, named, strict=True):
        if name is None:
            raise UserError(
                f"mixture: names neither {row['source']} nor its embodiment {row['embodiment']}, which has episodes; "
                f"give it a share (mixture.{row['embodiment']}=0.5), or 0 to leave it out"
            )
    if unknown := [key for key, share in mixture.items() if share and key not in named]:
        held = sorted({name for row in rows for name in (row["source"], row["embodiment"]) if name})
        raise UserError(f"mixture: {unknown[0]} is no source or embodiment to train on; there are {', '.join(held)}")
    return [name for name in named if name is not None]


def left_out(row: EpisodeRow, mixture: dict[str, float]) -> bool:
    """Return whether the mixture gives a row the share 0."""
    name = source_of(row, mixture)
    return name is not None and mixture.get(name) == 0


def is_validation(episode_id: str, share: float) -> bool:
    """Return whether an episode is held out: a pure function of its id, so added data never moves it."""
    return int(hashlib.sha256(f"split:{episode_id}".encode()).hexdigest()[:8], 16) / 2**32 < share


def choose_encoder(snapshot: Snapshot, name: str | None) -> str:
    """Return the digest of the store's encoder with that name or digest. Raises UserError if none or several fit."""
    table = snapshot.episodes(["encoder", "encoder_digest"]).to_pylist()
    digests = {
        row["encoder_digest"]: row["encoder"]
        for row in table
        if row["encoder"] != PIXELS and name in (None, row["encoder"], row["encoder_digest"])
    }
    if not digests:
        held = ", ".join(sorted({row["encoder"] for row in table} - {PIXELS}))
        raise UserError(
            f"{snapshot.uri}: " + (f"no latents of {name}; it holds {held}" if held else "holds no latents")
        )
    if len(digests) > 1:
        names = ", ".join(f"{named} ({digest})" for digest, named in digests.items())
        raise UserError(
            f"{snapshot.uri}: holds latents of several encoders: {names}; choose with encoder=NAME or DIGEST"
        )
    return next(iter(digests))


def text_encoder_of(snapshot: Snapshot, encoder: str, rows: Iterable[EpisodeRow]) -> dict[str, Any]:
    """Return name, digest and width of the text encoder with that name or digest, as model settings.

    Raises UserError if the store lacks the vector of one of the rows' instructions.
    """
    hint = f"uwm ingest SOURCE --store {snapshot.uri} --set text_encoder={encoder}"
    held = [row for row in snapshot.instruction_rows() if encoder in (row["encoder"], row["encoder_digest"])]
    digests = sorted({row["encoder_digest"] for row in held})
    if len(digests) != 1:
        found = "none" if not digests else f"several versions, {', '.join(digests)}; choose one of them"
        raise UserError(f"{snapshot.uri}: vectors of text encoder {encoder}: it holds {found}; {hint}")
    if missing := {row["instruction"] for row in rows} - {None, ""} - {row["text"] for row in held}:
        raise UserError(f"{snapshot.uri}: {len(missing)} instructions have no vector of {encoder}; {hint}")
    width = len(held[0]["vector"])
    return {"text_encoder": held[0]["encoder"], "text_encoder_digest": digests[0], "text_width": width}
