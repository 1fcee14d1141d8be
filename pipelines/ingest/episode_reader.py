"""Reads one episode of an ingest: its frames as they are decoded, then its record, or the reason to refuse it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import NamedTuple

import numpy as np

from pipelines.ingest.stored import Base, reusable
from pipelines.recipe import IngestRecipe
from preprocessing import limits, sources
from preprocessing.contracts.contract import DataContract
from preprocessing.contracts.interface import InterfaceRow, Interfaces, NamedWidth
from preprocessing.episode import Episode, EpisodeRef, Repair, Square
from preprocessing.errors import BadEpisode, UserError
from preprocessing.quality.duplicates import Fingerprints
from preprocessing.quality.filters import Filters, Inspector
from preprocessing.store.rows import EpisodeColumns, QuarantineRow, printable
from preprocessing.store.snapshot import Snapshot

READER = version("unified-world-models")


@dataclass(frozen=True)
class Work:
    """One episode to ingest. ``keys`` holds the key of its catalogue row for each encoder.

    ``bases`` holds, for the encoders that have one, its row under another contract.
    """

    ref: EpisodeRef
    source: str
    keys: dict[str, str]
    quarantine_key: str
    fps: float | None  # maximum frame rate, for episodes without actions
    bases: dict[str, Base] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The settings that all episodes of an ingest share."""

    encoders: dict[str, str]  # digest by name
    recipe: IngestRecipe
    contracts: dict[str, DataContract | None]  # by source
    interfaces: Interfaces  # of stored episodes; on the driver, also of those accepted since
    verbose: bool = False  # show what libraries print while they read

    @property
    def strictness(self) -> str:
        """The settings that decide whether an episode is accepted, as JSON; its bytes and contract decide too."""
        return self.recipe.model_dump_json(include={"keep_broken", "limits", "quality"})


class Refusal(NamedTuple):
    """Why an episode is not accepted."""

    reason: str
    reader: str | None  # version that refused these bytes for good; None if a retry may help
    filter: str | None = None  # quality filter that refused it; None if it cannot be read

    def row(self, work: Work) -> QuarantineRow:
        """Return the refusal as a row of the store's quarantine table."""
        return {
            "key": work.quarantine_key,
            "id": work.ref.id,
            "uri": printable(work.ref.uri),
            "index": work.ref.index if abs(work.ref.index) < 2**63 else -1,
            "reason": printable(" ".join(self.reason.split())),
            "reader": self.reader,
            "filter": self.filter,
        }


class EpisodeRecord(EpisodeColumns):
    """An episode's catalogue row before encoding. ``cameras`` maps each camera to its number of frames.

    ``reused`` maps encoders whose stored latents serve again to the cameras and their names in the base.
    """

    cameras: dict[str, int]
    reused: dict[str, dict[str, str]]


