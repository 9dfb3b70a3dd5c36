"""A sweep on an existing cluster of two nodes with its root on S3, whose driver is killed while trials run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from infra.storage import Store
from tests.chaos import MARK
from tests.command_line import environment
from tests.ray_hosts import RayNodes
from tests.services import S3Server
from tests.sweeps import PLAIN, awaited, check_answer, check_whole, space_file, sweep_of
from tuning.ledger import read_trials
from tuning.records import Status

pytestmark = pytest.mark.long

HEAD, OTHER = "127.0.0.2", "127.0.0.3"
TOKEN = "a-token-of-the-test-" + "0123456789abcdef" * 2
REPOSITORY = Path(__file__).parents[2]
ON_THE_HEAD = """
import sys
import ray

ray.init(address=sys.argv.pop(1), _node_ip_address=sys.argv.pop(1), log_to_driver=False, logging_level="warning")
from workflows.cli import main

sys.argv[0] = "hvqd"
main()
"""
"""`hvqd` on the head's machine; on loopback Ray has to be told which of the nodes that is."""
ENDS: dict[int, Status] = dict.fromkeys(range(3), "finished")


@pytest.fixture
def nodes(s3_server: S3Server) -> Iterator[RayNodes]:
    """Two nodes of one CPU each, with the credentials of S3."""
    folder = Path(tempfile.mkdtemp(prefix="hvqd-", dir="/tmp"))  # Ray's sockets need a short path
    binaries = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    mine = {MARK: uuid.uuid4().hex, "PATH": binaries, "OMP_NUM_THREADS": "1"}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}  # Ray's dashboard answers nobody without one
    cluster = RayNodes(HEAD, folder, environment(folder, mine | token | s3_server.env), token=TOKEN)
    started = []
    try:
        started += [cluster.start(HEAD), cluster.start(OTHER)]
        yield cluster
    finally:
        for pid in cluster.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in started:
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def groups(nodes: RayNodes) -> list[str]:
    """States of the placement groups that are not removed."""
    rows = nodes.ask("/api/v0/placement_groups")
    assert rows is not None
    return [row["state"] for row in rows["data"]["result"]["result"] if row["state"] != "REMOVED"]


def test_on_two_nodes_with_the_root_on_s3_a_killed_drivers_sweep_goes_on_and_leaves_nothing(
    nodes: RayNodes, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)  # where the tracking store of a remote root lies
    root = Store(f"s3://{s3_server.bucket}/sweep")
    base = {"preset": "integration", "set": {"compute.workers": 2, "vq.train.warmup_images": 160}}
    budget = {"trials": 3, "images": 960, "min_images": 320}
    space = space_file(tmp_path, base=base, budget=budget)

    def hvqd(*words: str) -> subprocess.Popen[str]:
        asked = ("tune", space, *PLAIN[:-2], "--set", f"compute.address={nodes.address}", "--root", root.url, "--json")
        command = [sys.executable, "-c", ON_THE_HEAD, nodes.address, HEAD, *asked, *words]
        env = {**nodes.env, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen(
            command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    refused = hvqd("--set", "compute.threads_per_worker=2")
    _, err = refused.communicate(timeout=300)
    assert refused.returncode == 2
    assert err.splitlines()[-2:] == [
        "error: 1 trials at once ask for 4 CPUs and 0 GPUs, the cluster has 2 and 0",
        "hint: a smaller --max-concurrent, compute.workers or compute.gpus_per_worker",
    ]
    killed = hvqd()

    def has_a_checkpoint() -> bool:
        assert killed.poll() is None, killed.communicate()
        checkpoints = sweep_of(root).child("trials", "0000", "vq", "checkpoints")
        return any(checkpoints.child(name).exists("manifest.json") for name in checkpoints.children())

    awaited("a checkpoint of the first trial", has_a_checkpoint)
    killed.kill()
    killed.communicate()
    process = hvqd("--resume")
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, f"{out}\n{err}"
    answer = json.loads(out.splitlines()[-1])
    check_answer({**answer, "cpus_free": answer["cpus"]}, ENDS)  # others may use a cluster that is not the job's own
    awaited("the end of all placement groups", lambda: not groups(nodes), 60)
    check_whole(root, ENDS)
    assert [record.number for record in read_trials(sweep_of(root))] == [0, 1, 2]
    assert "1 running" in err and "1 go on from their checkpoints" in err
