"""Jobs on virtual machines: Ray's cluster launcher starts them, and the job runs through the Jobs API of their head.

What `launch` does is three of Ray's own commands, printed by --dry-run: `ray up` (start the machines, copy this
checkout, install the lock), and `ray exec` to hand the job to the cluster's Jobs API and to ask about it later.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infra.errors import EnvironmentFailure, InputError
from infra.jobs import ENDED, Document, JobState, Submission, check_resources, find_job, run_program
from infra.jobs_ray import PREFIX, STATES, moment_of
from infra.secrets import names_a_secret
from infra.targets import VmsTarget

CLUSTER = "hvqd"
_FOLDER = Path(".hvqd/vms")
_REPOSITORY = Path(__file__).resolve().parents[1]
_PYTHON = "~/hvqd/.venv/bin/python"
_START_SECONDS = 3600.0
_LIST = "import json; from ray.job_submission import JobSubmissionClient as C; " + (
    "print('hvqd-jobs ' + json.dumps([[j.submission_id, j.status.value, j.start_time, j.message] "
    "for j in C('http://127.0.0.1:8265').list_jobs()]))"
)


@dataclass(frozen=True)
class VmsLauncher:
    """Jobs through Ray's cluster launcher."""

    target: VmsTarget

    def render(self, submission: Submission) -> list[Document]:
        """The cluster's YAML and the commands."""
        text = yaml.safe_dump(self.cluster(), sort_keys=False)
        commands = "\n".join(
            shlex.join(words) for words in self._commands(submission, dict.fromkeys(submission.secrets, "…"))
        )
        return [Document(str(_FOLDER / f"{CLUSTER}.yaml"), text), Document("commands", commands)]

    def check(self, submission: Submission) -> None:
        """Whether the YAML is one that Ray takes, and its machines can hold the workers where their size is known."""
        if secret := [name for name in self.target.forward if names_a_secret(name)]:
            raise InputError(
                "a vms target forwards no secrets, because `ray exec` would show them in the list of processes: "
                f"forward: {', '.join(secret)}\n"
                "hint: give the machines a role that may read the root, or let the target's setup fetch what they need"
            )
        check_schema(self.cluster())
        target, machines = self.target, self.target.max_workers or self.target.workers
        cpus = float("inf") if target.cpus is None else machines * target.cpus
        gpus = float("inf") if target.gpus is None else machines * target.gpus
        check_resources(submission, cpus, gpus, f"a cluster of {machines} machines")

    def submit(self, submission: Submission) -> JobState:
        """Start the machines (minutes), then the job."""
        self._write()
        for words in self._commands(submission, dict(submission.secrets)):
            run_program(*words, seconds=_START_SECONDS)
        return find_job(self, submission.name)

    def jobs(self) -> list[JobState]:
        """What the head's Jobs API lists."""
        said = run_program(*self._exec(f"{_PYTHON} -c {shlex.quote(_LIST)}"), seconds=120)
        line = next((line for line in said.splitlines() if line.startswith("hvqd-jobs ")), None)
        if line is None:
            raise EnvironmentFailure("the cluster's head did not list its jobs\nhint: `ray exec` by hand shows why")
        rows = json.loads(line.removeprefix("hvqd-jobs "))
        found = [
            JobState(
                name, STATES[state], f"submission {name} on the cluster {CLUSTER}", moment_of(start), message or ""
            )
            for name, state, start, message in rows
            if name and name.startswith(PREFIX)
        ]
        return sorted(found, key=lambda job: job.started, reverse=True)

    def logs(self, name: str, *, follow: bool) -> Iterator[str]:
        """The driver's output, through ssh."""
        find_job(self, name)
        words = self._exec(f"ray job logs {'--follow ' * follow}{shlex.quote(name)}")
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            yield from process.stdout
        finally:
            process.kill()
            process.wait()

    def stop(self, name: str) -> JobState:
        """Stop the job; the machines go when they have been idle long enough, or with `ray down`."""
        job = find_job(self, name)
        if job.state not in ENDED:
            run_program(*self._exec(f"ray job stop {shlex.quote(name)}"), seconds=120)
        return find_job(self, name)

    def cluster(self) -> dict[str, Any]:
        """Ray's cluster YAML."""
        target = self.target
        resources: dict[str, float] = {}
        if target.cpus is not None:
            resources["CPU"] = target.cpus
        if target.gpus is not None:
            resources["GPU"] = target.gpus
        most = target.workers if target.max_workers is None else target.max_workers
        exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in target.environment.items())
        ulimit = "ulimit -n 65536; "
        activate = "source ~/hvqd/.venv/bin/activate; "
        return {
            "cluster_name": CLUSTER,
            "max_workers": most,
            "idle_timeout_minutes": target.idle_minutes,
            "provider": dict(target.provider),
            "auth": dict(target.auth),
            "available_node_types": {
                "head": {"node_config": dict(target.head), "resources": {"CPU": 0}, "min_workers": 0, "max_workers": 0},
                "worker": {
                    "node_config": dict(target.worker),
                    "resources": resources,
                    "min_workers": target.workers,
                    "max_workers": most,
                },
            },
            "head_node_type": "head",
            "file_mounts": {"~/hvqd": str(_REPOSITORY)},
            "rsync_exclude": [".venv", ".git", "runs", ".hvqd", "**/__pycache__"],
            "setup_commands": [*target.setup, "echo 'source ~/hvqd/.venv/bin/activate' >> ~/.bashrc"],
            "head_start_ray_commands": [
                activate + "ray stop",
                activate
                + exports
                + ulimit
                + "ray start --head --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml --disable-usage-stats",
            ],
            "worker_start_ray_commands": [
                activate + "ray stop",
                activate + exports + ulimit + "ray start --address=$RAY_HEAD_IP:6379 --disable-usage-stats",
            ],
        }

    def _write(self) -> Path:
        _FOLDER.mkdir(parents=True, exist_ok=True)
        path = _FOLDER / f"{CLUSTER}.yaml"
        path.write_text(yaml.safe_dump(self.cluster(), sort_keys=False))
        return path

    def _ray(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "ray.scripts.scripts", *words]

    def _exec(self, line: str) -> list[str]:
        return self._ray("exec", str(_FOLDER / f"{CLUSTER}.yaml"), f"cd ~/hvqd && {line}")

    def _commands(self, submission: Submission, secrets: dict[str, str]) -> list[list[str]]:
        environment = json.dumps({"env_vars": secrets})
        job = shlex.join(
            [
                *("ray", "job", "submit", "--no-wait", "--submission-id", submission.name),
                *("--runtime-env-json", environment, "--", "bash", "-c"),
                submission.shell(["python", "-m", "workflows.cli"]),
            ]
        )
        return [self._ray("up", "-y", "--no-config-cache", str(_FOLDER / f"{CLUSTER}.yaml")), self._exec(job)]


def check_schema(cluster: dict[str, Any]) -> None:
    """Whether a mapping is a cluster that Ray's launcher takes, by Ray's own schema.

    Raises:
        InputError: it is not (the first thing that is wrong).
    """
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    problems = sorted(
        jsonschema.Draft7Validator(schema).iter_errors(cluster), key=lambda error: [str(part) for part in error.path]
    )
    if problems:
        place = ".".join(str(part) for part in problems[0].path) or "the cluster"
        raise InputError(
            f"Ray's cluster launcher would not take {place}: {problems[0].message[:300]}\n"
            "hint: `provider` and `auth` of the target follow Ray's documentation of cluster YAML files"
        )
