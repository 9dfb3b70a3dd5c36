"""A search of thousands of trials, simulated: what its driver does for each event, in time and memory.

Everything but Ray is the product's: the searcher, the ledger on a disk, ASHA, the bookkeeper that Tune calls, and the
tracker with MLflow on sqlite. Trials answer from recorded curves (`record_curves.py`), two hundred side by side.
"""

from __future__ import annotations

import heapq
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import yaml
from runner import REPOSITORY, Benchmark, Figures, Target, main

sys.path.insert(0, str(REPOSITORY))  # the recorder shares its code with other benchmarks

from infra.storage import open_store
from infra.tracking import open_tracker
from tests.benchmarks.record_curves import SPACE, read_table
from tuning.ledger import Ledger, best_of
from tuning.loading import space_from
from tuning.records import TrialRecord
from tuning.search import _bookkeeper, _scheduler, _search
from tuning.searcher import make_searcher
from tuning.space import SearchSpace
from tuning.tracking import SweepRuns

_TRIALS, _AT_ONCE = 2_000, 200
_QUARTERS = 4


def endless_space() -> SearchSpace:
    """The recorded grid's space with a learning rate of any value: a grid would end after 225 trials."""
    values = yaml.safe_load(SPACE.read_text())
    values["parameters"]["vq.train.learning_rate"] = {"log_uniform": [0.0005, 0.008]}
    return space_from(values, str(SPACE))


def resident_mib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass
class Spent:
    """What a quarter of the trials took."""

    events: int
    driver_seconds: float
    """Processor time of the thread that Tune calls."""
    tracker_seconds: float
    """Processor time of everything else: the thread that tells MLflow."""
    resident_mib: float
    """When the quarter had ended."""


