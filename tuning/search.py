"""The engine: Ray Tune runs the trials, each a process that drives a Ray Train + DeepSpeed run with its own workers.

Facts of Ray 2.60 that shape this module:

- A trial's workers are not part of its own resources, so the number of trials at once is capped by hand.
- A trial that the scheduler stops is killed. The placement group of its workers stays, because Ray keeps a group until
  both the process that made it and the whole job are gone; `Caretaker` gives such groups back.
- Tune's clock `training_iteration` restarts with the trial, so rungs are counted in images.
- Tune's own snapshot is not used (see `tuning.ledger`): every session builds its searcher and scheduler from the
  records.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from infra.cluster import free, own_job, reservations
from infra.errors import EnvironmentFailure, InputError
from infra.secrets import mask
from tuning.identity import SchedulerName
from tuning.ledger import Ledger
from tuning.space import SearchSpace
from tuning.trial import Place, run_trial

_IMAGES, _OBJECTIVE = "images", "objective"
_TRIAL_MEMORY_BYTES = 256 << 20
"""What a trial's own process asks of the cluster: it needs no CPU, and Tune refuses to ask for nothing."""
_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # figures come late, and a trial that fails reports why instead
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # nobody reads Tune's snapshot
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",  # a trial is drawn when it can start: the searcher knows most by then
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths in settings are the user's
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass
class Engine:
    """One session's use of Ray Tune."""

    place: Place
    ledger: Ledger
    scheduler: SchedulerName
    trials: int
    """How many the sweep shall have in all."""
    at_once: int
    mailbox: Any
    """The actor where trials leave what the user and the tracker may like to see."""

    def run(self) -> None:
        """Run all that is left, to the end; called in a thread of its own, because Tune takes Ctrl-C on the main one.

        Raises:
            Exception: what made Tune give up; a trial that fails does not.
        """
        os.environ.update(_SETTINGS)
        from ray import tune

        left = len(self.ledger.interrupted) + max(0, self.trials - len(self.ledger.records))
        if left == 0:
            return
        self.place.store.child("ray").delete()  # what a killed command left: Tune's snapshots are pickles
        filesystem, path = self.place.store.child("ray").arrow()
        compute = self.place.space.resolved_base.compute
        train = tune.with_parameters(_drive, place=self.place, mailbox=self.mailbox)
        numbers: dict[str, int] = {}
        try:
            tune.Tuner(
                tune.with_resources(train, {"memory": _TRIAL_MEMORY_BYTES}),
                tune_config=tune.TuneConfig(
                    num_samples=left,
                    max_concurrent_trials=self.at_once,
                    search_alg=_search(self.ledger, self.trials, numbers),
                    scheduler=_scheduler(self.scheduler, self.place.space, self.ledger),
                    trial_dirname_creator=lambda trial: str(trial.trial_id),
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=path,
                    storage_filesystem=filesystem,
                    verbose=0,
                    callbacks=[_bookkeeper(self.ledger, numbers)],
                    # A trial's own failures come back as results; what is left are processes and machines that died.
                    failure_config=tune.FailureConfig(max_failures=compute.max_failures),
                ),
            ).fit()
        finally:
            self.place.store.child("ray").delete()


def _drive(config: dict[str, Any], place: Place, mailbox: Any) -> None:
    """A trial's process: what Tune calls with the trial's number."""
    from ray import tune

    number = int(config["number"])
    space = place.space

    def report(images: int, figures: Mapping[str, float]) -> None:
        result: dict[str, Any] = {_IMAGES: images, "figures": dict(figures)}
        objective = figures.get(space.metrics[0].name)
        if objective is not None and math.isfinite(objective):
            result[_OBJECTIVE] = objective
        tune.report(result)

    def mail(kind: str, content: Any) -> None:
        mailbox.put.remote((kind, (number, content)))

    try:
        run_trial(place, number, report, mail)
    except Exception as error:  # said to the ledger in words; Tune would try again what can only fail again
        tune.report({"failed": reason(error)})


