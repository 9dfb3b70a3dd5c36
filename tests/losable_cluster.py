"""Ray clusters whose machines a test may lose, each on a loopback address of its own."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from infra.storage import Store
from tests.chaos import MARK, processes
from tests.services import free_ports

_DEADLINE_SECONDS = 240.0
QUICK_HEALTH = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}
"""With Ray's defaults the worker of a dead machine trains on for a while, and nothing is tested."""


def awaited(what: str, holds: Callable[[], bool], alive: Callable[[], bool], said: Callable[[], object]) -> None:
    """Wait until something holds while the training is alive."""
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not holds():
        assert alive(), f"the training ended before {what}: {said()}"
        assert time.monotonic() < deadline, f"no sign of {what}: {said()}"
        time.sleep(0.1)


def has_checkpoint(checkpoints: Store, workers: int | None = None) -> bool:
    """Whether a checkpoint is complete, of so many workers."""
    wanted = "-w" if workers is None else f"-w{workers}-"
    return any(checkpoints.child(n).exists("manifest.json") for n in checkpoints.children() if wanted in n)


def end_all(mark: str) -> None:
    """Kill what carries the mark."""
    for pid in processes(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def losable_cluster(monkeypatch: pytest.MonkeyPatch, *others: str) -> Iterator[Any]:
    """A cluster of a head and machines at these addresses, one CPU each, and this process attached to it."""
    for name, value in QUICK_HEALTH.items():
        monkeypatch.setenv(name, value)
    import ray
    from ray.cluster_utils import Cluster

    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    port = free_ports(1)[0]
    head = {"num_cpus": 1, "node_ip_address": "127.0.0.2", "include_dashboard": True, "dashboard_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for address in others:
            cluster.add_node(num_cpus=1, node_ip_address=address)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        ray.init(address=cluster.address, _node_ip_address="127.0.0.2", log_to_driver=False, logging_level="warning")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        end_all(mark)  # some outlive `shutdown`


def kill_node(cluster: Any) -> None:
    """Its only machine besides the head is lost."""
    (victim,) = cluster.worker_nodes
    os.kill(victim.all_processes["raylet"][0].process.pid, signal.SIGKILL)


class InThread:
    """A call under way, and what it returned."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.result: list[Any] = []
        self.thread = threading.Thread(target=lambda: self.result.append(call()), daemon=True)
        self.thread.start()
