"""`hvqd run` again, after changes, after kills and after signals: what is current stays, what was begun goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from tests.command_line import Finished, run_hvqd, start_hvqd
from tests.conftest import FinishedRun
from workflows.training.heap import HUGE_PAGES

_DEADLINE_SECONDS = 300.0
_POLL_SECONDS = 0.02
_WORKERS = 2
_MARK = "HVQD_TEST_MARK"


# ---- again, and after changes ----


def test_a_finished_run_is_skipped_and_a_changed_setting_makes_only_what_follows_from_it(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished_run.root, root)
    digests = finished_run.result["digests"]

    again = _run(root, finished_run).succeeded()
    assert again.answer["digests"] == digests
    assert _said(again) == dict.fromkeys(digests, "current")
    assert (again.answer["version"], again.answer["champion"]) == ("1", "1")

    changed = _run(root, finished_run, "--set", "prior.train.learning_rate=0.001").succeeded()
    made = {kind: kind in ("prior", "evaluation") for kind in digests}
    assert _said(changed) == {kind: "done" if new else "current" for kind, new in made.items()}
    assert {kind: changed.answer["digests"][kind] != digests[kind] for kind in digests} == made
    assert (changed.answer["version"], changed.answer["champion"]) == ("2", "2")
    assert _runs(root)["pipeline"] == ["FINISHED"] * 3, "one of the copied root, two of this one's settings"


def test_a_refusing_gate_is_named_recorded_and_keeps_the_champion(finished_run: FinishedRun, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished_run.root, root)
    (root / "report.html").unlink()
    audit = root / "audit" / "hvqd"
    before = set(audit.glob("*.json"))

    refused = _run(root, finished_run, "--set", "gates.min_psnr=99")
    error, hint = refused.err.splitlines()[-2:]
    assert refused.status == 3
    assert re.fullmatch(
        r"error: version 1 of hvqd is not promoted: min_psnr fails: PSNR .* at least 99 is asked", error
    )
    assert re.fullmatch(r"hint: train longer, or change the gate .*; the report at .*/report\.html shows .*", hint)
    assert refused.answer["status"] == 3
    assert (root / "report.html").is_file()
    assert set(_runs(root)["pipeline"]) == {"FINISHED"}, "a refusal is an answer"

    (record,) = [json.loads(path.read_text()) for path in set(audit.glob("*.json")) - before]
    gates = {gate["gate"]: gate["passed"] for gate in record["gates"]}
    assert (record["action"], record["version"], record["champion"]) == ("refuse", "1", "1")
    files = {"bundle_integrity": True, "lineage_complete": True}
    assert gates == {"min_psnr": False, "min_codebook_usage": True, **files}
    assert _aliases(root)["champion"] == "1"


# ---- kills ----


def test_a_run_killed_in_the_middle_of_each_step_ends_like_an_undisturbed_one(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    in_the_middle = {
        "dataset": "dataset/staging/*/unit-*.parquet",
        "vq": "vq/checkpoints/*320-b0-w2-*/manifest.json",
        "codes": "codes/staging/*/part-*.parquet",
        "prior": "prior/checkpoints/*320-b0-w2-*/manifest.json",
        "evaluation": "evaluation/parts/*",
        "registration": "mlartifacts/*/artifacts/model/*",
    }
    for kind, sign in in_the_middle.items():
        with _started(root, finished_run, "run") as process:
            _await(process, f"{sign} in the root", lambda sign=sign: any(root.glob(sign)))
            os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not (root / kind / "manifest.json").exists(), f"{kind} ended before it was killed"
    done = _run(root, finished_run).succeeded()
    assert done.answer["digests"] == finished_run.result["digests"]
    assert _registration(root) == _registration(finished_run.root)
    assert (done.answer["version"], done.answer["champion"]) == ("1", "1")
    assert set(_runs(root)) == {"pipeline", "dataset", "vq", "codes", "prior", "evaluation"}
    assert all(ends == ["FINISHED"] for ends in _runs(root).values()), "one run a step, gone on with"


def test_a_killed_worker_is_replaced_and_the_training_ends_as_if_nothing_had_been(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    root = _copy(finished_run, tmp_path, "dataset", "vq", "codes")
    with _started(root, finished_run, "train", "prior") as process:
        _await(process, "a checkpoint", lambda: any(root.glob("prior/checkpoints/*320-b0-w2-*/manifest.json")))
        workers = [pid for pid, command in _marked(process).items() if command.startswith("ray::RayTrainWorker")]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        out, err = process.communicate(timeout=_DEADLINE_SECONDS)
    assert process.returncode == 0, err
    assert "a worker was lost; restart 1 goes on from the newest checkpoint" in err
    assert json.loads(out)["digest"] == finished_run.result["digests"]["prior"]
    assert _runs(root) == {"pipeline": ["FINISHED"], "prior": ["FINISHED"]}


# ---- signals ----


def test_an_interrupted_training_says_so_everywhere_leaves_no_process_and_goes_on(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    """Ctrl-C while the workers start, then SIGTERM after a checkpoint, as a spot machine sends it, then the end."""
    root = _copy(finished_run, tmp_path, "dataset")

    def ray_trains(process: subprocess.Popen[str]) -> bool:
        return any(command.startswith("ray::TrainController") for command in _marked(process).values())

    signs: dict[signal.Signals, Callable[[subprocess.Popen[str]], bool]] = {
        signal.SIGINT: ray_trains,  # Ray is up, with signal handlers of its own
        signal.SIGTERM: lambda _: any(root.glob("vq/checkpoints/*320-b0-w2-*/manifest.json")),
    }
    for number, sign in signs.items():
        with _started(root, finished_run, "train", "vq") as process:
            _await(process, f"the moment for {number.name}", partial(sign, process))
            process.send_signal(number)
            out, err = process.communicate(timeout=_DEADLINE_SECONDS)
            assert process.returncode == 130, err
            assert err.endswith("error: interrupted\nhint: run the same command again, it goes on where it stood\n")
            assert json.loads(out)["status"] == 130
            assert _runs(root) == {"pipeline": ["KILLED"], "vq": ["KILLED"]}
            _await(None, "the end of all processes", lambda process=process: not _marked(process))
    done = run_hvqd("train", "vq", "--root", str(root), "--json", cwd=tmp_path, env=finished_run.env).succeeded()
    assert done.answer["digest"] == finished_run.result["digests"]["vq"]
    assert _runs(root) == {"pipeline": ["FINISHED"], "vq": ["FINISHED"]}


# ---- activation checkpointing ----


def test_a_checkpointed_prior_has_the_same_weights_from_workers_that_ask_for_large_pages(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    root = _copy(finished_run, tmp_path, "dataset", "vq", "codes")
    pages = {f"{name}={value}".encode() for name, value in HUGE_PAGES.items()}

    def workers_ask(process: subprocess.Popen[str]) -> bool:
        return sum(pages <= environment for environment in _environments(process).values()) >= _WORKERS

    with _started(
        root, finished_run, "train", "prior", "--set", "prior.model.activation_checkpointing=true"
    ) as process:
        _await(process, "workers that ask for large pages", partial(workers_ask, process))
    assert process.returncode == 0
    weights = Path("prior", "model", "weights.safetensors")
    assert (root / weights).read_bytes() == (finished_run.root / weights).read_bytes()


# ---- plumbing ----


def _run(root: Path, finished: FinishedRun, *more: str) -> Finished:
    arguments = ("run", "--preset", "integration", "--root", str(root), "--json", *more)
    return run_hvqd(*arguments, cwd=root.parent, env=finished.env)


def _copy(finished: FinishedRun, folder: Path, *kinds: str) -> Path:
    """A new root with these artifacts of the finished one."""
    root = folder / "run"
    for kind in kinds:
        shutil.copytree(finished.root / kind, root / kind, ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copy(finished.root / "config.yaml", root)
    return root


def _said(done: Finished) -> dict[str, str]:
    """What the command said of each step: current or done."""
    return dict(re.findall(r"^(\w+) +(current|done) +[0-9a-f]{12}\b", done.err, re.MULTILINE))


@contextmanager
def _started(root: Path, finished: FinishedRun, *command: str) -> Iterator[subprocess.Popen[str]]:
    """A command under way, whose processes can be told from all others; nothing of it is left in the end."""
    env = {**finished.env, _MARK: uuid.uuid4().hex}
    arguments = (*command, "--preset", "integration", "--root", str(root), "--json")
    process = start_hvqd(*arguments, cwd=root.parent, env=env)
    process.mark = env[_MARK]  # type: ignore[attr-defined]
    try:
        yield process
        process.communicate(timeout=_DEADLINE_SECONDS)
        _await(None, "the end of all processes", lambda: not _marked(process))
    finally:
        for pid in [process.pid, *_marked(process)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _marked(process: subprocess.Popen[str]) -> dict[int, str]:
    """Command line of every living process that descends from the command, by what they have in their environment."""
    found = {}
    for pid in _environments(process):
        with suppress(OSError):
            found[pid] = Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def _environments(process: subprocess.Popen[str]) -> dict[int, set[bytes]]:
    """Of every living process that descends from the command, as it was begun."""
    mark = f"{_MARK}={process.mark}".encode()  # type: ignore[attr-defined]
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            values = set((folder / "environ").read_bytes().split(b"\0"))
            if mark in values:
                found[int(folder.name)] = values
    return found


def _await(process: subprocess.Popen[str] | None, what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not holds():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"it ended with {process.returncode} before {what}: {process.communicate()[1]}")
        assert time.monotonic() < deadline, f"no sign of {what} within {_DEADLINE_SECONDS:.0f} s"
        time.sleep(_POLL_SECONDS)


def _query(root: Path, statement: str) -> list[tuple[str, str]]:
    """Rows of MLflow's store, read without MLflow."""
    if not (root / "mlflow.db").exists():
        return []
    connection = sqlite3.connect(f"file:{root}/mlflow.db?mode=ro", uri=True)
    with closing(connection), suppress(sqlite3.OperationalError):  # its tables may still be in the making
        return list(connection.execute(statement))
    return []


