"""A small ingest, without Ray: starting a cluster takes longer than encoding a few episodes.

Nobody knows beforehand how long an ingest takes. So each begins here, and as soon as its speed shows that it would
encode for longer than the recipe's ``local_seconds``, the rest is left to :mod:`pipelines.ingest.job`. So is what
follows a file that kills its reader: Ray tries that file again, and then goes on without it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.ingest.apart import apart
from pipelines.ingest.committer import Committer, Inbox, JobStopped
from pipelines.ingest.episode_reader import Plan, Refusal, Work, refusal
from pipelines.ingest.stages import ROWS_PER_PASS, ROWS_PER_WRITE, Encode, decode, item, ref, row, write

WRITE_BYTES = 64 * 2**20  # unencoded frames fill memory faster than latents


def run(work: list[Work], plan: Plan, committer: Committer, count: Callable[..., None]) -> list[Work]:
    """Ingest episodes with one process that decodes them and this one; return the episodes that are left."""
    inbox = Inbox()
    left = {one.ref.id: one for one in work}
    frames: list[pa.Table] = []
    latents: list[pa.Table] = []
    writes = 0

    def flush() -> None:
        nonlocal writes
        if latents and not inbox.put(writes, write(committer.store.uri, latents)):
            raise JobStopped
        writes += 1
        latents.clear()

    with committer.receiving(inbox), apart(decode_or_refuse, [item(one) for one in work], plan=plan) as rows:
        encode = Encode(plan, count, inbox.refuse)
        began = time.monotonic()
        for one in rows:
            [values] = one.select(["episode", "camera", "record"]).to_pylist()
            refused = json.loads(values["record"] or "{}").get("refusal")
            if refused:
                inbox.refuse(values["episode"], Refusal(*refused))
            else:
                frames.append(one)
            if values["camera"] is None:
                del left[values["episode"]]
            if len(frames) == ROWS_PER_PASS:
                latents.append(encode(pa.concat_tables(frames)))
                frames.clear()
                if sum(map(len, latents)) >= ROWS_PER_WRITE or sum(each.nbytes for each in latents) >= WRITE_BYTES:
                    flush()
                if too_long(time.monotonic() - began, 1 - len(left) / len(work), plan):
                    break
        if frames:
            latents.append(encode(pa.concat_tables(frames)))
        flush()
        if not left:
            committer.finish()
    return list(left.values())


def too_long(seconds: float, done: float, plan: Plan) -> bool:
    """Return whether work of which the share ``done`` took this long takes longer than ``local_seconds`` in all."""
    return seconds > plan.recipe.local_seconds * (done or 1)


def decode_or_refuse(item: dict[str, Any], plan: Plan) -> Iterator[pa.Table]:
    """Yield an episode's rows. If it is refused, the last one's record is ``{"refusal": ...}``."""
    try:
        yield from decode(item, plan)
    except Exception as error:  # one broken file must not end an ingest of thousands
        episode = ref(item)
        yield row(episode.id, np.zeros(0, np.float32), record={"refusal": refusal(error, episode)})