class Reading:
    """An episode being read: first all ``frames``, then the ``record``.

    ``encoders`` are those that need the frames; the others' latents are in the store. Every method may raise;
    :func:`refusal` turns the exception into a reason.
    """

    def __init__(self, work: Work, plan: Plan):
        limits.use(plan.recipe.limits)
        self._source, self._plan = work.source, plan
        contract = plan.contracts[work.source]
        self._breaks: list[str] | None = [] if plan.recipe.keep_broken else None
        self.episode = sources.load(work.ref, contract, work.fps, self._breaks)
        if reason := plan.interfaces.broken_by(work.source, _interface_row(self.episode)):
            raise BadEpisode(reason)
        self._counts: dict[str, int] = {}
        self._left_out: dict[str, str] = {}  # cameras that break or do not fit, and why
        self._sizes: dict[str, tuple[int, int]] = {}
        self._inspector = Inspector(plan.recipe.quality, self.episode)
        self._reused = reusable(work.ref, work.bases, contract, work.fps)
        self.encoders = [name for name in work.keys if name not in self._reused]
        base = next((work.bases[name] for name in self._reused), None)
        self._base = base if base and not self.encoders and _judged(base, plan.recipe.quality) else None

    def frames(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """Yield (camera, index of the first frame, up to 64 frames uint8 ``[n, S, S, 3]``).

        A camera that breaks is left out, unless it was the last one. Nothing is decoded if the store has all latents,
        and the filters have seen these frames.
        """
        if self._base:
            self._counts = dict.fromkeys(next(iter(self._reused.values())), self._base["frames"])
            return
        for camera, video in self.episode.cameras.items():
            self._counts[camera] = 0
            square = Square(self._plan.recipe.image_size, self._plan.recipe.fit)
            try:
                for frames in video.frames(square):
                    self._inspector.frames(camera, frames)
                    yield camera, self._counts[camera], frames
                    self._counts[camera] += len(frames)
            except BadEpisode as error:
                self._left_out[camera] = str(error)
                if len(self._left_out) == len(self.episode.cameras):
                    raise
            if square.recorded:
                self._sizes[camera] = square.recorded

    def record(self) -> tuple[EpisodeRecord, np.ndarray]:
        """Return the catalogue row without storage locations, and the steps float32 ``[T, D]``.

        Call it after all frames were read.
        """
        self._left_out |= _misfits(self.episode, self._counts, self._left_out)
        for camera in self._left_out:
            self._inspector.forget(camera)
        counts = {camera: count for camera, count in self._counts.items() if camera not in self._left_out}
        row, steps = _record(self.episode, counts, self._plan, self._source)
        row["reused"] = self._reused
        if sources.digest(self.episode.ref) != self.episode.ref.digest:
            raise BadEpisode("the source changed while it was read; ingest it again when it is complete")
        if self._base:
            row["spans"], row["fingerprint"] = self._base["spans"], self._base["fingerprint"]
            # What was found while the frames were decoded is still true of them.
            kinds, told = ("quality", "frames", "streams"), row["repairs"]
            more = [(field, text) for field, text in self._base["repairs"] if field in kinds and text not in told]
            row["repairs"] += [text for _, text in more]
            row["repair_fields"] = [*(row["repair_fields"] or ()), *(field for field, _ in more)]
            return row, steps
        verdict = self._inspector.verdict()
        if verdict.filter:
            raise _Filtered(verdict.filter, verdict.reason)
        row["cameras"] = {camera: count for camera, count in counts.items() if camera not in verdict.dead}
        row["pictures"] = [
            {"camera": name, "height": height, "width": width}
            for name, (height, width) in self._sizes.items()
            if name in row["cameras"]
        ]
        whole = verdict.spans == [(0, row["frames"])]
        row["spans"] = None if whole else [{"first": first, "stop": stop} for first, stop in verdict.spans]
        row["fingerprint"] = verdict.fingerprint.hex() if verdict.fingerprint else None
        repairs = [Repair("streams", f"camera {name}: {why}; left out") for name, why in self._left_out.items()]
        repairs += [Repair("quality", note) for note in verdict.notes]
        repairs += [Repair("frames", f"{reason}; kept up to there") for reason in self._breaks or ()]
        row["repairs"] += [repair.text for repair in repairs]
        row["repair_fields"] = [*(row["repair_fields"] or ()), *(repair.field for repair in repairs)]
        return row, steps


def _judged(base: Base, filters: Filters) -> bool:
    """Return whether the base says all that these filters would say of the same frames."""
    parts = filters.idle or filters.shots or base["spans"] is not None  # may depend on the action
    return not parts and (filters.near_duplicates is None or base["fingerprint"] is not None)


class _Filtered(Exception):
    """Refused by a quality filter. Arguments: the filter's name and its reason."""


class Gate:
    """Checks episodes against those already accepted, on the driver, in the order of their arrival."""

    def __init__(self, plan: Plan, head: Snapshot):
        self._interfaces, self._limit = plan.interfaces, plan.recipe.quality.near_duplicates
        self._seen = Fingerprints()
        if self._limit is not None:
            for row in head.episodes(("id", "fingerprint")).to_pylist():
                self._remember(row)

    def admit(self, source: str, row: EpisodeRecord) -> Refusal | None:
        """Accept the episode with this catalogue row and return None, or return why it is refused."""
        if reason := self._interfaces.broken_by(source, row):
            return Refusal(reason, READER)
        if self._limit is not None and row["fingerprint"]:
            near = self._seen.nearest(bytes.fromhex(row["fingerprint"]), self._limit)
            if near and near[0] != row["id"]:
                reason = f"near_duplicates: a copy of episode {near[0]}; {near[1]:.1f} of 64 bits per frame differ"
                return Refusal(reason, READER, "near_duplicates")
        self._interfaces.add(source, row)
        self._remember(row)
        return None

    def _remember(self, row: EpisodeRecord) -> None:
        if row["fingerprint"]:
            self._seen.add(row["id"], bytes.fromhex(row["fingerprint"]))


def refusal(error: Exception, ref: EpisodeRef) -> Refusal:
    """Turn an exception raised while reading an episode into the reason to refuse it."""
    match error:
        case BadEpisode():
            # Refused for good only if the file is unchanged; otherwise the next run reads it again.
            return Refusal(str(error), READER if _unchanged(ref) else None)
        case _Filtered(args=(name, reason)):
            return Refusal(reason, READER, name)
        case UserError():
            return Refusal(str(error), None)
    return Refusal(f"{type(error).__name__}: {error}", None)


def _unchanged(ref: EpisodeRef) -> bool:
    with contextlib.suppress(Exception):
        return bool(ref.problem) or sources.digest(ref) == ref.digest
    return False


def _interface_row(episode: Episode) -> InterfaceRow:
    """Return the columns that say what an episode's numbers and frames mean."""
    return {
        "fps": episode.fps,
        "embodiment": episode.embodiment,
        "cameras": list(episode.cameras),
        "action_dim": 0 if episode.action is None else episode.action.shape[1],
        "action_layout": json.dumps([block.model_dump() for block in episode.action_layout]),
        "proprio": _widths(episode.proprio),
    }


def _widths(columns: dict[str, np.ndarray]) -> list[NamedWidth]:
    return [{"name": name, "width": values.shape[1]} for name, values in columns.items()]


def _misfits(episode: Episode, counts: dict[str, int], broken: Collection[str]) -> dict[str, str]:
    """Return cameras with another number of frames than there are steps, if some camera has as many."""
    rows = [values for values in (episode.action, *episode.proprio.values()) if values is not None]
    steps = len(rows[0]) if rows else 0
    whole = {camera: count for camera, count in counts.items() if camera not in broken}
    if steps not in whole.values():
        return {}
    return {camera: f"{count} frames for {steps} steps" for camera, count in whole.items() if count != steps}


def _record(episode: Episode, counts: dict[str, int], plan: Plan, source: str) -> tuple[EpisodeRecord, np.ndarray]:
    tracks = {f"camera {camera}": count for camera, count in counts.items()}
    tracks |= {f"proprio {name}": len(values) for name, values in episode.proprio.items()}
    if episode.action is not None:
        tracks["action"] = len(episode.action)
    if not counts or len(set(tracks.values())) != 1 or 0 in tracks.values():
        lengths = ", ".join(f"{name} {count}" for name, count in tracks.items()) or "no camera"
        raise BadEpisode(f"its tracks differ in length or are empty: {lengths}")
    frames = next(iter(counts.values()))

    columns = [*([] if episode.action is None else [episode.action]), *episode.proprio.values()]
    if not all(np.isfinite(values).all() for values in columns):
        raise BadEpisode("its actions or proprioception contain NaN or infinity")
    signals = {name: values for name, values in episode.signals.items() if np.isfinite(values).all()}
    dropped = [name for name in episode.signals if name not in signals]
    repairs = [*episode.repairs, *(Repair("streams", f"{name} contains NaN or infinity; dropped") for name in dropped)]
    steps = np.concatenate([*columns, *signals.values(), np.zeros((frames, 0))], axis=1, dtype=np.float32)
    contract = plan.contracts[source]
    record: EpisodeRecord = {
        **_interface_row(episode),
        "id": episode.id,
        "uri": episode.ref.uri,
        "index": episode.ref.index,
        "format": episode.ref.format,
        "frames": frames,
        "instruction": episode.instruction,
        "success": episode.success,
        "cameras": counts,
        "contract": contract.model_dump_json() if contract else None,
        "repairs": [repair.text for repair in repairs],
        "repair_fields": [repair.field for repair in repairs],
        "source": source,
        "image_size": plan.recipe.image_size,
        "fit": plan.recipe.fit,
        "pictures": None,
        "reused": {},
        "split": episode.split,
        "signals": _widths(signals),
        "texts": [{"name": name, "text": text} for name, text in episode.texts.items()],
        "spans": None,
        "fingerprint": None,
    }
    return record, steps
