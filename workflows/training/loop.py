"""The training loop: one for both stages. It is handed its engine, stage, checkpoints and reporter.

Progress is counted in images. What a step does is a function of (seed, images seen) and of the state alone, so going on
needs nothing but the newest checkpoint; with the same number of workers the result is the same to the bit.

A step that is not finite is left out. A run of them is a sign that the weights have gone where no step leads out of:
the training steps back to the newest checkpoint and goes on with a lower learning rate, a few times at most.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from hvqd_model.codec.quantizer import CodebookStatistics, merge_statistics
from infra.errors import InputError
from workflows.training import collectives
from workflows.training.alarms import Alarm, find_alarms
from workflows.training.engine import Engine, StepResult
from workflows.training.feed import Feed
from workflows.training.ledger import Ledger
from workflows.training.stage import Position, RunningMean, Stage, learning_rate_at

log = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclass
class TrainState:
    """All that a run needs to go on, besides the engine's state."""

    images_seen: int = 0
    history: list[Record] = field(default_factory=list)
    """Records {"images": n, metric: value, …} at log and evaluation intervals; no times, so that runs compare."""
    setbacks: list[Record] = field(default_factory=list)
    """Each time the training stepped back after a run of non-finite steps: {"images": where, "to": where from now}."""
    interval: dict[str, Any] = field(default_factory=dict)
    """What an unfinished logging interval has gathered, by rank; empty where checkpoints are due, which end it."""


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

    def catch_up(self, history: list[Record], alarms: list[Alarm]) -> None:
        """What a resumed training told before: whoever listened may have died before hearing the last of it."""

    def picture(self, images_seen: int, png: bytes) -> None:
        """What an evaluation looked at."""


@dataclass(frozen=True)
class StepBack:
    """What to do about a run of non-finite steps."""

    after_steps: int
    """So many in a row."""
    at_most: int
    """Times; then the training stops with the reason."""
    factor: float
    """Of the learning rate, each time."""
    restore: Callable[[Engine, int | None], TrainState]
    """The newest state (before so many images), loaded; one of 0 images when there is none."""


class Stopped(Exception):  # noqa: N818 - it is an answer, not an error
    """The training was asked to stop, and its state has been kept."""

    def __init__(self, order: int) -> None:
        super().__init__(f"stopped by order {order}")
        self.order = order


def train(
    engine: Engine,
    stage: Stage,
    checkpoints: Checkpoints,
    reporter: Reporter,
    *,
    step_back: StepBack | None = None,
    pending_order: Callable[[], int] | None = None,
    ledger: Ledger | None = None,
) -> TrainState:
    """Train to the end of the budget and return the final state, which has been checkpointed.

    Args:
        step_back: what to do about a run of non-finite steps; without it they are left out one by one.
        pending_order: asked on rank 0 after every step; anything but 0 keeps the state and ends the training.
        ledger: where the time is booked.

    Raises:
        Stopped: an order was given.
        InputError: steps were not finite, again and again.
    """
    return _Training(engine, stage, checkpoints, reporter, step_back, pending_order, ledger or Ledger()).run()


