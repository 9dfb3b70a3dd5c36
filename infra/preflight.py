"""What a machine is like before a job runs on it, and what is wrong with it: facts on one side, verdicts on the other.

Facts are gathered on every node (`look`); verdicts are pure functions of facts, and every finding names its node.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from infra.errors import EnvironmentFailure, InputError
from infra.storage import open_store
from infra.versions import differences, versions

Verdict = Literal["pass", "warn", "fail"]
GIB = 2**30
MIB = 2**20

_PROBE_BYTES = 4 * MIB
_CLOCK_SECONDS = 5.0
_SHM_FAIL, _SHM_WARN = 128 * MIB, GIB
_SLOW_ROOT_MB_S = 20.0
_SLOW_WARN, _SLOW_FAIL = 1.5, 3.0
_SLOW_LINK = 0.5


@dataclass(frozen=True)
class Finding:
    """A line of the table."""

    check: str
    where: str
    verdict: Verdict
    what: str
    hint: str = ""


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch sees it."""

    name: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class RootFacts:
    """What reading and writing the root was like from one node."""

    url: str
    problem: str = ""
    """Two lines, when it did not work."""
    write_mb_s: float = 0.0
    read_mb_s: float = 0.0
    list_seconds: float = 0.0
    mark: str = ""
    """Name of a file that this node left for the others to see."""


@dataclass(frozen=True)
class NodeFacts:
    """What a node is like."""

    node: str
    """Its address."""
    host: str
    versions: Mapping[str, str]
    driver: str
    """Version of the NVIDIA driver; empty without one."""
    cuda: str
    """CUDA version that torch was built for; empty for a CPU build."""
    gpus: tuple[Gpu, ...]
    cpus: int
    free_memory_bytes: int
    clock: float
    """Seconds since 1970."""
    disk_free_bytes: int
    """Where temporary files lie, checkpoints on their way among them."""
    disk_folder: str
    shm_free_bytes: int
    root: RootFacts
    environment: Mapping[str, str] = field(default_factory=dict)


def look(node: str, root_url: str, run: str) -> NodeFacts:
    """Facts of the machine that this runs on.

    Args:
        node: what to call it.
        root_url: the root to try.
        run: names this preflight's own folder under the root.
    """
    folder = tempfile.gettempdir()
    driver, cuda, gpus = _gpus()
    return NodeFacts(
        node=node,
        host=platform.node(),
        versions=versions(),
        driver=driver,
        cuda=cuda,
        gpus=gpus,
        cpus=os.cpu_count() or 1,
        free_memory_bytes=_free_memory(),
        clock=time.time(),
        disk_free_bytes=shutil.disk_usage(folder).free,
        disk_folder=folder,
        shm_free_bytes=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        root=try_root(root_url, run),
    )


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0


def _gpus() -> tuple[str, str, tuple[Gpu, ...]]:
    import torch

    cuda = torch.version.cuda or ""
    if not torch.cuda.is_available():
        return _driver(), cuda, ()
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(torch.cuda.get_device_name(index), free, total))
    return _driver(), cuda, tuple(found)


def _driver() -> str:
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(said.split()), "")


def try_root(url: str, run: str) -> RootFacts:
    """Write, read and list a few MiB under the root, leave a mark, and clean up all but the mark."""
    name, content = f"{run}/probe-{uuid.uuid4().hex}", os.urandom(_PROBE_BYTES)
    mark = f"mark-{uuid.uuid4().hex}"
    try:
        store = open_store(url).quick().child(".preflight")
        started = time.perf_counter()
        store.write_bytes(name, content)
        written = time.perf_counter()
        same = store.read_bytes(name) == content
        read = time.perf_counter()
        store.child(run).children()
        listed = time.perf_counter()
        store.delete(name)
        store.write_bytes(f"{run}/{mark}", b"")
    except (EnvironmentFailure, InputError, OSError) as error:
        return RootFacts(url, problem=str(error).replace(f"/.preflight/{name}", ""))
    if not same:
        return RootFacts(url, problem=f"{url} does not return what was written\nhint: check the store")
    return RootFacts(
        url,
        write_mb_s=_PROBE_BYTES / 1e6 / max(written - started, 1e-9),
        read_mb_s=_PROBE_BYTES / 1e6 / max(read - written, 1e-9),
        list_seconds=listed - read,
        mark=mark,
    )


