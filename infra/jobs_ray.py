"""Jobs on an existing Ray cluster through its Jobs API. The code and the lock travel as the job's working directory.

The driver runs on the cluster's head, so the machine that launched may go away. A submission's id is the job's name; a
job that has ended gives its name to the next one.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import yaml

from infra.errors import EnvironmentFailure, InputError
from infra.jobs import (
    ANSWER_SECONDS,
    ENDED,
    Document,
    JobState,
    State,
    Submission,
    check_reachable,
    check_resources,
    find_job,
)
from infra.targets import RayTarget
from infra.versions import COMMIT, source_commit

CODE = ("hvqd_model", "infra", "workflows", "tuning", "pyproject.toml", "constraints.txt")
"""What travels: the packages and the lock."""
PREFIX = "hvqd-"
Answer = TypeVar("Answer")
_REPOSITORY = Path(__file__).resolve().parents[1]
_STOP_SECONDS = 60.0
_POLL_SECONDS = 0.5
STATES: dict[str, State] = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}


@dataclass(frozen=True)
class RayLauncher:
    """Jobs through the Jobs API."""

    target: RayTarget

    # ---- before ----

    def render(self, submission: Submission) -> list[Document]:
        """The request, with names for the values of forwarded variables."""
        names = {name: f"(from this machine's {name})" for name in submission.secrets}
        request = self._request(submission, "(this checkout)" if self.target.ship_code else None, names)
        return [Document(f"POST {self.target.address}/api/jobs/", yaml.safe_dump(request, sort_keys=False))]

    def check(self, submission: Submission) -> None:
        """Whether the cluster answers, takes the token, runs this Ray where code travels, and is large enough."""
        self._check_ray()
        cpus, gpus = 0.0, 0.0
        nodes = self._nodes()
        for node in nodes:
            cpus += node.get("CPU", 0.0)
            gpus += node.get("GPU", 0.0)
        check_resources(submission, cpus, gpus, f"the cluster at {self.target.address} ({len(nodes)} nodes)")

    def _check_ray(self) -> None:
        """Ray's version there and here; the other packages are compared when the job starts, on every node."""
        there, here = self._ask("/api/version", lambda value: str(value["ray_version"])), metadata.version("ray")
        if self.target.ship_code and there != here:
            raise InputError(
                f"the cluster at {self.target.address} runs ray {there}, this machine has ray {here}\n"
                "hint: install the same lock on both, or set ship_code: false to run the hvqd that is installed there"
            )

    def _nodes(self) -> list[dict[str, float]]:
        """Resources of the nodes that are alive."""

        def alive(value: Any) -> list[dict[str, float]]:
            rows: list[dict[str, Any]] = value["data"]["result"]["result"]
            return [row["resources_total"] for row in rows if row["state"] == "ALIVE"]

        return self._ask("/api/v0/nodes?detail=1&limit=10000", alive)

    def _ask(self, path: str, read: Callable[[Any], Answer]) -> Answer:
        """What the dashboard says, within seconds: Ray's own client would wait for it without end.

        Args:
            read: takes what is wanted out of the JSON value.

        Raises:
            InputError: the token is missing or refused.
            EnvironmentFailure: nobody answers, or not as a Ray dashboard does.
        """
        self._check_answers()
        request = urllib.request.Request(f"{self.target.address}{path}", headers=self._headers())
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
                return read(json.load(response))
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise self._refused(f"HTTP {error.code}") from error
            raise self._no_ray(error) from error
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            raise self._no_ray(error) from error

    def _check_answers(self) -> None:
        check_reachable(
            self.target.address,
            "the Ray dashboard",
            "check the target's address; `ray start --head --dashboard-host 0.0.0.0` opens it to other machines",
        )

    def _no_ray(self, error: Exception) -> EnvironmentFailure:
        said = " ".join(str(error).split())
        return EnvironmentFailure(
            f"what answers at {self.target.address} is no Ray dashboard with the State API: {said}\n"
            "hint: the cluster needs ray[default]; check the target's address"
        )

    def _refused(self, reason: str) -> InputError:
        variable = self.target.token_variable
        if variable is None:
            return InputError(
                f"the cluster at {self.target.address} wants a token ({reason}), and the target names none\n"
                "hint: put the token into an environment variable and its name into the target's token_variable"
            )
        return InputError(
            f"the cluster at {self.target.address} refused the token in {variable} ({reason})\n"
            "hint: it must be the token that the cluster was started with (RAY_AUTH_TOKEN on its head)"
        )

    def _headers(self) -> dict[str, str]:
        variable = self.target.token_variable
        if variable is None:
            return {}
        token = os.environ.get(variable, "").strip()
        if not token:
            raise InputError(
                f"the target takes its token from {variable}, which is not set here\n"
                f"hint: export {variable}=… (the token that the cluster was started with)"
            )
        return {"Authorization": f"Bearer {token}"}

    # ---- submit ----

    def _request(self, submission: Submission, code: str | None, values: dict[str, str]) -> dict[str, Any]:
        environment: dict[str, Any] = {
            "env_vars": {"HVQD_LOGS": "/tmp/hvqd-logs", **self.target.environment, **values},
        }
        if code is not None:
            environment["working_dir"] = code
        if self.target.install:
            environment["pip"] = {"packages": _locked(), "pip_check": False}
        return {
            "submission_id": submission.name,
            "entrypoint": submission.shell(["python", "-m", "workflows.cli"]),
            "runtime_env": environment,
            "metadata": {"hvqd_root": submission.root},
        }

    def submit(self, submission: Submission) -> JobState:
        """Upload the code, then the request."""
        client = self._client()
        with self._explained():
            self._forget(client, submission.name)
            with tempfile.TemporaryDirectory(prefix="hvqd-code-") as scratch:
                code = _stage(Path(scratch), submission.without) if self.target.ship_code else None
                request = self._request(submission, code, dict(submission.secrets))
                client.submit_job(**request)
        return find_job(self, submission.name)

    def _forget(self, client: Any, name: str) -> None:
        """Free the name of a job that has ended."""
        for job in self.jobs():
            if job.name == name and job.state in ENDED:
                client.delete_job(name)

    # ---- after ----

    def jobs(self) -> list[JobState]:
        """Those with our names."""
        client = self._client()
        with self._explained():
            found = client.list_jobs()
        states = [
            JobState(
                job.submission_id,
                STATES[str(job.status.value)],
                f"submission {job.submission_id} at {self.target.address}",
                moment_of(job.start_time),
                " ".join((job.message or "").split())[:300] if job.status.value == "FAILED" else "",
            )
            for job in found
            if job.submission_id and job.submission_id.startswith(PREFIX)
        ]
        return sorted(states, key=lambda job: job.started, reverse=True)

    def logs(self, name: str, *, follow: bool) -> Iterator[str]:
        """The driver's output, as the cluster keeps it.

        The text is asked for as a whole again and again: a stream would end without a word when a proxy cuts it.
        """
        find_job(self, name)
        client, shown = self._client(), 0
        while True:
            with self._explained():
                ended = STATES[str(client.get_job_status(name).value)] in ENDED
                text: str = client.get_job_logs(name)
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
            if not follow or ended:
                return
            time.sleep(_POLL_SECONDS)

    def stop(self, name: str) -> JobState:
        """Ask the cluster to stop the driver, and wait until it has."""
        job = find_job(self, name)
        if job.state in ENDED:
            return job
        client = self._client()
        with self._explained():
            client.stop_job(name)
        deadline = time.monotonic() + _STOP_SECONDS
        while (job := find_job(self, name)).state not in ENDED and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return job

    def _client(self) -> Any:
        headers = self._headers()
        self._ask("/api/version", lambda value: value["ray_version"])
        from ray.job_submission import JobSubmissionClient

        with self._explained():
            return JobSubmissionClient(self.target.address, headers=headers or None)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ConnectionError, OSError) as error:
            text = " ".join(str(error).split())
            if any(sign in text for sign in ("401", "403", "Unauthorized", "authentication", "Forbidden")):
                raise self._refused(text[:200]) from error
            raise EnvironmentFailure(
                f"the Ray cluster at {self.target.address} failed: {text[:300]}\n"
                "hint: look at its dashboard; the job's root is intact"
            ) from error


def _stage(folder: Path, without: Sequence[str] = ()) -> str:
    """Copy what travels, with the commit that the models made by it shall name.

    Args:
        without: patterns of file names that stay here.
    """
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", *without)
    for name in CODE:
        source = _REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=unwanted)
        elif source.exists():
            shutil.copyfile(source, folder / name)
    (folder / COMMIT).write_text(source_commit())
    return str(folder)


def _locked() -> list[str]:
    """Requirements of the lock, as pip takes them."""
    lines = (_REPOSITORY / "constraints.txt").read_text().splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def moment_of(milliseconds: int | None) -> str:
    if not milliseconds:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")
