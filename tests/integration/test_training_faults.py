"""Faults that befall a real `hvqd train`: it goes on by itself, says what happened, and ends as if nothing had been."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from infra.storage import Store, renew
from tests.chaos import started
from tests.command_line import environment, start_hvqd
from tests.conftest import FinishedRun
from tests.end_to_end.test_safety import bombs
from tests.fault_proxy import fault_proxy
from tests.services import S3Server

_DEADLINE_SECONDS = 300.0
INJECTED = Path(__file__).parents[1] / "injected"
PRESET = ("--preset", "integration")


def awaited(process: subprocess.Popen[str], what: str, holds: Callable[[], bool]) -> None:
    """Wait until something holds while the command runs."""
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not holds():
        assert process.poll() is None, f"it ended with {process.returncode} before {what}: {process.communicate()[1]}"
        assert time.monotonic() < deadline, f"no sign of {what} within {_DEADLINE_SECONDS:.0f} s"
        time.sleep(0.05)


def ended(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    """The command's answer and what it said, when it has ended well."""
    out, err = process.communicate(timeout=_DEADLINE_SECONDS)
    assert process.returncode == 0, f"status {process.returncode}\n{out}\n{err}"
    return json.loads(out.splitlines()[-1]), err


def logs(folder: Path) -> str:
    """What the command's processes have logged."""
    return "\n".join(path.read_text(errors="replace") for path in folder.rglob(".hvqd/logs/*.log"))


# ---- the store ----


@pytest.fixture
def direct(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A root on S3, seen without the proxy."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    renew()
    yield Store(f"s3://{s3_server.bucket}/faults")
    renew()


def write_keys(path: Path, keys: Mapping[str, str]) -> None:
    """A credentials file, replaced at once as a renewing agent does."""
    beside = path.with_suffix(".new")
    beside.write_text("\n".join(["[default]", *(f"{name} = {value}" for name, value in keys.items()), ""]))
    beside.replace(path)


def test_a_store_that_fails_and_goes_away_and_keys_that_expire_and_are_renewed_leave_no_trace(
    finished_run: FinishedRun, s3_server: S3Server, direct: Store, tmp_path: Path
) -> None:
    direct.child("dataset").upload_folder(finished_run.root / "dataset")
    file = tmp_path / "credentials"
    old, new = s3_server.add_keys("first"), s3_server.add_keys("second")
    write_keys(file, old)
    host, port = s3_server.endpoint.removeprefix("http://").split(":")
    with fault_proxy(host, int(port), seed=3) as proxy:
        keyless = {name: value for name, value in s3_server.env.items() if "KEY" not in name}
        broken = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}", "AWS_SHARED_CREDENTIALS_FILE": str(file)}
        env = environment(tmp_path, {**keyless, **broken, "OMP_NUM_THREADS": "1"})
        proxy.share, began = 0.1, time.monotonic()
        process = start_hvqd("train", "vq", *PRESET, "--root", direct.url, "--json", cwd=tmp_path, env=env)
        try:
            checkpoints = direct.child("vq", "checkpoints")
            awaited(
                process,
                "a checkpoint",
                lambda: any(checkpoints.child(name).exists("manifest.json") for name in checkpoints.children()),
            )
            proxy.begin_outage(_DEADLINE_SECONDS)  # at once: the keys take seconds to go
            s3_server.remove_keys("first", old)
            proxy.begin_outage(3)
            awaited(process, "a request with the old keys", lambda: proxy.seen["refused"] >= 2)
            write_keys(file, new)
            answer, err = ended(process)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert answer["digest"] == finished_run.result["digests"]["vq"]
    assert direct.child("vq").read_json("history.json") == json.loads(
        (finished_run.root / "vq" / "history.json").read_text()
    )
    assert proxy.seen["outage"] > 0
    said = re.findall(r"could not .*, trying again for .*", err)
    assert said, "the wait was not announced"
    assert len(said) <= 1 + (time.monotonic() - began) / 60, "a line a minute, not a flood"
    assert not any(secret in err + logs(tmp_path) for keys in (old, new) for secret in keys.values())


# ---- the workers ----


def injected(finished: FinishedRun, folder: Path, **fault: Any) -> dict[str, str]:
    """The environment of a command that a fault will befall."""
    path = os.pathsep.join([str(INJECTED), *filter(None, [finished.env.get("PYTHONPATH", "")])])
    told = json.dumps({**fault, "mark": str(folder / "happened")})
    return {**finished.env, "PYTHONPATH": path, "HVQD_TEST_FAULT": told}


def with_dataset(finished: FinishedRun, folder: Path) -> Path:
    """A root that has the dataset of the finished run."""
    shutil.copytree(finished.root / "dataset", folder / "run" / "dataset")
    return folder / "run"


def tracked_times(root: Path) -> dict[str, float]:
    """What the tracker was told of the time."""
    with closing(sqlite3.connect(f"file:{root / 'mlflow.db'}?mode=ro", uri=True)) as store:
        rows = store.execute("SELECT key, value FROM metrics WHERE key = 'goodput' OR key LIKE 'seconds/%'")
        return dict(rows.fetchall())


