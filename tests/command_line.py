"""Runs `hvqd` as a user does: another process, its own folder, nothing of the machine's own settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HVQD = Path(sys.executable).with_name("hvqd")
_OUTSIDE = ("AWS_", "MLFLOW_", "RAY_", "HVQD_")


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    status: int
    out: str
    err: str
    seconds: float

    @property
    def answer(self) -> dict[str, Any]:
        """The JSON object that `--json` prints last."""
        lines = self.out.splitlines()
        assert lines, f"nothing on stdout; status {self.status}, stderr:\n{self.err}"
        value = json.loads(lines[-1])
        assert isinstance(value, dict)
        return value

    def succeeded(self) -> Finished:
        """Itself, or a failure that shows what the command said."""
        assert self.status == 0, f"status {self.status} after {self.seconds:.0f} s\n{self.out}\n{self.err}"
        return self


def environment(folder: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without credentials and addresses, the cache in `folder`, and `more`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OUTSIDE)}
    return {**kept, "HVQD_CACHE": str(folder / "cache"), "COLUMNS": "200", **(more or {})}


def start_hvqd(*arguments: str, cwd: Path, env: Mapping[str, str], within: Sequence[str] = ()) -> subprocess.Popen[str]:
    """The command under way, in a process group of its own (so that it can be interrupted or killed whole).

    Args:
        within: a command that runs the one named by its further arguments.
    """
    return subprocess.Popen(
        [*within, str(HVQD), *arguments],
        cwd=cwd,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_hvqd(
    *arguments: str,
    cwd: Path,
    env: Mapping[str, str],
    timeout_seconds: float = 600,
    within: Sequence[str] = (),
) -> Finished:
    """Run the command to its end; one that takes longer is killed, and the test fails with what it had said."""
    started = time.monotonic()
    process = start_hvqd(*arguments, cwd=cwd, env=env, within=within)
    try:
        out, err = process.communicate(timeout=timeout_seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        said = f"{out}\n{err}"
        raise AssertionError(f"hvqd {' '.join(arguments)}: no end within {timeout_seconds:.0f} s\n{said}") from error
    return Finished(process.returncode, out, err, time.monotonic() - started)


def on_small_disk(root: Path, spare_bytes: int) -> list[str]:
    """For `within`: a command runs with `root` on a disk of its own that has only so much room left.

    A memory file system in a mount namespace of the command's; root's content is there at the start, and lies beside
    it in `<name>-after` when the command has ended.
    """
    files = [path for path in root.rglob("*") if path.is_file()]
    page = os.sysconf("SC_PAGE_SIZE")
    used = sum(-(-path.stat().st_size // page) * page for path in files)
    script = f"""
        set -e
        cp -a {root} {root}-before
        mount -t tmpfs -o size={used + spare_bytes} tmpfs {root}
        cp -a {root}-before/. {root}
        status=0; "$@" || status=$?
        cp -a {root} {root}-after
        exit $status
    """
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
