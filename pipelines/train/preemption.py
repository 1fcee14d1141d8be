"""Ray Train's Torch process group, with two changes.

Its workers note SIGTERM, which announces a preemption. And on a cluster of one machine they meet through a file and
talk over the loopback interface: PyTorch's TCP store would listen on every interface.

A separate module because Ray's controller imports it, and should import little else.
"""

from __future__ import annotations

import os
import signal
import threading
import uuid
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import (
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)

sigterm_received = threading.Event()  # by this worker


@dataclass
class PreemptibleTorchConfig(TorchConfig):
    """``meeting_folder`` is a folder of the only machine of the cluster; None: there may be several."""

    meeting_folder: str | None = None

    @property
    def backend_cls(self) -> type:
        return _PreemptibleBackend


class _PreemptibleBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if backend_config.meeting_folder is None:
            super().on_start(worker_group, backend_config)
        else:
            _meet_in(backend_config.meeting_folder, worker_group, backend_config)
        worker_group.execute(_note_sigterm)


def _meet_in(folder: str, worker_group: Any, config: PreemptibleTorchConfig) -> None:
    """Do what Ray's own backend does, with a file in place of a TCP store."""
    worker_group.execute(_set_torch_distributed_env_vars)
    worker_group.execute(_stay_on_loopback)
    size, url = len(worker_group), f"file://{folder}/{uuid.uuid4().hex}"
    ray.get(
        [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend=config.backend,
                world_rank=rank,
                world_size=size,
                init_method=url,
                timeout_s=config.timeout_s,
            )
            for rank in range(size)
        ]
    )


def _stay_on_loopback() -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"


def _note_sigterm() -> None:
    """Note SIGTERM instead of dying. Ray runs this in the main thread, the only one that may set signal handlers."""
    sigterm_received.clear()
    signal.signal(signal.SIGTERM, lambda *_: sigterm_received.set())
