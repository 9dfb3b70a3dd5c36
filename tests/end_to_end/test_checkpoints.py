"""`hvqd checkpoints` on what a run has left: what is exported is what was trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.command_line import Finished, run_hvqd
from tests.conftest import FinishedRun


@pytest.fixture
def root(finished_run: FinishedRun, tmp_path: Path) -> Path:
    """A copy of the run's trainings."""
    for kind in ("dataset", "codes", "vq", "prior"):
        shutil.copytree(finished_run.root / kind, tmp_path / "run" / kind)
    shutil.copy(finished_run.root / "config.yaml", tmp_path / "run")
    return tmp_path / "run"


def checkpoints(root: Path, finished: FinishedRun, *arguments: str) -> Finished:
    command = ("checkpoints", *arguments, "--preset", "integration", "--root", str(root), "--json")
    return run_hvqd(*command, cwd=finished.cwd, env=finished.env)


def test_checkpoints_are_listed_exported_checked_and_cleared_away(
    finished_run: FinishedRun, root: Path, tmp_path: Path
) -> None:
    listed = checkpoints(root, finished_run, "ls").succeeded().answer["checkpoints"]
    assert [(each["stage"], each["images_seen"], each["workers"], each["state"]) for each in listed] == [
        (stage, images, 2, "good") for stage in ("vq", "prior") for images in (640, 320)
    ]
    for stage in ("vq", "prior"):
        trained = load_file(root / stage / "model" / "weights.safetensors")
        out = tmp_path / f"exported-{stage}"
        answer = checkpoints(root, finished_run, "export", "--stage", stage, "--out", str(out)).succeeded().answer
        assert answer["images_seen"] == 640
        exported = load_file(out / "weights.safetensors")
        assert exported.keys() == trained.keys()
        assert [name for name in trained if not exported[name].equal(trained[name])] == []
    again = checkpoints(root, finished_run, "export", "--stage", "vq", "--out", str(tmp_path / "exported-vq"))
    assert again.status == 2
    assert "--out is there already and not empty" in again.err

    newest = listed[0]["name"]
    file = root / "vq" / "checkpoints" / newest / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    verified = checkpoints(root, finished_run, "verify")
    assert verified.status == 1
    assert f"1 of 4 checkpoints under {root} cannot be gone on from: {newest} is damaged: rank-00001" in verified.err
    planned = checkpoints(root, finished_run, "gc").succeeded().answer
    assert ([each["name"] for each in planned["checkpoints"]], planned["deleted"]) == ([newest], False)
    assert file.exists()
    assert checkpoints(root, finished_run, "gc", "--delete").succeeded().answer["deleted"]
    assert not file.parent.exists()
    assert len(checkpoints(root, finished_run, "verify").succeeded().answer["checkpoints"]) == 3
