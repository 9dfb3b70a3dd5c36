"""What a sweep's trials say: the ranking, the Pareto front, and which parameters mattered, with how sure that is.

Importance is the total effect of a parameter on a forest fitted to the trials: the share of the figure's variance over
the space that stays when everything but this parameter is known (Sobol's total index; Jansen's estimator, eq. 4 of
Saltelli et al., doi:10.1016/j.cpc.2009.09.018; forests as in Hutter et al., ICML 2014, "An efficient approach for
assessing hyperparameter importance"). A parameter is drawn anew by walking through the space, so that what depends on
it (conditions, lengths) follows. Intervals resample the trials.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tuning.constraints import Expression
from tuning.groups import Metric
from tuning.parameters import RandomSuggester, Scalar
from tuning.quantities import MEANINGS, Quantities, estimate_memory
from tuning.records import TrialRecord
from tuning.space import SearchSpace

Direction = Literal["min", "max"]
Array = NDArray[np.float64]

FEWEST_TRIALS = 8
"""Below so many trials no importance is worked out."""
_REFERENCE_DRAWS = 256
_TREES = 30
RESAMPLES = 40
_LARGER_IS_BETTER = ("psnr", "recall", "perplexity", "accuracy", "coverage")


# ---- ranking ----


def ranked(space: SearchSpace, records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Trials with a value of the first metric: finished ones, best first, then those that went furthest."""
    metric = space.metrics[0]
    sign = 1 if metric.direction == "min" else -1

    def place(record: TrialRecord) -> tuple[bool, int, float, int]:
        value = record.value(metric.name)
        assert value is not None
        return record.status != "finished", -record.images, sign * value, record.number

    return sorted((record for record in records if record.value(metric.name) is not None), key=place)


def running_best(space: SearchSpace, records: Sequence[TrialRecord]) -> list[tuple[int, float]]:
    """(trials so far, best value of the first metric) at each finished trial, in order of their numbers."""
    metric, found = space.metrics[0], list[tuple[int, float]]()
    better = min if metric.direction == "min" else max
    for count, record in enumerate(sorted(records, key=lambda record: record.number), 1):
        value = record.value(metric.name) if record.status == "finished" else None
        if value is not None:
            found.append((count, better(value, found[-1][1]) if found else value))
    return found


# ---- the Pareto front ----


@dataclass(frozen=True)
class Axis:
    """One side of a trade."""

    name: str
    direction: Direction

    def better(self, one: float, other: float) -> bool:
        """Whether the first is strictly better."""
        return one < other if self.direction == "min" else one > other


@dataclass(frozen=True)
class Trade:
    """What the trials offer for what they cost."""

    cost: Axis
    quality: Axis
    points: Mapping[int, tuple[float, float]]
    """Trial number -> (cost, quality)."""
    front: tuple[int, ...]
    """Trials that no other one beats on both sides, by rising cost."""


def trade_off(space: SearchSpace, records: Sequence[TrialRecord]) -> Trade | None:
    """Quality against bits or time, of the trials that went furthest; None when fewer than two have both.

    With two metrics or more these are the first two. With one, quality is the reported figure behind it, and the cost
    its bits where the tokenizer varies, else the trial's seconds.
    """
    metric = space.metrics[0]
    if len(space.metrics) > 1:
        quality = Axis(metric.name, metric.direction)
        cost = Axis(space.metrics[1].name, space.metrics[1].direction)
    else:
        quality = _figure_behind(metric)
        cost = Axis("seconds" if space.job == "prior" else "bits", "min")
    points: dict[int, tuple[float, float]] = {}
    for record in _furthest(records):
        across, up = _side(space, record, cost.name), _side(space, record, quality.name)
        if across is not None and up is not None:
            points[record.number] = (across, up)
    if len(points) < 2:
        return None
    return Trade(cost, quality, points, _front(points, cost, quality))


def _figure_behind(metric: Metric) -> Axis:
    """The reported figure that a metric is made of, or the metric itself."""
    if metric.expression is not None:
        names = sorted(Expression(metric.expression, metric.name).names - set(MEANINGS))
        if names:
            return Axis(names[0], "max" if any(word in names[0] for word in _LARGER_IS_BETTER) else "min")
    return Axis(metric.name, metric.direction)


