"""A sweep from its first trial to `best.yaml`: begun, or gone on with where it stood.

On the root a sweep is `tuning/NAME/`: `sweep.json` (what it is), `space.json`, `trials/NNNN/` (record, configuration
and artifacts of each trial), `warm.json` (trials of a former sweep that it began with), and at the end `best.yaml` and
`result.json`.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

from infra.cluster import available, connect, offered
from infra.errors import EnvironmentFailure, InputError
from infra.lease import Lease, hold
from infra.secrets import mask
from infra.storage import Store, open_store
from infra.tracking import Tracker
from tuning.identity import SWEEP, SweepIdentity, check_identity, keep_identity
from tuning.ledger import CONFIGURATION, ENDED, TRIALS, Ledger, best_of, read_trials, trial_folder
from tuning.records import TrialRecord, dump_records, parse_records
from tuning.report import write_sweep_report
from tuning.search import Caretaker, Engine, dead_reservations, in_thread
from tuning.searcher import Searcher, make_searcher
from tuning.space import SearchSpace
from tuning.table import SweepTable
from tuning.tracking import SweepRuns, params_of, wait
from tuning.trial import Place
from workflows.config import ComputeSettings, RunConfig
from workflows.context import Progress
from workflows.pipeline import Pipeline, artifact, state_of
from workflows.requests import PARENTS
from workflows.training.mailbox import open_mailbox

FOLDER = "tuning"
LEASE = "lease"
SPACE, WARM, BEST, RESULT = "space.json", "warm.json", "best.yaml", "result.json"

_POLL_SECONDS = 0.3
_TIDY_SECONDS = 1.0
_LEASE_SECONDS = 60.0
_EXTEND_SECONDS = 15.0
_LAST_WRITES_SECONDS = 20.0
"""After so long the workers of a trial that was stopped write nothing more."""
_FREE_SECONDS = 30.0
_TOLD_SECONDS = 120.0
_TOLD_IF_INTERRUPTED_SECONDS = 10.0


@dataclass(frozen=True)
class SweepRequest:
    """What the user asks for."""

    identity: SweepIdentity
    root: Store
    name: str
    trials: int
    """How many trials the sweep shall have in all."""
    at_once: int | None = None
    """How many run side by side; None: as many as the cluster has CPUs and GPUs for."""
    must_exist: bool = False
    """Whether the sweep must have begun before."""
    force: bool = False
    """Go on although space or code differ."""
    warm_from: str | None = None
    """Folder or URL of a former sweep whose trials the searcher shall know."""

    @property
    def store(self) -> Store:
        """The sweep's folder."""
        return self.root.child(FOLDER, self.name)

    @property
    def space(self) -> SearchSpace:
        """The sweep's space."""
        return self.identity.space

    def as_plan(self) -> dict[str, Any]:
        """What would be done, for programs."""
        return {
            "sweep": self.store.url,
            "space": self.space.name,
            "job": self.space.job,
            "searcher": self.identity.searcher,
            "scheduler": self.identity.scheduler,
            "trials": self.trials,
            "rungs": list(self.space.rungs),
            "done": len([record for record in read_trials(self.store) if record.status in ENDED]),
        }

    def as_text(self) -> str:
        """What would be done, for people."""
        plan = self.as_plan()
        rungs = ", ".join(f"{images:,}" for images in self.space.rungs)
        return (
            f"would run {self.trials - plan['done']} of {self.trials} trials of job {self.space.job} into "
            f"{plan['sweep']}, proposed by {plan['searcher']}, compared by {plan['scheduler']} after {rungs} images"
        )


@dataclass(frozen=True)
class SweepFolder:
    """What a root has of a sweep, begun or over."""

    store: Store
    space: SearchSpace
    records: list[TrialRecord]

    def write_report(self) -> str:
        """Write the report and say where it is."""
        return write_sweep_report(self.store, self.space, self.records, self.store.child(TRIALS))


