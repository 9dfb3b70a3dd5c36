"""A release owner's commands on real versions: judging anew, promoting, comparing, verifying, taking back."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from mlflow import MlflowClient

from tests.command_line import Finished, run_hvqd
from tests.conftest import FinishedRun


def test_a_release_owner_judges_anew_promotes_and_takes_back(finished_run: FinishedRun, tmp_path: Path) -> None:
    """Versions that were judged by different protocols are compared only after the champion was judged like the new."""
    root = tmp_path / "run"
    shutil.copytree(finished_run.root, root)

    def ask(*arguments: str) -> Finished:
        return run_hvqd(*arguments, "--root", str(root), "--json", cwd=tmp_path, env=finished_run.env)

    before = json.loads((root / "evaluation" / "metrics.json").read_text())["figures"]
    anew = ask("evaluate", "--model", "champion").succeeded().answer
    assert anew["version"] == "1"
    assert anew["figures"] == {name: figure["value"] for name, figure in before.items()}, "the same protocol"

    gates = ("--set", "gates.max_kid_regression=1e9", "--set", "gates.max_kid_regression_error=1e9")
    refused = ask("run", "--set", "sampling.steps=3", *gates)
    assert refused.status == 3
    assert "judged by another protocol: `hvqd evaluate --model champion`" in refused.err
    ask("evaluate", "--model", "champion").succeeded()
    promoted = ask("promote").succeeded().answer
    assert (promoted["moved"], promoted["version"], promoted["previous"]) == (True, "2", "1")
    compared = ask("models", "diff", "previous", "champion").succeeded().answer
    assert compared["settings"] == {"sampling.steps": [4, 3]} and compared["comparable"] is False
    assert set(compared["lineage"]) == {"evaluation"}
    assert ask("models", "verify", "champion").succeeded().answer["verified"] is True
    back = ask("rollback", "--reason", "too few steps").succeeded().answer
    assert (back["action"], back["champion"], back["previous"]) == ("rollback", "1", None)
    story = ask("models", "history", "--verify").succeeded().answer["entries"]
    assert [(entry["action"], entry["version"]) for entry in story] == [
        ("promote", "1"),
        ("refuse", "2"),
        ("promote", "2"),
        ("rollback", "1"),
    ]


def test_a_changed_byte_in_a_version_is_named(finished_run: FinishedRun, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished_run.root, root)
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    source = client.get_model_version("hvqd", "1").source
    moved = shutil.copytree(source, tmp_path / "version")
    weights = moved / "artifacts" / "bundle" / "prior" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        database.execute("UPDATE model_versions SET source = ?, storage_location = ?", (str(moved), str(moved)))
    done = run_hvqd("models", "verify", "champion", "--root", str(root), cwd=tmp_path, env=finished_run.env)
    assert done.status == 2
    assert re.search(
        r"error: version 1 of hvqd is not what was registered: prior/weights.safetensors has been changed\n"
        r"hint: restore .* from a copy, or `hvqd rollback` to another version\n$", done.err
    )  # fmt: skip
