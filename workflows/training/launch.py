"""The driver's side of training: Ray Train runs the workers, and what they report is shown and tracked here.

When a worker or its machine is lost the group starts again and goes on from our newest checkpoint; an error in the
program would only come again, and ends the job at once. Ray's own checkpoints and retries are not used.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from infra.cluster import connect
from infra.errors import EnvironmentFailure, InputError
from workflows.artifacts import (
    MANIFEST,
    Manifest,
    check_files,
    check_lineage,
    find_manifest,
    read_manifest,
    write_manifest,
)
from workflows.context import Context
from workflows.requests import PARENTS, request_of
from workflows.training.checkpoint import RECEIPT_SECONDS
from workflows.training.desk import PICTURES, TIMES, Desk
from workflows.training.elastic import Growth, bundle, choose_workers
from workflows.training.heap import HUGE_PAGES, gives_back
from workflows.training.mailbox import open_mailbox, passing_on
from workflows.training.patience import persist
from workflows.training.turn import LEASE, take_turn
from workflows.training.watchdog import Watchdog
from workflows.training.worker import RESIZE, STOP, StageName, TrainingJob, train_worker

Work = Callable[[dict[str, Any]], None]

_POLL_SECONDS = 0.3
_HEALTH_CHECK_SECONDS = "0.5"  # Ray's 2 s would be spent several times in a stage's start and end
_LEAVE_OUT = ("checkpoints/", "ray/", LEASE, TIMES, PICTURES)  # pictures are for the eye: no digest covers them


def train_vq(context: Context) -> Manifest:
    """Stage 1: the artifact `vq/` with model/, history.json and (not part of it) checkpoints/ and pictures/."""
    return _train(context, "vq")


def train_prior(context: Context) -> Manifest:
    """Stage 2: the artifact `prior/`."""
    return _train(context, "prior")


def _train(context: Context, stage: StageName) -> Manifest:
    root, folder = context.root, context.root.child(stage)
    commands = {"dataset": "hvqd data build", "vq": "hvqd train vq", "codes": "hvqd encode"}
    parents = {kind: read_manifest(root.child(kind), commands[kind]) for kind in PARENTS[stage]}
    for kind, manifest in parents.items():
        check_files(root.child(kind), manifest)
    if stage == "prior":
        # The prior takes its codebooks and conditions from these: codes of another tokenizer would mean nothing.
        around = {kind: read_manifest(root.child(kind), commands[kind]) for kind in PARENTS["codes"]}
        check_lineage({**around, **parents}, commands, of=("codes",))
    request = request_of(stage, context.config, parents)
    present = find_manifest(folder)
    if present is not None and present.request == request:
        check_files(folder, present)
        return present
    job = TrainingJob(stage, context.config, root, request)
    started = time.monotonic()
    with take_turn(folder, f"training {stage}", context.progress.say) as turn:
        folder.delete(MANIFEST)  # what follows overwrites its files
        desk = Desk(context, folder, request, turn)
        with passing_on(desk.pass_on):
            records = run_job(job, context, desk=desk)
            seconds = time.monotonic() - started
            desk.tell_times(job.settings.images)
            patience = context.config.compute.faults.patience_seconds
            complete = partial(_complete, job, desk, parents, records, seconds)
            return persist(complete, "write the manifest", folder, patience)


def _complete(job: TrainingJob, desk: Desk, parents: dict[str, Manifest], records: int, seconds: float) -> Manifest:
    """Write the artifact's manifest: the training counts from here on."""
    folder, compute = job.folder, job.config.compute
    history = folder.read_json("history.json")
    return write_manifest(
        folder,
        job.stage,
        job.request,
        {kind: manifest.digest for kind, manifest in parents.items()},
        facts={"images": job.settings.images, **folder.read_json("summary.json"), **_last_figures(history)},
        provenance={
            "seconds": round(seconds, 1),
            "workers": compute.most_workers,
            "threads_per_worker": compute.threads_per_worker,
            "gpus_per_worker": compute.gpus_per_worker,
            "records_this_run": records,
            "goodput": desk.goodput.summary(),
        },
        leave_out=_LEAVE_OUT,
    )


def _last_figures(history: list[dict[str, float]]) -> dict[str, float]:
    """The last value of every validation figure."""
    return {name: value for record in history for name, value in record.items() if name.startswith("val_")}


