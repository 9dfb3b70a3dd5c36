"""One rank of a training job, as Ray Train runs it: builds its stage and engine, trains, and exports on rank 0."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.config import PriorConfig
from hvqd_model.export import load_model, save_model
from hvqd_model.prior.latents import LatentStatistics
from hvqd_model.prior.prior import HierarchicalPrior
from hvqd_model.randomness import derive_key
from infra.storage import Store
from workflows.artifacts import read_manifest
from workflows.config import RunConfig, TrainSettings
from workflows.data.batches import CodeTable, ImageTable
from workflows.data.conditions import ConditionSource
from workflows.data.latents import statistics_of
from workflows.training.alarms import Alarm, find_alarms
from workflows.training.checkpoint import StoreCheckpoints
from workflows.training.compiled import compile_blocks, should_compile
from workflows.training.heap import shape_heap
from workflows.training.judges import build_judges
from workflows.training.ledger import Ledger
from workflows.training.loop import Record, StepBack, Stopped, train
from workflows.training.mailbox import passing_on
from workflows.training.meters import Meters, meters_for
from workflows.training.patience import persist
from workflows.training.precision import choose_precision
from workflows.training.prior_stage import PriorStage
from workflows.training.retention import Retention
from workflows.training.stage import Companion
from workflows.training.vq_stage import VQStage
from workflows.training.watchdog import Heart, Pulse

StageName = Literal["vq", "prior"]
STOP, RESIZE = 1, 2
"""Orders: keep the state and end; the second is followed by a start with another number of workers."""
_PROGRESS_SECONDS = 0.5


@dataclass(frozen=True)
class TrainingJob:
    """All that a worker needs; small, and free of secrets."""

    stage: StageName
    config: RunConfig
    root: Store
    request: str
    """What the training answers; see `workflows.requests`."""

    @property
    def settings(self) -> TrainSettings:
        """The stage's optimisation."""
        return self.config.vq.train if self.stage == "vq" else self.config.prior.train

    @property
    def folder(self) -> Store:
        """The stage's folder on the root."""
        return self.root.child(self.stage)


@dataclass
class MailReporter:
    """Sends progress to the driver through a mailbox actor, without waiting for it."""

    mailbox: Any
    ledger: Ledger | None = None
    """Whose accounts are sent along."""
    batch: int = 0
    """Images a step."""
    meters: Meters | None = None
    """Who tells the exporter."""
    _sent: float = 0.0
    _first: int | None = None

    def progress(self, images_seen: int, total: int, note: str) -> None:
        """At most twice a second."""
        if self.meters is not None:
            self.meters.step(images_seen, total)
        now = time.monotonic()
        first = self._first is None
        if self._first is None:
            self._first = images_seen - self.batch
        if first or now - self._sent >= _PROGRESS_SECONDS or images_seen >= total:
            self._sent = now
            self.mailbox.put.remote(("progress", (images_seen, total, note)))
            if self.ledger is not None:
                self.mailbox.put.remote(("times", (images_seen, self._first, dict(self.ledger.seconds))))

    def record(self, record: Record) -> None:
        """One line of the history."""
        if self.meters is not None:
            self.meters.loss = record.get("loss", self.meters.loss)
        self.mailbox.put.remote(("record", record))

    def alarm(self, alarm: Alarm) -> None:
        """Something goes wrong."""
        self.mailbox.put.remote(("alarm", alarm))

    def catch_up(self, history: list[Record], alarms: list[Alarm]) -> None:
        """What was told before the checkpoint gone on from."""
        self.mailbox.put.remote(("past", (history, alarms)))

    def picture(self, images_seen: int, png: bytes) -> None:
        """A picture to keep."""
        self.mailbox.put.remote(("picture", (images_seen, png)))


def train_worker(loop_config: dict[str, Any]) -> None:
    """The function that Ray Train calls on every worker."""
    import ray.train

    job: TrainingJob = loop_config["job"]
    torch.set_num_threads(job.config.compute.threads_per_worker)
    shape_heap(job.config, job.stage)
    device = ray.train.torch.get_device()
    from workflows.training.zero import ZeroEngine

    mailbox, ledger = loop_config["mailbox"], Ledger()
    rank, actor = ray.train.get_context().get_world_rank(), ray.get_runtime_context().current_actor
    meters = meters_for(job.config.compute.address, job.stage, job.root.url, rank)

    def beat(pulse: Pulse) -> None:
        mailbox.put.remote(("pulse", pulse))
        meters.publish()

    with Heart(beat, rank, ledger, actor), passing_on(lambda line: mailbox.put.remote(("said", line))):
        faults = job.config.compute.faults
        stage = persist(lambda: build_stage(job, device), "read the inputs", job.root, faults.patience_seconds)
        compiling, why = should_compile(job.config.compute.compile, device, job.settings.zero_stage)
        if compiling:
            blocks = compile_blocks(stage.objective, strict=job.config.compute.compile == "on")
            print(f"{job.stage}: {blocks} blocks are compiled, {why}")  # noqa: T201 - the worker's log
        engine = ZeroEngine(stage.objective, job.settings, device)
        checkpoints = checkpoints_of(job, stage.companion)
        meters.checkpoint_age = checkpoints.age_seconds
        try:
            state = train(
                engine,
                stage,
                checkpoints,
                MailReporter(mailbox, ledger, job.settings.global_batch, meters),
                step_back=StepBack(
                    faults.non_finite_steps, faults.setbacks, faults.setback_factor, checkpoints.step_back
                ),
                pending_order=Orders(mailbox).pending,
                ledger=ledger,
            )
        except Stopped as stopped:
            checkpoints.finish()
            if rank == 0:
                ray.get(mailbox.put.remote(("stopped", stopped.order)))
            return
        with ledger.time("checkpoint"):
            checkpoints.finish()
        weights = engine.export()
        if engine.rank == 0:
            call = partial(export, job, stage, weights, state.history)
            persist(call, "write the model", job.root, faults.patience_seconds)