class _Training:
    """One call of `train`."""

    def __init__(
        self,
        engine: Engine,
        stage: Stage,
        checkpoints: Checkpoints,
        reporter: Reporter,
        step_back: StepBack | None,
        pending_order: Callable[[], int] | None,
        ledger: Ledger,
    ) -> None:
        self.engine, self.stage, self.checkpoints, self.reporter = engine, stage, checkpoints, reporter
        self.step_back, self.pending_order, self.ledger = step_back, pending_order, ledger
        self.settings = stage.settings
        self.feed = Feed(stage.batch, engine.device)
        self.means = RunningMean()
        self.left_out = 0
        """Steps in a row that were not finite."""
        self.note = ""

    def run(self) -> TrainState:
        with self.ledger.time("restart"):
            self._go_on_from(self.checkpoints.restore(self.engine))
        self.began_at = self.state.images_seen
        try:
            while self.state.images_seen < self.settings.images:
                self._advance()
        finally:
            self.feed.close()
        return self.state

    def _go_on_from(self, state: TrainState) -> None:
        self.state = state
        self.kept_at = state.images_seen
        self.watch = self.stage.watch()
        alarms = find_alarms(state.history, self.watch)  # what was said before is not said again
        if state.history and self.engine.rank == 0:
            self.reporter.catch_up(list(state.history), alarms)
        if state.interval:
            self.means.load(state.interval["means"], self.engine.rank, self.engine.world)
            self.stage.load_interval(state.interval["stage"])
            state.interval = {}

    def _advance(self) -> None:
        """One global batch, and what is due after it."""
        engine, stage, settings, state = self.engine, self.stage, self.settings, self.state
        before = state.images_seen
        with self.ledger.time("steps"):
            started = stage.before_step(engine, before)
        if started:
            self._keep({"images": before, **started})
        result = self._step(before)
        state.images_seen = before + settings.global_batch
        done = state.images_seen >= settings.images
        self.left_out = 0 if result.applied else self.left_out + 1
        if not result.applied:
            self.note = "a step with non-finite gradients was left out"
            if self.step_back is not None and self.left_out >= self.step_back.after_steps:
                self._step_back(self.step_back)
                return
        if done or _crossed(before, state.images_seen, settings.log_every_images):
            values = {**collectives.mean_metrics(self.means.take()), "gradient_norm": result.gradient_norm}
            values["learning_rate"] = self._learning_rate(before)
            self.note = f"loss {values['loss']:.4f}" if "loss" in values else self.note
            self._keep({"images": state.images_seen, **values})
        if done or _crossed(before, state.images_seen, settings.evaluate_every_images):
            self._evaluate()
        if engine.rank == 0:
            self.reporter.progress(min(state.images_seen, settings.images), settings.images, self.note)
        due = done or _crossed(before, state.images_seen, settings.checkpoint_every_images)
        if due:
            # The means of an unfinished interval are part of the history to come: a checkpoint ends the interval.
            self.means.take()
        order = 0 if done else self._order()
        if (due and (done or self.left_out == 0)) or order:
            self._save(ends_interval=due)
        if order:
            raise Stopped(order)

    def _order(self) -> int:
        """What rank 0 was asked, the same on all ranks."""
        if self.pending_order is None:
            return 0
        return collectives.broadcast_number(self.pending_order() if self.engine.rank == 0 else 0, self.engine.device)

    def _save(self, *, ends_interval: bool) -> None:
        state = self.state
        if not ends_interval:
            means = collectives.gather_objects(self.means.state())
            state = replace(state, interval={"means": means, "stage": self.stage.interval()})
        with self.ledger.time("checkpoint"):
            self.checkpoints.save(self.engine, state)
        self.kept_at = state.images_seen

    def _learning_rate(self, images_seen: int) -> float:
        factor = self.step_back.factor ** len(self.state.setbacks) if self.step_back is not None else 1.0
        return learning_rate_at(images_seen, self.settings) * factor

    def _step_back(self, rule: StepBack) -> None:
        """Go on from an earlier state with a lower learning rate."""
        at, earlier = self.state.images_seen, self.state.setbacks
        reason = f"{self.left_out} steps in a row were not finite before image {at:,}"
        if len(earlier) >= rule.at_most:
            raise self._given_up(f"{reason}, after {len(earlier)} setbacks", at)
        with self.ledger.time("restart"):
            # Where the last setback led to has led here again: go further back.
            again = bool(earlier) and self.kept_at == earlier[-1]["to"]
            state = rule.restore(self.engine, self.kept_at if again else None)
            if state.images_seen == 0 and again:
                state = rule.restore(self.engine, None)
        if state.images_seen == 0:
            raise self._given_up(f"{reason}, and there is no checkpoint to go back to", at)
        self.ledger.lose((at - state.images_seen) / max(at - self.began_at, 1))
        state.setbacks = [*earlier, {"images": at, "to": state.images_seen}]
        state.interval = {}
        self.means.take()
        self.stage.load_interval({})
        self._go_on_from(state)
        self.left_out = 0
        if self.engine.rank == 0:
            log.warning(
                "%s: back to image %d with %g of the learning rate (setback %d of at most %d)",
                *(reason, state.images_seen, rule.factor ** len(state.setbacks), len(state.setbacks), rule.at_most),
            )
        self.note = f"stepped back: {reason}"
        self._keep({"images": state.images_seen, "setbacks": float(len(state.setbacks))})
        if self.engine.rank == 0:
            self.reporter.progress(state.images_seen, self.settings.images, self.note)
        self._save(ends_interval=True)  # so that a restart remembers

    def _given_up(self, reason: str, at: int) -> InputError:
        rate, stage = self._learning_rate(at), self.stage.name
        return InputError(
            f"training {stage} stopped at a learning rate of {rate:.3g}: {reason}\n"
            f"hint: lower {stage}.train.learning_rate or {stage}.train.gradient_clip, or set "
            f"{stage}.train.precision=fp32; the training then begins anew"
        )

    def _keep(self, record: Record) -> None:
        """A line of the history."""
        completed = self.watch.completed(record)
        rounded = {name: value if name == "images" else float(f"{value:.6g}") for name, value in completed.items()}
        self.state.history.append(rounded)
        alarms = self.watch.see(rounded)
        if self.engine.rank == 0:
            self.reporter.record(rounded)
            for alarm in alarms:
                self.reporter.alarm(alarm)

    def _evaluate(self) -> None:
        engine, stage = self.engine, self.stage
        with self.ledger.time("evaluation"):
            engine.module.eval()
            try:
                with torch.no_grad():
                    figures = stage.evaluate(engine)
            finally:
                engine.module.train()
        consequences = stage.after_evaluation(figures)
        self._keep({"images": self.state.images_seen, **figures, **consequences})
        if engine.rank == 0 and stage.picture is not None:
            self.reporter.picture(self.state.images_seen, stage.picture)

    def _position(self, images_seen: int, micro: int) -> Position:
        """Of this rank's part of a micro-batch."""
        unit = self.settings.micro_batch
        offset = (micro * self.engine.world + self.engine.rank) * unit
        return Position(images_seen, offset, unit, self.settings.global_batch)

    def _step(self, images_seen: int) -> StepResult:
        """One global batch: micro-batches, the optimizer's step, and what the stage does after it."""
        engine, stage, settings, means = self.engine, self.stage, self.settings, self.means
        engine.module.train()
        merged: tuple[CodebookStatistics, ...] = ()
        count = settings.global_batch // (settings.micro_batch * engine.world)
        positions = [self._position(images_seen, micro) for micro in range(count)]
        after = images_seen + settings.global_batch
        last = None if after >= settings.images else self._position(after, 0)
        for position, following in itertools.zip_longest(positions, positions[1:], fillvalue=last):
            assert position is not None
            with self.ledger.time("data", own=True):
                inputs = self.feed.take(position, following)
            with self.ledger.time("steps", own=True):
                output = engine.forward(*inputs)
            with self.ledger.time("steps"):
                engine.backward(output.loss)
                means.add({"loss": output.loss, **output.metrics, **stage.after_micro_batch(output)})
            if merged:
                pairs = zip(merged, output.statistics, strict=True)
                merged = tuple(merge_statistics(one, other) for one, other in pairs)
            else:
                merged = output.statistics
        with self.ledger.time("steps"):
            result = engine.step(self._learning_rate(images_seen))
            if result.applied:
                # Once a step, not once a micro-batch: accumulation must not change the codebooks.
                whole = tuple(collectives.merge_over_ranks(part) for part in merged)
                means.add(stage.after_step(whole, images_seen))
        return result


def _crossed(before: int, after: int, interval: int) -> bool:
    return before // interval != after // interval
