"""What makes two sessions one sweep: the space, how it is searched, and the code; and what differs when they aren't."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from infra.errors import InputError
from infra.storage import Store
from tuning.searcher import SearcherName
from tuning.space import SearchSpace

SWEEP = "sweep.json"
FORMAT = 1
SchedulerName = Literal["asha", "none"]
SCHEDULERS: tuple[SchedulerName, ...] = ("asha", "none")

_PACKAGES = ("hvqd_model", "workflows", "tuning")
"""What decides a trial's figures and which trials there are."""
_SHOWN = 3


@dataclass(frozen=True)
class SweepIdentity:
    """One sweep, whichever session works on it."""

    space: SearchSpace
    searcher: SearcherName
    scheduler: SchedulerName
    seed: int

    def as_json(self) -> dict[str, Any]:
        """As kept on the root. How many trials there are, and where they run, may change from session to session."""
        base = {"root", "tracking", "compute"}
        space = self.space.model_dump(
            mode="json", exclude={"base": True, "about": True, "resolved_base": base, "budget": {"trials"}}
        )
        compute = self.space.resolved_base.compute
        workers = {"workers": compute.workers, "threads_per_worker": compute.threads_per_worker}
        return {
            "format": FORMAT,
            "space": {**space, "compute": workers},
            "searcher": self.searcher,
            "scheduler": self.scheduler,
            "seed": self.seed,
            "code": code_digests(),
        }


def code_digests() -> dict[str, str]:
    """Short digests of the source files that decide what a sweep finds."""
    found = {}
    for package in _PACKAGES:
        folder = Path(str(import_module(package).__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            name = f"{package}/{path.relative_to(folder).as_posix()}"
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return found


def keep_identity(store: Store, identity: SweepIdentity, *, force: bool = False) -> bool:
    """Write the identity of a new sweep; of one that is there check it.

    Args:
        store: the sweep's folder.
        force: take the present identity in the place of one that differs.

    Returns:
        Whether the sweep was there.

    Raises:
        InputError: it was, and differs (says in what).
    """
    state = check_identity(store, identity, force=force)
    if state != "same":
        store.write_json(SWEEP, identity.as_json())
    return state != "new"


def check_identity(store: Store, identity: SweepIdentity, *, force: bool = False) -> Literal["new", "same", "forced"]:
    """What `keep_identity` would do, or its error, with nothing written."""
    try:
        present = store.read_json(SWEEP)
    except FileNotFoundError:
        return "new"
    except ValueError as error:
        if force:
            return "forced"
        raise InputError(
            f"{store.url}/{SWEEP} is damaged: {error}\nhint: --force writes it anew; the trials' records stay"
        ) from error
    different = list(differences(present, identity.as_json()))
    if different and not force:
        more = len(different) - _SHOWN
        shown = "; ".join([*different[:_SHOWN], *([f"and {more} more"] if more > 0 else [])])
        raise InputError(
            f"the sweep at {store.url} was begun otherwise: {shown}\n"
            "hint: --name starts another sweep; --force goes on with this one, old trials beside new ones"
        )
    return "forced" if different else "same"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two sweeps, a phrase each: settings with both values, files of the code by name."""
    old, new = dict(_flat(before)), dict(_flat(now))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) == new.get(key):
            continue
        *group, last = key
        if group == ["code"]:
            what = "is new" if key not in old else "is gone" if key not in new else "has changed"
            yield f"the code, {last} {what}"
            continue
        values = [json.dumps(found[key]) if key in found else "nothing" for found in (old, new)]
        yield f"{'.'.join(key)} was {values[0]}, is {values[1]}"


def _flat(value: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, child in value.items():
        if isinstance(child, dict):
            yield from _flat(child, (*above, name))
        else:
            yield (*above, name), child