def checkpoints_of(job: TrainingJob, companion: Companion | None) -> StoreCheckpoints:
    """The stage's checkpoints as the settings want them."""
    keep = job.config.compute.keep
    return StoreCheckpoints(
        job.folder.child("checkpoints"),
        job.request,
        Retention(job.settings.keep_checkpoints, keep.best, keep.every_images),
        companion,
        background=keep.background,
        patience_seconds=job.config.compute.faults.patience_seconds,
    )


@dataclass
class Orders:
    """What the driver asks for, looked up without waiting."""

    mailbox: Any
    _question: Any = None
    _asked: float = 0.0

    def pending(self) -> int:
        """The newest answer that is there, 0 for none."""
        import ray

        now = time.monotonic()
        if self._question is None:
            if now - self._asked < _PROGRESS_SECONDS:
                return 0
            self._question, self._asked = self.mailbox.order.remote(), now
        ready, _ = ray.wait([self._question], timeout=0)
        if not ready:
            return 0
        order = int(ray.get(ready[0]))
        self._question = None
        return order


def build_stage(job: TrainingJob, device: torch.device) -> VQStage | PriorStage:
    """The job's stage with fresh weights, the same on every rank.

    Raises:
        InputError: a named file with weights of the feature network cannot be used.
    """
    config = job.config
    precision, reason = choose_precision(job.settings.precision, device)
    print(f"{job.stage}: {precision}, {reason}; process {os.getpid()} on {device}")  # noqa: T201 - the worker's log
    torch.manual_seed(derive_key(config.seed, job.stage, "weights"))
    if job.stage == "vq":
        manifest = read_manifest(job.root.child("dataset"), "hvqd data build")
        images = [ImageTable.open(job.root.child("dataset"), manifest, split) for split in ("train", "val")]
        model = HierarchicalVQ(config.vq_config)
        judges = build_judges(config.vq.train, config.seed, precision, device)
        return VQStage(model, config.vq.train, config.seed, precision, images[0], images[1], judges)
    manifest = read_manifest(job.root.child("codes"), "hvqd encode")
    statistics = statistics_of(manifest) if config.prior.model.noise == "gaussian" else None
    codes = [
        CodeTable.open(job.root.child("codes"), manifest, split, with_latents=statistics is not None)
        for split in ("train", "val")
    ]
    prior, codes = build_prior(job.root, config, codes, device, statistics)
    return PriorStage(prior, config.prior.train, config.seed, precision, codes[0], codes[1])


def build_prior(
    root: Store,
    config: RunConfig,
    codes: list[CodeTable],
    device: torch.device,
    statistics: Sequence[LatentStatistics] | None = None,
) -> tuple[HierarchicalPrior, list[CodeTable]]:
    """A prior with fresh weights for the root's tokenizer and conditions, and the codes with their conditions.

    Args:
        codes: of the training and the validation split.
        device: where captions are embedded.
        statistics: of the latents, for a Gaussian prior.

    Raises:
        InputError: the data has none of a condition that the prior shall be told.
    """
    with tempfile.TemporaryDirectory(prefix="hvqd-model-") as scratch:
        vq = load_model(root.child("vq", "model").download_folder(Path(scratch)))
    assert isinstance(vq, HierarchicalVQ)
    dataset, names = read_manifest(root.child("dataset"), "hvqd data build"), config.prior.model.conditions
    source = ConditionSource(root.child("dataset"), dataset, vq.config, names, config.prior.text_encoder, str(device))
    more = [source.columns(split, table) for split, table in zip(("train", "val"), codes, strict=True)]
    prior_config = PriorConfig(
        **config.prior.model.model_dump(),
        grids=vq.config.grids,
        codebook_sizes=vq.config.codebook_sizes,
        code_dim=vq.config.code_dims,
        **source.described(more[0]),
    )
    told = [replace(table, more=columns) for table, columns in zip(codes, more, strict=True)]
    return HierarchicalPrior(prior_config, vq.codebooks, statistics), told


def export(
    job: TrainingJob, stage: VQStage | PriorStage, weights: dict[str, torch.Tensor], history: list[Record]
) -> None:
    """Write the model, the history and a summary to the stage's folder; the driver completes the artifact."""
    model = stage.model
    state = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    parameters = sum(state[name].numel() for name, _ in model.named_parameters())  # under ZeRO-3 they are empty here
    with tempfile.TemporaryDirectory(prefix="hvqd-model-") as scratch:
        save_model(model, Path(scratch), state)
        job.folder.child("model").upload_folder(Path(scratch))
    if job.stage == "prior" and "text" in job.config.prior.model.conditions:
        dataset = read_manifest(job.root.child("dataset"), "hvqd data build")
        source = ConditionSource(
            job.root.child("dataset"), dataset, job.config.vq_config, ("text",), job.config.prior.text_encoder
        )
        source.keep_text(job.folder.child("text"))
    job.folder.write_json("history.json", history)
    alarms = [alarm.as_json() for alarm in find_alarms(history, stage.watch())]
    job.folder.write_json("summary.json", {"parameters": parameters, "alarms": alarms})
