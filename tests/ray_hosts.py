"""A Ray cluster of nodes that are started as people start them, with `ray start`, each under an address of its own.

All nodes are on this machine. On loopback addresses they differ in their address alone; `two_hosts` gives each a
network and mounts of its own, so that one can lack what the other has: a port, room on a disk, shared memory.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos import MARK, processes
from tests.command_line import environment
from tests.services import free_ports

_RAY = Path(sys.executable).with_name("ray")
_START_SECONDS = 180.0
_OBJECT_STORE_BYTES = 150 << 20
_WORKER_PORTS = 100
HOSTS = ("10.77.0.2", "10.77.0.3")
"""Addresses in `two_hosts`."""


@dataclass
class RayNodes:
    """A cluster under way."""

    head: str
    """The head's address, an IP."""
    folder: Path
    """Of sessions and logs; a short path, as Ray's sockets need."""
    env: dict[str, str]
    """What every node's processes have in their environment; nothing of this machine's credentials."""
    within: tuple[str, ...] = ()
    """A command that runs what asks the cluster from where its addresses are known."""
    token: str = ""
    _ports: list[int] = field(default_factory=lambda: free_ports(2))
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def dashboard(self) -> str:
        """Address of the Jobs API."""
        return f"http://{self.head}:{self._ports[0]}"

    @property
    def address(self) -> str:
        """What drivers and nodes connect to."""
        return f"{self.head}:{self._ports[1]}"

    def start(
        self,
        node: str,
        *,
        cpus: int = 1,
        env: Mapping[str, str] | None = None,
        within: Sequence[str] = (),
        plasma: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a node, the head first, and wait until the cluster knows it.

        Args:
            node: its IP.
            env: more for its processes.
            within: a command that runs the one named by its further arguments.
            plasma: folder of the object store, where it shall not lie in /dev/shm.
        """
        agent, metrics, runtime, manager, objects, client, low = _port_block(self._ports)
        words = [str(_RAY), "start", "--block", "--disable-usage-stats", f"--node-ip-address={node}"]
        words += [f"--num-cpus={cpus}", f"--object-store-memory={_OBJECT_STORE_BYTES}"]
        # All ports are named: a firewall is told of them, and two nodes of one machine must not meet.
        words += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
        words += [f"--runtime-env-agent-port={runtime}", f"--node-manager-port={manager}"]
        words += [f"--object-manager-port={objects}", f"--min-worker-port={low}"]
        words += [f"--max-worker-port={low + _WORKER_PORTS}"]
        if node == self.head:
            words += ["--head", f"--port={self._ports[1]}", "--dashboard-host=0.0.0.0", "--include-dashboard=true"]
            words += [f"--dashboard-port={self._ports[0]}", f"--ray-client-server-port={client}"]
            words += [f"--temp-dir={self.folder}"]
        else:
            words += [f"--address={self.address}"]
        if plasma is not None:
            words += [f"--plasma-directory={plasma}"]
        if node != self.head and not within:
            within = self._own_resources(node)
        log = self.folder / f"{node}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*within, *words],
                env={**self.env, **(env or {})},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        deadline = time.monotonic() + _START_SECONDS
        while node not in (alive := self.alive()):
            said = log.read_text(errors="replace")[-3000:]
            assert process.poll() is None, f"the node {node} ended with status {process.returncode}:\n{said}"
            assert time.monotonic() < deadline, f"no node {node} after {_START_SECONDS:.0f} s, only {alive}:\n{said}"
            time.sleep(0.2)
        return process

    def _own_resources(self, node: str) -> tuple[str, ...]:
        """A command that gives a node a folder of its own for the code of jobs.

        Nodes of one machine share the session's folder, and each one's agent would unpack a job's code anew over what
        the job is running from.
        """
        own, shared = self.folder / f"resources-{node}", self.folder / "session_latest" / "runtime_resources"
        own.mkdir(exist_ok=True)
        mounted = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
        return (
            *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted, "sh"),
            *(str(own), str(shared.resolve())),
        )

    def alive(self) -> list[str]:
        """Addresses of the nodes that the cluster holds for alive; none where it does not answer."""
        rows = self.ask("/api/v0/nodes?detail=1")
        found = [] if rows is None else rows["data"]["result"]["result"]
        return [row["node_ip"] for row in found if row["state"] == "ALIVE"]

    def ask(self, path: str) -> Any:
        """What the dashboard says as JSON; None where it does not answer."""
        script = (
            "import sys, urllib.request as u; "
            "sys.stdout.write(u.urlopen(u.Request(sys.argv[1], headers={'Authorization': sys.argv[2]}), timeout=10)"
            ".read().decode())"
        )
        url, token = f"{self.dashboard}{path}", f"Bearer {self.token}"
        if self.within:
            words = [*self.within, sys.executable, "-S", "-c", script, url, token]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            return json.loads(done.stdout) if done.returncode == 0 else None
        try:
            request = urllib.request.Request(url, headers={"Authorization": token})
            with urllib.request.urlopen(request, timeout=10) as response:
                return json.load(response)
        except (OSError, ValueError):
            return None

    def processes(self) -> dict[int, str]:
        """Command lines of all that runs on the nodes, by pid."""
        return processes(self.env[MARK])

    def stop(self, process: subprocess.Popen[bytes], node: str) -> None:
        """End a node as a lost machine ends, and wait until the cluster knows."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pid in self.of(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + _START_SECONDS
        while node in self.alive():
            assert time.monotonic() < deadline, f"{node} still counts as alive"
            time.sleep(0.2)

    def of(self, node: str) -> list[int]:
        """Processes of one node: its raylet and what that has started."""
        raylets = {pid for pid, line in self.processes().items() if f"--node_ip_address={node} " in f"{line} "}
        found = set(raylets)
        while True:
            more = {pid for pid in self.processes() if _parent(pid) in found} - found
            if not more:
                return sorted(found)
            found |= more


def _port_block(taken: Sequence[int]) -> list[int]:
    """Six free ports and the beginning of a range for workers that holds none of them, nor of those taken.

    Below what the kernel hands out by itself.
    """
    while True:
        *ports, low = free_ports(7)
        if not any(low <= port <= low + _WORKER_PORTS for port in (*ports, *taken)):
            return [*ports, low]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


@contextmanager
def ray_nodes(head: str, *, token: str = "", within: Sequence[str] = ()) -> Iterator[RayNodes]:
    """A cluster with a head and no other node yet; nothing of it is left in the end.

    Args:
        head: the head's IP.
        token: what whoever asks must know; empty for a cluster without.
        within: a command that runs what must see the head's network.
    """
    folder = Path(tempfile.mkdtemp(prefix="hvqd-", dir="/tmp"))
    mark = uuid.uuid4().hex
    env = environment(folder, {MARK: mark, "PATH": f"{_RAY.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"})
    env |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "20"}
    # Said either way: left open, `ray start` takes the token it finds in the user's home.
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    nodes = RayNodes(head, folder, env, tuple(within), token)
    try:
        nodes.start(head, within=within)
        yield nodes
    finally:
        for pid in nodes.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in nodes._started:
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


