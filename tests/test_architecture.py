"""Who may import whom, as ARCHITECTURE.md says it; and that every module has its line there."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.recipe import RESULT_KEYS, WORK_KEYS, Recipe

ROOT = Path(__file__).parents[1]
PACKAGES = ("uwm_model", "preprocessing", "infra", "pipelines")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# What each package may import of the others. Simulators may name the types of contracts.
SIBLINGS = {
    "uwm_model": set(),
    "preprocessing": set(),
    "infra": set(),
    "pipelines": {"uwm_model", "preprocessing", "infra"},
}
CONTRACT_TYPES = {"preprocessing.episode", "preprocessing.contracts.interface"}

# From the bottom up: a module imports its own group and groups of lower levels, never another group of its level.
LEVELS = {
    "pipelines": [
        ["recipe", "errors", "console", "outputs"],
        ["models"],
        ["ingest", "train", "evaluate", "registry", "serve"],
        ["report", "record", "train_vae", "doctor", "workflow"],
        ["demo"],
        ["cli"],
    ],
    "preprocessing": [
        ["errors", "limits", "cache"],
        ["episode"],
        ["video"],
        ["contracts"],
        ["sources", "quality", "store", "encoders"],
        ["dataset", "inspect"],
    ],
}
# Heavy or replaceable libraries, and the only modules that import them.
HOMES = {
    "typer": ("pipelines.cli", "pipelines.console"),
    "icechunk": ("preprocessing.store", "pipelines.ingest"),
    "mlflow": ("infra", "pipelines.models.mlflow_policy"),
    "deepspeed": ("infra.engine",),
    "ray": ("infra", "pipelines.ingest", "pipelines.train"),
    "jinja2": ("pipelines.report",),
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def imported(path: Path) -> tuple[str, ...]:
    """Names of the modules that a file imports, anywhere in it; ``from a import b`` counts as a.b if that is one."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports relatively"
            for alias in node.names:
                inner = ROOT.joinpath(*(node.module or "").split("."), alias.name)
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                yield f"{node.module}.{alias.name}" if is_module else node.module or ""


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_downwards_only(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for name in imported(path):
            top = name.partition(".")[0]
            types = path.parent.name == "simulators" and name in CONTRACT_TYPES
            if top in PACKAGES and top != package and not types:
                assert top in SIBLINGS[package], f"{path}: imports {name}"


@pytest.mark.parametrize("package", LEVELS)
def test_levels_within_a_package(package: str) -> None:
    level = {group: number for number, groups in enumerate(LEVELS[package]) for group in groups}
    for path in (ROOT / package).rglob("*.py"):
        own = name_of(path).split(".")[1:2]
        if not own:
            continue
        assert own[0] in level, f"{path}: of no level; name it in LEVELS and in ARCHITECTURE.md"
        for name in imported(path):
            if name.startswith(f"{package}."):
                other = name.split(".")[1]
                lower = other == own[0] or level[other] < level[own[0]]
                same_bottom = level[other] == level[own[0]] == 0
                assert lower or same_bottom, f"{path}: imports {name}, which is not below it"


@pytest.mark.parametrize("library", HOMES)
def test_libraries_have_homes(library: str) -> None:
    for path in MODULES:
        if any(name.split(".")[0] == library for name in imported(path)):
            homes = [f"{home}." for home in HOMES[library]]
            assert f"{name_of(path)}.".startswith(tuple(homes)), f"{path}: imports {library}"


LOADED = "import sys; import {module}; print(*(name for name in {unwanted} if name in sys.modules))"


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("pipelines.models.policy", ["ray", "mlflow", "deepspeed", "icechunk", "zarr", "pyarrow", "typer", "av"]),
        ("pipelines.models.session", ["ray", "mlflow", "deepspeed", "icechunk", "zarr", "pyarrow", "typer", "av"]),
        ("pipelines.models.resolve", ["torch", "ray", "mlflow", "icechunk", "pyarrow"]),
        ("pipelines.cli", ["torch", "ray", "mlflow", "icechunk", "pyarrow"]),
        ("pipelines.ingest.job", ["torch", "mlflow"]),
        ("preprocessing.sources", ["torch", "ray", "icechunk"]),
    ],
)
def test_what_loads_what(module: str, unwanted: list[str]) -> None:
    code = LOADED.format(module=module, unwanted=unwanted)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


WATCH = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "ray" and "RAY_ENABLE_UV_RUN_RUNTIME_ENV" not in os.environ:
            raise SystemExit("ray is imported before its environment is set")

os.environ.pop("RAY_ENABLE_UV_RUN_RUNTIME_ENV", None)
sys.meta_path.insert(0, Watch())
import {module}
assert "ray" in sys.modules
"""


@pytest.mark.parametrize("module", ["infra.cluster", "pipelines.train.driver", "pipelines.train.preemption"])
def test_the_environment_is_set_before_ray_is_imported(module: str) -> None:
    code = WATCH.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_public_class_has_the_name_of_another() -> None:
    names = [
        node.name
        for path in MODULES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_every_module_has_its_line_in_the_architecture() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    listed = set(re.findall(r"^- `([\w/.]+\.py)`", page, re.MULTILINE))
    there = {
        str(path.relative_to(ROOT))
        for path in MODULES
        if path.name != "__init__.py" or path.relative_to(ROOT) == Path("preprocessing/sources/__init__.py")
    }
    assert listed == there, f"missing: {sorted(there - listed)}; gone: {sorted(listed - there)}"


def test_every_recipe_key_says_whether_it_changes_the_result() -> None:
    assert set(Recipe.model_fields) == RESULT_KEYS | WORK_KEYS
    assert not RESULT_KEYS & WORK_KEYS
