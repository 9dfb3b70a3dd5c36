"""The driver's side of training: Ray Train runs the workers, and what they report is shown and tracked here.

When a worker or its machine is lost the group starts again and goes on from our newest checkpoint; an error in the
program would only come again, and ends the job at once. Ray's own checkpoints and retries are not used.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.cluster import connect
from infra.errors import EnvironmentFailure, InputError
from infra.storage import Store
from workflows.artifacts import MANIFEST, Manifest, check_files, find_manifest, read_manifest, write_manifest
from workflows.context import Context
from workflows.requests import PARENTS, request_of
from workflows.training.alarms import Alarm
from workflows.training.mailbox import Mailbox
from workflows.training.worker import StageName, TrainingJob, train_worker

Work = Callable[[dict[str, Any]], None]

_POLL_SECONDS = 0.3
_HEALTH_CHECK_SECONDS = "0.5"  # Ray's 2 s would be spent several times in a stage's start and end
_PICTURES = "pictures/"
_LEAVE_OUT = ("checkpoints/", "ray/", _PICTURES)  # pictures are for the eye: no digest covers them


def train_vq(context: Context) -> Manifest:
    """Stage 1: the artifact `vq/` with model/, history.json and (not part of it) checkpoints/ and pictures/."""
    return _train(context, "vq")


def train_prior(context: Context) -> Manifest:
    """Stage 2: the artifact `prior/`."""
    return _train(context, "prior")


def _train(context: Context, stage: StageName) -> Manifest:
    root, folder = context.root, context.root.child(stage)
    commands = {"dataset": "hvqd data build", "codes": "hvqd encode"}
    parents = {kind: read_manifest(root.child(kind), commands[kind]) for kind in PARENTS[stage]}
    for kind, manifest in parents.items():
        check_files(root.child(kind), manifest)
    request = request_of(stage, context.config, parents)
    present = find_manifest(folder)
    if present is not None and present.request == request:
        check_files(folder, present)
        return present
    folder.delete(MANIFEST)  # what follows overwrites its files
    job = TrainingJob(stage, context.config, root, request)
    started = time.monotonic()
    records = run_job(job, context)
    seconds = time.monotonic() - started
    history = folder.read_json("history.json")
    digests = {kind: manifest.digest for kind, manifest in parents.items()}
    return write_manifest(
        folder,
        stage,
        request,
        digests,
        facts={"images": job.settings.images, **folder.read_json("summary.json"), **_last_figures(history)},
        provenance={
            "seconds": round(seconds, 1),
            "workers": context.config.compute.workers,
            "threads_per_worker": context.config.compute.threads_per_worker,
            "gpus_per_worker": context.config.compute.gpus_per_worker,
            "records_this_run": records,
        },
        leave_out=_LEAVE_OUT,
    )


def _last_figures(history: list[dict[str, float]]) -> dict[str, float]:
    """The last value of every validation figure."""
    return {name: value for record in history for name, value in record.items() if name.startswith("val_")}


def run_job(job: TrainingJob, context: Context, work: Work = train_worker) -> int:
    """Run the workers to the end of the budget; returns how many history records they sent.

    Args:
        work: what each worker does with {"job": …, "mailbox": …}; the overhead benchmark puts its stop-watch here.

    Raises:
        InputError, EnvironmentFailure: what a worker met, in its own words.
    """
    compute = job.config.compute
    connect(compute.address, compute.workers * compute.threads_per_worker)
    import ray

    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    desk = Desk(context, job.folder)
    records, restarts = 0, 0
    while True:
        failures: list[BaseException] = []

        def fit(failures: list[BaseException] = failures) -> None:
            try:
                _fit(job, mailbox, work)
            except BaseException as error:  # handed to the main thread below
                failures.append(error)

        # In a thread, because Ray Train takes Ctrl-C for itself on the main one; a daemon, so that it can be abandoned.
        thread = threading.Thread(target=fit, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            records += desk.show(ray.get(mailbox.take.remote()))
        if not failures:
            ray.kill(mailbox)
            return records
        if not _lost_a_worker(failures[0]):
            raise _explained(failures[0])
        if 0 <= compute.max_failures <= restarts:
            raise EnvironmentFailure(
                f"training lost a worker {restarts + 1} times, compute.max_failures allows {compute.max_failures}\n"
                "hint: see whether the machines have enough memory; the same command goes on from the last checkpoint"
            )
        restarts += 1
        context.progress.say(f"  a worker was lost; restart {restarts} goes on from the newest checkpoint")


def _fit(job: TrainingJob, mailbox: Any, work: Work) -> None:
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _HEALTH_CHECK_SECONDS)
    if job.config.compute.address is None:
        # Nobody takes a cluster of one's own away, and nobody reads its metrics: two processes less to wait for.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    import ray.train
    from ray.train.torch import TorchConfig

    compute = job.config.compute
    filesystem, path = job.folder.child("ray").arrow()
    name = f"run-{uuid.uuid4().hex[:12]}"  # new each time: what counts is in our checkpoints, not in Ray's snapshot
    try:
        _trainer(own_cluster=compute.address is None)(
            work,
            train_loop_config={"job": job, "mailbox": mailbox},
            torch_config=TorchConfig(backend="nccl" if compute.gpus_per_worker else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=compute.workers,
                use_gpu=compute.gpus_per_worker > 0,
                resources_per_worker={
                    "CPU": compute.threads_per_worker,
                    **({"GPU": compute.gpus_per_worker} if compute.gpus_per_worker else {}),
                },
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=ray.train.FailureConfig(max_failures=0),  # `run_job` decides what is worth a restart
            ),
        ).fit()
    finally:
        job.folder.child("ray").delete()


def _trainer(*, own_cluster: bool) -> Any:
    """Ray's trainer; on a cluster of one's own without its cleaner of placement groups.

    The cleaner asks the State API, which such a cluster does not have: it would be a process that never ends. Nothing
    is left there to clean but by a search, which stops trainings hard and gives back what they held (`tuning.search`).
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    if not own_cluster:
        return TorchTrainer

    class WithoutCleaner(TorchTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]

    return WithoutCleaner


