"""Jobs on Slurm: a batch script that starts Ray on its nodes, waits until all have met, and runs the job on the first.

Before a preemption or the time limit Slurm sends USR1; the script then ends the job as Ctrl-C would and asks to be
queued again under the same number. A lost node does the same. The job goes on from its root.
"""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.errors import EnvironmentFailure
from infra.jobs import (
    ENDED,
    Document,
    JobState,
    State,
    Submission,
    check_resources,
    find_job,
    require_program,
    run_program,
)
from infra.targets import SlurmTarget

PREFIX = "hvqd-"
_TEMPLATE = Path(__file__).parent / "deploy" / "slurm" / "job.sh"
_POLL_SECONDS = 0.5
_STOP_SECONDS = 60.0
_BLOCK = 1 << 16
_STATES: dict[str, State] = {
    **dict.fromkeys(("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "PREEMPTED"), "waiting"),
    **dict.fromkeys(("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING"), "running"),
    "COMPLETED": "succeeded",
    "CANCELLED": "stopped",
}
_HINT = "run this where Slurm's commands are, usually a login node"


@dataclass(frozen=True)
class SlurmLauncher:
    """Jobs through sbatch, squeue, scontrol and scancel."""

    target: SlurmTarget

    @property
    def folder(self) -> Path:
        """Of scripts and logs."""
        return Path(self.target.folder).expanduser().resolve()

    def render(self, submission: Submission) -> list[Document]:
        """The batch script."""
        return [Document(f"{submission.name}.sbatch", self._script(submission))]

    def check(self, submission: Submission) -> None:
        """Whether Slurm answers, and the job's own nodes can hold the workers."""
        require_program("sbatch", _HINT)
        target = self.target
        run_program("sinfo", "--noheader", "--format=%D", seconds=10)
        where = f"a job of {target.nodes} nodes"
        check_resources(submission, target.nodes * target.cpus_per_node, target.nodes * target.gpus_per_node, where)

    def submit(self, submission: Submission) -> JobState:
        """Write the script and hand it to sbatch; forwarded variables go through the environment, not the script."""
        sbatch = require_program("sbatch", _HINT)
        self.folder.mkdir(parents=True, exist_ok=True)
        script = self.folder / f"{submission.name}.sbatch"
        script.write_text(self._script(submission))
        said = run_program(sbatch, "--parsable", str(script))
        number = said.strip().split(";")[0]
        (self.folder / f"{submission.name}.job").write_text(number)
        return find_job(self, submission.name)

    def jobs(self) -> list[JobState]:
        """Those that were submitted from this folder, with what Slurm knows of them."""
        require_program("squeue", _HINT)
        found = []
        for path in self.folder.glob(f"{PREFIX}*.job"):
            number = path.read_text().strip()
            state, where, started, message = self._ask(number, path.stem)
            found.append(JobState(path.stem, state, f"Slurm job {number}{where}", started, message))
        return sorted(found, key=lambda job: job.started, reverse=True)

    def _ask(self, number: str, name: str) -> tuple[State, str, str, str]:
        """State, place, start and message of a job; what Slurm has forgotten ended as its log says."""
        try:
            said = run_program("scontrol", "--oneliner", "show", "job", number, seconds=15)
        except EnvironmentFailure as error:
            if "Invalid job id" not in str(error):
                raise
            status = self._path(name, "status")
            ended: State = "succeeded" if status.exists() and status.read_text().strip() == "0" else "failed"
            return ended, "", "", "Slurm has forgotten it"
        fields = dict(re.findall(r"(\w+)=(\S*)", said))
        state = _STATES.get(fields.get("JobState", ""), "failed")
        nodes = fields.get("NodeList", "")
        where = "" if nodes in ("", "(null)") else f" on {nodes}"
        reason = fields.get("Reason", "None")
        return state, where, fields.get("StartTime", ""), "" if reason == "None" else reason

    def logs(self, name: str, *, follow: bool) -> Iterator[str]:
        """The script's log, which a requeued job goes on with."""
        find_job(self, name)
        log, place = self._path(name, "log"), 0
        while True:
            ended = find_job(self, name).state in ENDED
            if log.exists():
                with log.open("rb") as file:
                    file.seek(place)
                    while block := file.read(_BLOCK):
                        place += len(block)
                        yield block.decode("utf-8", "replace")
            if not follow or ended:
                return
            time.sleep(_POLL_SECONDS)

    def stop(self, name: str) -> JobState:
        """Cancel the job and wait until Slurm has."""
        job = find_job(self, name)
        if job.state in ENDED:
            return job
        run_program("scancel", self._path(name, "job").read_text().strip())
        deadline = time.monotonic() + _STOP_SECONDS
        while (job := find_job(self, name)).state not in ENDED and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return job

    def _path(self, name: str, suffix: str) -> Path:
        return self.folder / f"{name}.{suffix}"

    def _script(self, submission: Submission) -> str:
        target = self.target
        python = target.python or sys.executable
        gpus = target.gpus_per_node
        options = {
            "job-name": submission.name,
            "nodes": target.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": target.cpus_per_node,
            "gpus-per-node": gpus or None,
            "mem": target.memory_per_node,
            "partition": target.partition,
            "account": target.account,
            "qos": target.qos,
            "time": target.time_limit,
            "output": self._path(submission.name, "log"),
            "open-mode": "append",
            "signal": f"B:USR1@{target.notice_seconds}",
        }
        resources = f"--num-cpus={target.cpus_per_node} --num-gpus={gpus}"
        job = submission.shell([python, "-m", "workflows.cli"])
        ready = [python, "-m", "infra.nodes_ready", str(target.nodes), str(target.start_seconds)]
        filled = {
            "OPTIONS": [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None],
            "FOLDER": [shlex.quote(str(Path.cwd()))],
            "SETUP": [
                *(f"export {name}={shlex.quote(value)}" for name, value in target.environment.items()),
                *target.setup,
            ],
            "STATUS_FILE": [shlex.quote(str(self._path(submission.name, "status")))],
            "ADDRESSES": [
                f"    {shlex.quote(node)}) echo {shlex.quote(at)} ;;" for node, at in target.addresses.items()
            ],
            "START_RAY": [shlex.join([python, "-m", "ray.scripts.scripts", "start"])],
            "RESOURCES": [resources],
            "WAIT_FOR_NODES": [shlex.join(ready)],
            "JOB": [shlex.quote(f"trap : USR1; {job}")],
        }
        return _filled(_TEMPLATE.read_text(), filled)


def _filled(template: str, filled: Mapping[str, Sequence[str]]) -> str:
    """A template with lines in place of each `@NAME@`; a line with nothing but a name that has none is left out."""
    empty = "|".join(name for name, lines in filled.items() if not lines)
    text = re.sub(rf"^@({empty})@\n", "", template, flags=re.MULTILINE) if empty else template
    return re.sub("@([A-Z_]+)@", lambda found: "\n".join(filled[found[1]]), text)
