"""How long a soak is, and its chances: ``make soak`` is short, ``make soak-long`` kills more."""

from __future__ import annotations

import os
import random

SEED = int(os.environ.get("UWM_SOAK_SEED", "0"))  # make soak prints a new one each time
KILLS = int(os.environ.get("UWM_SOAK_KILLS", "4"))
FLIPS = 50


def chances(test: str) -> random.Random:
    return random.Random(f"{SEED} {test}")
