"""What a sweep has done so far, kept on the root a file a trial: the truth from which everything else is rebuilt.

Each change of a trial is one whole file written (`trials/NNNN/record.json`), so that a sweep killed at any moment goes
on from what these files say. Ray Tune's own snapshot is not read back: it is a pickle, which only a trusted store may
be asked for, and it knows nothing that the records don't.

One process writes at a time (it holds the sweep's lease); inside it several threads may.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from infra.errors import InputError
from infra.secrets import mask
from infra.storage import Store
from tuning.records import Rung, Status, TrialRecord
from tuning.searcher import Searcher
from tuning.space import Drawn, SearchSpace
from workflows.loading import masked, to_yaml

TRIALS = "trials"
RECORD = "record.json"
CONFIGURATION = "trial.yaml"
ENDED: frozenset[Status] = frozenset({"finished", "stopped", "failed", "refused"})

Listener = Callable[[TrialRecord], None]


def trial_folder(store: Store, number: int) -> Store:
    """The folder of a sweep's trial."""
    return store.child(TRIALS, f"{number:04d}")


def read_trials(store: Store) -> list[TrialRecord]:
    """The records of a sweep by number; folders without one are leftovers of a crash.

    Raises:
        InputError: a record is damaged (named).
    """
    found = []
    for name in store.child(TRIALS).children():
        folder = store.child(TRIALS, name)
        try:
            found.append(TrialRecord.from_json(folder.read_json(RECORD)))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"the record {folder.url}/{RECORD} is damaged: {' '.join(str(error).split())}\n"
                f"hint: delete the folder {folder.url}; its trial is then drawn anew"
            ) from error
    return sorted(found, key=lambda record: record.number)


class Ledger:
    """The trials of one sweep while it runs."""

    def __init__(self, store: Store, space: SearchSpace, searcher: Searcher, root_url: str) -> None:
        """Go on from what the store has; the searcher is told all of it.

        Args:
            store: the sweep's folder.
            root_url: the root that a trial's configuration names.
        """
        self.store, self.space = store, space
        self._searcher, self._root_url = searcher, root_url
        self._lock = threading.RLock()
        self._since: dict[int, float] = {}
        self._listeners: list[Listener] = []
        self._open = True
        self._records = {record.number: record for record in read_trials(store)}
        for record in self._records.values():
            searcher.tell(record)
        self._waiting = [record.number for record in self._records.values() if record.status not in ENDED]

    # ---- reading ----

    @property
    def records(self) -> list[TrialRecord]:
        """All trials by number."""
        with self._lock:
            return [self._records[number] for number in sorted(self._records)]

    def __getitem__(self, number: int) -> TrialRecord:
        with self._lock:
            return self._records[number]

    @property
    def interrupted(self) -> list[TrialRecord]:
        """Those that had begun when an earlier session ended, and have not been handed out since."""
        with self._lock:
            return [self._records[number] for number in self._waiting]

    def listen(self, listener: Listener) -> None:
        """Call `listener` with a trial's record after each change."""
        self._listeners.append(listener)

    # ---- writing ----

    def next_trial(self, most: int) -> TrialRecord | None:
        """The trial to run next: one that was interrupted, or a new one while there are fewer than `most`.

        Returns:
            None when the sweep has enough trials, or the space has no more.
        """
        with self._lock:
            if not self._open:
                return None
            if self._waiting:
                return self._handed_out(self._waiting.pop(0))
            number = max(self._records, default=-1) + 1
            if len(self._records) >= most:
                return None
            drawn = self._searcher.propose(number)
            if drawn is None:
                return None
            self._begin(number, drawn)
            return self._handed_out(number)

    def _handed_out(self, number: int) -> TrialRecord:
        self._since[number] = time.monotonic()
        self._change(number, facts={**self._records[number].facts, "started": _now()})
        return self._records[number]

    def _begin(self, number: int, drawn: Drawn) -> None:
        config = self.space.check(drawn).model_copy(update={"root": self._root_url})
        folder = trial_folder(self.store, number)
        folder.delete()  # what a crash left of a trial that has no record
        folder.write_bytes(CONFIGURATION, to_yaml(masked(config), documented=False).encode())
        self._put(TrialRecord(number, drawn, self.space.settings(drawn)))

    def started(self, number: int) -> None:
        """The trial's workers are being started."""
        with self._lock:
            self._change(number, status="running")

    def stepped(self, number: int) -> None:
        """Its workers train: the first of their steps in this session has been heard of."""
        with self._lock:
            facts = self._records[number].facts
            if self._records[number].status == "running" and facts.get("first_step", 0.0) < facts["started"]:
                self._change(number, facts={**facts, "first_step": _now()})

    def rung(self, number: int, images: int, metrics: Mapping[str, float], *, stopped: bool = False) -> None:
        """What was measured after so many images, and whether the trial ends with it; what is known already is kept."""
        with self._lock:
            record = self._records[number]
            rungs = record.rungs
            if images > record.images:
                rungs = (*rungs, Rung(images, dict(metrics)))
            self._change(number, rungs=rungs, **({"status": "stopped"} if stopped else {}))

    def ended(self, number: int, status: Status, error: str | None = None) -> None:
        """How the trial ended; the searcher learns of it."""
        with self._lock:
            if self._open:
                kept = {**self._records[number].facts, "ended": _now()}
                self._change(number, status=status, error=None if error is None else mask(error), facts=kept)
                self._searcher.tell(self._records[number])
                self._since.pop(number, None)

    def close(self) -> None:
        """Take no more changes: the session has been interrupted."""
        with self._lock:
            self._open = False

    def _change(self, number: int, **changes: Any) -> None:
        if not self._open:
            return
        record = self._records[number]
        now = time.monotonic()
        seconds = record.seconds + now - self._since.get(number, now)
        if number in self._since:
            self._since[number] = now
        self._put(replace(record, seconds=round(seconds, 2), **changes))

    def _put(self, record: TrialRecord) -> None:
        trial_folder(self.store, record.number).write_json(RECORD, record.as_json())
        self._records[record.number] = record
        for listener in self._listeners:
            listener(record)


def _now() -> float:
    """Seconds since 1970, for people and for what a sweep cost; nothing is decided by it."""
    return round(time.time(), 2)


def best_of(space: SearchSpace, records: Iterable[TrialRecord]) -> TrialRecord | None:
    """The best trial by the first metric: of those that were trained to the end, else of those that went furthest."""
    metric = space.metrics[0]
    known = [(record, value) for record in records if (value := record.value(metric.name)) is not None]
    if not known:
        return None
    furthest = max((record.status == "finished", record.images) for record, _ in known)
    sign = 1 if metric.direction == "min" else -1
    whole = [pair for pair in known if (pair[0].status == "finished", pair[0].images) == furthest]
    return min(whole, key=lambda pair: sign * pair[1])[0]
