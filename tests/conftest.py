from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Uwm

torch.set_num_threads(1)  # of two cores; the processes that tests start need the other


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests off the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UWM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster for all tests: starting it takes seconds."""
    from infra.cluster import cluster

    with cluster():
        yield


@pytest.fixture
def uwm(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Uwm:
    """Run the command line in this process.

    Returns (exit code, last line of stdout as JSON with --json, text for people: the rest of stdout, then stderr).
    """
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
        answer = json.loads(lines.pop()) if "--json" in arguments and lines else None
        return int(code or 0), answer, "".join(f"{line}\n" for line in lines) + err

    return run
