"""The base installation acts with a policy, and each verb's packages are declared by its extra."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipelines.cli.extras import PROJECT, VERBS, explain

ROOT = Path(__file__).parents[1]
PACKAGES = ("infra", "pipelines", "preprocessing", "uwm_model")
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BROUGHT = {"botocore": "boto3", "mujoco": "metaworld"}  # pinned by the packages that bring them
HEAVY = {"av", "boto3", "deepspeed", "icechunk", "mlflow", "pandas", "pyarrow", "ray", "scipy", "transformers", "zarr"}

ACT = """
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

import pipelines
from pipelines.models.policy import Policy
from pipelines.models.session import Session

assert Path(pipelines.__file__).is_relative_to(sys.prefix), pipelines.__file__
policy = Policy(Path(sys.argv[1]))
random, observed, size = np.random.default_rng(0), policy.settings.model.observed_frames, policy.image_size
images = {name: random.integers(0, 256, (1, observed, size, size, 3), np.uint8) for name in policy.spec.seen}
proprio = {
    name: random.standard_normal((1, observed, width)).astype(np.float32) for name, width in policy.spec.proprio
}
action = policy.act(images, proprio, torch.Generator().manual_seed(0))
np.testing.assert_allclose(action, np.load(sys.argv[2])["action"], atol=1e-4)
observation = {part: {name: value[0, 0] for name, value in values.items()}
               for part, values in (("images", images), ("proprio", proprio))}
session = Session(policy)
for _ in range(3):
    action = session.act(observation)
    assert action.shape == (policy.spec.action_dim,) and np.isfinite(action).all()
print(*(distribution.name for distribution in metadata.distributions()))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install this checkout without extras, as a user would, and return the environment's folder of programs."""
    place = tmp_path_factory.mktemp("install")
    for name in PACKAGES:  # a copy: building leaves files behind
        shutil.copytree(ROOT / name, place / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "source")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True)
    pip = [sys.executable, "-m", "pip", "--python", place / "venv", "install", "--quiet", "--no-compile"]
    done = _run(*pip, "-c", ROOT / "constraints.txt", place / "source", cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "venv" / "bin"


def _run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_policy_acts_on_the_base_alone(base: Path, tmp_path: Path) -> None:
    with tarfile.open(ROOT / "tests" / "golden" / "recorded-0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    [checkpoint] = (tmp_path / "runs").glob("*/checkpoint")
    done = _run(base / "python", "-c", ACT, checkpoint, tmp_path / "expected.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    installed = {canonicalize_name(name) for name in done.stdout.split()}
    assert "torch" in installed and not installed & HEAVY


@pytest.mark.slow
def test_the_command_line_starts_on_the_base_alone(base: Path, tmp_path: Path) -> None:
    for words in ("--help", "store --help", "contract show droid"):
        done = _run(base / "uwm", *words.split(), cwd=tmp_path)
        assert done.returncode == 0 and done.stdout and not done.stderr, done.stderr
    done = _run(base / "uwm", "contract", "list", "--json", cwd=tmp_path)
    assert "droid" in [contract["name"] for contract in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "extras"),
    [
        ("ingest x --store y", "ingest"),
        ("pretrain --store y --dry-run", "train"),
        ("promote x 1", "train"),
        ("demo", "ingest,train,sim"),
        ("record x", "sim"),
    ],
)
def test_a_verb_names_its_extra(base: Path, tmp_path: Path, words: str, extras: str) -> None:
    done = _run(base / "uwm", *words.split(), cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and "needs the package" in line
    assert line.endswith(f"pip install '{PROJECT}[{extras}]'")


def test_what_a_missing_package_is_told() -> None:
    def line(name: str, *words: str) -> str:
        return explain(ModuleNotFoundError(f"No module named '{name}'", name=name), list(words))

    needs = "uwm {} needs the package '{}': pip install 'unified-world-models[{}]'"
    assert line("icechunk", "ingest", "x") == needs.format("ingest", "icechunk", "ingest")
    assert line("icechunk", "-v", "pretrain") == needs.format("pretrain", "icechunk", "train")
    assert line("ray.data", "ingest") == needs.format("ingest", "ray", "ingest")
    assert line("transformers", "pretrain") == needs.format("pretrain", "transformers", "text")
    assert line("tokenizers", "pretrain") == needs.format("pretrain", "tokenizers", "train")  # of another package
    assert line("metaworld", "evaluate") == needs.format("evaluate", "metaworld", "sim")
    own = ModuleNotFoundError("Meta-World has nothing to render with: apt install libegl1")
    assert explain(own, ["record"]) == str(own)


def _functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield each verb and the functions that it runs."""
    for file in ("app", "policies", "store", "contract"):
        for node in ast.parse((ROOT / "pipelines" / "cli" / f"{file}.py").read_text()).body:
            if isinstance(node, ast.FunctionDef):
                calls = [one.func for one in node.decorator_list if isinstance(one, ast.Call)]
                command = any(isinstance(call, ast.Attribute) and call.attr == "command" for call in calls)
                of_a_file = file in ("store", "contract")
                if command or (file == "policies") or (of_a_file and node.name.startswith("_")):
                    yield (file if of_a_file else node.name.replace("_", "-")), node


def _modules(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Names of the modules that these statements import, except for type checkers; ``a.b`` for ``from a import b``."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _file(module: str) -> Path | None:
    """Return the file of one of our modules, or of the one that holds the name."""
    parts = module.split(".")
    for stem in (ROOT.joinpath(*parts), ROOT.joinpath(*parts[:-1])):
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return path
    return None


def _imported_with(modules: Iterable[str]) -> set[str]:
    """Return the foreign packages that are imported when these modules are."""
    seen: set[Path] = set()
    foreign: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        top = module.partition(".")[0]
        if top in PACKAGES:
            path = _file(module)
            if path and path not in seen:
                seen.add(path)
                waiting += _modules(ast.parse(path.read_text()).body)
        elif top not in sys.stdlib_module_names:
            foreign.add(top)
    return foreign


def _undeclared(modules: set[str], extras: Iterable[str]) -> set[str]:
    lines = [*DECLARED["dependencies"]]
    for extra in extras:
        lines += DECLARED["optional-dependencies"][extra]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    names = metadata.packages_distributions()
    return {
        module
        for module in modules
        if not {canonicalize_name(name) for name in names.get(BROUGHT.get(module, module), [module])} & declared
    }


def test_every_import_is_declared() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    modules = {name.partition(".")[0] for path in files for name in _modules(ast.walk(ast.parse(path.read_text())))}
    foreign = modules - set(PACKAGES) - set(sys.stdlib_module_names)
    assert not _undeclared(foreign, ("ingest", "train", "serve", "sim", "text", "vae"))


def test_the_base_declares_what_a_policy_imports() -> None:
    assert not _undeclared(_imported_with(["pipelines.models.session", "pipelines.cli.app"]), ())


def test_every_verb_has_extras() -> None:
    assert {name for name, _ in _functions()} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_the_extras_of_a_verb_declare_what_it_imports(verb: str) -> None:
    modules = {module for name, node in _functions() if name == verb for module in _modules(ast.walk(node))}
    assert modules
    assert not _undeclared(_imported_with(modules), VERBS[verb])