def read_sweep(root: Store, name: str) -> SweepFolder:
    """A sweep of the root, by its name.

    Raises:
        InputError: there is none, or it is damaged.
    """
    store = root.child(FOLDER, name)
    try:
        space = SearchSpace.model_validate(store.read_json(SPACE))
    except (FileNotFoundError, NotADirectoryError) as error:
        names = ", ".join(root.child(FOLDER).children()) or "none"
        raise InputError(f"no such sweep: {store.url} (there: {names})\nhint: give the sweep's --root") from error
    except ValueError as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"{store.url}/{SPACE} cannot be read: {said}\nhint: another version of hvqd wrote it; use that one"
        ) from error
    return SweepFolder(store, space, read_trials(store))


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found and cost."""

    folder: str
    counts: dict[str, int]
    """Trials by how they ended."""
    images: int
    """Trained on, all trials together."""
    seconds: float
    """Time of the trials, added up."""
    best: TrialRecord | None
    metric: str
    best_file: str | None
    """A complete configuration, for --config."""
    refused: dict[str, int]
    """Draws of this session that were impossible, by what refused them."""
    cpus: tuple[float, float] = (0.0, 0.0)
    """CPUs of the cluster that were free when all trials had ended, and how many it has."""
    told: bool = True
    """Whether the tracking store has all of it."""
    further: dict[str, str] = field(default_factory=dict)
    """Other files, by name."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        best = None
        if self.best is not None:
            best = {
                "trial": self.best.number,
                self.metric: self.best.value(self.metric),
                "drawn": dict(self.best.drawn),
            }
        return {
            "sweep": self.folder,
            "trials": self.counts,
            "images": self.images,
            "seconds": round(self.seconds, 1),
            "best": best,
            "best_config": self.best_file,
            "refused": self.refused,
            "cpus_free": self.cpus[0],
            "cpus": self.cpus[1],
            "tracked": self.told,
            **self.further,
        }

    def as_text(self) -> str:
        """For people."""
        counts = ", ".join(f"{count} {word}" for word, count in self.counts.items())
        lines = [f"sweep     {self.folder}: {counts}; {self.images:,} images in {self.seconds:,.0f} s of trials"]
        if self.best is not None:
            drawn = " ".join(f"{name}={value}" for name, value in self.best.drawn.items())
            lines += [f"best      trial {self.best.number}, {self.metric} {self.best.value(self.metric):.5g}: {drawn}"]
            lines += [f"use it    hvqd run --config {self.best_file}"]
        lines += [f"{name:<9} {value}" for name, value in self.further.items()]
        return "\n".join(lines)


def run_sweep(request: SweepRequest, tracker: Tracker, progress: Progress, stream: TextIO) -> SweepResult:
    """Run a sweep, or go on with it, to its end.

    Args:
        progress: told of the steps that come before the first trial.
        stream: where the table goes.

    Raises:
        InputError: an impossible space, a sweep of this name that differs, or more workers than the cluster has.
        EnvironmentFailure: the store, the tracking store or the cluster is away.
    """
    space, store = request.space, request.store
    searcher = make_searcher(request.identity.searcher, space, request.identity.seed)
    _check_possible(request)
    if request.must_exist and not store.exists(SWEEP):
        there = ", ".join(name for name in request.root.child(FOLDER).children()) or "none"
        raise InputError(
            f"there is no sweep to go on with at {store.url} (sweeps of this root: {there})\n"
            "hint: without --resume the same command begins it"
        )
    with hold(store.child(LEASE), f"the sweep {request.name}", seconds=_LEASE_SECONDS, patience_seconds=0) as lease:
        # All that may refuse comes before the first word is written: a refused command leaves no sweep behind.
        check_identity(store, request.identity, force=request.force)
        former = _former(request)
        for _ in _shared(request):
            pass
        at_once = _capacity(space.resolved_base.compute, request.at_once)
        lease.extend(_LEASE_SECONDS)
        keep_identity(store, request.identity, force=request.force)
        store.write_json(SPACE, space.model_dump(mode="json"))
        if former:
            store.write_bytes(WARM, dump_records(former).encode())
        for record in former:
            searcher.tell(replace(record, number=-1 - record.number))
        for kind, config, root in _shared(request):
            Pipeline(config, root, tracker, progress).run_alone(kind)
        lease.extend(_LEASE_SECONDS)
        ledger = Ledger(store, space, searcher, request.root.url)
        return _Session(request, ledger, searcher, tracker, lease, at_once, stream).run()


def _check_possible(request: SweepRequest) -> None:
    """Raises InputError when no draw is possible, before anything is made."""
    make_searcher("random", request.space, request.identity.seed).propose(0)


