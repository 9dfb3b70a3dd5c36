"""Ray's Prometheus exporter during a real training: every gauge is there, with values that can be."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.chaos import MARK, processes
from tests.command_line import environment, run_hvqd, start_hvqd
from workflows.training.meters import METERS

_SCRAPE_SECONDS = 0.5
_DEADLINE_SECONDS = 300.0
IMAGES = 4800


@pytest.fixture
def exporting_node(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Address of a Ray cluster of one machine, and of its exporter, which is told twice a second."""
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    monkeypatch.setenv("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")
    import ray
    from ray.cluster_utils import Cluster

    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "node_ip_address": "127.0.0.5"})
    try:
        ray.init(cluster.address, _node_ip_address="127.0.0.5", log_to_driver=False, logging_level="warning")
        (node,) = ray.nodes()
        yield cluster.address, f"http://127.0.0.5:{node['MetricsExportPort']}/metrics"
    finally:
        ray.shutdown()
        cluster.shutdown()
        for pid in processes(mark):  # some outlive `shutdown`
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def scraped(exporter: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Labels and value of each sample of ours, by name without Ray's prefix; nothing while nobody answers."""
    try:
        with urllib.request.urlopen(exporter, timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("ray_")
            if name in METERS:
                found.setdefault(name, []).append((dict(sample.labels), sample.value))
    return found


def test_a_training_on_a_cluster_exports_every_gauge(exporting_node: tuple[str, str], tmp_path: Path) -> None:
    address, exporter = exporting_node
    root = tmp_path / "run"
    env = environment(tmp_path, {"OMP_NUM_THREADS": "1"})
    options = ["--preset", "integration", "--root", str(root), "--set", f"vq.train.images={IMAGES}"]
    run_hvqd("data", "build", *options, cwd=tmp_path, env=env).succeeded()

    training = start_hvqd("train", "vq", *options, "--set", f"compute.address={address}", cwd=tmp_path, env=env)
    seen: dict[str, Any] = {}
    deadline = time.monotonic() + _DEADLINE_SECONDS
    try:
        while training.poll() is None and time.monotonic() < deadline:
            for name, samples in scraped(exporter).items():
                seen.setdefault(name, []).extend(samples)
            time.sleep(_SCRAPE_SECONDS)
        out, err = training.communicate(timeout=60)
        assert training.returncode == 0, f"{out}\n{err}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(training.pid, signal.SIGKILL)

    assert set(seen) == set(METERS), "every gauge was there to be scraped while the training ran"
    values = {name: [value for _, value in samples] for name, samples in seen.items()}
    assert {(labels["stage"], labels["root"]) for samples in seen.values() for labels, _ in samples} == {
        ("vq", str(root))
    }
    images = [value for value in values["hvqd_images_seen"] if value]
    assert sorted(images) == images and 0 < max(images) <= IMAGES
    assert set(values["hvqd_images_planned"]) <= {0.0, float(IMAGES)}
    assert 1 < max(values["hvqd_images_per_second"]) < 1e5
    assert 0 < max(values["hvqd_loss"]) < 100
    assert 0 < max(values["hvqd_goodput_ratio"]) <= 1
    assert set(values["hvqd_restarts"]) == {0.0}
    assert 0 <= min(values["hvqd_checkpoint_age_seconds"]) < _DEADLINE_SECONDS
    memory = {labels["rank"]: value for labels, value in seen["hvqd_memory_bytes"] if labels["device"] == "host"}
    assert set(memory) == {"0", "1"} and min(memory.values()) > 1e8
