"""Joining a cluster from a home with a Ray token in it, as every local cluster leaves one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ray_hosts import ray_nodes

HEAD = "127.0.0.4"
TOKEN = "0123456789abcdef" * 4
JOIN = """
import sys
import ray
from infra.cluster import _check_answers
from infra.errors import EnvironmentFailure

try:
    _check_answers(sys.argv[1])
except EnvironmentFailure as error:
    sys.exit(str(error))
ray.init(sys.argv[1], _node_ip_address=sys.argv[2], log_to_driver=False)  # on loopback it has to be told which node

@ray.remote(num_cpus=0)
class Counter:
    def count(self):
        return 1

print(ray.get(Counter.remote().count.remote(), timeout=60))
"""


@pytest.mark.parametrize(
    ("wanted", "kept", "answer"),
    [
        ("", TOKEN, "1\n"),
        (TOKEN, TOKEN, "1\n"),
        (TOKEN, "", ""),
    ],
    ids=["of a cluster without tokens", "of a cluster that wants it", "without one"],
)
def test_an_actor_answers_whether_or_not_the_cluster_wants_the_token(
    wanted: str, kept: str, answer: str, tmp_path: Path
) -> None:
    if kept:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(kept)
    with ray_nodes(HEAD, token=wanted) as nodes:
        env = {name: value for name, value in nodes.env.items() if not name.startswith("RAY_AUTH")}
        env |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", JOIN, nodes.address, HEAD]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
        # What a batch script asks before its job begins.
        ready = [sys.executable, "-m", "infra.nodes_ready", "1", "20", "--address", nodes.address, "--head", HEAD]
        waited = subprocess.run(ready, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert waited.returncode == (0 if answer else 1), waited.stderr
    assert done.stdout == answer, done.stderr
    if not answer:
        assert f"no Ray cluster answers at {nodes.address}: " in done.stderr and "token" in done.stderr
