"""The sweep in MLflow: a run for the sweep, a child for each trial, with curves as they come and truthful ends.

All of it is written by one thread of the sweep's driver, in order, so that a slow or absent store holds up nothing:
what it cannot take now is sent when it answers again. The records on the root are the truth; `sync` tells the store
whatever an earlier session could not.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from infra.errors import EnvironmentFailure
from infra.tracking import KEY_TAG, Status, TrackedRun, Tracker
from tuning.ledger import ENDED, best_of
from tuning.records import TrialRecord
from tuning.space import SearchSpace
from workflows.artifacts import digest_of

log = logging.getLogger(__name__)

END_TAG = "hvqd.trial.end"
"""finished, stopped early, failed: …, or interrupted."""
TRIAL_TAG = "hvqd.trial"
SWEEP_TAG = "hvqd.sweep"

_RETRY_SECONDS = 2.0
_STATUS: Mapping[str, Status] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "refused": "FAILED"}
"""KILLED is MLflow's word for what others ended."""


class SweepRuns:
    """Tells the tracking store about one sweep."""

    def __init__(self, tracker: Tracker, sweep: str, space: SearchSpace, params: Mapping[str, object]) -> None:
        """Open the sweep's run.

        Args:
            sweep: URL of the sweep's folder.
            params: how it is searched.
        """
        self._tracker, self._sweep, self._space = tracker, sweep, space
        key = digest_of({"sweep": sweep})
        self.parent = tracker.run(
            key, f"tune {space.name}", params=params, tags={SWEEP_TAG: sweep, "hvqd.step": f"tune {space.job}"}
        )
        self._runs: dict[int, TrackedRun] = {}
        self._ended: dict[int, TrialRecord] = {}
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def key(self, number: int) -> str:
        """What makes a run that of a trial."""
        return digest_of({"sweep": self._sweep, "trial": number})

    # ---- what is told ----

    def changed(self, record: TrialRecord) -> None:
        """A trial began, reached a rung or ended."""
        if record.status == "running" and not record.rungs:
            self._queue.put(lambda: self._begin(record))
        if record.status in ENDED:
            self._queue.put(lambda: self._end(record))

    def heard(self, number: int, line: Mapping[str, float]) -> None:
        """A line of a trial's history."""
        values = {name: float(value) for name, value in line.items() if not name.endswith("images")}
        images = next(int(value) for name, value in line.items() if name.endswith("images"))
        self._queue.put(lambda: self._run(number).log_metrics(values, step=images))

    def interrupted(self, record: TrialRecord) -> None:
        """The session ends before the trial has."""
        self._queue.put(lambda: self._close(record, "interrupted", "KILLED"))

    def sync(self, records: list[TrialRecord]) -> None:
        """Tell the store of ends that it has not heard of."""
        self._queue.put(lambda: self._sync(records))

    @property
    def backlog(self) -> int:
        """How many things the store has not been told yet, apart from the one under way."""
        return self._queue.qsize()

    def finish(self, status: Status, seconds: float) -> bool:
        """End the sweep's run when all is told, and wait for that.

        Returns:
            Whether the store took everything in this time.
        """
        self._queue.put(lambda: self.parent.end(status))
        self._queue.put(None)
        self._thread.join(seconds)
        self._given_up.set()
        return not self._thread.is_alive()

    # ---- the thread ----

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            while True:
                try:
                    task()
                    break
                except EnvironmentFailure as error:
                    log.warning("the tracking store is away: %s", error)
                    if self._given_up.wait(_RETRY_SECONDS):
                        return
                except Exception:
                    log.exception("the tracking store refused something; the records on the root have it")
                    break

    def _run(self, number: int, record: TrialRecord | None = None) -> TrackedRun:
        if number not in self._runs:
            self._runs[number] = self._tracker.run(
                self.key(number),
                f"trial {number}",
                parent=self.parent.run_id,
                params={} if record is None else {**record.drawn, **record.settings},
                tags={SWEEP_TAG: self._sweep, TRIAL_TAG: str(number), END_TAG: "under way"},
            )
        return self._runs[number]

    def _begin(self, record: TrialRecord) -> None:
        self._run(record.number, record)

    def _end(self, record: TrialRecord) -> None:
        match record.status:
            case "stopped":
                said = f"stopped early after {record.images} images"
            case "failed" | "refused":
                said = f"{record.status}: {record.error}"
            case _:
                said = record.status
        run = self._run(record.number, record)
        for rung in record.rungs:
            run.log_metrics(rung.metrics, step=rung.images)
        self._close(record, said, _STATUS[record.status])
        self._ended[record.number] = record
        best = best_of(self._space, self._ended.values())
        if best is not None:
            metric = self._space.metrics[0].name
            self.parent.log_metrics({f"best_{metric}": best.value(metric) or 0.0}, step=len(self._ended))
            self.parent.set_tags({"hvqd.best_trial": str(best.number)})

    def _close(self, record: TrialRecord, said: str, status: Status) -> None:
        run = self._run(record.number, record)
        run.set_tags({END_TAG: said})
        run.end(status)

    def _sync(self, records: list[TrialRecord]) -> None:
        known = {run.tags.get(KEY_TAG): run for run in self._tracker.runs(f"tags.`{SWEEP_TAG}` = '{self._sweep}'")}
        for record in records:
            if record.status not in ENDED:
                continue
            run = known.get(self.key(record.number))
            self._ended[record.number] = record
            if run is None or run.status != _STATUS[record.status]:
                self._runs.pop(record.number, None)
                self._end(record)


def wait(condition: Callable[[], bool], seconds: float, poll_seconds: float = 0.2) -> bool:
    """Whether the condition came to hold in this time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(poll_seconds)
    return True


def params_of(**values: Any) -> dict[str, object]:
    """Parameters of the sweep's run, those that are not set left out."""
    return {name: value for name, value in values.items() if value is not None}
