"""Who proposes the next trial: Optuna's TPE, random draws, or the grid in order.

What a searcher proposes for trial n depends on the space, the seed, n, and what it has been told by then; nothing else
is remembered, so that a searcher made anew from the records of a sweep goes on as the old one would have.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import numpy as np

from hvqd_model.randomness import derive_key
from infra.errors import InputError
from tuning.records import TrialRecord
from tuning.space import MOST_DRAWS, Drawn, Refusal, SearchSpace

SearcherName = Literal["tpe", "random", "grid"]
SEARCHERS: tuple[SearcherName, ...] = ("tpe", "random", "grid")

_STARTUP_TRIALS = 6
"""TPE draws at random until it knows so many trials: a sweep of dozens cannot spend Optuna's ten."""
_MOST_ASKED = 30
"""Draws of TPE for one trial; when all are refused, random draws follow."""
_MOST_REPEATS = 200
"""Draws of what was tried before, one after the other, after which a space counts as exhausted."""


class Searcher(Protocol):
    """Proposes trials and is told how they ended."""

    refused: Counter[str]
    """Why draws were passed over, and how often."""

    def propose(self, number: int) -> Drawn | None:
        """A draw for trial `number` that is possible and was not tried before; None when there is none left.

        Raises:
            InputError: nothing in the space is possible.
        """

    def tell(self, record: TrialRecord) -> None:
        """Learn of a trial that began before this searcher was made, or that has ended."""


def make_searcher(name: SearcherName, space: SearchSpace, seed: int) -> Searcher:
    """The searcher of this name, which knows no trial yet."""
    match name:
        case "tpe":
            return TreeParzen(space, seed)
        case "random":
            return Random(space, seed)
        case "grid":
            return Grid(space)
    raise ValueError(f"no such searcher: {name}")


class _Tried:
    """The draws of a sweep so far, and why others were passed over."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.refused: Counter[str] = Counter()
        self._known: set[str] = set()

    def add(self, drawn: Drawn) -> None:
        """Remember a draw."""
        self._known.add(_text(drawn))

    def has(self, drawn: Drawn) -> bool:
        """Whether it was drawn before."""
        return _text(drawn) in self._known

    def first_new(self, draws: Iterator[Drawn]) -> Drawn | None:
        """The first of the draws that is possible and new; None when they end, or repeat what is known.

        Raises:
            InputError: none of `MOST_DRAWS` was possible.
        """
        impossible, repeats = 0, 0
        for drawn in draws:
            if self.has(drawn):
                repeats += 1
                if repeats >= _MOST_REPEATS:
                    return None
                continue
            try:
                self.space.check(drawn)
            except Refusal as refusal:
                self.refused[refusal.reason] += 1
                impossible += refusal.weight
                if impossible >= MOST_DRAWS:
                    named = "; ".join(f"{reason} ({count} times)" for reason, count in self.refused.most_common(3))
                    raise InputError(
                        f"space {self.space.name}: none of {MOST_DRAWS} draws is possible: {named}\n"
                        "hint: widen the parameters or relax the constraints"
                    ) from refusal
                continue
            self.add(drawn)
            return drawn
        return None


def _text(drawn: Drawn) -> str:
    return json.dumps(drawn, sort_keys=True)


class Random:
    """Independent draws; the baseline."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self._space, self._seed, self._tried = space, seed, _Tried(space)
        self.refused = self._tried.refused

    def propose(self, number: int) -> Drawn | None:
        """See `Searcher`."""
        generator = np.random.default_rng(derive_key(self._seed, "random search", number) % 2**64)

        def draws() -> Iterator[Drawn]:
            while True:
                yield self._space.draw_any(generator)

        return self._tried.first_new(draws())

    def tell(self, record: TrialRecord) -> None:
        """Only what was tried matters."""
        self._tried.add(dict(record.drawn))


class Grid:
    """Every possible combination in order; real numbers at three points."""

    def __init__(self, space: SearchSpace) -> None:
        self._tried = _Tried(space)
        self._rest = space.grid()
        self.refused = self._tried.refused

    def propose(self, number: int) -> Drawn | None:
        """See `Searcher`."""
        left = (drawn for drawn in self._rest if not self._tried.has(drawn))
        return self._tried.first_new(left)

    def tell(self, record: TrialRecord) -> None:
        """What was tried is passed over."""
        self._tried.add(dict(record.drawn))


class TreeParzen:
    """Optuna's tree-structured Parzen estimator (arXiv:2304.11127), asked and told one trial at a time.

    A trial that was stopped early is known by its curve and ranks behind all that went further; with several metrics,
    which Optuna cannot prune, its last figures count as they are. Trials under way count as bad ones until they end, so
    that trials that run side by side are not alike (the "constant liar").
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._seed, self._tried = space, seed, _Tried(space)
        self.refused = self._tried.refused
        down, up = optuna.study.StudyDirection.MINIMIZE, optuna.study.StudyDirection.MAXIMIZE
        directions = [down if metric.direction == "min" else up for metric in space.metrics]
        self._study = optuna.create_study(directions=directions, sampler=self._sampler(0))
        self._running: dict[int, Any] = {}

    def _sampler(self, number: int) -> Any:
        """A sampler whose draws depend on the number, not on how often it was asked before."""
        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                n_startup_trials=_STARTUP_TRIALS,
                multivariate=True,
                group=True,  # conditional parameters are modelled where they apply
                constant_liar=True,
                seed=derive_key(self._seed, "tpe", number) % 2**32,
            )

    def propose(self, number: int) -> Drawn | None:
        """See `Searcher`."""
        import optuna

        self._study.sampler = self._sampler(number)
        generator = np.random.default_rng(derive_key(self._seed, "random search", number) % 2**64)
        asked: list[Any] = []
        found: Drawn | None = None

        def draws() -> Iterator[Drawn]:
            # What is refused stays under way meanwhile, and so counts as bad: the next draw is another one.
            for _ in range(_MOST_ASKED):
                asked.append(self._study.ask())
                yield self._space.suggest(asked[-1])
            while True:
                yield self._space.draw_any(generator)

        try:
            found = self._tried.first_new(draws())
            if found is not None and len(asked) == _MOST_ASKED:
                asked.append(self._replayed(found))
        finally:
            for trial in asked[:-1] if asked and found is not None else asked:
                self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        if found is not None:
            self._running[number] = asked[-1]
        return found

    def _replayed(self, drawn: Drawn) -> Any:
        """A trial of the study with these values."""
        self._study.enqueue_trial(self._space.flat(drawn))
        trial = self._study.ask()
        self._space.suggest(trial)
        return trial

    def tell(self, record: TrialRecord) -> None:
        """See `Searcher`; a draw that the space does not have (any more) is passed over."""
        import optuna

        trial = self._running.pop(record.number, None)
        if trial is None:
            drawn = dict(record.drawn)
            self._tried.add(drawn)
            if not self._space.contains(drawn):
                return
            trial = self._replayed(drawn)
        states = optuna.trial.TrialState
        found = [record.value(metric.name) for metric in self._space.metrics]
        values = [value for value in found if value is not None]
        match record.status:
            case "waiting" | "running":
                self._running[record.number] = trial
            case "finished" | "stopped" if len(values) == len(found):
                if record.status == "finished" or len(values) > 1:
                    self._study.tell(trial, values)
                else:
                    name = self._space.metrics[0].name
                    for rung in record.rungs:
                        if (value := record.value(name, rung.images)) is not None:
                            trial.report(value, rung.images)
                    self._study.tell(trial, state=states.PRUNED)
            case _:
                self._study.tell(trial, state=states.FAIL)