def reason(error: BaseException) -> str:
    """Why a trial failed, without the remedy, which speaks of a command that nobody typed."""
    words = " ".join(mask(str(error)).split("\nhint:")[0].split())
    return words if isinstance(error, InputError | EnvironmentFailure) else f"{type(error).__name__}: {words}"


def _search(ledger: Ledger, most: int, numbers: dict[str, int]) -> Any:
    """Tune's view of the ledger: each suggestion is the next trial's number."""
    from ray.tune.search import Searcher

    class FromLedger(Searcher):  # type: ignore[misc]
        def __reduce__(self) -> Any:
            """Tune keeps a snapshot of its parts; this one is on the root already."""
            return object, ()

        def suggest(self, trial_id: str) -> Any:
            record = ledger.next_trial(most)
            if record is None:
                return Searcher.FINISHED
            numbers[trial_id] = record.number
            return {"number": record.number}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            """The bookkeeper hears of it with more detail."""

        def save(self, checkpoint_path: str) -> None:
            """The ledger is on the root."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing is restored from Tune's files."""

    return FromLedger()


def _bookkeeper(ledger: Ledger, numbers: Mapping[str, int]) -> Any:
    """Writes what Tune sees into the ledger."""
    from ray import tune

    class Bookkeeper(tune.Callback):  # type: ignore[misc]
        def __reduce__(self) -> Any:
            """As for the searcher."""
            return object, ()

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            ledger.started(numbers[trial.trial_id])

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            number = numbers[trial.trial_id]
            if "failed" in result:
                ledger.ended(number, "failed", str(result["failed"]))
                return
            images = int(result[_IMAGES])
            whole = images >= ledger.space.images
            ledger.rung(number, images, result["figures"], stopped=bool(result.get("done")) and not whole)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            number = numbers[trial.trial_id]
            record = ledger[number]
            if record.status == "failed":
                return
            ledger.ended(number, "stopped" if record.status == "stopped" else "finished")

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            error = trial.get_pickled_error()
            said = "its process died" if error is None else f"its process died: {mask(str(error)).splitlines()[0]}"
            ledger.ended(numbers[trial.trial_id], "failed", said)

    return Bookkeeper()


def _scheduler(name: SchedulerName, space: SearchSpace, ledger: Ledger) -> Any:
    """Tune's scheduler, which knows the rungs that earlier sessions recorded."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if name == "none":
        return FIFOScheduler()
    metric, sign = space.metrics[0], -1.0 if space.metrics[0].direction == "min" else 1.0
    scheduler = ASHAScheduler(
        time_attr=_IMAGES,
        metric=_OBJECTIVE,
        mode=metric.direction,
        max_t=space.images,
        grace_period=space.min_images,
        reduction_factor=space.budget.reduction_factor,
        stop_last_trials=False,  # a trial that reached the whole ends by itself, when its artifacts are complete
    )
    for record in ledger.records:
        earlier = SimpleNamespace(trial_id=f"of an earlier session: {record.number}")
        for rung in record.rungs:
            if (value := record.value(metric.name, rung.images)) is not None and metric.name in rung.metrics:
                scheduler._brackets[0].on_result(earlier, rung.images, sign * value)
    return scheduler


class Caretaker:
    """Gives back what stopped trials still hold."""

    def __init__(self) -> None:
        self._job = own_job()

    def tidy(self) -> int:
        """Free the placement groups of this job whose makers are gone; returns how many there were."""
        left = [found for found in reservations() if found.job == self._job and found.maker_is_dead]
        for reservation in left:
            free(reservation)
        return len(left)


def dead_reservations() -> list[tuple[str, Callable[[], None]]]:
    """What jobs that have ended still hold on the connected cluster: a line each, and what gives it back."""
    found = [reservation for reservation in reservations() if reservation.job_is_dead]
    return [(f"{held.cpus:g} CPUs for job {held.job}, which has ended", partial(free, held)) for held in found]


def in_thread(run: Callable[[], None]) -> tuple[threading.Thread, list[BaseException]]:
    """A daemon that runs the engine, and the list that will hold what made it give up."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as error:  # handed to the main thread
            failures.append(error)

    thread = threading.Thread(target=guarded, name="tune", daemon=True)
    thread.start()
    return thread, failures
