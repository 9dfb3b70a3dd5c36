"""Seconds from `hvqd launch --no-preflight` to the first training step, on a running cluster of two nodes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import yaml
from runner import REPOSITORY, Benchmark, Figures, Target, main

sys.path.insert(0, str(REPOSITORY))  # the nodes that the tests use, too

from tests.command_line import HVQD, environment, run_hvqd
from tests.ray_hosts import RayNodes, ray_nodes

NODES = ("127.0.0.2", "127.0.0.3")
_DEADLINE_SECONDS = 600.0
_POLL_SECONDS = 0.05
_IDLE_SHARE = 0.1
FIRST_STEP = "vq/times/goodput.json"
"""What the driver writes when it hears of the first step."""


def processor_seconds(nodes: RayNodes) -> float:
    """CPU time of all that runs on the nodes so far."""
    ticks = 0
    for pid in nodes.processes():
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def settle(nodes: RayNodes) -> None:
    """Wait until the cluster idles: what it starts by itself has started."""
    before = processor_seconds(nodes)
    for _ in range(60):
        time.sleep(1)
        now = processor_seconds(nodes)
        if now - before < _IDLE_SHARE:
            return
        before = now
    raise AssertionError("the cluster did not come to rest within a minute")


def wait(what: str, holds: Callable[[], bool], launching: subprocess.Popen[bytes], log: Path) -> None:
    """Poll until something holds."""
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not holds():
        failed = launching.poll() not in (None, 0)
        assert not failed and time.monotonic() < deadline, f"no {what}:\n{log.read_text()}"
        time.sleep(_POLL_SECONDS)


def start(nodes: RayNodes, folder: Path, env: dict[str, str], name: str) -> Figures:
    """Launch the training of a tokenizer on a root of its own, and stop it after its first step."""
    root, target, log = folder / name, folder / "cluster.yaml", folder / f"{name}.log"
    words = ["--preset", "integration", "--root", str(root)]
    run_hvqd("data", "build", *words, cwd=folder, env=env).succeeded()
    settle(nodes)
    launch = ["launch", "train", "vq", *words, "--on", str(target), "--no-preflight", "--name", name]
    started = time.monotonic()
    with log.open("wb") as output:
        launching = subprocess.Popen([str(HVQD), *launch], cwd=folder, env=env, stdout=output, stderr=output)
    wait("end of launch", lambda: launching.poll() == 0, launching, log)
    submitted = time.monotonic() - started
    wait("first step", (root / FIRST_STEP).exists, launching, log)
    seconds = time.monotonic() - started
    run_hvqd("jobs", "stop", name, "--on", str(target), cwd=folder, env=env).succeeded()
    return {"seconds": seconds, "seconds_until_submitted": submitted}


def measure(quick: bool, seed: int) -> Figures:
    """A launch on a cluster that has never seen this code, and a second one."""
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="hvqd-cold-") as scratch, ray_nodes(NODES[0]) as nodes:
        folder = Path(scratch)
        nodes.start(NODES[1])
        target = {"kind": "ray", "address": nodes.dashboard, "shared_folders": [scratch]}
        (folder / "cluster.yaml").write_text(yaml.safe_dump(target))
        env = environment(folder)
        for name in ("hvqd-first", "hvqd-second"):
            found = start(nodes, folder, env, name)
            figures |= {f"{figure}_{name.removeprefix('hvqd-')}": value for figure, value in found.items()}
    return figures


BENCHMARK = Benchmark(
    name="cold_start",
    what=(
        "Wall time from `hvqd launch train vq --no-preflight` (preset `integration`, the dataset there already, two "
        "workers on two nodes) until the driver has heard of the first optimizer step. The cluster is started anew for "
        "every repeat, each node of one CPU under a loopback address of its own on this machine, and idles before the "
        "launch; `first` is the first job of the cluster, so that the code is uploaded and unpacked on both nodes, "
        "`second` the next. `until_submitted` is when the launching command has ended."
    ),
    parts={"launches": measure},
    targets=(Target("seconds_first", "<=", 20),),
    repeats=3,
    quick_decides=True,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
