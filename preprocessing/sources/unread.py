"""What a robot's log holds beyond its action and proprioception: named, with the line of a contract that would read it.

Readers keep all other numbers of a step as signals. Whoever knows the robot may want them: split columns of an action,
another arm, tactile sensors, forces. Numbers that only keep the books of an episode, or a simulator's state, are not
worth a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from preprocessing.episode import Episode, Repair

COMMAND = re.compile(r"(?<![a-z])(actions?|act|commands?|commanded|cmd|ctrl|controls?|targets?)(?![a-z])")
MEASURED = re.compile(r"arm|joint|gripper|hand|eef|ee_|tcp|pos|rot|vel|effort|forc|torque|wrench|tact|touch|state|qpos")
BOOKS = re.compile(
    r"(time_?stamps?|time|clock|rewards?|dones?|discount|is_\w+|(\w+_)?index|skip_action|success|stage|annotation.*)$"
    r"|(^|[/._])(states|sim_states?|scene_obs|environment_state|model_xml|object([-_]state)?)$"
)
# Fields that every data set of a format has, and docs/formats.md tells what becomes of them.
KNOWN = {
    "calvin": re.compile(r"actions|scene_obs"),
    "droid": re.compile(r"(action|observation/(robot_state|controller_info|timestamp))/.*"),
    "bridge": re.compile(r"qpos|qvel|eef_transform|(high|low)_bound|\w*_transform|env_done|t_get_obs|time_stamp"),
}
MOST = 8  # names in one sentence


def unread(episode: Episode) -> tuple[Repair, ...]:
    """Name the signals that a contract could read as part of the action or as proprioception."""
    told = " ".join(repair.text for repair in episode.repairs)
    known = KNOWN.get(episode.ref.format)
    others = {
        name: values.shape[1] for name, values in episode.signals.items() if not (known and known.fullmatch(name))
    }
    names = [name for name, width in others.items() if _matters(name, width) and not _is_word(name, told)]
    return tuple(_sentences(episode, [name for name in names if is_command(name)], names))


def is_command(name: str) -> bool:
    """Whether a recorded name says that it is a command; ``observation.action_of_user`` is what was observed."""
    return COMMAND.search(name.lower().replace("_", " ")) is not None and not name.startswith("observation")


def contract_line(key: str, value: object) -> str:
    """A line of a contract, as YAML."""
    return yaml.safe_dump({key: value}, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)[1:-2]


def _sentences(episode: Episode, commands: list[str], names: list[str]) -> Iterator[Repair]:
    if commands and episode.action is not None:
        line = contract_line("action", ["action", *commands[:MOST]])
        yield Repair("action", f"recorded, but not part of the action: {_listed(episode, commands)}; to read: `{line}`")
    if others := [name for name in names if name not in commands]:
        kept = {name: name for name in episode.proprio}
        wanted = {name: re.split(r"[./]", name)[-1] or name for name in others[:MOST]}
        if len({*kept, *wanted.values()}) < len(kept) + len(wanted):
            wanted = {name: name for name in wanted}
        line = contract_line("proprio", kept | wanted)
        yield Repair("proprio", f"recorded, but not proprioception: {_listed(episode, others)}; to read: `{line}`")


def _is_word(name: str, text: str) -> bool:
    return re.search(rf"(?<![\w/.]){re.escape(name)}(?![\w/])", text) is not None


def _listed(episode: Episode, names: list[str]) -> str:
    some = ", ".join(f"{name} ({episode.signals[name].shape[1]})" for name in names[:MOST])
    return some if len(names) <= MOST else f"{some} and {len(names) - MOST} more"


def _matters(name: str, width: int) -> bool:
    lower = name.lower()
    return not BOOKS.search(lower) and (width > 1 or is_command(name) or MEASURED.search(lower) is not None)