def simulate(folder: Path, trials: int, at_once: int, seed: int) -> list[Spent]:
    """A whole sweep, in quarters."""
    space, curves, chance = endless_space(), read_table(), random.Random(seed)
    root = open_store(str(folder))
    store = root.child("tuning", "scale")
    ledger = Ledger(store, space, make_searcher("random", space, seed), root.url)
    runs = SweepRuns(open_tracker(None, "hvqd", root), store.url, space, {})
    ledger.listen(runs.changed)
    numbers: dict[str, int] = {}
    search, keeper, scheduler = (
        _search(ledger, trials, numbers),
        _bookkeeper(ledger, numbers),
        _scheduler("asha", space, ledger),
    )
    queue: list[tuple[float, int, SimpleNamespace]] = []
    info = {"iteration": 0, "trials": []}

    def begin(now: float) -> None:
        trial = SimpleNamespace(trial_id=f"t{len(numbers)}")
        if search.suggest(trial.trial_id) == "FINISHED":
            return
        scheduler.on_trial_add(None, trial)
        keeper.on_trial_start(trial=trial, **info)
        heapq.heappush(queue, (now + chance.uniform(0.5, 1.5), 0, trial))

    found, events, ended = [], 0, 0
    begun = (time.thread_time(), time.process_time())
    for _ in range(at_once):
        begin(0.0)
    while queue:
        now, place, trial = heapq.heappop(queue)
        number = numbers[trial.trial_id]
        rung = curves[number % len(curves)].rungs[place]
        runs.heard(number, {"images": rung.images, **rung.metrics})
        result = {"images": rung.images, "figures": dict(rung.metrics), "objective": rung.metrics["cost"]}
        stop = scheduler.on_trial_result(None, trial, result) == "STOP"
        whole = rung.images >= space.images
        keeper.on_trial_result(trial=trial, result={**result, "done": stop}, **info)
        events += 1
        if not stop and not whole:
            heapq.heappush(queue, (now + chance.uniform(0.5, 1.5), place + 1, trial))
            continue
        scheduler.on_trial_complete(None, trial, result)
        keeper.on_trial_complete(trial=trial, **info)
        ended += 1
        begin(now)
        if ended % (trials // _QUARTERS) == 0:
            while runs.backlog:
                time.sleep(0.01)
            driver, whole_process = time.thread_time() - begun[0], time.process_time() - begun[1]
            found.append(Spent(events, driver, whole_process - driver, resident_mib()))
            events, begun = 0, (time.thread_time(), time.process_time())
    assert runs.finish("FINISHED", 600)
    assert len(ledger.records) == trials and best_of(space, ledger.records) is not None
    return found


def _scale(quick: bool, seed: int) -> Figures:
    trials, at_once = (200, 40) if quick else (_TRIALS, _AT_ONCE)
    with tempfile.TemporaryDirectory(prefix="hvqd-scale-") as folder:
        before = resident_mib()
        quarters = simulate(Path(folder), trials, at_once, seed)
        began = time.process_time()
        space = endless_space()
        store = open_store(folder).child("tuning", "scale")
        resumed = Ledger(store, space, make_searcher("random", space, seed), folder)
        _scheduler("asha", space, resumed)
        resume = time.process_time() - began
    first, last = quarters[0], quarters[-1]
    return {
        "events": sum(each.events for each in quarters),
        "driver_ms_an_event": 1e3 * sum(q.driver_seconds for q in quarters) / sum(q.events for q in quarters),
        "driver_ms_an_event_last_quarter": 1e3 * last.driver_seconds / last.events,
        "driver_growth": (last.driver_seconds / last.events) / (first.driver_seconds / first.events),
        "tracker_ms_an_event": 1e3 * sum(q.tracker_seconds for q in quarters) / sum(q.events for q in quarters),
        "tracker_growth": (last.tracker_seconds / last.events) / (first.tracker_seconds / first.events),
        "resident_mib": last.resident_mib,
        "mib_a_thousand_trials": 1e3 * (last.resident_mib - first.resident_mib) / (0.75 * trials),
        "mib_over_start": last.resident_mib - before,
        "resume_seconds": resume,
    }


def _proposals(quick: bool, seed: int) -> Figures:
    """What TPE takes for a proposal when it knows so many trials, two hundred more being under way."""
    space, curves = endless_space(), read_table()
    sizes = (100, 200) if quick else (500, 1_000, 2_000)
    random_draws, searcher = make_searcher("random", space, seed), make_searcher("tpe", space, seed)
    found, known = {}, 0
    for size in sizes:
        while known < size + _AT_ONCE:
            drawn = random_draws.propose(known)
            assert drawn is not None
            curve = curves[known % len(curves)]
            searcher.tell(replace(curve, number=known, drawn=drawn) if known < size else TrialRecord(known, drawn, {}))
            known += 1
        began = time.process_time()
        for number in range(10):
            assert searcher.propose(10_000 + 100 * size + number) is not None
        found[f"tpe_proposal_ms_knowing_{size}"] = 100 * (time.process_time() - began)
    values = list(found.values())
    return {**found, "tpe_growth": values[-1] / values[0]}


BENCHMARK = Benchmark(
    name="search_scale",
    what=(
        f"A simulated search of {_TRIALS:,} trials, {_AT_ONCE} at once, under ASHA: each event is a rung's figures as "
        "Tune hands them to the driver, which asks the scheduler, writes the trial's record to the disk, has MLflow "
        "(sqlite) told, and proposes the next trial. Processor time an event, and the memory of the process. `growth` "
        "compares the last quarter of the trials with the first: if an event's cost grew linearly with the trials so "
        "far it would be about 7, as the middles of the quarters lie; for TPE (2,000 known against 500) it would be 4. "
        "Ray Tune's own loop is not part of it."
    ),
    parts={"scale": _scale, "proposals": _proposals},
    targets=(
        Target("driver_growth", "<=", 7),
        Target("tracker_growth", "<=", 7),
        Target("tpe_growth", "<=", 4.4),
        Target("mib_a_thousand_trials", "<=", 200),
    ),
    repeats=1,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
