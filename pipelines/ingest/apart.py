"""Decoding in a process of its own, without Ray: a file that kills its reader does not kill the ingest.

The process gets its work by pipe from the one that started it and answers with an Arrow stream, which is no pickle:
it reads files that nobody vouches for.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from pipelines.ingest.episode_reader import Plan


@contextlib.contextmanager
def apart(function: Callable[..., Iterator[pa.Table]], items: list[Any], plan: Plan) -> Iterator[Any]:
    """Start a process that calls ``function(item, plan=plan)`` for each item; yield the iterator of its tables.

    They have one schema. The iterator ends early if the process dies; leaving the block ends the process.
    """
    # -P: whatever lies in the current folder, such as a random.py, is not imported in place of the library's.
    command = [sys.executable, "-P", "-c", f"from {__name__} import main; main()"]
    modules = os.pathsep.join(map(os.path.abspath, sys.path))
    environment = os.environ | {"PYTHONPATH": modules, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if plan.verbose else subprocess.DEVNULL,
    )
    assert process.stdin and process.stdout
    try:
        with contextlib.suppress(BrokenPipeError):  # it died already; its stream is empty
            pickle.dump((function, items, plan), process.stdin)
            process.stdin.close()
        yield _tables(process.stdout)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _tables(stream: Any) -> Iterator[pa.Table]:
    with contextlib.suppress(pa.ArrowInvalid, OSError):  # cut off in a message, or before the first
        for batch in pa.ipc.open_stream(stream):
            yield pa.Table.from_batches([batch])


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends this process
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # whatever a library prints must not get into the stream
        function, items, plan = pickle.load(sys.stdin.buffer)
        writer = None
        for item in items:
            for table in function(item, plan=plan):
                writer = writer or pa.ipc.new_stream(answers, table.schema)
                writer.write_table(table)
                answers.flush()
        if writer:
            writer.close()
