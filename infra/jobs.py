"""Jobs on a target: submit, list, follow, stop, alike on each. The targets' own files say how (`jobs_*.py`).

A job's name follows from its command and root, so that launching the same again meets the one that runs; a job goes on
from its root whatever happened to an earlier one.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import urlsplit

from infra.errors import EnvironmentFailure, InputError
from infra.targets import KubeRayTarget, LocalTarget, RayTarget, SlurmTarget, Target, VmsTarget

State = Literal["waiting", "running", "succeeded", "failed", "stopped"]
ENDED: tuple[State, ...] = ("succeeded", "failed", "stopped")
ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class Submission:
    """A job before it is submitted."""

    name: str
    command: tuple[str, ...]
    """Words after `hvqd`: the command with all its options."""
    root: str
    workers: int
    """The fewest that it starts with."""
    cpus_per_worker: int
    gpus_per_worker: int
    preflight: bool = True
    """Whether `hvqd preflight` runs first, on the target."""
    preflight_options: tuple[str, ...] = ()
    """Words for it, the configuration included."""
    without: tuple[str, ...] = ()
    """Patterns of files that need not travel with the code, because the command does not read them."""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Values of the target's forwarded variables."""

    def shell(self, program: Sequence[str]) -> str:
        """The shell line that runs the job: preflight first, if wanted, and only if it passes the command.

        Args:
            program: how to call hvqd on the target.
        """
        import shlex

        job = shlex.join([*program, *self.command])
        if not self.preflight:
            return job
        return f"{shlex.join([*program, 'preflight', *self.preflight_options])} && {job}"


@dataclass(frozen=True)
class Document:
    """One thing that is submitted: a script, a manifest, a request."""

    name: str
    text: str


@dataclass(frozen=True)
class JobState:
    """A job on a target."""

    name: str
    state: State
    where: str
    """What the target calls it, and where it runs."""
    started: str = ""
    """UTC, as far as the target tells."""
    message: str = ""


class Launcher(Protocol):
    """One kind of target."""

    def render(self, submission: Submission) -> list[Document]:
        """Exactly what `submit` would submit, secrets left out; touches nothing."""

    def check(self, submission: Submission) -> None:
        """Whether the target is there and has what the job asks for.

        Raises:
            InputError, EnvironmentFailure: it is not, or has not.
        """

    def submit(self, submission: Submission) -> JobState:
        """Submit the job."""

    def jobs(self) -> list[JobState]:
        """The target's hvqd jobs, newest first."""

    def logs(self, name: str, *, follow: bool) -> Iterator[str]:
        """Pieces of the job's output; with `follow` until it ends."""

    def stop(self, name: str) -> JobState:
        """Stop the job; what it has written to its root stays."""


def launcher_for(target: Target) -> Launcher:
    """How jobs are handled on a target."""
    match target:
        case LocalTarget():
            from infra.jobs_local import LocalLauncher

            return LocalLauncher(target)
        case RayTarget():
            from infra.jobs_ray import RayLauncher

            return RayLauncher(target)
        case SlurmTarget():
            from infra.jobs_slurm import SlurmLauncher

            return SlurmLauncher(target)
        case KubeRayTarget():
            from infra.jobs_kuberay import KubeRayLauncher

            return KubeRayLauncher(target)
        case VmsTarget():
            from infra.jobs_vms import VmsLauncher

            return VmsLauncher(target)
    raise ValueError(f"no launcher for {target}\nhint: one of local, ray, slurm, kuberay, vms")


def job_name(command: Sequence[str], root: str) -> str:
    """The usual name of a command's job: the command and a digest of its root, fit for every target."""
    verb = "-".join(re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-") for word in command)
    return f"hvqd-{verb}-{hashlib.sha256(root.encode()).hexdigest()[:8]}"


def forwarded(target: Target) -> dict[str, str]:
    """Values of the variables that the target forwards, as they are here."""
    return {name: os.environ[name] for name in target.forward if name in os.environ}


def is_seen(path: str, target: Target) -> bool:
    """Whether every machine of the target sees what lies here under a path or URL."""
    if isinstance(target, LocalTarget) or ("://" in path and not path.startswith("file://")):
        return True
    found = Path(path.removeprefix("file://")).expanduser().resolve()
    return any(found.is_relative_to(shared) for shared in target.shared_folders)


def check_root(root: str, target: Target, on: str) -> None:
    """Whether every machine of the target sees the root.

    Raises:
        InputError: it is a folder that only this machine is known to see.
    """
    if is_seen(root, target):
        return
    raise InputError(
        f"the root {root} is a folder of this machine, and the nodes of {on} would each write to their own\n"
        "hint: --root s3://bucket/prefix; or a folder that all nodes mount, named in the target's shared_folders"
    )


def check_free(launcher: Launcher, name: str, on: str) -> None:
    """Whether no job of this name is waiting or running.

    Raises:
        InputError: one is (says where).
    """
    for job in launcher.jobs():
        if job.name == name and job.state not in ENDED:
            raise InputError(
                f"the job {name} is {job.state} already: {job.where}\n"
                f"hint: follow it with `hvqd jobs logs -f {name} --on {on}`, or stop it, or give another --name"
            )


def find_job(launcher: Launcher, name: str) -> JobState:
    """The newest job of a name.

    Raises:
        InputError: there is none.
    """
    jobs = launcher.jobs()
    found = next((job for job in jobs if job.name == name), None)
    if found is None:
        known = ", ".join(dict.fromkeys(job.name for job in jobs)) or "there are none"
        raise InputError(f"no such job: {name} ({known})\nhint: `hvqd jobs ls --on TARGET` lists them")
    return found


def check_reachable(url: str, what: str, hint: str) -> None:
    """Whether somebody listens at a URL's host and port.

    Raises:
        EnvironmentFailure: nobody does, or not within seconds.
    """
    address = urlsplit(url)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise EnvironmentFailure(f"{what} does not answer at {url}: {error}\nhint: {hint}") from error


def require_program(name: str, hint: str) -> str:
    """Path of a program that must be installed.

    Raises:
        EnvironmentFailure: it is not.
    """
    found = shutil.which(name)
    if found is None:
        raise EnvironmentFailure(f"{name} is not installed on this machine\nhint: {hint}")
    return found


def run_program(*words: str, stdin: str | None = None, seconds: float = 60.0) -> str:
    """What a program printed.

    Raises:
        EnvironmentFailure: it failed, or took too long.
    """
    name = words[0].rpartition("/")[2]
    try:
        done = subprocess.run(words, input=stdin or "", capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFailure(
            f"{name} gave no answer within {seconds:.0f} s\nhint: check that its server runs: {' '.join(words[:3])}"
        ) from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[:400]
        raise EnvironmentFailure(f"{name} {' '.join(words[1:3])} failed: {said}\nhint: run it by hand to see more")
    return done.stdout


def check_resources(submission: Submission, cpus: float, gpus: float, where: str) -> None:
    """Whether a target that offers so much can hold the workers.

    Raises:
        InputError: it cannot.
    """
    for kind, offered, each in (("GPU", gpus, submission.gpus_per_worker), ("CPU", cpus, submission.cpus_per_worker)):
        wanted = each * submission.workers
        if wanted > offered:
            setting = "compute.workers" if kind == "GPU" else "compute.workers x compute.threads_per_worker"
            raise InputError(
                f"{where} has {offered:g} {kind}s, the job's workers ask for {wanted}\n"
                f"hint: {setting} must be at most {offered:g}, or add nodes"
            )
