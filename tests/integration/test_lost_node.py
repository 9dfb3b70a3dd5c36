"""Machines that are lost and machines that join in the middle of a training with its root on S3, the head included."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from infra.storage import Store, renew
from tests.chaos import MARK
from tests.command_line import environment, run_hvqd, start_hvqd
from tests.losable_cluster import QUICK_HEALTH, InThread, awaited, end_all, has_checkpoint, kill_node, losable_cluster
from tests.said import Said
from tests.services import S3Server, free_ports
from workflows.context import Context
from workflows.loading import load_config
from workflows.training.launch import train_vq

pytestmark = pytest.mark.long

_DEADLINE_SECONDS = 300.0
SETTINGS = ["vq.train.images=1600", "vq.train.checkpoint_every_images=160"]


@pytest.fixture
def here(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """This process can speak to S3; the environment of commands that can."""
    for name, value in {**s3_server.env, "HVQD_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    renew()
    yield environment(tmp_path, {**s3_server.env, "OMP_NUM_THREADS": "1"})
    renew()


def undisturbed(folder: Path, env: dict[str, str], *, train: bool = True) -> Store:
    """The root of the same training on this machine alone; or of its data."""
    whole = folder / "whole"
    arguments = ["--preset", "integration", "--root", str(whole), "--json"]
    for setting in [*SETTINGS, "compute.workers=2"]:
        arguments += ["--set", setting]
    for command in (("data", "build"), ("train", "vq"))[: 2 if train else 1]:
        run_hvqd(*command, *arguments, cwd=folder, env=env).succeeded()
    return Store(str(whole))


def train_on(cluster: Any, root: Store, *changes: str) -> tuple[InThread, Said]:
    """The training under way on a cluster."""
    settings = [*SETTINGS, *changes, f"compute.address={cluster.address}"]
    said, config = Said(), load_config("integration", None, settings, root.url)
    return InThread(lambda: train_vq(Context(config, root, said))), said


def test_a_lost_machine_is_replaced_by_another_and_the_result_is_that_of_an_undisturbed_run(
    here: dict[str, str], s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, whole = Store(f"s3://{s3_server.bucket}/lost-node"), undisturbed(tmp_path, here)
    root.child("dataset").upload_folder(whole.child("dataset").path)
    with losable_cluster(monkeypatch, "127.0.0.3") as cluster:
        training, said = train_on(cluster, root, "compute.workers=2")
        alive = training.thread.is_alive
        awaited("a checkpoint", lambda: has_checkpoint(root.child("vq", "checkpoints")), alive, lambda: said.lines)
        kill_node(cluster)
        awaited("the loss", lambda: any("a worker was lost" in x for x in said.lines), alive, lambda: said.lines)
        cluster.add_node(num_cpus=1, node_ip_address="127.0.0.4")
        training.thread.join(_DEADLINE_SECONDS)
    assert len(training.result) == 1, said.lines
    local = whole.child("vq")
    assert root.child("vq").read_json("history.json") == local.read_json("history.json")
    assert root.child("vq").read_json("manifest.json")["files"] == local.read_json("manifest.json")["files"]


def test_a_training_grows_when_a_machine_joins_and_goes_on_with_fewer_when_it_is_lost(
    here: dict[str, str], s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Store(f"s3://{s3_server.bucket}/elastic")
    root.child("dataset").upload_folder(undisturbed(tmp_path, here, train=False).child("dataset").path)
    checkpoints = root.child("vq", "checkpoints")
    with losable_cluster(monkeypatch) as cluster:
        training, said = train_on(cluster, root, "compute.workers={min: 1, max: 2}", "vq.train.images=6400")
        alive = training.thread.is_alive
        awaited("a checkpoint of one", lambda: has_checkpoint(checkpoints, 1), alive, lambda: said.lines)
        cluster.add_node(num_cpus=1, node_ip_address="127.0.0.3")
        awaited("a checkpoint of two", lambda: has_checkpoint(checkpoints, 2), alive, lambda: said.lines)
        kill_node(cluster)
        training.thread.join(_DEADLINE_SECONDS)
    assert len(training.result) == 1, said.lines
    assert sum("there is room for more workers" in line for line in said.lines) == 1, said.lines
    assert sum("a worker was lost" in line for line in said.lines) == 1, said.lines
    history = root.child("vq").read_json("history.json")
    losses = {record["images"]: record["loss"] for record in history if "loss" in record}
    assert list(losses) == list(range(160, 6401, 160)), "no gap and no double point"
    assert losses[6400] < losses[160]


@contextmanager
def head(port: int, env: dict[str, str], folder: Path) -> Iterator[str]:
    """A cluster's head with two CPUs, as `ray start` makes it; killed with all its processes in the end."""
    mark = uuid.uuid4().hex
    log_file = folder / f"head-{mark}.log"
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", f"--port={port}", "--num-cpus=2"]
    options = ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats", "--block"]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*command, *options], env={**env, MARK: mark, **QUICK_HEALTH}, stdout=log, stderr=log, cwd=folder
        )
    try:
        awaited(
            "the head",
            lambda: "Ray runtime started" in log_file.read_text(errors="replace"),
            lambda: process.poll() is None,
            lambda: log_file.read_text(errors="replace"),
        )
        yield mark
    finally:
        end_all(mark)
        process.wait()


def test_a_head_that_is_lost_ends_the_command_and_the_same_command_goes_on_at_the_next_head(
    here: dict[str, str], s3_server: S3Server, tmp_path: Path
) -> None:
    root, whole = Store(f"s3://{s3_server.bucket}/lost-head"), undisturbed(tmp_path, here)
    root.child("dataset").upload_folder(whole.child("dataset").path)
    (port,) = free_ports(1)
    arguments = ["train", "vq", "--preset", "integration", "--root", root.url, "--json"]
    for setting in [*SETTINGS, "compute.workers=2", f"compute.address=127.0.0.1:{port}"]:
        arguments += ["--set", setting]
    with head(port, here, tmp_path):
        process = start_hvqd(*arguments, cwd=tmp_path, env=here)
        checkpoints = root.child("vq", "checkpoints")
        alive = lambda: process.poll() is None  # noqa: E731
        awaited("a checkpoint", lambda: has_checkpoint(checkpoints), alive, lambda: alive() or process.communicate())
    lost = time.monotonic()
    try:
        out, err = process.communicate(timeout=_DEADLINE_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 1, f"status {process.returncode} after {time.monotonic() - lost:.0f} s\n{out}\n{err}"
    assert "\nhint: " in err, err
    with head(port, here, tmp_path):
        done = run_hvqd(*arguments, cwd=tmp_path, env=here).succeeded()
    assert done.answer["digest"] == json.loads(whole.child("vq").read_bytes("manifest.json"))["digest"]
