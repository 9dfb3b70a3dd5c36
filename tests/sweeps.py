"""What the tests of searches share: a small space, and what must be true of a sweep that has ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from infra.storage import Store, open_store
from infra.tracking import Tracker, open_tracker
from tuning.doctor import examine
from tuning.ledger import ENDED, read_trials
from tuning.records import Status, TrialRecord
from tuning.tracking import END_TAG, SWEEP_TAG, TRIAL_TAG

SPACE: dict[str, Any] = {
    "name": "small",
    "base": {"preset": "integration", "set": {"compute.workers": 1, "vq.train.warmup_images": 160}},
    "job": "vq",
    "parameters": {"vq.train.learning_rate": {"log_uniform": [0.001, 0.01]}, "vq.model.code_dim": {"choice": [8, 16]}},
    "metrics": [{"name": "val_psnr", "direction": "max"}],
    "budget": {"trials": 4, "images": 1_280, "min_images": 320, "reduction_factor": 2},
}
"""Four trials of some seconds, two side by side on two cores."""
PLAIN = ("--searcher", "random", "--scheduler", "none", "--max-concurrent", "2")
"""Trials of which none depends on another."""


def space_file(folder: Path, **changes: Any) -> str:
    """A file of the small space, with changes."""
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(SPACE | changes))
    return str(path)


def sweep_of(root: Path | Store, name: str = "small") -> Store:
    """The sweep's folder."""
    store = open_store(str(root)) if isinstance(root, Path) else root
    return store.child("tuning", name)


def figures(records: list[TrialRecord]) -> dict[int, tuple[Any, ...]]:
    """All that a trial of a fixed configuration must give again: its draw, its end, its curve."""
    return {record.number: (record.drawn, record.status, record.rungs) for record in records}


def check_whole(root: Path | Store, ends: Mapping[int, Status], tracker: Tracker | None = None) -> list[TrialRecord]:
    """Every trial is accounted for, MLflow agrees with the records, and nothing was left behind.

    Args:
        ends: how each trial must have ended.
        tracker: where the sweep was told of; the store of a local root unless given.
    """
    store = open_store(str(root)) if isinstance(root, Path) else root
    sweep, tracker = sweep_of(store), tracker or open_tracker(None, "hvqd", store)
    records = read_trials(sweep)
    assert {record.number: record.status for record in records} == ends
    runs = list(tracker.runs(f"tags.`{SWEEP_TAG}` = '{sweep.url}'"))
    parents = [run for run in runs if TRIAL_TAG not in run.tags]
    assert [run.status for run in parents] == ["FINISHED"]
    children = {int(run.tags[TRIAL_TAG]): run for run in runs if TRIAL_TAG in run.tags}
    assert len(children) == len(runs) - 1 and children.keys() == ends.keys()
    words = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
    for record in records:
        run = children[record.number]
        assert run.status == words[record.status]
        assert run.tags[END_TAG].split()[0].rstrip(":") == record.status
        for metric in ("val_psnr",):
            points = {point.step: point.value for point in tracker.client.get_metric_history(run.run_id, metric)}
            wanted = {rung.images: rung.metrics[metric] for rung in record.rungs if metric in rung.metrics}
            assert wanted.items() <= points.items()
    assert all(record.status in ENDED for record in records)
    left = examine(store, tracker, None).as_text()
    assert left == "nothing was left behind", left
    return records


def check_answer(answer: dict[str, Any], ends: Mapping[int, Status]) -> None:
    """What the command said in the end agrees, and all CPUs came back."""
    counts: dict[str, int] = {}
    for status in ends.values():
        counts[status] = counts.get(status, 0) + 1
    assert answer["trials"] == counts
    assert answer["cpus_free"] == answer["cpus"] > 0
    assert answer["tracked"] is True


def awaited(what: str, holds: Callable[[], bool], seconds: float = 300.0) -> None:
    """Wait until something is the case."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"no sign of {what} within {seconds:.0f} s"
        time.sleep(0.05)


def statuses(sweep: Path) -> dict[int, str]:
    """The trials of a sweep under way, as their records say now."""
    found = {}
    for path in sorted(sweep.glob("trials/*/record.json")):
        try:
            found[int(path.parent.name)] = json.loads(path.read_text())["status"]
        except ValueError:  # it is being written
            continue
    return found
