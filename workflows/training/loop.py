"""The training loop: one for both stages. It is handed its engine, stage, checkpoints and reporter.

Progress is counted in images. What a step does is a function of (seed, images seen) and of the state alone, so going on
needs nothing but the newest checkpoint; with the same number of workers the result is the same to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from hvqd_model.codec.quantizer import CodebookStatistics, merge_statistics
from workflows.training import collectives
from workflows.training.alarms import Alarm, Watch, find_alarms
from workflows.training.engine import Engine, StepResult
from workflows.training.stage import Position, RunningMean, Stage, learning_rate_at, place_on

Record = dict[str, Any]


@dataclass
class TrainState:
    """All that a run needs to go on, besides the engine's state."""

    images_seen: int = 0
    history: list[Record] = field(default_factory=list)
    """Records {"images": n, metric: value, …} at log and evaluation intervals; no times, so that runs compare."""


class Checkpoints(Protocol):
    """Where states are kept."""

    def restore(self, engine: Engine) -> TrainState:
        """The newest complete state, loaded into the engine; a fresh one when there is none."""

    def save(self, engine: Engine, state: TrainState) -> None:
        """Keep a state: complete or absent, never half."""


class Reporter(Protocol):
    """Who is told how it goes; called on rank 0 only."""

    def progress(self, images_seen: int, total: int, note: str) -> None:
        """Called after every step."""

    def record(self, record: Record) -> None:
        """One line of the history."""

    def alarm(self, alarm: Alarm) -> None:
        """Something goes wrong; said once a run."""

    def picture(self, images_seen: int, png: bytes) -> None:
        """What an evaluation looked at."""


def train(engine: Engine, stage: Stage, checkpoints: Checkpoints, reporter: Reporter) -> TrainState:
    """Train to the end of the budget and return the final state, which has been checkpointed."""
    settings = stage.settings
    state = checkpoints.restore(engine)
    watch = stage.watch()
    find_alarms(state.history, watch)  # what was said before is not said again
    means = RunningMean()

    def keep(record: Record) -> None:
        _record(state, watch, reporter, engine, record)

    note = ""
    while state.images_seen < settings.images:
        before = state.images_seen
        started = stage.before_step(engine, before)
        if started:
            keep({"images": before, **started})
        result = _step(engine, stage, before, means)
        state.images_seen = before + settings.global_batch
        done = state.images_seen >= settings.images
        if not result.applied:
            note = "a step with non-finite gradients was left out"
        if done or _crossed(before, state.images_seen, settings.log_every_images):
            values = {**collectives.mean_metrics(means.take()), "gradient_norm": result.gradient_norm}
            values["learning_rate"] = learning_rate_at(before, settings)
            note = f"loss {values['loss']:.4f}" if "loss" in values else note
            keep({"images": state.images_seen, **values})
        if done or _crossed(before, state.images_seen, settings.evaluate_every_images):
            figures = _evaluate(engine, stage)
            consequences = stage.after_evaluation(figures)
            keep({"images": state.images_seen, **figures, **consequences})
            if engine.rank == 0 and stage.picture is not None:
                reporter.picture(state.images_seen, stage.picture)
        if engine.rank == 0:
            reporter.progress(min(state.images_seen, settings.images), settings.images, note)
        if done or _crossed(before, state.images_seen, settings.checkpoint_every_images):
            # The means of an unfinished interval are part of the history to come: a checkpoint ends the interval.
            means.take()
            checkpoints.save(engine, state)
    return state


def _crossed(before: int, after: int, interval: int) -> bool:
    return before // interval != after // interval


def _record(state: TrainState, watch: Watch, reporter: Reporter, engine: Engine, record: Record) -> None:
    completed = watch.completed(record)
    rounded = {name: value if name == "images" else float(f"{value:.6g}") for name, value in completed.items()}
    state.history.append(rounded)
    alarms = watch.see(rounded)
    if engine.rank == 0:
        reporter.record(rounded)
        for alarm in alarms:
            reporter.alarm(alarm)


def _evaluate(engine: Engine, stage: Stage) -> dict[str, float]:
    engine.module.eval()
    try:
        with torch.no_grad():
            return stage.evaluate(engine)
    finally:
        engine.module.train()


def _step(engine: Engine, stage: Stage, images_seen: int, means: RunningMean) -> StepResult:
    """One global batch: micro-batches, the optimizer's step, and what the stage does after it."""
    settings = stage.settings
    engine.module.train()
    merged: tuple[CodebookStatistics, ...] = ()
    for micro in range(settings.global_batch // (settings.micro_batch * engine.world)):
        offset = (micro * engine.world + engine.rank) * settings.micro_batch
        position = Position(images_seen, offset, settings.micro_batch, settings.global_batch)
        output = engine.forward(*place_on(engine.device, *stage.batch(position)))
        engine.backward(output.loss)
        means.add({"loss": output.loss, **output.metrics, **stage.after_micro_batch(output)})
        if merged:
            pairs = zip(merged, output.statistics, strict=True)
            merged = tuple(merge_statistics(one, other) for one, other in pairs)
        else:
            merged = output.statistics
    result = engine.step(learning_rate_at(images_seen, settings))
    if result.applied:
        # Once a step, not once a micro-batch: accumulation must not change the codebooks.
        means.add(stage.after_step(tuple(collectives.merge_over_ranks(part) for part in merged), images_seen))
    return result
