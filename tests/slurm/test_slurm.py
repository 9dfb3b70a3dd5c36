"""Jobs on a real Slurm of two nodes: submitted, followed, cancelled, and queued again when their node goes away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.storage import Store
from tests.chaos import MARK, processes
from tests.command_line import Finished, environment, run_hvqd
from tests.conftest import FinishedRun
from tests.slurm.cluster import Slurm, awaited, slurm

pytestmark = pytest.mark.slurm

LONG = ["--set", "vq.train.images=64000", "--set", "vq.train.checkpoint_every_images=160"]
_JOB_SECONDS = 240.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as here:
        yield here


class Place:
    """A folder that both nodes see, a target for it, and hvqd as a user of Slurm runs it."""

    def __init__(self, cluster: Slurm, folder: Path) -> None:
        self.cluster, self.folder, self.root = cluster, folder, folder / "run"
        self.mark = f"slurm-{folder.name}"
        self.on = str(cluster.target(folder / "target.yaml", folder))
        self.env = environment(folder, {**cluster.env, MARK: self.mark, "OMP_NUM_THREADS": "1"})

    def hvqd(self, *arguments: str) -> Finished:
        return run_hvqd(*arguments, "--json", cwd=self.folder, env=self.env, timeout_seconds=_JOB_SECONDS)

    def launch(self, *command: str) -> Finished:
        options = ["--preset", "integration", "--root", str(self.root), "--on", self.on]
        return self.hvqd("launch", *command, *options)

    def job(self) -> dict[str, Any]:
        """The only job of this folder."""
        (job,) = self.hvqd("jobs", "ls", "--on", self.on).succeeded().answer["jobs"]
        return dict(job)

    def number(self) -> str:
        return next((self.folder / "jobs").glob("*.job")).read_text().strip()

    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in (self.folder / "jobs").glob("*.log"))

    def awaited(self, what: str, seconds: float = _JOB_SECONDS) -> Any:
        """For use as `place.awaited(what)(condition)`."""

        def until(holds: Any) -> None:
            try:
                awaited(what, holds, self.cluster.folder, seconds)
            except AssertionError as error:
                raise AssertionError(f"{error}\n== job's log\n{self.log()[-4000:]}") from error

        return until

    def checkpoints(self) -> int:
        """Complete checkpoints of the tokenizer so far."""
        return len(list((self.root / "vq" / "checkpoints").glob("*/manifest.json")))


@pytest.fixture
def place(cluster: Slurm, tmp_path: Path) -> Place:
    return Place(cluster, tmp_path)


def same(kind: str, one: Path, other: Path) -> bool:
    """Whether two roots hold the same artifact, by its files' digests."""
    first, second = (Store(str(root / kind)).read_json("manifest.json")["files"] for root in (one, other))
    return bool(first == second)


def test_a_launched_run_is_followed_to_its_end_and_equals_a_local_one(place: Place, finished_run: FinishedRun) -> None:
    done = place.launch("run", "--follow").succeeded()
    assert done.answer["state"] == "succeeded"
    assert "pass  collective" in done.err, "preflight ran on the nodes first"
    assert "hvqd: 2 nodes are there: 127.0.0.2, 127.0.0.3" in done.err
    job = place.job()
    assert (job["state"], job["name"]) == ("succeeded", done.answer["name"])
    kinds = ("dataset", "vq", "codes", "prior", "evaluation")
    assert [kind for kind in kinds if not same(kind, place.root, finished_run.root)] == []
    state = place.hvqd("status", str(place.root)).succeeded().answer
    assert "champion" in json.dumps(state)


def test_a_stopped_job_leaves_nothing_running_and_its_state_behind(place: Place) -> None:
    place.launch("data", "build", "--no-preflight", "--follow", "--name", "data").succeeded()
    for path in (place.folder / "jobs").glob("*"):
        path.unlink()
    place.launch("train", "vq", "--no-preflight", *LONG).succeeded()
    place.awaited("a checkpoint")(lambda: place.checkpoints() > 0)
    again = place.launch("train", "vq", "--no-preflight", *LONG)
    assert again.status == 2, "the name is taken while the job runs"
    assert "hint: follow it with `hvqd jobs logs -f" in again.err
    job = place.job()
    assert (job["state"], "on n[1-2]" in job["where"]) == ("running", True)
    assert place.hvqd("jobs", "stop", job["name"], "--on", place.on).succeeded().answer["state"] == "stopped"
    place.awaited("the end of the job's processes", 60)(lambda: not processes(place.mark))
    assert place.checkpoints() > 0
    assert place.cluster.call("squeue", "--noheader") == ""


def test_a_job_whose_node_is_drained_is_queued_again_and_goes_on_to_the_same_result(
    place: Place, finished_run: FinishedRun
) -> None:
    """As an administrator takes a node out: drained, the job told, the node back later."""
    changes = ["--set", "vq.train.images=4800", "--set", "vq.train.checkpoint_every_images=160"]
    options = ["--preset", "integration", *changes]
    whole = place.folder / "whole"
    for command in (("data", "build"), ("train", "vq")):
        run_hvqd(*command, *options, "--root", str(whole), cwd=place.folder, env=place.env).succeeded()
    Store(str(place.root / "dataset")).upload_folder(whole / "dataset")
    place.launch("train", "vq", "--no-preflight", *changes).succeeded()
    place.awaited("a checkpoint")(lambda: place.checkpoints() > 0)

    place.cluster.call("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=repair")
    place.cluster.call("scancel", "--signal=USR1", "--batch", place.number())
    place.awaited("the job back in the queue")(lambda: place.job()["state"] == "waiting")
    assert "queued again, it goes on from its root" in place.log()
    assert not (place.root / "vq" / "manifest.json").exists(), "it was in the middle"
    place.cluster.call("scontrol", "update", "NodeName=n2", "State=RESUME")
    # Slurm keeps a job that was queued again from its nodes for a while; an administrator may let it begin at once.
    place.cluster.call("scontrol", "update", f"JobId={place.number()}", "StartTime=now")
    done = place.hvqd("jobs", "logs", "-f", place.job()["name"], "--on", place.on).succeeded()
    assert done.answer["state"] == "succeeded"
    log = place.log()
    assert "hvqd: start 0 of job" in log and "hvqd: start 1 of job" in log
    history = [Store(str(root / "vq")).read_json("history.json") for root in (place.root, whole)]
    assert history[0] == history[1]
    assert same("vq", place.root, whole)
