"""A short training of both stages that is killed at random moments and started again, until it is done.

What comes out must be what an undisturbed one gives, to the bit: weights, codebooks and optimizer state (the digests
of the checkpoints' files), the models, and the metric history, in the root and in the tracker.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.command_line import start_hvqd

Victim = Literal["worker", "driver", "everything", "mid-checkpoint", "mid-upload"]
VICTIMS: tuple[Victim, ...] = ("worker", "driver", "everything", "mid-checkpoint", "mid-upload")
STAGES = ("vq", "prior")
MARK = "HVQD_CHAOS_MARK"
_DEADLINE_SECONDS = 900.0
_MOST_STARTS = 12


@dataclass
class Course:
    """How a disturbed run went."""

    kills: list[str] = field(default_factory=list)
    starts: int = 0


def processes(mark: str) -> dict[int, str]:
    """Command lines of the living processes that carry a mark in their environment, by pid."""
    found = {}
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


@contextmanager
def started(root: Path, env: Mapping[str, str], *command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A command under way, and the mark of all its processes; nothing of it is left in the end."""
    mark = uuid.uuid4().hex
    process = start_hvqd(*command, "--root", str(root), "--json", cwd=root.parent, env={**env, MARK: mark})
    try:
        yield process, mark
    finally:
        for pid in processes(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def run_disturbed(
    root: Path, env: Mapping[str, str], command: tuple[str, ...], stage: str, victims: list[Victim], seed: int
) -> Course:
    """Run a training's command again and again, with one kill of each victim, until it ends by itself.

    Raises:
        AssertionError: it fails, or does not end.
    """
    chance, course, left = random.Random(seed), Course(), list(victims)
    while course.starts < _MOST_STARTS:
        course.starts += 1
        with started(root, env, *command) as (process, mark):
            deadline = time.monotonic() + _DEADLINE_SECONDS
            while process.poll() is None:
                assert time.monotonic() < deadline, f"no end within {_DEADLINE_SECONDS:.0f} s after {course.kills}"
                if left and _strike(process, mark, root / stage / "checkpoints", left[0], chance):
                    course.kills.append(left.pop(0))
                time.sleep(0.02)
            out, err = process.communicate()
        if process.returncode == 0:
            return course
        assert process.returncode == -signal.SIGKILL or course.kills, f"status {process.returncode}\n{out}\n{err}"
    raise AssertionError(f"not done after {course.starts} starts and {course.kills}")


def _strike(
    process: subprocess.Popen[str], mark: str, checkpoints: Path, victim: Victim, chance: random.Random
) -> bool:
    """Kill the victim if this is the moment; whether something was killed."""
    complete = list(checkpoints.glob("*/manifest.json"))
    match victim:
        case "mid-checkpoint":
            due = any(not (folder / "manifest.json").exists() for folder in checkpoints.glob("0*"))
        case "mid-upload":
            due = any(checkpoints.glob("0*/.*.partial"))
        case _:
            due = bool(complete) and chance.random() < 0.03  # some second or two after a checkpoint
    if not due:
        return False
    if victim == "worker":
        workers = [pid for pid, line in processes(mark).items() if line.startswith("ray::RayTrainWorker")]
        if not workers:
            return False
        os.kill(chance.choice(workers), signal.SIGKILL)
    elif victim == "driver":
        os.kill(process.pid, signal.SIGKILL)
    else:
        for pid in processes(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return True


def outcome(root: Path, stage: str) -> dict[str, object]:
    """All that must not depend on what happened on the way."""
    folder = root / stage
    newest = max(folder.glob("checkpoints/0*/manifest.json"), key=lambda path: path.parent.name)
    manifest = json.loads(newest.read_text())
    return {
        "artifact": json.loads((folder / "manifest.json").read_text())["files"],
        "model": hashlib.sha256((folder / "model" / "weights.safetensors").read_bytes()).hexdigest(),
        "state": {name: entry["sha256"] for name, entry in manifest["files"].items()},
        "history": json.loads((folder / "history.json").read_text()),
        "tracked": tracked(root, stage),
    }


def differences(found: Mapping[str, object], expected: Mapping[str, object]) -> list[str]:
    """What of an outcome is not as expected, each with its first difference."""
    return [
        f"{name}: {_first_difference(found[name], expected[name])}"
        for name in expected
        if found[name] != expected[name]
    ]


def _first_difference(found: object, expected: object) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted({*found, *expected}):
            if found.get(key) != expected.get(key):
                return f"{key} = {found.get(key)!r:.200}, not {expected.get(key)!r:.200}"
    if isinstance(found, list) and isinstance(expected, list):
        for place, (one, other) in enumerate(zip(found, expected, strict=False)):
            if one != other:
                return f"entry {place} is {one!r:.200}, not {other!r:.200}"
        return f"{len(found)} entries, not {len(expected)}"
    return f"{found!r:.200}, not {expected!r:.200}"


def tracked(root: Path, stage: str) -> list[tuple[str, int, float]]:
    """Every point of the history that the tracker has, in order; a double one would be there twice."""
    with closing(sqlite3.connect(f"file:{root / 'mlflow.db'}?mode=ro", uri=True)) as store:
        rows = store.execute(
            "SELECT key, step, value, is_nan FROM metrics JOIN runs USING (run_uuid) WHERE name = ? "
            "AND key NOT LIKE 'seconds/%' AND key != 'goodput' ORDER BY key, step",
            (stage,),
        )
        return [(key, step, float("nan") if is_nan else value) for key, step, value, is_nan in rows]


def copy_inputs(source: Path, target: Path, kinds: tuple[str, ...]) -> None:
    """A root with these artifacts of another one."""
    for kind in kinds:
        shutil.copytree(source / kind, target / kind)