def _runs(root: Path) -> dict[str, list[str]]:
    """How the runs ended, by name."""
    found: dict[str, list[str]] = {}
    for name, status in _query(root, "SELECT name, status FROM runs ORDER BY start_time"):
        found.setdefault(name, []).append(status)
    return found


def _aliases(root: Path) -> dict[str, str]:
    return {name: str(version) for name, version in _query(root, "SELECT alias, version FROM registered_model_aliases")}


def _registration(root: Path) -> object:
    manifest = json.loads((root / "registration" / "manifest.json").read_text())
    return {name: manifest[name] for name in ("digest", "request", "facts", "parents")}


def test_sigterm_leaves_a_last_checkpoint_within_the_grace_period(finished_run: FinishedRun, tmp_path: Path) -> None:
    root = _copy(finished_run, tmp_path, "dataset")
    long = ("--set", "vq.train.images=64000", "--set", "vq.train.checkpoint_every_images=32000")
    with _started(root, finished_run, "train", "vq", *long) as process:
        _await(process, "the first steps", lambda: any(root.glob("vq/times/*")))
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=_DEADLINE_SECONDS)
        assert process.returncode == 130, err
    (last,) = root.glob("vq/checkpoints/0*/manifest.json")
    assert 0 < int(last.parent.name[:12]) < 32_000, "it is not one of those that come at their time"
