"""Which extra to install when a package is missing.

The base installation holds what a policy needs to act. Packages that only some verbs need are declared as extras in
pyproject.toml; the installed metadata says which.
"""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "unified-world-models"
VERBS: dict[str, tuple[str, ...]] = {
    "ingest": ("ingest",),
    "store": ("ingest",),
    "contract": ("ingest",),
    "pretrain": ("train",),
    "finetune": ("train",),
    "evaluate": ("ingest", "train"),  # decodes the source files of held-out episodes
    "register": ("train",),
    "promote": ("train",),
    "report": ("train",),
    "demo": ("ingest", "train", "sim"),
    "record": ("ingest", "sim"),
    "train-vae": ("ingest",),
    "doctor": (),  # tells what is missing
}
# Packages whose names differ from their modules'.
PACKAGES = {"cv2": "opencv-python", "PIL": "pillow", "yaml": "pyyaml"}


def explain(error: ModuleNotFoundError, arguments: list[str]) -> str:
    """Return one line that says what to install, where ``uwm`` with these arguments raised ``error``.

    An error with a message of its own, such as a simulator's, keeps it.
    """
    module = (error.name or "").partition(".")[0]
    if not module or not str(error).startswith("No module named"):
        return str(error)
    verb = next((word for word in arguments if not word.startswith("-")), "")
    extras, declaring = VERBS.get(verb, ()), extras_of(PACKAGES.get(module, module))
    if declaring and not set(extras) & set(declaring):  # an optional package of the verb's, such as a text encoder's
        extras = (declaring[0],)
    project = f"{PROJECT}[{','.join(extras)}]" if extras else PROJECT
    return f"{' '.join(['uwm', verb]).rstrip()} needs the package '{module}': pip install '{project}'"


def extras_of(package: str) -> list[str]:
    """Return the extras that declare a package, in the order of pyproject.toml."""
    try:
        project = metadata.metadata(PROJECT)
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        return []
    extras = project.get_all("Provides-Extra") or []
    declared = [Requirement(line) for line in project.get_all("Requires-Dist") or []]
    named = [one for one in declared if canonicalize_name(one.name) == canonicalize_name(package) and one.marker]
    return [extra for extra in extras if any(one.marker and one.marker.evaluate({"extra": extra}) for one in named)]
