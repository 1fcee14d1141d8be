"""The instruction of an episode in HDF5: attributes and data sets whose names say so, whatever recorder wrote them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import h5py

from preprocessing.episode import Repair
from preprocessing.sources.untrusted.hdf5 import own, text

MAX_TEXT = 1000  # characters of an instruction
MAX_MEMBERS = 256  # of a group that is searched for one; those above many episodes have thousands
SAYS = re.compile(r"instruction|lang|task|prompt|caption|annotation|description|mission", re.IGNORECASE)
INSTRUCTIONS = (  # names that hold an instruction, the likeliest first
    *("language_instruction", "natural_language_instruction", "instruction", "language_raw", "task_description"),
    *("lang", "language", "mission", "prompt", "task", "description", "annotation", "caption"),
)


def instruction_of(texts: dict[str, str], own_names: Iterable[str] = ()) -> tuple[str | None, list[Repair]]:
    """The instruction among an episode's texts, and a repair if its name is none of the format's own."""
    for name in own_names:
        if texts.get(name):
            return texts[name], []
    for known in INSTRUCTIONS:
        for name, words in texts.items():
            if words and name.rpartition("/")[2].lower() == known:
                return words, [Repair("instruction", f"the instruction is taken from {name}")]
    return None, []


def texts_of(*groups: h5py.Group) -> dict[str, str]:
    """Attributes and data sets of single texts in these groups, the innermost first, whose names say instruction."""
    found = dict[str, str]()
    for group in groups:
        for name in group.attrs:
            if SAYS.search(name) and name not in found and (words := short_text(_attribute(group, name))):
                found[name] = words
        for name in sorted(group) if len(group) <= MAX_MEMBERS else ():
            member = own(group, name) if SAYS.search(name) and name not in found else None
            if isinstance(member, h5py.Dataset) and member.shape in ((), (1,)) and member.dtype.kind in "SO":
                found[name] = short_text(member[()])
    return {name: words for name, words in found.items() if words}


def other_texts(known: dict[str, Any], *groups: h5py.Group) -> dict[str, str]:
    """Those of these texts that are not ``known`` already, for a digest."""
    return {name: words for name, words in texts_of(*groups).items() if name not in known}


def _attribute(group: h5py.Group, name: str) -> Any:
    try:
        return group.attrs[name]
    except (OSError, RuntimeError, TypeError, ValueError, KeyError):  # damaged, or of a type that NumPy lacks
        return None


def short_text(value: Any) -> str:
    """A text that can be an instruction: no JSON, no XML, no document."""
    words = text(value)
    return "" if len(words) > MAX_TEXT or words.startswith(("{", "[", "<")) else words
