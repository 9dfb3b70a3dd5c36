"""`hvqd preflight` on a real cluster of two machines of which one is ill: each fault planted, and named on its node.

The second machine has networks and mounts of its own: a full disk, little shared memory, a root that cannot be
written, a firewall that lets only Ray's own ports through, and too little of its processor.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from infra.versions import versions
from tests.command_line import Finished, environment, run_hvqd
from tests.ray_hosts import HOSTS, RayNodes, ray_nodes, two_hosts
from tests.services import free_ports

WELL, ILL = HOSTS
_RUN_SECONDS, _PAUSE_SECONDS = 0.004, 0.03
_MOUNTS = """
set -e
mount --make-rprivate /
mount -t tmpfs -o size=64m tmpfs /dev/shm
mount -t tmpfs -o size=64k tmpfs {disk}
mount --bind {root} {root}
mount -o remount,bind,ro {root}
ip rule add pref 100 lookup local
ip rule add pref 50 to {well} ipproto tcp sport 32768-60999 dport 32768-60999 unreachable
ip rule del pref 0
exec "$@"
"""
"""Ray's own ports are below 32768 here; what training opens is above."""


@contextmanager
def throttled(nodes: RayNodes, node: str) -> Iterator[None]:
    """The workers of a node get an eighth of their processor, as in a container with a small quota."""
    over = threading.Event()

    def victims() -> list[int]:
        return [pid for pid in nodes.of(node) if "ray::Member" in nodes.processes().get(pid, "")]

    def send(number: signal.Signals, pids: list[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def throttle() -> None:
        found, looked = victims(), time.monotonic()
        while not over.is_set():
            send(signal.SIGSTOP, found)
            stopped = time.monotonic()
            if stopped - looked > 0.5 or not found:  # looking takes a while, in which they shall not run
                looked, newly = stopped, [pid for pid in victims() if pid not in found]
                send(signal.SIGSTOP, newly)
                found += newly
            time.sleep(max(0.0, _PAUSE_SECONDS - (time.monotonic() - stopped)))
            send(signal.SIGCONT, found)
            time.sleep(_RUN_SECONDS)
        send(signal.SIGCONT, found)

    thread = threading.Thread(target=throttle, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def table(done: Finished) -> dict[tuple[str, str], tuple[str, str]]:
    """Verdict and text by check and place, as they are printed."""
    found = {}
    for line in done.err.splitlines() + done.out.splitlines():
        if line.startswith(("pass ", "warn ", "fail ")):
            verdict, check, where, text = (part.strip() for part in line.split("  ") if part.strip())
            found[check, where] = (verdict, text)
    assert found, done.err
    return found


@pytest.mark.long  # the slow worker is stopped again and again, which a busy machine may begin late
def test_every_fault_of_a_machine_is_named_on_it_and_none_on_the_other(tmp_path: Path) -> None:
    root, disk = tmp_path / "root", tmp_path / "disk"
    root.mkdir()
    disk.mkdir()
    tracker = f"http://127.0.0.1:{free_ports(1)[0]}"
    env = environment(tmp_path)
    with two_hosts(tmp_path) as (one, other), ray_nodes(WELL, within=one) as nodes:
        faults = _MOUNTS.format(disk=disk, root=root, well=WELL)
        infected = (*other, "unshare", "--mount", "sh", "-c", faults, "sh")
        ill = nodes.start(ILL, within=infected, env={"TMPDIR": str(disk)}, plasma=nodes.folder)

        def preflight(*more: str) -> Finished:
            words = ["preflight", "--preset", "integration", "--root", str(root)]
            words += ["--set", f"compute.address={nodes.address}", *more]
            return run_hvqd(*words, cwd=tmp_path, env=env, within=one, timeout_seconds=600)

        with throttled(nodes, ILL):
            done = preflight("--set", f"tracking.uri={tracker}")
        found = table(done)
        failed = {place: text for place, (verdict, text) in found.items() if verdict == "fail"}
        checks = {check for check, _ in failed}
        assert done.status == 1
        assert checks == {"tracker", "disk", "shared memory", "root", "speed", "network"}, done.err
        assert tracker in failed["tracker", "driver"]
        for check in ("disk", "shared memory", "root"):
            assert ILL in failed[check, ILL] and found[check, WELL][0] in ("pass", "warn")
        (slow,) = (place for check, place in failed if check == "speed")
        assert slow.endswith(f"on {ILL}"), "the slow worker is that of the ill machine"
        (blocked,) = (text for (check, _), text in failed.items() if check == "network")
        assert "cannot reach worker 0 on" in blocked and WELL in blocked and ILL in blocked
        assert "hint: open all TCP ports between the nodes" in done.err

        nodes.stop(ill, ILL)
        package = tmp_path / "packages" / "mlflow-0.0.1.dist-info"
        package.mkdir(parents=True)
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mlflow\nVersion: 0.0.1\n")
        nodes.start(ILL, within=other, env={"PYTHONPATH": str(package.parent)})
        here = versions()["mlflow"]
        found = table(preflight())
        assert [place for place, (verdict, _) in found.items() if verdict == "fail"] == [("versions", ILL)]
        assert f"mlflow 0.0.1 instead of {here}" in found["versions", ILL][1]

        words = ["data", "build", "--preset", "integration", "--root", str(root)]
        words += ["--set", f"compute.address={nodes.address}"]
        started = run_hvqd(*words, cwd=tmp_path, env=env, within=one)
        assert (started.status, len(started.err.splitlines()[-2:])) == (1, 2)
        assert (
            f"{ILL} has mlflow 0.0.1 instead of {here}" in started.err and "hint: install the same lock" in started.err
        )