def run_job(job: TrainingJob, context: Context, work: Work = train_worker, desk: Desk | None = None) -> int:
    """Run the workers to the end of the budget; returns how many history records they sent.

    Args:
        work: what each worker does with {"job": …, "mailbox": …}; the overhead benchmark puts its stop-watch here.
        desk: who passes on what workers report.

    Raises:
        InputError, EnvironmentFailure: what a worker met, in its own words.
    """
    compute = job.config.compute
    cpus = compute.least_workers if compute.address is not None else compute.most_workers
    connect(compute.address, cpus * compute.threads_per_worker)
    import ray

    mailbox = open_mailbox()
    desk = desk or Desk(context, job.folder, job.request)
    restarts = 0
    try:
        while True:
            allowed = job.config.workers_for(job.settings)
            workers = choose_workers(allowed, compute, context.progress.say)
            failure = _Group(job, mailbox, work, workers, desk).run()
            if failure is None and desk.stopped != RESIZE:
                break
            if failure is None:
                context.progress.say("  there is room for more workers: all start again from the state just written")
                continue
            if not _lost_a_worker(failure):
                raise _explained(failure)
            if 0 <= compute.max_failures <= restarts:
                raise EnvironmentFailure(
                    f"training lost a worker {restarts + 1} times, compute.max_failures allows {compute.max_failures}\n"
                    "hint: see whether the machines have enough memory; the same command goes on from the last "
                    "checkpoint"
                )
            restarts += 1
            context.progress.say(f"  a worker was lost; restart {restarts} goes on from the newest checkpoint")
    except ray.exceptions.RayError as error:  # not of a worker: of what stands beside the driver
        place = compute.address or "this machine"
        raise EnvironmentFailure(
            f"the Ray cluster at {place} does not answer any more: {next(iter(str(error).splitlines()), '')}\n"
            "hint: see whether its head is alive; the same command goes on at the next one"
        ) from error
    finally:
        desk.keep_times()
    ray.kill(mailbox)
    return desk.records


class _Group:
    """One group of workers, from its start to its end."""

    def __init__(self, job: TrainingJob, mailbox: Any, work: Work, workers: int, desk: Desk) -> None:
        self.job, self.mailbox, self.work, self.workers, self.desk = job, mailbox, work, workers, desk
        self.compute = job.config.compute
        faults = self.compute.faults
        self.watchdog = Watchdog(faults.hang_seconds, faults.slow_factor, faults.patience_seconds + RECEIPT_SECONDS)
        self.growth = Growth(job.config.workers_for(job.settings), workers, self.compute)
        self.failures: list[BaseException] = []
        # In a thread, because Ray Train takes Ctrl-C for itself on the main one; a daemon, so that it can be abandoned.
        self.thread = threading.Thread(target=self._fit, daemon=True)
        # Not `join`: interrupted by a signal, it takes a thread that still runs for ended (CPython, bpo-45274).
        self.ended = threading.Event()

    def _fit(self) -> None:
        try:
            _fit(self.job, self.mailbox, self.work, self.workers)
        except BaseException as error:  # handed to the main thread
            self.failures.append(error)
        finally:
            self.ended.set()

    def run(self) -> BaseException | None:
        """What ended it, None when it did what it was asked.

        Raises:
            KeyboardInterrupt: the driver was asked to stop; workers had the grace period to write a last checkpoint.
        """
        import ray

        # Nobody waits here: the mailbox's process may still start, and what one caller asks is done in order.
        self.mailbox.take.remote()  # what an earlier group said last is of no use to this one's watchdog
        self.mailbox.give_order.remote(0)
        self.desk.begin(self.watchdog)
        self.thread.start()
        try:
            while not self.ended.wait(_POLL_SECONDS):
                self._look()
        except KeyboardInterrupt:
            self._stop()
            raise
        self.desk.show(ray.get(self.mailbox.take.remote()))
        return self.failures[0] if self.failures else None

    def _look(self) -> None:
        """Pass on what was reported, and see to what is hung, slow or could grow."""
        import ray

        self.desk.show(ray.get(self.mailbox.take.remote()))
        self.desk.keep_turn()
        for line in self.watchdog.slow():
            self.desk.warn(line)
        hung = self.watchdog.hung()
        if hung:
            self.desk.context.progress.say("\n".join(f"  {line}" for line in hung.splitlines()))
            for pulse in self.watchdog.pulses.values():
                ray.kill(pulse.actor)
            self.watchdog.pulses.clear()
        if self.watchdog.pulses and self.growth.target() is not None:
            self.mailbox.give_order.remote(RESIZE)

    def _stop(self) -> None:
        """Ask for a last checkpoint and wait for it, unless nothing has begun or the user loses patience."""
        import ray

        grace = self.compute.faults.grace_seconds
        if not self.desk.has_begun or grace == 0:
            return
        self.desk.context.progress.say(f"  stopping: workers have {grace:g} s to write a last checkpoint")
        deadline = time.monotonic() + grace
        self.mailbox.give_order.remote(STOP)
        with suppress(ray.exceptions.RayError):
            while not self.ended.wait(_POLL_SECONDS) and time.monotonic() < deadline and self.desk.stopped == 0:
                self.desk.show(ray.get(self.mailbox.take.remote(), timeout=_POLL_SECONDS * 10))


