"""What a process waits for before it works: ``make bench-start`` writes docs/benchmarks/start.md.

Each line is a fresh Python process, in rounds that take every line once; the first round only warms the disk's cache.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers.formats import numbered, write_demos, write_video
from tqdm import tqdm

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "start.md"
ROUNDS = 6
LINES = {
    "Python alone": "pass",
    "torch": "import torch",
    "a policy (`pipelines.models.session`)": "import pipelines.models.session",
    "`uwm --help`": "import sys; sys.argv = ['uwm', '--help']; from pipelines.cli import main; main()",
    "the readers (`preprocessing.sources`)": "import preprocessing.sources",
    "the store (`preprocessing.store.store`)": "import preprocessing.store.store",
    "a training (`pipelines.train.pretrain`)": "import pipelines.train.pretrain",
}
INGEST = "import sys; sys.argv = ['uwm', 'ingest', 'raw', '--store', {}]; from pipelines.cli import main; main()"
LINES["`uwm ingest` of a video and a demonstration, 80 frames"] = INGEST.format("'a'")
LINES["the same on Ray (`local_seconds=0`)"] = INGEST.format("'b', '--set', 'local_seconds=0'")


def seconds(code: str) -> float:
    """Run the code in an empty folder, but for ``raw``."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "raw").mkdir()
        write_video(Path(place) / "raw" / "clip.mp4", numbered(60))
        write_demos(Path(place) / "raw" / "toy_demo.hdf5", demos=1, steps=20)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = os.environ | {"UWM_CACHE": f"{place}/cache"}
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], cwd=place, env=environment, check=True, **quiet)
        return time.perf_counter() - began


def main() -> None:
    rounds = [{name: seconds(code) for name, code in LINES.items()} for _ in tqdm(range(ROUNDS), "start", unit="round")]
    torch = statistics.median(each["torch"] for each in rounds[1:])
    rows = []
    for name in LINES:
        median = statistics.median(each[name] for each in rounds[1:])
        rows.append(f"| {name} | {median:.2f} | {median / torch:.2f} |")
    PAGE.write_text(
        f"# Starting\n\n`make bench-start` on {os.cpu_count()} CPU cores: seconds that a fresh process takes, "
        f"medians of {ROUNDS - 1} rounds.\n\n| what is imported or run | s | of torch's |\n|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
