"""Torch's process group for Ray Train, with workers that are told when their machine is taken away.

A module of its own, since Ray's controller imports it, and little else.
"""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

told_to_stop = threading.Event()  # of this worker


@dataclass
class Listening(TorchConfig):
    @property
    def backend_cls(self) -> type:
        return _Listening


class _Listening(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(_listen)


def _listen() -> None:
    """Note SIGTERM instead of dying of it. Ray runs this in a worker's main thread, where alone Python allows it."""
    told_to_stop.clear()
    signal.signal(signal.SIGTERM, lambda *_: told_to_stop.set())