def marks(url: str, run: str) -> tuple[str, ...]:
    """Marks that the nodes left under the root, as this machine sees them."""
    return tuple(name for name in open_store(url).quick().child(".preflight", run).children() if name[:5] == "mark-")


def forget_marks(url: str, run: str) -> None:
    """Remove this preflight's own folder; the outer one too when nothing else is in it."""
    store = open_store(url).quick()
    store.child(".preflight", run).delete()
    if not store.child(".preflight").children():
        store.child(".preflight").delete()


# ---- verdicts on nodes ----


def judge_versions(expected: Mapping[str, str], facts: NodeFacts, expected_from: str) -> Finding:
    """Versions of a node against those of another."""
    found = differences(expected, facts.versions)
    if not found:
        return Finding(
            "versions", facts.node, "pass", f"python {facts.versions['python']}, ray {facts.versions['ray']}"
        )
    return Finding(
        "versions",
        facts.node,
        "fail",
        f"{facts.node} has {', '.join(found)} ({expected_from} has the latter)",
        "install the same lock everywhere, ship the code (ship_code), or use one image",
    )


def judge_clock(before: float, facts: NodeFacts, after: float) -> Finding:
    """A node's clock against the driver's, which asked between `before` and `after`."""
    off = max(before - facts.clock, facts.clock - after, 0.0)
    if off <= _CLOCK_SECONDS:
        return Finding("clock", facts.node, "pass", f"within {max(off, 0.1):.1f} s of the driver's")
    return Finding(
        "clock",
        facts.node,
        "fail" if off > 60 else "warn",
        f"the clock of {facts.node} is {off:.0f} s off the driver's",
        "let chrony or ntpd set it: S3 refuses signatures of another time, and leases would overlap",
    )


def judge_disk(facts: NodeFacts, needed_bytes: float) -> Finding:
    """Room for a checkpoint on its way."""
    text = f"{facts.disk_free_bytes / GIB:.1f} GiB free in {facts.disk_folder}"
    if facts.disk_free_bytes >= 2 * needed_bytes:
        return Finding("disk", facts.node, "pass", text)
    return Finding(
        "disk",
        facts.node,
        "fail" if facts.disk_free_bytes < needed_bytes else "warn",
        f"{text} of {facts.node}, a checkpoint on its way takes {needed_bytes / GIB:.2f} GiB",
        "free some space, or name another folder in TMPDIR on that node",
    )


def judge_shm(facts: NodeFacts) -> Finding:
    """Shared memory, which NCCL, gloo and Ray's object store use."""
    free = facts.shm_free_bytes
    text = f"{free / GIB:.2f} GiB free in /dev/shm"
    if free >= _SHM_WARN:
        return Finding("shared memory", facts.node, "pass", text)
    return Finding(
        "shared memory",
        facts.node,
        "fail" if free < _SHM_FAIL else "warn",
        f"{text} of {facts.node}, at least {_SHM_WARN / GIB:.0f} GiB is good",
        "docker run --shm-size=8g, an emptyDir of medium Memory, or remount /dev/shm larger",
    )


def judge_devices(facts: NodeFacts, gpus_wanted: bool, needed_bytes: float) -> Finding:
    """GPUs and free memory of a node."""
    if not gpus_wanted:
        text = f"{facts.cpus} CPUs, {facts.free_memory_bytes / GIB:.1f} GiB free"
        if facts.free_memory_bytes >= needed_bytes:
            return Finding("devices", facts.node, "pass", text)
        return Finding(
            "devices",
            facts.node,
            "warn",
            f"{text} on {facts.node}, its workers take about {needed_bytes / GIB:.1f} GiB",
            "fewer workers a node, or a smaller micro_batch",
        )
    if not facts.gpus:
        why = (
            "torch is a CPU build"
            if not facts.cuda
            else f"driver {facts.driver or 'missing'}, torch's CUDA {facts.cuda}"
        )
        hint = "install the NVIDIA driver and a CUDA build of torch that it supports (TORCH_SPEC, see install.sh)"
        return Finding("devices", facts.node, "fail", f"torch sees no GPU on {facts.node}: {why}", hint)
    free = min(gpu.free_bytes for gpu in facts.gpus)
    text = f"{len(facts.gpus)} x {facts.gpus[0].name}, {free / GIB:.1f} GiB free, driver {facts.driver}"
    if free >= needed_bytes:
        return Finding("devices", facts.node, "pass", text)
    return Finding(
        "devices",
        facts.node,
        "fail",
        f"{text} on {facts.node}, a worker takes about {needed_bytes / GIB:.1f} GiB",
        "end what else runs there, or see `hvqd plan` for the least change that fits",
    )


