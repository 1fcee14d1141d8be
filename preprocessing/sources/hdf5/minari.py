"""Minari data sets: ``episode_i/{observations, actions, ...}`` in ``main_data.hdf5``, with ``metadata.json`` beside it.

The layout: https://minari.farama.org/content/dataset_standards and https://github.com/Farama-Foundation/Minari
(``minari/dataset/_storages/hdf5_storage.py``). Observations are an array, or a group for spaces that are dictionaries
or tuples (``_index_0``); they and ``infos`` have a row more than actions: the last is from after the last action, and
is not read. Vectors among them are proprioception: they are what the policy observed. ``infos`` is a group of arrays
or, in later versions, a list of JSON texts, which are not read. Minari records neither robot nor rate. Most of its data
sets hold no pictures.

An episode's index is its position in the order of the episodes' numbers; its digest covers its data sets and the name
of the data set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from preprocessing.episode import ActionBlock, Episode, EpisodeRef, Repair
from preprocessing.errors import BadEpisode
from preprocessing.sources.hdf5.episodes import find_each, name_of
from preprocessing.sources.hdf5.kinds import episode_groups, hdf5_files
from preprocessing.sources.hdf5.streams import action_of, read_streams
from preprocessing.sources.hdf5.texts import instruction_of
from preprocessing.sources.scan_cache import Finding, findings
from preprocessing.sources.untrusted.files import within
from preprocessing.sources.untrusted.hdf5 import child, digest_of, numbers, own
from preprocessing.sources.untrusted.metadata import beside

FPS = 20.0
SEEN = "observations"


def detect(path: Path) -> bool:
    return any(True for _ in hdf5_files(path, "minari"))


def scan(path: Path) -> Iterator[EpisodeRef]:
    for file, found in findings("minari", hdf5_files(path, "minari"), _read):
        name, _ = _dataset(file)
        for index, one in enumerate(found):
            yield EpisodeRef(str(file.absolute()), "minari", index, _joined(one.digest, name), one.problem)


def digest(ref: EpisodeRef) -> str:
    with h5py.File(ref.uri, "r") as file:
        return _joined(_digest(file, name_of(ref, _names)), _dataset(Path(ref.uri))[0])


def load(ref: EpisodeRef) -> Episode:
    path, name = Path(ref.uri), name_of(ref, _names)
    with h5py.File(path, "r") as file:
        episode = child(file, name, h5py.Group)
        commands, parts, repairs = action_of(episode, ("actions",))
        if not parts:
            raise BadEpisode(f"no actions in {name}")
        action = np.concatenate([*parts.values()], axis=1)
        steps = len(action)
        used = {"infos", *([commands] if commands in parts else [])}
        streams = read_streams(path, episode, steps, skip=lambda at: at.partition("/")[0] in used, last_too=True)
        infos = own(episode, "infos")
        told = read_streams(path, infos, steps, "infos/", last_too=True) if isinstance(infos, h5py.Group) else None
        success = _success(infos)
        total = episode.attrs.get("total_steps")
    repairs += [*streams.repairs, *(told.repairs if told else [])]
    if isinstance(infos, h5py.Dataset):
        repairs.append(Repair("streams", "infos are JSON texts; left out"))
    if isinstance(total, int | np.integer) and total != steps:
        repairs.append(Repair("steps", f"total_steps is {total}, but there are {steps} actions"))
    repairs.append(Repair("fps", f"control rate unknown; {FPS:g} Hz assumed"))
    repairs.append(Repair("embodiment", "robot unknown"))
    dataset, problem = _dataset(path)
    repairs += [Repair("contract", problem)] if problem else []
    instruction, guess = instruction_of(streams.texts)
    observed = {key: rows for key, rows in streams.vectors.items() if _is_seen(key)}
    outside = {key: rows for key, rows in (streams.vectors | streams.tables).items() if key not in observed}
    outside |= {f"infos/{key}": rows for key, rows in ((told.vectors | told.tables) if told else {}).items()}
    return Episode(
        ref=ref,
        fps=FPS,
        cameras={_seen_name(key): video for key, video in streams.cameras.items()},
        proprio={_seen_name(key): rows for key, rows in observed.items()},
        action=action,
        action_layout=tuple(ActionBlock(name=_block(key), size=rows.shape[1]) for key, rows in parts.items()),
        instruction=instruction,
        success=success,
        embodiment="unknown",
        repairs=(*repairs, *guess),
        signals=outside,
        texts=streams.texts,
        dataset=dataset,
    )


def _is_seen(key: str) -> bool:
    return key.partition("/")[0] == SEEN


def _seen_name(key: str) -> str:
    return key.removeprefix(f"{SEEN}/")


def _block(key: str) -> str:
    return "action" if key == "actions" else key


def _success(infos: h5py.Group | h5py.Dataset | None) -> bool | None:
    for name in ("success", "is_success") if isinstance(infos, h5py.Group) else ():
        marks = own(infos, name)
        if isinstance(marks, h5py.Dataset) and marks.size and marks.dtype.kind in "fiub":
            return bool((numbers(marks) >= 1).any())
    return None


def _dataset(file: Path) -> tuple[str | None, str | None]:
    """The data set's name in the metadata, which is next to the file, or in its folder's; and what is wrong with it."""
    for folder in (file.parent, file.parent.parent):
        with within(folder):  # the user may name the file or its folder
            table, problem = beside(folder / "metadata.json")
        if table or problem:
            name = table.get("dataset_id")
            return name if isinstance(name, str) else None, problem
    return None, None


def _joined(held: str, name: str | None) -> str:
    return hashlib.sha256(f"{held} {name}".encode(errors="surrogatepass")).hexdigest() if name else held


def _names(file: h5py.File) -> list[str]:
    return episode_groups(file, "episode")


def _read(file: Path) -> list[Finding]:
    return find_each(file, _names, _digest)


def _digest(file: h5py.File, name: str) -> str:
    return digest_of(child(file, name, h5py.Group), {})
