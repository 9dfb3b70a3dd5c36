"""One holder at a time, on a local disk or an object store: a lease that expires when its holder is gone.

A lease is a numbered file. Whoever creates the next number, which is possible only once, holds it until it is released
or runs out; the number only ever grows, so that a holder that slept too long can see that it has been overtaken. It
needs nothing of the store but that of two writers who create a file one fails (`Store.create_bytes`). A holder on the
same machine whose process has ended is passed over at once.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import EnvironmentFailure
from infra.storage import Store

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Lease:
    """A lease that is held now."""

    store: Store
    number: int
    token: str
    entry: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def extend(self, seconds: float) -> None:
        """Count as alive for so long from now on; for work that lasts longer than a holder may be silent.

        Raises:
            EnvironmentFailure: somebody has overtaken this holder.
        """
        self.check_held()
        self.store.write_json(_name(self.number), {**self.entry, "until": time.time() + seconds})

    def is_held(self) -> bool:
        """Whether nobody has overtaken this holder."""
        return max(_numbers(self.store), default=0) == self.number

    def check_held(self) -> None:
        """Raises EnvironmentFailure when somebody has."""
        if not self.is_held():
            raise EnvironmentFailure(
                f"the lock {self.store.url} was taken over because this process did not answer for too long\n"
                "hint: see what the other one did, then run the same command again"
            )


@contextmanager
def hold(store: Store, what: str, *, seconds: float = 60.0, patience_seconds: float = 30.0) -> Iterator[Lease]:
    """Hold the lease that lives in this folder.

    Args:
        store: a folder of the lease's own.
        what: what it is held for, shown to those who wait in vain.
        seconds: after so long a holder counts as gone. Clocks may differ by a share of it, not by more.
        patience_seconds: how long to wait for another holder.

    Raises:
        EnvironmentFailure: somebody else holds it all that time (named).
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        lease, holder = _try(store, what, seconds)
        if lease is not None:
            break
        if time.monotonic() >= deadline:
            raise EnvironmentFailure(
                f"{what}: {holder.get('what')} is under way by {holder.get('who')} since {holder.get('since')}\n"
                f"hint: wait for it; a holder that is gone is passed over after {seconds:g} s"
            )
        time.sleep(_POLL_SECONDS)
    try:
        yield lease
    finally:
        with suppress(EnvironmentFailure):  # what was done under it is done; without a release it runs out
            store.write_json(_name(lease.number), {"released": True, "token": lease.token})
            for number in _numbers(store):  # the newest stays, so that numbers never repeat
                if number < lease.number:
                    store.delete(_name(number))


def _try(store: Store, what: str, seconds: float) -> tuple[Lease | None, dict[str, Any]]:
    """The lease if it is free now, and who holds it otherwise."""
    newest = max(_numbers(store), default=0)
    holder = _read(store, newest) if newest else {"released": True}
    if (
        not holder.get("released")
        and time.time() < float(holder.get("until", 0))
        and not has_ended(holder.get("process"))
    ):
        return None, holder
    token = uuid.uuid4().hex
    entry = {
        "released": False,
        "token": token,
        "what": what,
        "who": f"{user()}@{socket.gethostname()} (process {os.getpid()})",
        "process": process_identity(os.getpid()),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "until": time.time() + seconds,
    }
    if not store.create_bytes(_name(newest + 1), json.dumps(entry).encode()):
        return None, _read(store, newest + 1)
    lease = Lease(store, newest + 1, token, entry)
    if lease.is_held():
        return lease, entry
    store.delete(_name(lease.number))  # a number of the past, free again because it was cleared away meanwhile
    return None, _read(store, max(_numbers(store), default=0))


def is_free(store: Store) -> bool:
    """Whether nobody holds the lease that lives in this folder, as far as this machine can tell."""
    newest = max(_numbers(store), default=0)
    holder = _read(store, newest) if newest else {"released": True}
    return (
        bool(holder.get("released")) or time.time() >= float(holder.get("until", 0)) or has_ended(holder.get("process"))
    )


def process_identity(pid: int) -> list[str] | None:
    """What no two processes share: the boot, the process namespace, the pid and when it began; None where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
    return [boot, namespace, str(pid), began]


def runs_here(process: Any) -> bool:
    """Whether a process's identity is one of this machine, since it started and as far as this process can see."""
    mine = process_identity(os.getpid())
    return isinstance(process, list) and mine is not None and process[:2] == mine[:2]


def has_ended(process: Any) -> bool:
    """Whether the process of this identity ran on this machine and is there no more."""
    return runs_here(process) and process_identity(int(process[2])) != process


def user() -> str:
    """The account that this process runs under."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def _read(store: Store, number: int) -> dict[str, Any]:
    try:
        value = store.read_json(_name(number))
    except (FileNotFoundError, ValueError):
        return {"released": True}  # released, and cleared away by a later holder
    return value if isinstance(value, dict) else {"released": True}


def _name(number: int) -> str:
    return f"{number:012d}.json"


def _numbers(store: Store) -> list[int]:
    names = [name.removesuffix(".json") for name in store.children()]
    return sorted(int(name) for name in names if name.isdigit())
