"""A sweep is killed, robbed of workers, cut off from MLflow and interrupted; it ends as an undisturbed one does."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra.tracking import Tracker
from tests.chaos import processes, started
from tests.command_line import environment, run_hvqd
from tests.services import free_ports, mlflow_on
from tests.sweeps import PLAIN, awaited, check_answer, check_whole, figures, space_file, statuses
from tuning.records import Status

pytestmark = pytest.mark.long

ENDS: dict[int, Status] = dict.fromkeys(range(4), "finished")
_DEADLINE_SECONDS = 900.0


@dataclass(frozen=True)
class Undisturbed:
    """The sweep as it ends when nothing happens."""

    space: str
    figures: dict[int, tuple[Any, ...]]
    root: Path

    def dataset(self, root: Path) -> Path:
        """A root with nothing but the same dataset."""
        shutil.copytree(self.root / "dataset", root / "dataset")
        return root


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Run once; every disturbed sweep must give the same draws and curves, to the bit."""
    folder = tmp_path_factory.mktemp("undisturbed")
    root, space, env = folder / "root", space_file(folder), environment(folder)
    done = run_hvqd("tune", space, *PLAIN, "--root", str(root), "--json", cwd=folder, env=env)
    check_answer(done.succeeded().answer, ENDS)
    return Undisturbed(space, figures(check_whole(root, ENDS)), root)


# ---- the driver ----


def checkpoints(root: Path) -> int:
    """How many complete ones the sweep's trials have."""
    return len(list(root.glob("tuning/small/trials/*/vq/checkpoints/0*/manifest.json")))


def ended(root: Path) -> int:
    """How many trials have ended."""
    return sum(status == "finished" for status in statuses(root / "tuning/small").values())


def grown(count: Callable[[Path], int], root: Path) -> Callable[[], bool]:
    """Whether there are more than now."""
    before = count(root)
    return lambda: count(root) > before


MOMENTS: tuple[Callable[[Path], Callable[[], bool]], ...] = (
    lambda root: lambda: (root / "tuning/small/sweep.json").exists(),
    lambda root: lambda: "running" in statuses(root / "tuning/small").values(),
    lambda root: grown(checkpoints, root),
    lambda root: grown(ended, root),
    lambda root: grown(checkpoints, root),
)
"""What is waited for before each kill; then a random moment within some seconds."""


def wait_for(what: str, is_due: Callable[[], bool], process: subprocess.Popen[str], more_seconds: float) -> None:
    """Wait for a moment in a command's life, and a little longer."""
    awaited(what, lambda: is_due() or process.poll() is not None)
    with suppress(subprocess.TimeoutExpired):
        process.wait(more_seconds)
    assert process.poll() is None, f"it ended before {what}: {process.communicate()}"


def test_a_driver_killed_at_five_random_moments_goes_on_each_time(undisturbed: Undisturbed, tmp_path: Path) -> None:
    root, env, chance = undisturbed.dataset(tmp_path / "root"), environment(tmp_path), random.Random(7)
    command = ("tune", undisturbed.space, *PLAIN)
    for kill, moment in enumerate(MOMENTS):
        is_due = moment(root)
        with started(root, env, *command, *(["--resume"] if kill else [])) as (process, _):
            wait_for(f"the moment of kill {kill + 1}", is_due, process, chance.uniform(0, 4))
            process.kill()
            process.wait()
    done = run_hvqd(*command, "--resume", "--root", str(root), "--json", cwd=tmp_path, env=env).succeeded()
    check_answer(done.answer, ENDS)
    assert figures(check_whole(root, ENDS)) == undisturbed.figures


# ---- what it started ----


def test_a_killed_worker_and_a_killed_trial_go_on_from_their_checkpoints(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    root, env = undisturbed.dataset(tmp_path / "root"), environment(tmp_path)

    def kill_one(mark: str, kind: str) -> None:
        found: list[int] = []

        def is_there() -> bool:
            found[:] = [pid for pid, line in processes(mark).items() if line.startswith(kind)]
            return bool(found)

        awaited(f"a process {kind}", is_there)
        os.kill(found[0], signal.SIGKILL)

    with started(root, env, "tune", undisturbed.space, *PLAIN) as (process, mark):
        awaited("a checkpoint", grown(checkpoints, root))
        kill_one(mark, "ray::RayTrainWorker")
        awaited("the end of a trial", grown(ended, root))
        awaited("a checkpoint of a later trial", grown(checkpoints, root))
        kill_one(mark, "ray::ImplicitFunc")
        _, err = process.communicate(timeout=_DEADLINE_SECONDS)
    assert process.returncode == 0, err
    assert "a worker was lost; restart 1 goes on from the newest checkpoint" in err
    assert figures(check_whole(root, ENDS)) == undisturbed.figures


# ---- MLflow ----


def test_mlflow_may_be_away_for_half_a_minute_and_is_told_everything_afterwards(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    root, env, (port,) = undisturbed.dataset(tmp_path / "root"), environment(tmp_path), free_ports(1)
    folder = tmp_path / "mlflow"
    folder.mkdir()
    database, artifacts = f"sqlite:///{folder}/mlflow.db", f"{folder}/artifacts"

    def server() -> Any:
        return mlflow_on(database, artifacts, folder, {}, port)

    with ExitStack() as stack:
        there = stack.enter_context(ExitStack())
        address = there.enter_context(server()).address
        command = ("tune", undisturbed.space, *PLAIN, "--set", f"tracking.uri={address}")
        process, _ = stack.enter_context(started(root, env, *command))
        awaited("a running trial", lambda: "running" in statuses(root / "tuning/small").values())
        there.close()
        with pytest.raises(subprocess.TimeoutExpired):  # it goes on meanwhile
            process.wait(30)
        with server():
            out, err = process.communicate(timeout=_DEADLINE_SECONDS)
            assert process.returncode == 0, err
            assert '"tracked": true' in out.splitlines()[-1]
            records = check_whole(root, ENDS, Tracker(address, None, "hvqd"))
    assert figures(records) == undisturbed.figures


# ---- Ctrl-C ----


def test_ctrl_c_twice_ends_at_once_leaves_no_process_and_the_sweep_goes_on(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    root, env = undisturbed.dataset(tmp_path / "root"), environment(tmp_path)
    command = ("tune", undisturbed.space, *PLAIN)
    with started(root, env, *command) as (process, mark):
        awaited("a checkpoint", grown(checkpoints, root))
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
        assert time.monotonic() - begun < 60
        assert process.returncode == 130, err
        assert err.splitlines()[-1].startswith(("error: interrupted", "hint: "))
        awaited("the end of all processes", lambda: not processes(mark), 60)
    done = run_hvqd(*command, "--resume", "--root", str(root), "--json", cwd=tmp_path, env=env).succeeded()
    check_answer(done.answer, ENDS)
    assert figures(check_whole(root, ENDS)) == undisturbed.figures
