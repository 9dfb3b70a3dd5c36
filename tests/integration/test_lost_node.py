"""A machine is lost in the middle of a training with its root on S3, and another one joins."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from infra.storage import Store
from tests.chaos import MARK, processes
from tests.command_line import environment, run_hvqd
from tests.services import S3Server, free_ports
from workflows.context import Context
from workflows.loading import load_config
from workflows.training.launch import train_vq

_DEADLINE_SECONDS = 240.0
_QUICK_HEALTH = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}
"""With Ray's defaults the worker of a dead machine trains on for a while, and nothing is tested."""
SETTINGS = ["vq.train.images=1600", "vq.train.checkpoint_every_images=160", "compute.workers=2"]


class Said:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def update(self, done: float, total: float, unit: str, note: str = "") -> None:
        """Not looked at."""


def awaited(what: str, holds: Callable[[], bool], thread: threading.Thread) -> None:
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not holds():
        assert thread.is_alive(), f"the training ended before {what}"
        assert time.monotonic() < deadline, f"no sign of {what}"
        time.sleep(0.1)


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of two machines on loopback addresses, this process attached to it."""
    for name, value in _QUICK_HEALTH.items():
        monkeypatch.setenv(name, value)
    import ray
    from ray.cluster_utils import Cluster

    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    port = free_ports(1)[0]
    head = {"num_cpus": 1, "node_ip_address": "127.0.0.2", "include_dashboard": True, "dashboard_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1, node_ip_address="127.0.0.3")
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        ray.init(address=cluster.address, _node_ip_address="127.0.0.2", log_to_driver=False, logging_level="warning")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        for pid in processes(mark):  # some outlive `shutdown`
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.long
def test_a_lost_machine_is_replaced_by_another_and_the_result_is_that_of_an_undisturbed_run(
    two_nodes: Any, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**s3_server.env, "HVQD_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    root = Store(f"s3://{s3_server.bucket}/lost-node")
    env = environment(tmp_path, {**s3_server.env, "OMP_NUM_THREADS": "1"})
    whole = tmp_path / "whole"
    arguments = ["--preset", "integration", "--root", str(whole), "--json"]
    for setting in SETTINGS:
        arguments += ["--set", setting]
    run_hvqd("data", "build", *arguments, cwd=tmp_path, env=env).succeeded()
    run_hvqd("train", "vq", *arguments, cwd=tmp_path, env=env).succeeded()
    root.child("dataset").upload_folder(whole / "dataset")

    config = load_config("integration", None, [*SETTINGS, f"compute.address={two_nodes.address}"], root.url)
    said, ended = Said(), []
    thread = threading.Thread(target=lambda: ended.append(train_vq(Context(config, root, said))), daemon=True)
    thread.start()
    checkpoints = root.child("vq", "checkpoints")
    awaited(
        "a checkpoint",
        lambda: any(checkpoints.child(n).exists("manifest.json") for n in checkpoints.children()),
        thread,
    )
    (victim,) = two_nodes.worker_nodes
    os.kill(victim.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    awaited("the loss", lambda: any("a worker was lost" in line for line in said.lines), thread)
    two_nodes.add_node(num_cpus=1, node_ip_address="127.0.0.4")
    thread.join(_DEADLINE_SECONDS)
    assert len(ended) == 1, said.lines

    local = Store(str(whole / "vq"))
    assert root.child("vq").read_json("history.json") == local.read_json("history.json")
    assert root.child("vq").read_json("manifest.json")["files"] == local.read_json("manifest.json")["files"]
