"""A real Slurm on this machine: munge, a controller, and two nodes that are daemons of their own, all on loopback.

Everything lies in one folder and listens on free ports, so that it runs beside an installed Slurm. In the end jobs are
cancelled and only what was started here is ended.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.services import free_ports

NODES = {"n1": "127.0.0.2", "n2": "127.0.0.3"}
"""Slurm's names, and where each one's Ray listens."""
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_START_SECONDS = 60.0
_POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Slurm:
    """A running Slurm."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """What its commands need in their environment."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    def call(self, *command: str) -> str:
        """What a command of Slurm says."""
        done = subprocess.run(
            command, env={**os.environ, **self.env}, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def target(self, path: Path, shared: Path) -> Path:
        """A target's file for `--on`: both nodes, one CPU of each."""
        value = {
            "kind": "slurm",
            "nodes": len(NODES),
            "cpus_per_node": 1,
            "addresses": NODES,
            "folder": str(shared / "jobs"),
            "shared_folders": [str(shared)],
            "environment": {"HVQD_CACHE": str(shared / "cache")},
        }
        path.write_text(yaml.safe_dump(value))
        return path


def configuration(folder: Path) -> str:
    """slurm.conf of a host that is two nodes (platform: Debian's 22.05)."""
    host, (controller, *ports) = socket.gethostname(), free_ports(1 + len(NODES))
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN"
        for name, port in zip(NODES, ports, strict=True)
    ]
    lines = [
        "ClusterName=hvqd",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={controller}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.socket",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd-%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "AccountingStorageType=accounting_storage/none",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "SlurmdParameters=config_overrides",
        "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny",
        "SchedulerParameters=sched_interval=1,batch_sched_delay=0",
        "ReturnToService=2",
        "JobRequeue=1",
        "KillWait=10",
        *nodes,
        "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
    ]
    return "\n".join(lines) + "\n"


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """A Slurm whose two nodes are idle; its logs lie in `folder`."""
    folder.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(configuration(folder))
    here = Slurm(folder)
    munged = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
    munged += [f"--{kind}-file={folder}/munged.{kind}" for kind in ("pid", "log", "seed")]
    daemons = [munged, ["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", name, "-c"] for name in NODES)]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in daemons:
            with (folder / f"{command[0]}-{len(started)}.out").open("wb") as out:
                process = subprocess.Popen(
                    command,
                    env={**os.environ, **here.env},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            started.append(process)
            if command is munged:
                awaited("munge's socket", (folder / "munge.socket").exists, folder)
        awaited("two idle nodes", lambda: _idle(here) == len(NODES), folder)
        yield here
    finally:
        with suppress(AssertionError):  # the daemons may not have come up
            here.call("scancel", "--user=root", "--state=PENDING")
            here.call("scancel", "--user=root")
            awaited("an empty queue", lambda: here.call("squeue", "--noheader") == "", folder)
        for process in reversed(started):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _idle(here: Slurm) -> int:
    with suppress(AssertionError):
        return here.call("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").count("n")
    return 0


def awaited(what: str, holds: Callable[[], bool], folder: Path, seconds: float = _START_SECONDS) -> None:
    """Poll until it holds; otherwise fail with the last lines of all logs in `folder`."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            logs = [path for path in sorted(folder.iterdir()) if path.suffix in (".log", ".out")]
            tails = "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in logs)
            raise AssertionError(f"no sign of {what} within {seconds:.0f} s\n{tails}")
        time.sleep(_POLL_SECONDS)
