"""Ray Train's Torch process group with workers that note SIGTERM, which announces a preemption.

A separate module because Ray's controller imports it, and should import little else.
"""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

sigterm_received = threading.Event()  # by this worker


@dataclass
class PreemptibleTorchConfig(TorchConfig):
    @property
    def backend_cls(self) -> type:
        return _PreemptibleBackend


class _PreemptibleBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(_note_sigterm)


def _note_sigterm() -> None:
    """Note SIGTERM instead of dying. Ray runs this in the main thread, the only one that may set signal handlers."""
    sigterm_received.clear()
    signal.signal(signal.SIGTERM, lambda *_: sigterm_received.set())
