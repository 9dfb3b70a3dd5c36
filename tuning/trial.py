"""One trial: the trainings that `hvqd train` would run with its `trial.yaml`, and what the search is told of them.

A trial has a folder of its own on the root; what it shares with the others (the dataset; for job `prior` also the
tokenizer and the codes) lies where the root has it. It runs in a process without a CPU of its own, beside its workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import yaml

from infra.errors import InputError
from infra.storage import Store
from tuning.ledger import CONFIGURATION, RECORD, trial_folder
from tuning.records import TrialRecord
from tuning.reported import PICTURE_FIGURES, Job
from tuning.space import SearchSpace
from workflows.artifacts import Manifest
from workflows.config import RunConfig
from workflows.context import Context
from workflows.loading import config_from

SHARED: Mapping[Job, tuple[str, ...]] = {
    "vq": ("dataset",),
    "prior": ("dataset", "vq", "codes"),
    "joint": ("dataset",),
}
"""The artifacts that all trials of a job use."""

RungJudge = Callable[[int], "tuple[int, Mapping[str, float]] | None"]
"""Judges pictures of the first state after so many images: (its images, figures); None when there is none to judge."""
Report = Callable[[int, Mapping[str, float]], None]
"""Called with (images, figures) at each rung; it may end the trial by raising SystemExit."""
Mail = Callable[[str, Any], None]
"""Called with what the user and the tracker may like to see: ("progress", (images, total)), ("record", {…}), …"""

_PROGRESS_SECONDS = 1.0


@dataclass(frozen=True)
class Place:
    """Where a sweep's trials run; small, and free of secrets."""

    root: Store
    store: Store
    """The sweep's folder."""
    space: SearchSpace

    @property
    def shared(self) -> Mapping[str, Store]:
        """Where the artifacts that all trials use lie: on the root, but for codes with the latents that only this sweep
        needs (those of the root stay what its own prior was trained on)."""
        own = {"codes": self.store} if self.space.needs_latents else {}
        return {kind: own.get(kind, self.root).child(kind) for kind in SHARED[self.space.job]}

    def trial_root(self, number: int) -> Store:
        """What a trial sees as its root."""
        return trial_folder(self.store, number).sharing(**self.shared)

    def configuration(self, number: int) -> RunConfig:
        """The trial's configuration, from its file."""
        return config_from(yaml.safe_load(trial_folder(self.store, number).read_bytes(CONFIGURATION)))


@dataclass
class _Watcher:
    """Hears a training's records; its evaluations become rungs."""

    place: Place
    config: RunConfig
    report: Report
    mail: Mail
    reported: int
    """Images of the last rung that the search knows."""
    judge: RungJudge | None = None
    """Who has pictures drawn at a rung, where they are what is sought."""
    prefix: str = ""
    """Before the names of records that are of a stage the budget does not count."""
    figures: dict[str, float] = field(default_factory=dict)
    """The newest value of each validation figure."""
    _sent: float = 0.0

    def say(self, text: str) -> None:
        """A line for the user."""
        self.mail("said", text.strip())

    def update(self, done: float, total: float, unit: str, note: str = "") -> None:
        """How far the step under way is."""
        now = time.monotonic()
        if now - self._sent >= _PROGRESS_SECONDS or done >= total:
            self._sent = now
            self.mail("progress", (done, total, unit))

    def hear(self, record: Mapping[str, float]) -> None:
        """A line of a training's history."""
        self.mail("record", {self.prefix + name: value for name, value in record.items()})
        found = {name: float(value) for name, value in record.items() if name.startswith("val_")}
        self.figures |= found
        images = int(record["images"])
        if not found or self.prefix or not self.reported < images < self.place.space.images:
            return
        if self.judge is not None:
            if not any(self.reported < rung <= images for rung in self.place.space.rungs):
                return  # pictures cost more than the other figures
            judged = self.judge(images)
            if judged is None:
                return
            images, pictures = judged
            self.figures |= pictures
        self.reported = images
        self.report(images, self.measured())

    def measured(self) -> dict[str, float]:
        """Figures and metrics so far; those that are not finite are left out."""
        found = self.place.space.measured(self.figures, self.config)
        return {name: value for name, value in found.items() if math.isfinite(value)}


def run_trial(place: Place, number: int, report: Report, mail: Mail) -> None:
    """Run a trial, or go on with it, and report its rungs; the last one when its artifacts are complete.

    Raises:
        InputError, EnvironmentFailure: what ends the trial, in its own words.
    """
    config = place.configuration(number)
    known = TrialRecord.from_json(trial_folder(place.store, number).read_json(RECORD))
    watcher = _Watcher(place, config, report, mail, known.images)
    context = Context(config, place.trial_root(number), watcher, None, watcher.hear)
    if place.space.judges_pictures:
        from tuning.pictures import judge_rung

        watcher.judge = partial(judge_rung, context, place.space)
    match place.space.job:
        case "vq":
            trained = [_train(context, "vq")]
        case "prior":
            trained = [_train(context, "prior")]
        case "joint":
            trained = _train_both(context, watcher)
    for manifest in trained:
        watcher.figures |= {name: value for name, value in manifest.facts.items() if name.startswith("val_")}
    if any(metric.figures & set(PICTURE_FIGURES) for metric in place.space.metrics):
        from tuning.pictures import judge_pictures

        watcher.figures |= judge_pictures(context)
    measured = watcher.measured()
    missing = sorted(metric.name for metric in place.space.metrics if metric.name not in measured)
    if missing:
        found = ", ".join(sorted(measured)) or "none"
        raise InputError(
            f"the trial's figures do not give {', '.join(missing)}: it reported {found}\n"
            "hint: see whether its codebooks ever started, and whether a figure is not finite"
        )
    report(place.space.images, measured)


def _train(context: Context, stage: str) -> Manifest:
    from workflows.training.launch import train_prior, train_vq

    return train_vq(context) if stage == "vq" else train_prior(context)


def _train_both(context: Context, watcher: _Watcher) -> list[Manifest]:
    """A tokenizer, its codes, and a prior on them; the rungs are the prior's."""
    from workflows.encode import encode_dataset

    watcher.prefix = "vq_"
    tokenizer = _train(context, "vq")
    encode_dataset(context)
    watcher.prefix = ""
    return [tokenizer, _train(context, "prior")]
