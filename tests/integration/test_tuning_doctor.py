"""What dead jobs left is listed and tidied up, and what may be alive is left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from infra.lease import hold
from infra.storage import Store, open_store
from infra.tracking import PROCESS_TAG, Tracker, open_tracker
from tuning.doctor import Findings, examine

REPOSITORY = Path(__file__).parents[2]
DIES = """
import os, signal, sys
from infra.storage import open_store
from infra.tracking import open_tracker

open_tracker(None, "hvqd", open_store(sys.argv[1])).run("dead", "of a dead process")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def root(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "root"))


@pytest.fixture
def tracker(root: Store) -> Tracker:
    return open_tracker(None, "hvqd", root)


def whats(found: Findings) -> list[tuple[str, bool]]:
    return sorted((finding.what.split(" (")[0], finding.tidy is not None) for finding in found.found)


def test_nothing_is_found_and_nothing_made_in_a_root_that_was_never_used(root: Store, tracker: Tracker) -> None:
    assert examine(root, tracker, None).as_text() == "nothing was left behind"
    assert not Path(root.url).exists()


def test_runs_of_dead_processes_are_ended_and_those_of_living_and_far_ones_are_not(
    root: Store, tracker: Tracker
) -> None:
    dead = subprocess.run([sys.executable, "-c", DIES, root.url], cwd=REPOSITORY, capture_output=True, timeout=120)
    assert dead.returncode == -9, dead.stderr
    alive = tracker.run("alive", "of this process")
    far = tracker.run("far", "of another machine")
    far.set_tags({PROCESS_TAG: json.dumps([["other boot", "namespace", "1", "2"], "node-7"])})
    tracker.run("ended", "that has ended").end("FINISHED")
    found = examine(root, tracker, None)
    assert whats(found) == [("run of a dead process", True), ("run of another machine", False)]
    assert "is RUNNING, its process is on node-7" in found.as_text()
    assert found.as_text().endswith("hint: hvqd doctor --fix tidies up what was left behind")
    fixed = examine(root, tracker, None, fix=True)
    assert fixed.as_json()["fixed"] == 1
    assert whats(examine(root, tracker, None)) == [("run of another machine", False)]
    statuses = {run.name: run.status for run in tracker.runs("")}
    assert statuses["of a dead process"] == "KILLED" and statuses["that has ended"] == "FINISHED"
    assert tracker.client.get_run(alive.run_id).info.status == "RUNNING"


def test_folders_of_no_use_are_deleted_unless_somebody_holds_the_sweep(root: Store, tracker: Tracker) -> None:
    sweep = root.child("tuning", "vq")
    record = {"number": 0, "drawn": {}, "settings": {}, "status": "finished", "rungs": []}
    sweep.write_json("trials/0000/record.json", record)
    sweep.write_json("trials/0001/record.json", record | {"number": 1, "status": "running"})
    kept = {
        "trials/0000/record.json",
        "trials/0000/vq/model/config.json",
        "trials/0001/record.json",
        "trials/0001/vq/checkpoints/000000000160-b0-w1-a/manifest.json",
        "trials/0001/vq/checkpoints/000000000160-b0-w1-a/state.pt",
    }
    useless = {
        "ray/tune/tuner.pkl",
        "trials/0000/vq/checkpoints/000000000320-b0-w1-a/manifest.json",
        "trials/0001/vq/ray/run-1/state.json",
        "trials/0001/vq/checkpoints/000000000320-b0-w1-a/state.pt",
        "trials/0002/trial.yaml",
    }
    for name in (kept | useless) - {"trials/0000/record.json", "trials/0001/record.json"}:
        sweep.write_bytes(name, b"{}")
    with hold(sweep.child("lease"), "the sweep vq"):
        assert examine(root, tracker, None, fix=True).found == ()
    found = examine(root, tracker, None)
    assert len(found.found) == len(useless) and found.open == ()
    examine(root, tracker, None, fix=True)
    assert {name for name in sweep.files() if not name.startswith("lease/")} == kept
    assert examine(root, tracker, None).found == ()
