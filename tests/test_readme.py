"""The README's commands, in order, on very little data. ``make demo`` runs the same verbs at full length."""

from __future__ import annotations

import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

import pytest
from helpers.command import Uwm

README = Path(__file__).parents[1] / "README.md"
SMALL = ["model.width=32", "model.depth=1", "model.heads=2"]
QUICK = ["steps=2", "batch_size=8", "validation_share=0.5", "workers=1"]
APPENDED = {  # to a verb's own arguments, for speed
    "record": ["--task", "drawer-close", "--image-size", "64"],
    "pretrain": ["--json", *SMALL, *QUICK],
    "finetune": ["--json", *QUICK],
    "evaluate": ["--episodes", "2"],
    "train-vae": ["--steps", "2"],
}


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("uwm ")]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("metaworld") is None, reason="the extra 'sim' is not installed")
def test_every_command_of_the_readme_runs(
    ray_cluster: None, tmp_path: Path, uwm: Uwm, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.record import record

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("UWM_CACHE", str(tmp_path / "cache"))
    record(Path("demo-output/raw"), ["drawer-close"], episodes=5, videos=1)
    places = {
        "/data/my_lerobot": "demo-output/raw/lerobot",
        "/data/more.hdf5": "demo-output/raw/hdf5/drawer-close_demo.hdf5",
        "/data/videos": "demo-output/raw/videos",
        "/data/": "",
        ".venv/": f"{sys.prefix}/",
        "sdxl-vae": "tiny",  # no model hub can be reached here
    }
    done = []
    for verb, *arguments in commands():
        for written, here in places.items():
            arguments = [argument.replace(written, here) for argument in arguments]
        code, answer, err = uwm(verb, *arguments, *APPENDED.get(verb, []))
        # The gate may refuse a policy that was trained for two steps.
        assert code in ((0, 4) if verb == "promote" else (0,)), (verb, arguments, err)
        assert "Traceback" not in err
        if verb == "pretrain" and "run_id" in answer:
            places["RUN_ID"] = answer["run_id"]
        done.append(verb)
    assert {"ingest", "store", "pretrain", "finetune", "evaluate", "promote", "record", "train-vae"} <= set(done)
    assert len(list(Path("runs").glob("evaluation-*/drawer-close_*.mp4"))) == 2
    act = run_path(str(README.parent / "examples" / "act.py"))["main"]
    assert act("models:/my-policy/1", "drawer-close") in (True, False)