def _furthest(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Finished trials; where there are none, those with the most images."""
    finished = [record for record in records if record.status == "finished"]
    most = max((record.images for record in records), default=0)
    return finished or [record for record in records if record.images == most and record.rungs]


def _side(space: SearchSpace, record: TrialRecord, name: str) -> float | None:
    if name == "seconds":
        return record.seconds or None
    if name in MEANINGS:
        if not space.contains(dict(record.drawn)):
            return None
        return float(Quantities(space.configuration(dict(record.drawn)), space.job, estimate_memory)[name])
    return record.value(name)


def _front(points: Mapping[int, tuple[float, float]], cost: Axis, quality: Axis) -> tuple[int, ...]:
    """The points that none dominates: none is at least as good on both sides and better on one."""
    sign_cost, sign_quality = (1 if axis.direction == "min" else -1 for axis in (cost, quality))
    scaled = {number: (sign_cost * x, sign_quality * y) for number, (x, y) in points.items()}
    found: list[int] = []
    best = math.inf
    last: tuple[float, float] | None = None
    for number in sorted(scaled, key=lambda number: (*scaled[number], number)):
        if scaled[number][1] < best or scaled[number] == last:
            found.append(number)
            best, last = scaled[number][1], scaled[number]
    return tuple(found)


# ---- importance ----


@dataclass(frozen=True)
class Effect:
    """How much one parameter matters."""

    name: str
    share: float
    """Of the variance over the space, 0 to 1; shares add up to more than 1 where parameters act together."""
    low: float
    high: float
    """90 % interval over resampled trials."""


@dataclass(frozen=True)
class Importance:
    """The parameters' effects, largest first, and what they were worked out from."""

    metric: str
    images: int
    """At which rung."""
    trials: int
    explained: float
    """R² of the forest on trials that a tree didn't see; at 0 or below the effects mean nothing."""
    effects: tuple[Effect, ...]


def importance(
    space: SearchSpace,
    records: Sequence[TrialRecord],
    seed: int = 0,
    *,
    resamples: int = RESAMPLES,
    trees: int = _TREES,
) -> Importance | None:
    """Which parameters mattered to the first metric; None with fewer than `FEWEST_TRIALS` trials, or with equal ones.

    Trials are compared at the first rung that three quarters of them reached and that has the metric, because those
    that were stopped early are no random part of the space.
    """
    metric = space.metrics[0].name
    compared = _compared(space, records, metric)
    if compared is None:
        return None
    images, pairs = compared
    columns = _Columns(space)
    rows = np.array([columns.row(space.flat(dict(record.drawn))) for record, _ in pairs])
    values = np.array([value for _, value in pairs])
    if len(values) < FEWEST_TRIALS or np.ptp(values) == 0:
        return None
    generator = np.random.default_rng(seed)
    reference, changed = _reference(space, seed)
    base = np.array([columns.row(flat) for flat in reference])
    moved = {name: np.array([columns.row(flat) for flat in flats]) for name, flats in changed.items()}
    found: dict[str, list[float]] = {name: [] for name in moved}
    for resample in range(resamples):
        chosen = generator.integers(len(values), size=len(values))
        if np.ptp(values[chosen]) == 0:
            continue
        for name, share in _shares(_forest(rows[chosen], values[chosen], trees, resample), base, moved).items():
            found[name].append(share)
    whole = _forest(rows, values, 4 * trees, seed, judged=True)
    shares = _shares(whole, base, moved)
    effects = [Effect(name, share, *_interval(found[name], share)) for name, share in shares.items()]
    explained = float(whole.oob_score_)
    ordered = tuple(sorted(effects, key=lambda effect: -effect.share))
    return Importance(metric, images, len(values), explained, ordered)


def _compared(
    space: SearchSpace, records: Sequence[TrialRecord], metric: str
) -> tuple[int, list[tuple[TrialRecord, float]]] | None:
    """The images to compare at, and each trial's value there."""
    usable = [record for record in records if record.value(metric) is not None and space.contains(dict(record.drawn))]
    for rung in space.rungs:
        pairs = []
        for record in usable:
            reached = next((r for r in record.rungs if r.images >= rung and _finite(r.metrics.get(metric))), None)
            if reached is not None:
                pairs.append((record, float(reached.metrics[metric])))
        if len(pairs) >= max(FEWEST_TRIALS, 0.75 * len(usable)):
            return rung, pairs
    return None


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _interval(resampled: Sequence[float], share: float) -> tuple[float, float]:
    low, high = np.quantile([*resampled, share], (0.05, 0.95))
    return min(float(low), share), max(float(high), share)


class _Columns:
    """Draws as rows of numbers; what does not apply is missing."""

    def __init__(self, space: SearchSpace) -> None:
        self._places: dict[str, int] = {}
        self._choices: dict[str, list[Scalar]] = {}
        for flat_name in _flat_names(space):
            parameter = space.parameters[flat_name.partition("/")[0]]
            if parameter.kind == "choice" and not parameter.ordered:
                self._choices[flat_name] = [parameter.flat(value) for value in parameter.domain]
                for label in self._choices[flat_name]:
                    self._places[f"{flat_name}={label!r}"] = len(self._places)
            else:
                self._places[flat_name] = len(self._places)

    def row(self, flat: Mapping[str, Scalar]) -> Array:
        """Numbers, and a column for each choice that has no order."""
        row = np.full(len(self._places), np.nan)
        for name, value in flat.items():
            if name in self._choices:
                for label in self._choices[name]:
                    row[self._places[f"{name}={label!r}"]] = float(label == value)
            else:
                row[self._places[name]] = float(value)  # type: ignore[arg-type]
        return row


def _flat_names(space: SearchSpace) -> list[str]:
    """Every name that a draw may ask for; a list has as many as the longest of some draws."""
    generator = np.random.default_rng(0)
    draws = [space.draw_any(generator) for _ in range(_REFERENCE_DRAWS)]
    found: list[str] = []
    for name, parameter in space.parameters.items():
        if parameter.length is None:
            found.append(name)
        else:
            longest = max((len(drawn[name]) for drawn in draws if name in drawn), default=0)
            found += [f"{name}/{place}" for place in range(longest)]
    return found


def _reference(space: SearchSpace, seed: int) -> tuple[list[dict[str, Scalar]], dict[str, list[dict[str, Scalar]]]]:
    """Draws of the space, and by parameter the same draws with that parameter drawn anew.

    A draw is the walk over a point of the unit cube that has a coordinate for every name, whether it applies or not;
    drawing a parameter anew replaces its coordinates. The points are of a Sobol sequence, evenly spread.
    """
    from scipy.stats.qmc import Sobol

    names = _flat_names(space)
    place = {name: column for column, name in enumerate(names)}
    points = Sobol(2 * len(names), seed=seed).random(_REFERENCE_DRAWS)
    kept, others = points[:, : len(names)], points[:, len(names) :]

    def walk(point: Array) -> dict[str, Scalar]:
        return space.flat(space.suggest(RandomSuggester(lambda name: float(point[place[name]]))))

    changed: dict[str, list[dict[str, Scalar]]] = {}
    for parameter in space.parameters:
        mine = np.array([name.partition("/")[0] == parameter for name in names])
        changed[parameter] = [walk(np.where(mine, other, one)) for one, other in zip(kept, others, strict=True)]
    return [walk(point) for point in kept], changed


def _forest(rows: Array, values: Array, trees: int, seed: int, *, judged: bool = False) -> Any:
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(
        n_estimators=trees, min_samples_leaf=1, max_features=0.7, oob_score=judged, random_state=seed
    )
    return forest.fit(rows, values)


def _shares(forest: Any, base: Array, moved: Mapping[str, Array]) -> dict[str, float]:
    """Jansen's estimator of each parameter's total effect, as a share of the variance."""
    predicted = forest.predict(np.concatenate([base, *moved.values()])).reshape(1 + len(moved), len(base))
    before, after = predicted[0], predicted[1:]
    variance = float(before.var())
    if variance == 0:
        return dict.fromkeys(moved, 0.0)
    effects = np.square(before - after).mean(1) / (2 * variance)
    return {name: min(1.0, float(effect)) for name, effect in zip(moved, effects, strict=True)}
