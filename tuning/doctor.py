"""What jobs that are gone left behind: resources of a cluster, runs that never ended, folders of no use.

Nothing is taken for dead on suspicion: a placement group counts when the cluster itself says that its job has ended, a
run when the process that wrote it ran on this machine and is gone, a folder of a sweep when nobody holds the sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from infra.lease import has_ended, is_free, runs_here
from infra.storage import Store
from infra.tracking import TrackedRun, Tracker
from tuning.ledger import ENDED, RECORD, TRIALS, read_trials, trial_folder
from tuning.search import dead_reservations
from tuning.sweep import FOLDER, LEASE
from workflows.artifacts import MANIFEST

_STAGES = ("vq", "prior")


@dataclass(frozen=True)
class Finding:
    """One thing that was left."""

    kind: str
    """cpus, run or folder."""
    what: str
    """A line for people."""
    tidy: Callable[[], None] | None
    """What tidies it up; None where this machine cannot tell whether it is dead."""


@dataclass(frozen=True)
class Findings:
    """All that was left."""

    found: tuple[Finding, ...]
    fixed: bool

    @property
    def open(self) -> tuple[Finding, ...]:
        """Those that another machine must judge."""
        return tuple(finding for finding in self.found if finding.tidy is None)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        entries = [{"kind": f.kind, "what": f.what, "certain": f.tidy is not None} for f in self.found]
        return {"found": entries, "fixed": len(self.found) - len(self.open) if self.fixed else 0}

    def as_text(self) -> str:
        """For people."""
        if not self.found:
            return "nothing was left behind"
        done = "tidied up" if self.fixed else "left behind"
        lines = [f"{done if f.tidy is not None else 'cannot tell':<12} {f.what}" for f in self.found]
        if not self.fixed and len(self.open) < len(self.found):
            lines.append("hint: hvqd doctor --fix tidies up what was left behind")
        return "\n".join(lines)


def examine(root: Store, tracker: Tracker, address: str | None, *, fix: bool = False) -> Findings:
    """Look at a root, its tracking store and, where there is one, the cluster.

    Args:
        address: of the Ray cluster; None looks at none, because a local one ends with its job.
        fix: tidy up what is certain.

    Raises:
        EnvironmentFailure: the store, the tracking store or the cluster is away.
    """
    found = [*_cluster(address), *_runs(tracker), *_folders(root)]
    if fix:
        for finding in found:
            if finding.tidy is not None:
                finding.tidy()
    return Findings(tuple(found), fix)


def _cluster(address: str | None) -> Iterator[Finding]:
    if address is None:
        return
    from infra.cluster import connect

    connect(address, 0, compare_versions=False)
    for line, give_back in dead_reservations():
        yield Finding("cpus", f"{address} keeps {line}", give_back)


def _runs(tracker: Tracker) -> Iterator[Finding]:
    for run in tracker.runs("attributes.status = 'RUNNING'"):
        identity, machine = run.process
        if has_ended(identity):

            def end(run_id: str = run.run_id) -> None:
                TrackedRun(tracker.uri, run_id).end("KILLED")

            yield Finding("run", f"run {run.name} ({run.run_id}) is RUNNING, its process is gone", end)
        elif not runs_here(identity):
            where = f"its process is on {machine}" if machine else "who writes it is not known"
            yield Finding("run", f"run {run.name} ({run.run_id}) is RUNNING, {where}", None)


def _folders(root: Store) -> Iterator[Finding]:
    for name in root.child(FOLDER).children():
        sweep = root.child(FOLDER, name)
        if not is_free(sweep.child(LEASE)):
            continue
        yield from _sweep_folders(sweep)


def _sweep_folders(sweep: Store) -> Iterator[Finding]:
    """Leftovers of a sweep that nobody works on."""
    if not sweep.child("ray").is_empty():
        yield _folder(sweep.child("ray"), "Ray Tune's own files")
    records = {record.number: record for record in read_trials(sweep)}
    for name in sweep.child(TRIALS).children():
        folder = sweep.child(TRIALS, name)
        if not folder.exists(RECORD) and not folder.is_empty():
            yield _folder(folder, "a trial without a record")
    for number, record in records.items():
        for stage in _STAGES:
            below = trial_folder(sweep, number).child(stage)
            if not below.child("ray").is_empty():
                yield _folder(below.child("ray"), "Ray Train's own files")
            checkpoints = below.child("checkpoints")
            if record.status in ENDED:
                if not checkpoints.is_empty():
                    yield _folder(checkpoints, f"checkpoints of a trial that is {record.status}")
                continue
            for checkpoint in checkpoints.children():
                begun = checkpoints.child(checkpoint)
                if checkpoint[0].isdigit() and not begun.exists(MANIFEST) and not begun.is_empty():
                    yield _folder(begun, "a checkpoint that was never completed")


def _folder(store: Store, why: str) -> Finding:
    return Finding("folder", f"{store.url}: {why}", store.delete)
