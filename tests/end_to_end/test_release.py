"""A release owner's commands on real versions: judging anew, promoting, comparing, verifying, taking back."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import yaml
from mlflow import MlflowClient

from tests.command_line import Finished, run_hvqd
from tests.conftest import FinishedRun


class Copied:
    """A finished run in a folder of its own, and what is asked of it."""

    def __init__(self, finished_run: FinishedRun, folder: Path) -> None:
        self.folder, self.env = folder, finished_run.env
        self.root = Path(shutil.copytree(finished_run.root, folder / "run"))

    def ask(self, *arguments: str) -> Finished:
        """A command on it."""
        return run_hvqd(*arguments, "--root", str(self.root), "--json", cwd=self.folder, env=self.env)

    def figures(self) -> dict[str, float]:
        """Of its present evaluation."""
        measured = json.loads((self.root / "evaluation" / "metrics.json").read_text())["figures"]
        return {name: figure["value"] for name, figure in measured.items()}


def test_a_release_owner_judges_anew_promotes_and_takes_back(finished_run: FinishedRun, tmp_path: Path) -> None:
    """Versions that were judged by different protocols are compared only after the champion was judged like the new."""
    copied = Copied(finished_run, tmp_path)
    ask, figures_now = copied.ask, copied.figures

    anew = ask("evaluate", "--model", "champion").succeeded().answer
    assert anew["version"] == "1"
    assert anew["figures"] == figures_now(), "the same protocol"

    gates = ("--set", "gates.max_kid_regression=1e9", "--set", "gates.max_kid_regression_error=1e9")
    refused = ask("run", "--set", "sampling.steps=3", *gates)
    assert refused.status == 3
    assert "judged by another protocol: `hvqd evaluate --model champion`" in refused.err
    assert [gate["gate"] for gate in refused.answer["gates"] if not gate["passed"]] == [
        "max_kid_regression",
        "max_kid_regression_error",
    ]
    written = ask("protocol", "--name", "three steps", "--out", str(tmp_path / "protocol.yaml")).succeeded().answer
    judged = ask("evaluate", "--model", "champion", "--protocol", written["file"]).succeeded().answer
    assert judged["protocol"] == written["protocol"]["digest"] != anew["protocol"]
    gate_file = tmp_path / "gates.yaml"
    gate_file.write_text("smoke_test: true\nmax_memory_gib: 16\nlicences: [MIT]\ncovers: {metric: psnr, at_least: 5}\n")
    dry = ask("promote", "--dry-run", "--gates", str(gate_file))
    said = {gate["gate"]: gate["passed"] for gate in dry.answer["gates"]}
    assert dry.status == 3 and len(said) == 10 and [name for name, passed in said.items() if not passed] == ["licences"]
    assert dry.answer["hint"].startswith("train longer") and dry.answer["version"] == "2"
    gate_file.write_text("covers: {metric: psrn, at_least: 5}\n")
    unmeasured = ask("promote", "--gates", str(gate_file))
    assert (unmeasured.status, unmeasured.answer["hint"]) == (2, "did you mean psnr?")
    promoted = ask("promote").succeeded().answer
    assert (promoted["moved"], promoted["version"], promoted["previous"]) == (True, "2", "1")
    compared = ask("models", "diff", "previous", "champion").succeeded().answer
    assert compared["settings"] == {"sampling.steps": [4, 3]} and compared["comparable"] is True
    assert compared["figures"]["kid_samples"] == [
        judged["figures"]["kid_samples"],
        figures_now()["kid_samples"],
    ], "both by the later protocol"
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


def test_a_version_is_judged_on_codes_like_those_that_it_learned(finished_run: FinishedRun, tmp_path: Path) -> None:
    """Whatever the root's own `encode.refine_rounds` is by then."""
    copied = Copied(finished_run, tmp_path)
    ask, figures_now = copied.ask, copied.figures

    encoders_own = figures_now()
    ask("run", "--set", "encode.refine_rounds=1")  # whether it is promoted says nothing here
    refined = figures_now()
    assert refined["psnr"] > encoders_own["psnr"]
    for version, rounds, expected in (("2", 0, refined), ("1", 1, encoders_own)):
        judged = ask("evaluate", "--model", version, "--set", f"encode.refine_rounds={rounds}").succeeded().answer
        assert judged["figures"] == expected


def test_a_bundle_says_by_itself_what_it_was_made_of_and_how(finished_run: FinishedRun) -> None:
    made = MlflowClient(f"sqlite:///{finished_run.root}/mlflow.db").get_model_version("hvqd", "1")
    bundle = Path(made.source) / "artifacts" / "bundle"
    described = json.loads((bundle / "bundle.json").read_text())
    kinds = {"dataset", "vq", "codes", "prior", "evaluation"}
    assert set(described["lineage"]) == set(described["runs"]) == kinds
    assert len(set(described["runs"].values())) == 5 and described["commit"] == made.tags["hvqd.commit"]
    assert described["preprocessing"]["image_size"] == [16, 16] and described["preprocessing"]["resize"] == "crop"
    card = (bundle / "README.md").read_text()
    told = {made.tags["hvqd.protocol"], described["commit"]}
    told |= {*described["lineage"].values(), *described["runs"].values()}
    assert [text for text in told if text not in card] == [] and card.strip() == made.description.strip()
    settings = yaml.safe_load((bundle / "config.yaml").read_text())
    assert settings["sampling"] == described["sampling"] and settings["data"]["source"] == "emoji"
    measured = json.loads((bundle / "evaluation.json").read_text())
    assert measured["protocol"]["extractor"]["weights_sha256"] and measured["figures"]["kid_samples"]["value"] > 0


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
