from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Uwm

torch.set_num_threads(1)  # two cores; the tests' own processes want the other


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is left in, or taken from, the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UWM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for all tests: starting it takes seconds."""
    from infra.cluster import cluster

    with cluster():
        yield


@pytest.fixture
def uwm(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Uwm:
    """Runs the command line in this process: (exit code, last line of stdout as JSON, stderr)."""
    from pipelines.cli import main

    def run(*arguments: str | Path) -> tuple[int, Any, str]:
        monkeypatch.setattr(sys, "argv", ["uwm", *map(str, arguments)])
        capfd.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        lines = out.strip().splitlines()
        return int(code or 0), json.loads(lines[-1]) if "--json" in arguments and lines else None, err

    return run
