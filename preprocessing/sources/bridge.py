"""Raw BridgeData recordings: one folder per episode, ``.../DATE_TIME/raw/traj_group0/traj0/``.

``images0/im_0.jpg`` and so on are each camera's frames, ``obs_dict.pkl`` holds arrays with a row per frame,
``policy_out.pkl`` a list with an entry per action, ``lang.txt`` each annotator's instruction and confidence. Pickles
are read as data (:mod:`preprocessing.sources.untrusted.pickles`). The layout:
https://github.com/rail-berkeley/bridge_data_v2 (``data_processing/bridgedata_raw_to_numpy.py``). Notes:

- There is one frame more than there are actions. Action t was commanded at frame t; the last frame is left out.
- Before 2021-07-23 cameras lagged by one frame: there, action t is paired with frame t + 1.
- Actions are tool motions in the base frame, in metres and radians, and a gripper that is open at 1, at 5 Hz
  (arXiv 2308.12952).

An episode's digest covers its frames in order, both pickles, the instructions, and whether its cameras lagged.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.episode import ActionBlock, Episode, EpisodeRef, Repair, Video
from preprocessing.errors import BadEpisode
from preprocessing.limits import limits
from preprocessing.sources.scan_cache import Finding, file_digest, findings, stamp_of
from preprocessing.sources.untrusted.files import contents, own
from preprocessing.sources.untrusted.pickles import read_pickle
from preprocessing.video.frames import indexed_images_video

FPS = 5.0
OBSERVED, COMMANDED, INSTRUCTIONS = "obs_dict.pkl", "policy_out.pkl", "lang.txt"
NO_LAG_SINCE = "2021-07-23"
MAX_PICKLE = 2**25  # bytes; 2**17 are usual
MAX_INSTRUCTIONS = 2**16  # bytes
LAYOUT = (
    ActionBlock(name="position", size=3, kind="position", mode="delta", frame="base", unit="m"),
    ActionBlock(
        name="rotation", size=3, kind="rotation", representation="euler_xyz", mode="delta", frame="base", unit="rad"
    ),
    ActionBlock(name="gripper", size=1, kind="gripper", mode="absolute", gripper_one_means="open"),
)


def detect(path: Path) -> bool:
    """One of the pickles beside images is enough: an episode without the other is reported as broken."""
    named = any((path / name).exists() for name in (OBSERVED, COMMANDED))
    return named and any(_images(camera) for camera in _cameras(path).values() if camera.is_dir())


def scan(path: Path) -> Iterator[EpisodeRef]:
    folder = path.absolute()
    files = _files(folder)
    stamp = stamp_of(files)  # one cache entry for all files of an episode
    if stamp:
        [(_, [finding])] = findings(f"bridge {stamp}", [files[0]], lambda _: _read(folder))
    else:
        [finding] = _read(folder)
    yield EpisodeRef(str(folder), "bridge", 0, finding.digest, finding.problem)


def digest(ref: EpisodeRef) -> str:
    return _digest(Path(ref.uri))


def load(ref: EpisodeRef) -> Episode:
    folder = Path(ref.uri)
    commands, action = _commands(folder)
    first = int(_lagged(folder))
    steps = len(action) - first
    if steps < 1:
        raise BadEpisode(f"holds {len(action)} actions")
    cameras = {f"image_{k}": _video(camera, len(action), first, steps) for k, camera in _cameras(folder).items()}
    table = _pickle(folder / OBSERVED)
    observed = _rows(table, len(action), first, steps)
    misfits = [name for name, values in table.items() if name not in observed and _numbers(values) is not None]
    if "full_state" not in observed:
        raise BadEpisode(f"{OBSERVED} holds no full_state with a row per frame")
    if "time_stamp" in observed:
        observed["time_stamp"] -= observed["time_stamp"][0]  # float32 cannot hold seconds since 1970
    commanded = _rows(commands, len(action), 0, steps)
    instructions = _instructions(folder)
    repairs = [
        Repair("streams", f"{name} in {OBSERVED} has another number of rows than frames; left out") for name in misfits
    ]
    if first:
        text = f"cameras lagged by one frame before {NO_LAG_SINCE}; each action is paired with the next frame"
        repairs.append(Repair("steps", text))
    elif not _dates(folder):
        text = f"no folder name has a date; cameras assumed not to lag, as since {NO_LAG_SINCE}"
        repairs.append(Repair("steps", text))
    return Episode(
        ref=ref,
        fps=FPS,
        cameras=cameras,
        proprio={"state": observed.pop("full_state").astype(np.float32)},
        action=action[:steps],
        action_layout=LAYOUT if action.shape[1] == 7 else (ActionBlock(name="action", size=action.shape[1]),),
        instruction=next(iter(instructions), None),
        success=None,
        embodiment="widowx",
        repairs=tuple(repairs),
        signals={name: rows.astype(np.float32) for name, rows in (observed | commanded).items()},
        texts={f"lang_{index}": instruction for index, instruction in enumerate(instructions)},
    )


def _cameras(folder: Path) -> dict[int, Path]:
    """The folders of colour cameras, by number."""
    return _numbered(folder, r"images([0-9]{1,3})")


def _files(folder: Path) -> list[Path]:
    """All files of an episode, in order."""
    named = [folder / name for name in (OBSERVED, COMMANDED, INSTRUCTIONS) if (folder / name).exists()]
    every = [*named, *(image for camera in _cameras(folder).values() for image in _images(camera).values())]
    return [own(file) for file in every]


def _images(camera: Path) -> dict[int, Path]:
    return _numbered(camera, r"im_([0-9]{1,9})\.jpg")


def _numbered(folder: Path, name: str) -> dict[int, Path]:
    """The members of a folder that match, by their number, sorted: 10 comes after 9."""
    found = {int(number[1]): path for path in folder.iterdir() if (number := re.fullmatch(name, path.name))}
    return dict(sorted(found.items()))


def _video(camera: Path, actions: int, first: int, steps: int) -> Video:
    images = _images(camera)
    if list(images) not in ([*range(actions)], [*range(actions + 1)]):
        raise BadEpisode(f"{camera.name} holds {len(images)} images; {actions} actions need images 0 to {actions}")
    shown = [images[index] for index in range(first, first + steps)]
    return indexed_images_video(steps, lambda index: shown[index].read_bytes())


def _commands(folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """The outputs of the policy or the teleoperator per step, by name, and the actions, float32 ``[T, A]``."""
    entries = _pickle(folder / COMMANDED)
    if not isinstance(entries, list) or not entries or len(entries) > limits().episode_steps:
        raise BadEpisode(f"{COMMANDED} does not hold a list of actions")
    tables = [
        entry if isinstance(entry, dict) else {"actions": entry} for entry in entries
    ]  # the oldest hold bare arrays
    names = [name for name in tables[0] if isinstance(name, str) and all(name in table for table in tables)]
    columns = {name: [table[name] for table in tables] for name in names}
    actions = _numbers(columns.pop("actions", None))
    if actions is None or actions.ndim != 2:
        raise BadEpisode(f"{COMMANDED} does not hold one action vector per step")
    return columns, actions.astype(np.float32)


def _rows(table: Any, actions: int, first: int, steps: int) -> dict[str, np.ndarray]:
    """The arrays that have a row per action or per frame, float64 ``[steps, D]`` by name."""
    if not isinstance(table, dict):
        raise BadEpisode(f"{OBSERVED} does not hold a table")
    found = {name: _numbers(values) for name, values in table.items()}
    fitting = {name: rows for name, rows in found.items() if rows is not None and len(rows) in (actions, actions + 1)}
    return {name: rows[first : first + steps].reshape(steps, -1) for name, rows in fitting.items()}


def _numbers(values: Any) -> np.ndarray | None:
    """float64 with at least one dimension; None if the values are something else."""
    try:  # as objects first: NumPy turns numbers mixed with text into text, each as long as the longest
        rows = values if isinstance(values, np.ndarray) else np.asarray(values, object)
        if rows.dtype == object:
            fits = all(isinstance(item, int | float | np.number | np.bool_) for item in rows.flat)
        else:
            fits = rows.dtype.kind in "fiub"
        return rows.astype(np.float64) if fits and rows.ndim and rows.size else None
    except (ValueError, TypeError, OverflowError):  # ragged, or beyond the range of floats
        return None


def _pickle(file: Path) -> Any:
    return read_pickle(_bytes(file, MAX_PICKLE))


def _instructions(folder: Path) -> list[str]:
    if not (folder / INSTRUCTIONS).is_file():
        return []
    lines = [
        line.strip() for line in _bytes(folder / INSTRUCTIONS, MAX_INSTRUCTIONS).decode(errors="replace").splitlines()
    ]
    return [line for line in lines if line and not line.startswith("confidence")]


def _bytes(file: Path, limit: int) -> bytes:
    if not file.exists():
        raise BadEpisode(f"has no {file.name}")
    return contents(file, limit)


def _lagged(folder: Path) -> bool:
    return any(date < NO_LAG_SINCE for date in _dates(folder)[-1:])


def _dates(folder: Path) -> list[str]:
    """The dates in the folders' names; the last one is the recording's."""
    return [part[:10] for part in folder.parts if re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", part)]


def _digest(folder: Path) -> str:
    parts = [[str(file.relative_to(folder)), file_digest(file)] for file in _files(folder)]
    return hashlib.sha256(json.dumps([parts, _lagged(folder)]).encode()).hexdigest()


def _read(folder: Path) -> list[Finding]:
    problem = None
    try:
        _commands(folder)
    except BadEpisode as error:
        problem = str(error)
    return [Finding(_digest(folder), problem)]
