"""`hvqd launch --on ray`: a real cluster of two nodes that wants a token, the root on S3, MLflow on PostgreSQL.

The nodes have no credentials of their own: what a job needs of them is forwarded from where it is launched.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.storage import Store
from tests.command_line import HVQD, Finished, environment, run_hvqd
from tests.conftest import FinishedRun, RegistryServer
from tests.ray_hosts import RayNodes, ray_nodes
from tests.services import S3Server

pytestmark = pytest.mark.long
TOKEN = "a-token-of-the-test-" + "0123456789abcdef" * 2
_DEADLINE_SECONDS = 300.0


@dataclass(frozen=True)
class Place:
    """A folder and an environment to launch from, and where to."""

    folder: Path
    env: dict[str, str]
    target: Path
    nodes: RayNodes

    def hvqd(self, *words: str, **env: str) -> Finished:
        """Run a command here."""
        return run_hvqd(*words, cwd=self.folder, env={**self.env, **env}, timeout_seconds=900)

    def launch(self, *words: str, **env: str) -> Finished:
        """Launch one on the cluster, without preflight."""
        return self.hvqd("launch", *words, "--on", str(self.target), "--no-preflight", **env)

    def job(self, name: str) -> dict[str, Any]:
        """What `hvqd jobs ls` says of a job."""
        listed = self.hvqd("jobs", "ls", "--on", str(self.target), "--json").succeeded().answer["jobs"]
        (found,) = (job for job in listed if job["name"] == name)
        return dict(found)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayNodes]:
    """Two nodes of a CPU each."""
    with ray_nodes("127.0.0.2", token=TOKEN) as nodes:
        nodes.start("127.0.0.3")
        yield nodes


@pytest.fixture
def place(cluster: RayNodes, s3_server: S3Server, tmp_path: Path) -> Place:
    """With the credentials of S3, the cluster's token, and a target file."""
    target = tmp_path / "cluster.yaml"
    text = {
        "kind": "ray",
        "address": cluster.dashboard,
        "token_variable": "HVQD_TEST_TOKEN",
        "forward": sorted(s3_server.env),
        "environment": {"HVQD_LOGS": str(tmp_path / "logs")},
    }
    target.write_text(yaml.safe_dump(text))
    return Place(tmp_path, environment(tmp_path, {**s3_server.env, "HVQD_TEST_TOKEN": TOKEN}), target, cluster)


def awaited(what: str, holds: Callable[[], bool], said: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"waited {_DEADLINE_SECONDS:.0f} s for {what}\n{said()}"
        time.sleep(0.2)


def test_a_launched_step_makes_the_same_artifact_as_a_local_one_and_is_followed_to_its_end(
    place: Place, registry_server: RegistryServer, s3_server: S3Server, finished_run: FinishedRun
) -> None:
    root = f"s3://{s3_server.bucket}/launched-step"
    words = ("--preset", "integration", "--root", root, "--set", f"tracking.uri={registry_server.address}")
    done = place.launch("data", "build", *words, "--name", "build", "--follow")
    assert "dataset     done" in done.succeeded().out, done.out
    assert done.out.splitlines()[-1] == "hvqd-build has succeeded"
    assert f"{root}/dataset" in done.out
    assert finished_run.result["digests"]["dataset"][:12] in done.out, "equal to the local one, digest by digest"
    job = place.job("hvqd-build")
    assert job["state"] == "succeeded" and place.nodes.dashboard in job["where"] and job["started"]
    again = place.hvqd("jobs", "logs", "hvqd-build", "--on", str(place.target)).succeeded()
    assert again.out.rstrip() in done.out, "without -f: what was said so far"


def test_a_job_that_runs_keeps_its_name_and_stopping_it_leaves_nothing_running(
    place: Place, s3_server: S3Server
) -> None:
    words = ("run", "--preset", "integration", "--root", f"s3://{s3_server.bucket}/stopped", "--name", "long")
    assert "tracked in a file of the job's own machine" in place.launch(*words).succeeded().err
    second = place.launch(*words)
    lines = second.err.splitlines()
    assert (second.status, len(lines)) == (2, 2), second.err
    assert "the job hvqd-long is " in lines[0] and place.nodes.dashboard in lines[0]
    assert f"hvqd jobs logs -f hvqd-long --on {place.target}" in lines[1]
    stopped = place.hvqd("jobs", "stop", "hvqd-long", "--on", str(place.target), "--json").succeeded()
    assert stopped.answer["state"] == "stopped"

    def left() -> list[str]:
        return [line for line in place.nodes.processes().values() if "workflows.cli" in line or "RayTrain" in line]

    awaited("the end of the driver and its workers", lambda: not left(), lambda: "\n".join(left()))


@pytest.mark.parametrize("token", ["wrong" + TOKEN, ""], ids=["wrong", "missing"])
def test_a_wrong_token_is_two_lines_and_status_two_for_every_command(
    place: Place, s3_server: S3Server, token: str
) -> None:
    root = f"s3://{s3_server.bucket}/never"
    launched = place.launch("run", "--preset", "integration", "--root", root, HVQD_TEST_TOKEN=token)
    listed = place.hvqd("jobs", "ls", "--on", str(place.target), HVQD_TEST_TOKEN=token)
    for done in (launched, listed):
        assert (done.status, len(done.err.splitlines())) == (2, 2), done.err
        assert "HVQD_TEST_TOKEN" in done.err and TOKEN not in done.err


def test_a_folder_of_this_machine_is_no_root_for_a_cluster(place: Place) -> None:
    done = place.launch("run", "--preset", "integration", "--root", str(place.folder / "root"))
    assert (done.status, len(done.err.splitlines())) == (2, 2), done.err
    assert "is a folder of this machine" in done.err and "hint: --root s3://" in done.err
    assert not (place.folder / "root").exists()


def test_the_whole_path_runs_on_the_cluster_though_whoever_launched_it_has_gone(
    place: Place,
    registry_server: RegistryServer,
    s3_server: S3Server,
    finished_run: FinishedRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = f"s3://{s3_server.bucket}/launched"
    words = ["launch", "run", "--preset", "integration", "--root", root, "--on", str(place.target), "--name", "whole"]
    words += ["--set", f"tracking.uri={registry_server.address}", "--set", "tracking.model_name=launched", "--follow"]
    first = place.folder / "first.out"
    with first.open("w") as output:
        launching = subprocess.Popen(
            [str(HVQD), *words], cwd=place.folder, env=place.env, stdout=output, stderr=output, start_new_session=True
        )
        try:
            awaited(
                "the first training",
                lambda: launching.poll() is not None or "training the tokenizer" in first.read_text(),
                first.read_text,
            )
        finally:
            os.killpg(launching.pid, signal.SIGKILL)  # the laptop is closed
            launching.wait()
    early = first.read_text()
    assert "a step of prior" in early, "preflight came first, and its table is in the log"
    assert "training the prior" not in early

    followed = place.hvqd("jobs", "logs", "-f", "hvqd-whole", "--on", str(place.target)).succeeded()
    assert followed.out.splitlines()[-1] == "hvqd-whole has succeeded"
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    store, digests = Store(root), finished_run.result["digests"]
    assert list(digests) == ["dataset", "vq", "codes", "prior", "evaluation"]
    assert {step: store.child(step).read_json("manifest.json")["digest"] for step in digests} == digests
    champion = place.hvqd("models", "show", "champion", "--root", root, "--json").succeeded().answer
    assert champion["model"] == "launched", champion