@dataclass
class Desk:
    """Where what workers reported is passed to the user, to the tracker and to the stage's folder."""

    context: Context
    folder: Store
    """Of the stage on the root."""
    _alarms: set[str] = field(default_factory=set)
    """Those that the user knows of: a restarted worker raises again what came after its checkpoint."""

    def show(self, messages: list[tuple[str, Any]]) -> int:
        """Pass messages on, in order; returns how many of them were records."""
        records = 0
        for kind, content in messages:
            match kind:
                case "progress":
                    images_seen, total, note = content
                    self.context.progress.update(images_seen, total, "images", note)
                case "record":
                    records += 1
                    self._record(content)
                case "alarm":
                    self._alarm(content)
                case "picture":
                    self._picture(*content)
        return records

    def _record(self, record: dict[str, float]) -> None:
        if self.context.run is not None:
            values = {name: value for name, value in record.items() if name != "images"}
            self.context.run.log_metrics(values, step=int(record["images"]))
        if self.context.listen is not None:
            self.context.listen(record)

    def _alarm(self, alarm: Alarm) -> None:
        if alarm.title in self._alarms:
            return
        self._alarms.add(alarm.title)
        for line in alarm.text.splitlines():
            self.context.progress.say(f"  {line}")
        if self.context.run is not None:
            name = "_".join(alarm.title.replace(",", "").split())
            self.context.run.set_tags({f"hvqd.alarm.{name}": alarm.text})

    def _picture(self, images_seen: int, png: bytes) -> None:
        self.folder.write_bytes(f"{_PICTURES}latest.png", png)
        if self.context.run is not None:
            with tempfile.TemporaryDirectory(prefix="hvqd-picture-") as scratch:
                path = Path(scratch) / f"images-{images_seen:012d}.png"
                path.write_bytes(png)
                self.context.run.log_file(path, "pictures")


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