_NETWORK = """
set -e
ip link set dev lo up
unshare --net --mount sh -c 'ip link set dev lo up; echo $$ > other.new; mv other.new other; exec sleep infinity' &
until [ -e other ]; do sleep 0.05; done
ip link add name hvqd0 type veth peer name hvqd1
ip link set dev hvqd1 netns $(cat other)
ip addr add {first}/24 dev hvqd0
ip link set dev hvqd0 up
nsenter -t $(cat other) --net ip addr add {second}/24 dev hvqd1
nsenter -t $(cat other) --net ip link set dev hvqd1 up
echo $$ > one.new; mv one.new one
exec sleep infinity
"""


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Two machines as far as network and mounts go, at `HOSTS`: for each a command that runs another one there."""
    script = _NETWORK.format(first=HOSTS[0], second=HOSTS[1])
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-c", script],
        env={**os.environ, MARK: mark},
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 30
        while not (folder / "one").exists():
            assert process.poll() is None, f"no network of two hosts: {process.stderr and process.stderr.read()}"
            assert time.monotonic() < deadline, "waited 30 s for a network of two hosts"
            time.sleep(0.05)
        first, second = (int((folder / name).read_text()) for name in ("one", "other"))
        enter = ("nsenter", "--user", "--net", "--mount")
        yield (*enter, "-t", str(first)), (*enter, "-t", str(second))
    finally:
        for pid in processes(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