def plant_bombs(root: Path, mark: Path) -> None:
    """Pickles under the names of what DeepSpeed, Ray Train and Ray Tune would read from a training's folder."""
    live = bombs(mark)
    for name, wrapping in {
        "vq/checkpoints/latest": "pickle",
        "vq/checkpoints/global_step20/mp_rank_00_model_states.pt": "torch",
        "vq/checkpoints/global_step20/zero_pp_rank_0_mp_rank_00_optim_states.pt": "torch",
        "vq/checkpoints/000000000999-b0-w2-0123abcd/manifest.json": "pickle",
        "vq/checkpoints/000000000999-b0-w2-0123abcd/rank-00000.safetensors": "torch",
        "vq/ray/run-0/checkpoint_manager_snapshot.json": "pickle",
        "vq/ray/tune/tuner.pkl": "pickle",
        "vq/ray/tune/trainable.pkl": "pickle",
        "vq/ray/tune/searcher-state-0.pkl": "pickle",
        "vq/times/goodput.json": "pickle",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(live[wrapping])


def test_a_hung_collective_names_the_silent_worker_and_where_it_is_and_the_time_is_booked(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    root, env = with_dataset(finished_run, tmp_path), injected(finished_run, tmp_path, kind="stuck", images=416)
    plant_bombs(root, tmp_path / "exploded")
    impatient = ("--set", "compute.faults.hang_seconds=12")
    with started(root, env, "train", "vq", *PRESET, *impatient) as (process, _):
        answer, err = ended(process)
    assert (tmp_path / "happened").exists()
    assert re.search(r"no step for \d+ s \(compute\.faults\.hang_seconds=12\); all workers start again", err), err
    named = r"worker 1 \(process \d+ on .*\) is not where the others wait; it was last seen at\n(?:    .*\n)*"
    found = re.search(named, err)
    assert found and "sitecustomize.py" in found[0], err
    assert "a worker was lost; restart 1 goes on from the newest checkpoint" in err
    assert "000000000999-b0-w2-0123abcd is passed over: its manifest cannot be read" in err
    assert re.search(r"going on from .*/vq/checkpoints/000000000320-b0-w2-", err), err
    assert answer["digest"] == finished_run.result["digests"]["vq"]
    assert not (tmp_path / "exploded").exists(), "a file of the root was unpickled"

    books = json.loads((root / "vq" / "manifest.json").read_text())["provenance"]["goodput"]
    assert sum(books["seconds"].values()) == pytest.approx(books["wall_seconds"], rel=0.01)
    assert books["restarts"] >= 1
    assert books["seconds"]["restart"] > 12, "the hang, and the new start"
    assert min(books["seconds"].values()) > -0.01
    times = tracked_times(root)
    assert times.pop("goodput") == pytest.approx(books["goodput"], abs=1e-3)
    assert times.pop("seconds/wall") == pytest.approx(sum(times.values()), rel=0.01)
    assert times == pytest.approx({f"seconds/{name}": value for name, value in books["seconds"].items()}, abs=0.01)


def test_a_run_of_steps_that_are_not_finite_leads_back_to_the_last_good_checkpoint_at_half_the_learning_rate(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    root = with_dataset(finished_run, tmp_path)
    env = injected(finished_run, tmp_path, kind="not finite", images=416, last=448)
    strict = ("--set", "compute.faults.non_finite_steps=2")
    with started(root, env, "train", "vq", *PRESET, *strict) as (process, _):
        answer, err = ended(process)
    said = "2 steps in a row were not finite before image 480: back to image 320 with 0.5 of the learning rate"
    assert f"{said} (setback 1 of at most 3)" in err
    history = json.loads((root / "vq" / "history.json").read_text())
    undisturbed = json.loads((finished_run.root / "vq" / "history.json").read_text())
    assert [record["setbacks"] for record in history if "setbacks" in record] == [1.0]
    points = [(record["images"], "loss" in record) for record in history if "setbacks" not in record]
    assert points == [(record["images"], "loss" in record) for record in undisturbed], "no gap, no double point"
    rates = [record["learning_rate"] for record in history if "learning_rate" in record]
    usual = [record["learning_rate"] for record in undisturbed if "learning_rate" in record]
    assert rates[-1] == pytest.approx(usual[-1] / 2, rel=1e-4)
    assert {path.name.split("-")[1] for path in root.glob("vq/checkpoints/0*")} >= {"b1"}
    assert answer["digest"] != finished_run.result["digests"]["vq"]


@pytest.mark.long
def test_a_slow_worker_is_named(finished_run: FinishedRun, tmp_path: Path) -> None:
    root = with_dataset(finished_run, tmp_path)
    env = injected(finished_run, tmp_path, kind="slow", images=0, seconds=1.5)
    with started(root, env, "train", "vq", *PRESET, "--set", "vq.train.images=1600") as (process, _):
        _, err = ended(process)
    assert re.search(
        r"worker 1 \(process \d+ on .*\) is slow: its own part of the steps takes [\d.]+ times as long as the others'",
        err,
    ), err
    assert "worker 0 (process" not in err