def _capacity(compute: ComputeSettings, asked: int | None) -> int:
    """How many trials run at once on the cluster, which this process is connected to afterwards."""
    if not isinstance(compute.workers, int):
        raise InputError(
            f"compute.workers must be one number in a sweep, so that trials compare: {compute.workers}\n"
            "hint: --set compute.workers=2"
        )
    cpus = compute.workers * compute.threads_per_worker
    gpus = compute.workers * compute.gpus_per_worker
    connect(compute.address, cpus * (asked or 1))
    found = offered()
    if compute.address is not None:
        for _, give_back in dead_reservations():  # or the first trial waits for ever for what a killed job holds
            give_back()
    fits = int(found.get("CPU", 0) // cpus)
    if gpus:
        fits = min(fits, int(found.get("GPU", 0) // gpus))
    wanted = asked or 1
    if fits < wanted:
        raise InputError(
            f"{wanted} trials at once ask for {cpus * wanted} CPUs and {gpus * wanted} GPUs, the cluster has "
            f"{found.get('CPU', 0):g} and {found.get('GPU', 0):g}\n"
            "hint: a smaller --max-concurrent, compute.workers or compute.gpus_per_worker"
        )
    if compute.address is None:
        fits = min(fits, max(1, (os.cpu_count() or 1) // cpus)) if asked is None else fits
    return asked or fits


def _former(request: SweepRequest) -> list[TrialRecord]:
    """The trials of a former sweep that the searcher begins with, from the sweep's own copy once there is one.

    Raises:
        InputError: none of them fits the space.
    """
    try:
        return parse_records(request.store.read_bytes(WARM).decode())
    except FileNotFoundError:
        if request.warm_from is None:
            return []
    former = open_store(request.warm_from)
    trials = [record for record in read_trials(former) if record.status in ("finished", "stopped")]
    fitting = [record for record in trials if request.space.contains(dict(record.drawn))]
    if not fitting:
        raise InputError(
            f"none of the {len(trials)} trials that ended at {former.url} fits the space {request.space.name}\n"
            "hint: name the folder of a sweep over the same parameters (ROOT/tuning/NAME), or leave --warm-from out"
        )
    return fitting


def _shared(request: SweepRequest) -> Iterator[tuple[str, RunConfig, Store]]:
    """What all trials share and the root does not have yet: its kind, and by which configuration it is made where.

    Raises:
        InputError: the root has it, made with other settings.
    """
    space, place = request.space, Place(request.root, request.store, request.space)
    config = space.resolved_base.model_copy(update={"root": request.root.url})
    for kind, lies in place.shared.items():
        root = request.root
        if own := lies.url != artifact(root, kind).url:
            root = request.store.sharing(**{name: root.child(name) for name in PARENTS[kind]})
            model = config.prior.model.model_copy(update={"noise": "gaussian"})  # its codes have latents
            config = config.model_copy(update={"prior": config.prior.model_copy(update={"model": model})})
        state, _ = state_of(kind, config, root)
        if state == "stale" and not own:
            raise InputError(
                f"{lies.url} was made with other settings than those of the space\n"
                "hint: --config ROOT/config.yaml takes the root's own settings, another --root leaves them alone"
            )
        if state != "current":
            yield kind, config, root


@dataclass
class _Session:
    """One session's work on a sweep."""

    request: SweepRequest
    ledger: Ledger
    searcher: Searcher
    tracker: Tracker
    lease: Lease
    at_once: int
    stream: TextIO
    _ended: deque[tuple[float, int]] = field(default_factory=deque)
    """(time, number) of trials whose checkpoints are still there."""
    _next: dict[str, float] = field(default_factory=dict)

    def run(self) -> SweepResult:
        identity, space = self.request.identity, self.request.space
        params = params_of(
            space=space.name,
            job=space.job,
            searcher=identity.searcher,
            scheduler=identity.scheduler,
            seed=identity.seed,
            images=space.images,
            trials=self.request.trials,
            trials_at_once=self.at_once,
            warm_from=self.request.warm_from,
        )
        runs = SweepRuns(self.tracker, self.request.store.url, space, params)
        runs.sync(self.ledger.records)
        table = SweepTable(space, self.request.trials, self.stream)
        table.known(self.ledger.records)
        for record in self.ledger.records:
            self._watch(record)  # an earlier session may have ended before it dropped their checkpoints
        self._greet(table)
        for listener in (runs.changed, table.changed, self._watch):
            self.ledger.listen(listener)
        mailbox = open_mailbox()
        place = Place(self.request.root, self.request.store, space)
        engine = Engine(place, self.ledger, identity.scheduler, self.request.trials, self.at_once, mailbox)
        try:
            self._drive(engine, mailbox, runs, table)
        except BaseException as error:
            self.ledger.close()
            table.finish()
            for record in self.ledger.records:
                if record.status == "running":
                    runs.interrupted(record)
            interrupted = isinstance(error, KeyboardInterrupt)
            runs.finish("KILLED" if interrupted else "FAILED", _TOLD_IF_INTERRUPTED_SECONDS)
            raise
        table.finish()
        cpus = self._all_free()
        self._drop_checkpoints(now=float("inf"))
        result = self._result(cpus)
        told = runs.finish("FINISHED", _TOLD_SECONDS)
        if not told:
            table.say("the tracking store did not take everything; the same command tells it the rest")
        return replace(result, told=told)

    def _greet(self, table: SweepTable) -> None:
        records = self.ledger.records
        if records:
            counts = ", ".join(f"{count} {word}" for word, count in Counter(r.status for r in records).items())
            going_on = len(self.ledger.interrupted)
            more = f"; {going_on} go on from their checkpoints" if going_on else ""
            table.say(f"going on with {self.request.store.url}: {counts}{more}")
        table.say(
            f"{self.request.trials} trials, {self.at_once} at once, up to {self.request.space.images:,} images each"
        )

    def _drive(self, engine: Engine, mailbox: Any, runs: SweepRuns, table: SweepTable) -> None:
        """Until the engine's thread has ended: pass on what trials say, and keep things in order."""
        import ray

        caretaker = Caretaker()
        thread, failures = in_thread(engine.run)
        running = True
        while running:
            thread.join(_POLL_SECONDS)
            running = thread.is_alive()
            for kind, (number, content) in ray.get(mailbox.take.remote()):
                match kind:
                    case "progress":
                        if content[2] == "images":
                            self.ledger.stepped(number)
                        table.progress(number, *content)
                    case "record":
                        runs.heard(number, content)
                    case "said":
                        table.say(f"trial {number:>3}  {content}")
            if self._is_time("tidy", _TIDY_SECONDS):
                caretaker.tidy()
            if self._is_time("extend", _EXTEND_SECONDS):
                self.lease.extend(_LEASE_SECONDS)
            self._drop_checkpoints(time.monotonic())
            table.refresh()
        ray.kill(mailbox)
        if failures:
            raise _in_words(failures[0])

    def _is_time(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now < self._next.get(what, 0.0):
            return False
        self._next[what] = now + seconds
        return True

    def _watch(self, record: TrialRecord) -> None:
        if record.status in ENDED:
            self._ended.append((time.monotonic() + _LAST_WRITES_SECONDS, record.number))

    def _drop_checkpoints(self, now: float) -> None:
        """A trial that has ended goes on no more; its model and history stay."""
        while self._ended and self._ended[0][0] <= now:
            _, number = self._ended.popleft()
            for stage in ("vq", "prior"):
                trial_folder(self.request.store, number).child(stage, "checkpoints").delete()

    def _all_free(self) -> tuple[float, float]:
        """CPUs that are free and that there are, when nothing of the sweep's holds any (or after patience)."""
        caretaker = Caretaker()
        total = offered().get("CPU", 0.0)
        own = self.request.space.resolved_base.compute.address is None

        def is_free() -> bool:
            return caretaker.tidy() == 0 and (not own or available().get("CPU", 0.0) >= total)

        wait(is_free, _FREE_SECONDS)
        return available().get("CPU", 0.0), total

    def _result(self, cpus: tuple[float, float]) -> SweepResult:
        records, store, space = self.ledger.records, self.request.store, self.request.space
        best, metric = best_of(space, records), space.metrics[0].name
        best_file = None
        if best is not None:
            best_file = f"{store.url}/{BEST}"
            about = f"# Trial {best.number}, the best of {len(records)} of {store.url}: {metric} {best.value(metric)}\n"
            configuration = trial_folder(store, best.number).read_bytes(CONFIGURATION)
            store.write_bytes(BEST, about.encode() + configuration)
        report = write_sweep_report(store, space, records, store.child(TRIALS))
        result = SweepResult(
            folder=store.url,
            counts=dict(Counter(record.status for record in records)),
            images=sum(record.images for record in records),
            seconds=sum(record.seconds for record in records),
            best=best,
            metric=metric,
            best_file=best_file,
            refused=dict(self.searcher.refused),
            cpus=cpus,
            further={"report": report},
        )
        store.write_json(RESULT, result.as_json())
        return result


def _in_words(error: BaseException) -> BaseException:
    """What Tune wrapped, where it is meant for the user."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError | EnvironmentFailure):
            return cause
        cause = cause.__cause__ or cause.__context__
    return RuntimeError(f"the search gave up: {mask(str(error))}")