def _fit(job: TrainingJob, mailbox: Any, work: Work, workers: int) -> None:
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _HEALTH_CHECK_SECONDS)
    # It only writes to Ray's own log that a node is about to go, and is a process to wait for.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    if job.config.compute.address is None:
        os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")  # nobody reads those of a cluster of one's own
    import ray.train
    from ray.train.torch import TorchConfig

    _start_coordinator()
    compute = job.config.compute
    # Not on the root: what counts is in our checkpoints, so that Ray writes nothing but a mark, and need not fail when
    # the store is away. New each time: no snapshot of an earlier run is read.
    path, name = Path(tempfile.gettempdir(), "hvqd-ray"), f"run-{uuid.uuid4().hex[:12]}"
    try:
        _trainer()(
            work,
            train_loop_config={"job": job, "mailbox": mailbox},
            torch_config=TorchConfig(backend="nccl" if compute.gpus_per_worker else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=compute.gpus_per_worker > 0,
                resources_per_worker=bundle(compute),
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=str(path),
                failure_config=ray.train.FailureConfig(max_failures=0),  # `run_job` decides what is worth a restart
                worker_runtime_env={"env_vars": dict(HUGE_PAGES)} if gives_back(job.config, job.stage) else None,
            ),
        ).fit()
    finally:
        shutil.rmtree(path / name, ignore_errors=True)


def _start_coordinator() -> None:
    """Start the actor by which Ray Train asks an autoscaler for machines, beside its controller and not after it."""
    with suppress(ImportError):  # a detail of Ray's, which comes by itself in any case
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
            get_or_create_autoscaling_coordinator,
        )

        get_or_create_autoscaling_coordinator()


def _trainer() -> Any:
    """Ray's trainer without what no training here uses, each a process to wait for at the start.

    That is the provider of Ray Data's datasets, and the cleaner of placement groups: Ray frees a group itself when the
    driver's job has ended, and a search, which stops trainings hard within one job, gives back what they held
    (`tuning.search`). On a cluster of one's own the cleaner would ask a State API that is not there, and never end.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class Trainer(TorchTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            unused = (DatasetsCallback, PlacementGroupCleanerCallback)
            return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    return Trainer


def _causes(error: BaseException) -> list[BaseException]:
    """The errors that Ray wrapped, rank by rank, innermost last."""
    failures = getattr(error, "worker_failures", None) or {}
    found: list[BaseException] = []
    for rank in sorted(failures):
        cause: BaseException | None = failures[rank]
        while cause is not None:
            found.append(cause)
            inner = getattr(cause, "health_check_failure", None) or getattr(cause, "cause", None)
            cause = inner or cause.__cause__
    return found


def _lost_a_worker(error: BaseException) -> bool:
    """Whether a process or machine went away; its peers then fail with broken connections."""
    import ray.exceptions

    lost = (ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError, ray.exceptions.WorkerCrashedError)
    return any(isinstance(cause, (*lost, ray.exceptions.NodeDiedError)) for cause in _causes(error))


def _explained(error: BaseException) -> BaseException:
    """What a worker met, in its own words where they are meant for the user."""
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, InputError | EnvironmentFailure):
            return cause
        if isinstance(cause, ValueError) and "\nhint:" in str(cause):
            return InputError(str(cause))
    return RuntimeError(f"a training worker failed: {causes[-1]!r}").with_traceback(None) if causes else error
