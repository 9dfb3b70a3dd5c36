"""Jobs on this machine: a process group each, with a record and a log in a folder."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra.jobs import ENDED, Document, JobState, State, Submission, check_resources, find_job
from infra.lease import has_ended, process_identity
from infra.targets import LocalTarget

_POLL_SECONDS = 0.2
_STOP_SECONDS = 30.0
_BLOCK = 1 << 16


@dataclass(frozen=True)
class LocalLauncher:
    """Jobs as background processes."""

    target: LocalTarget

    @property
    def folder(self) -> Path:
        """Of records and logs."""
        return Path(self.target.folder).resolve()

    def render(self, submission: Submission) -> list[Document]:
        """The shell line."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.target.environment.items()]
        return [Document("command", " ".join([*variables, submission.shell(_program())]))]

    def check(self, submission: Submission) -> None:
        """CPUs may be oversubscribed on one machine, GPUs may not."""
        check_resources(submission, float("inf"), _gpus(), "this machine")

    def submit(self, submission: Submission) -> JobState:
        """Start the process group."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self._path(submission.name, "log")
        done = self._path(submission.name, "status")
        done.unlink(missing_ok=True)
        script = f"{submission.shell(_program())}; echo $? > {shlex.quote(str(done))}"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["sh", "-c", script],
                env={**os.environ, **self.target.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        record = {
            "pid": process.pid,
            "process": process_identity(process.pid),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "stopped": False,
        }
        self._path(submission.name, "json").write_text(json.dumps(record))
        return self._state(submission.name)

    def jobs(self) -> list[JobState]:
        """By their records."""
        names = [path.stem for path in self.folder.glob("*.json")]
        return sorted((self._state(name) for name in names), key=lambda job: job.started, reverse=True)

    def logs(self, name: str, *, follow: bool) -> Iterator[str]:
        """What lies in the log, and what comes."""
        find_job(self, name)
        with self._path(name, "log").open("rb") as file:
            while True:
                ended = self._state(name).state in ENDED
                while block := file.read(_BLOCK):
                    yield block.decode("utf-8", "replace")
                if not follow or ended:
                    return
                time.sleep(_POLL_SECONDS)

    def stop(self, name: str) -> JobState:
        """As Ctrl-C would, to the whole group; then by force."""
        job = find_job(self, name)
        if job.state in ENDED:
            return job
        path = self._path(name, "json")
        record = self._record(name)
        path.write_text(json.dumps({**record, "stopped": True}))
        _signal(record["pid"], signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        while self._state(name).state not in ENDED and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        _signal(record["pid"], signal.SIGKILL)
        return self._state(name)

    def _path(self, name: str, suffix: str) -> Path:
        return self.folder / f"{name}.{suffix}"

    def _record(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self._path(name, "json").read_text())
        return value

    def _state(self, name: str) -> JobState:
        record, status = self._record(name), self._path(name, "status")
        state: State = "running"
        message = ""
        if status.exists() and (text := status.read_text().strip()):
            state, message = ("succeeded", "") if text == "0" else ("failed", f"status {text}")
        elif _is_over(record):
            state, message = "failed", "its process is gone"
        if record["stopped"] and state != "running":
            state, message = "stopped", ""
        return JobState(
            name, state, f"process {record['pid']}, log {self._path(name, 'log')}", record["started"], message
        )


def _is_over(record: dict[str, Any]) -> bool:
    """Whether the group's leader is gone, or only waits for its parent to notice."""
    if has_ended(record["process"]):
        return True
    try:
        return Path(f"/proc/{record['pid']}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _signal(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def _program() -> list[str]:
    return [sys.executable, "-m", "workflows.cli"]


def _gpus() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