def judge_root(facts: NodeFacts) -> Finding:
    """Whether a node reads and writes the root, and how fast."""
    root = facts.root
    if root.problem:
        first, _, rest = root.problem.partition("\n")
        return Finding("root", facts.node, "fail", f"from {facts.node}: {first}", rest.removeprefix("hint: ").strip())
    speeds = f"write {root.write_mb_s:.0f} MB/s, read {root.read_mb_s:.0f} MB/s, list {root.list_seconds * 1e3:.0f} ms"
    if min(root.write_mb_s, root.read_mb_s) >= _SLOW_ROOT_MB_S:
        return Finding("root", facts.node, "pass", speeds)
    return Finding(
        "root", facts.node, "warn", f"{speeds} from {facts.node}", "checkpoints will take long: `hvqd plan --bandwidth`"
    )


def judge_shared_root(nodes: Sequence[NodeFacts], visible: Sequence[str]) -> list[Finding]:
    """Whether all nodes wrote to the same root: one of them sees every node's mark."""
    missing = [facts for facts in nodes if facts.root.mark and facts.root.mark not in visible]
    return [
        Finding(
            "shared root",
            facts.node,
            "fail",
            f"what {facts.node} writes to {facts.root.url} is not seen by the driver: it is a folder of its own",
            "a root that all nodes see: s3://bucket/prefix, or a folder that all of them mount",
        )
        for facts in missing
    ]


# ---- verdicts on workers ----


@dataclass(frozen=True)
class Link:
    """Between two workers that are neighbours in the ring."""

    sender: str
    receiver: str
    bytes_a_second: float
    seconds: float
    """Latency of a small message."""


def judge_workers(seconds: Mapping[str, float]) -> list[Finding]:
    """The same work on every worker: one that takes much longer than the others' median is named with its node."""
    findings = []
    for where, took in seconds.items():
        others = [other for name, other in seconds.items() if name != where]  # without it: of two it would be half
        slower = took / max(statistics.median(others), 1e-9) if others else 1.0
        if slower < _SLOW_WARN:
            findings.append(Finding("speed", where, "pass", f"{took * 1e3:.0f} ms for the same work"))
            continue
        findings.append(
            Finding(
                "speed",
                where,
                "fail" if slower >= _SLOW_FAIL else "warn",
                f"{where} takes {slower:.1f} times as long as the others ({took * 1e3:.0f} ms)",
                "look for other jobs, a power limit or heat there: every step waits for the slowest",
            )
        )
    return findings


def judge_reach(problems: Mapping[str, str], meeting: str) -> list[Finding]:
    """Workers that cannot reach the meeting point of the collective, by worker."""
    return [
        Finding(
            "network",
            where,
            "fail",
            f"{where} cannot reach {meeting}: {problem}",
            "open all TCP ports between the nodes; training and Ray choose theirs",
        )
        for where, problem in problems.items()
    ]


def judge_links(links: Sequence[Link], all_reduce_bytes_a_second: float) -> list[Finding]:
    """Neighbours' links and the whole ring."""
    if not links:
        return []
    usual = statistics.median(link.bytes_a_second for link in links)
    findings = [
        Finding(
            "collective",
            "all workers",
            "pass",
            f"all-reduce at {all_reduce_bytes_a_second / 1e6:.0f} MB/s a worker, "
            f"{statistics.median(link.seconds for link in links) * 1e3:.2f} ms a message",
        )
    ]
    hint = "check that link's cable, switch port and interface (NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO)"
    slow = [link for link in links if link.bytes_a_second < _SLOW_LINK * usual]
    findings += [
        Finding(
            "collective",
            f"{link.sender} - {link.receiver}",
            "warn",
            f"the link from {link.sender} to {link.receiver} is slow: {link.bytes_a_second / 1e6:.0f} MB/s, "
            f"others {usual / 1e6:.0f}",
            hint,
        )
        for link in slow
    ]
    return findings


def reach(host: str, port: int, seconds: float) -> str:
    """Why a port cannot be reached from here; empty when it can."""
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except OSError as error:
        return str(error)
    return ""


def worst(findings: Sequence[Finding]) -> Verdict:
    """The worst verdict."""
    verdicts = {finding.verdict for finding in findings}
    return "fail" if "fail" in verdicts else "warn" if "warn" in verdicts else "pass"
