"""A search space: which settings are varied and how, what no trial may violate, what is sought, and for how long.

It is a YAML file over the dotted keys of the configuration (`tuning/spaces/*.yaml` are ready ones). A *draw* is what
the search sees, parameter -> value; `settings` turns it into dotted configuration keys, `configuration` into the
resolved configuration of one trial, and `check` refuses what is impossible before it costs anything.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import Any, Literal, Self

import numpy as np
import yaml
from pydantic import Field, model_validator

from hvqd_model.config import Settings
from infra.errors import InputError
from tuning.constraints import Expression, NotDrawn
from tuning.groups import Base, Budget, Metric, check_key, check_metrics, check_names, nearest
from tuning.parameters import FixedSuggester, Parameter, RandomSuggester, Scalar, Suggester, enumerate_grid
from tuning.quantities import MEANINGS, MemoryEstimate, Quantities, estimate_memory, explain
from tuning.reported import PICTURE_FIGURES, Job
from workflows.config import RunConfig
from workflows.loading import config_from, dotted_keys

Drawn = dict[str, Any]
MOST_DRAWS = 1_000
"""Draws after which a space counts as one that nothing satisfies."""
_NOISE = "prior.model.noise"
_PLANNED_WEIGHT = 40
"""Of a draw that the planner refused."""


class Refusal(InputError):  # noqa: N818 - it names what the space does
    """A draw that is no trial: its configuration is impossible, or a constraint forbids it."""

    def __init__(self, message: str, reason: str, weight: int = 1) -> None:
        super().__init__(message)
        self.reason = reason
        """The constraint's text, or what the configuration said without this draw's values."""
        self.weight = weight
        """How many of `MOST_DRAWS` it counts for: what the planner had to walk through took seconds."""


class SearchSpace(Settings):
    """The space as read, checked against the configuration; `tuning.loading.load_space` makes one."""

    name: str = Field(pattern=r"^[\w-]+$")
    """Letters, digits, _ and -."""
    about: str = ""
    """What it is for, in a sentence."""
    base: Base = Base()
    """What every trial has in common."""
    job: Job
    """What a trial trains: vq, prior, or joint (a tokenizer and then a prior on it)."""
    parameters: dict[str, Parameter]
    """A dotted configuration key, or a name of its own (with `key`, or to steer others) -> what it can be."""
    computed: dict[str, str] = Field({})
    """Dotted configuration key -> expression over the parameters."""
    constraints: tuple[str, ...] = ()
    """Expressions that must hold; one over a parameter that does not apply holds."""
    metrics: tuple[Metric, ...]
    """What is sought; several make it a search for the Pareto front."""
    budget: Budget = Budget()
    """How much a sweep may cost."""
    resolved_base: RunConfig
    """The base's configuration."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.parameters:
            raise ValueError("parameters must name at least one: none\nhint: `hvqd tune show vq` shows a space")
        if not self.metrics:
            raise ValueError(
                "metrics must name at least one: none\nhint: for example [{name: val_psnr, direction: max}]"
            )
        keys = dotted_keys()
        for name, parameter in self.parameters.items():
            if parameter.key is not None or "." in name:
                check_key(parameter.key or name, keys, f"parameters.{name}")
        for key in (*self.computed, *self.base.set):
            check_key(key, keys, "computed" if key in self.computed else "base.set")
        self._check_budgeted()
        _ = self._order
        for expression in (*self._computed.values(), *self._constraints):
            check_names(expression, [*self.parameters, *MEANINGS, *keys])
        check_metrics(self.metrics, self.job, keys)
        return self

    # ---- what was read ----

    @property
    def stage(self) -> Literal["vq", "prior"]:
        """The training whose images the budget counts."""
        return "vq" if self.job == "vq" else "prior"

    @property
    def images(self) -> int:
        """Images of a whole trial."""
        base = self.resolved_base.vq.train if self.stage == "vq" else self.resolved_base.prior.train
        return self.budget.images or base.images

    @property
    def min_images(self) -> int:
        """Images of the first rung."""
        return min(self.images, self.budget.min_images or max(1, self.images // self.budget.reduction_factor**2))

    @property
    def rungs(self) -> tuple[int, ...]:
        """Images at which trials are compared, the last one the whole."""
        found, images = [], self.min_images
        while images < self.images:
            found.append(images)
            images *= self.budget.reduction_factor
        return (*found, self.images)

    @property
    def judges_pictures(self) -> bool:
        """Whether early stopping asks for drawn pictures: the first metric is made of their figures."""
        return bool(self.metrics[0].figures & set(PICTURE_FIGURES))

    @property
    def needs_latents(self) -> bool:
        """Whether a trial may have Gaussian noise though the base has not: its codes need their latents beside them."""
        if self.job != "prior" or self.resolved_base.prior.model.noise == "gaussian":
            return False
        drawn = any(
            "gaussian" in found.domain for name, found in self.parameters.items() if self.key_of(name) == _NOISE
        )
        return drawn or "gaussian" in self.computed.get(_NOISE, "")

    def key_of(self, name: str) -> str | None:
        """The configuration key that a parameter sets; None for one that only steers others."""
        return self.parameters[name].key or (name if "." in name else None)

    # ---- draws ----

    def suggest(self, suggester: Suggester) -> Drawn:
        """Walk through the parameters that apply and ask for each value: Optuna's define-by-run.

        Entry i of a list is asked for as `name/i`. What comes back may be impossible: `check` it.
        """
        drawn: Drawn = {}
        for name in self._order:
            parameter = self.parameters[name]
            if not self._applies(name, drawn):
                continue
            count = self._length(name, drawn)
            drawn[name] = (
                parameter.suggest(name, suggester)
                if count is None
                else [parameter.suggest(f"{name}/{place}", suggester) for place in range(count)]
            )
        return {name: drawn[name] for name in self.parameters if name in drawn}

    def draw_any(self, generator: np.random.Generator) -> Drawn:
        """A random draw, possible or not."""
        return self.suggest(RandomSuggester(generator))

    def draw(self, generator: np.random.Generator, memory: MemoryEstimate | None = estimate_memory) -> Drawn:
        """A random draw that `check` agrees with.

        Raises:
            InputError: nothing is possible among `MOST_DRAWS` draws; says what refused how many.
        """
        reasons: Counter[str] = Counter()
        weight = 0
        while weight < MOST_DRAWS:
            drawn = self.draw_any(generator)
            try:
                self.check(drawn, memory)
            except Refusal as refusal:
                reasons[refusal.reason] += 1
                weight += refusal.weight
                last = str(refusal).splitlines()[0]
            else:
                return drawn
        named = "; ".join(f"{reason} ({count} times)" for reason, count in reasons.most_common(3))
        raise InputError(
            f"space {self.name}: none of {reasons.total():,} draws is possible: {named}\n"
            f"hint: widen the parameters or relax the constraint; of the last one: {last}"
        )

    def grid(self, points: int = 3) -> Iterator[Drawn]:
        """Every combination, possible or not; real numbers, and whole ones on a logarithm, at so many points."""
        found: Iterator[Drawn] = enumerate_grid(self.suggest, points)
        return found

    def count(self, most: int = 100_000) -> int | None:
        """How many combinations there are; `most` when there are more, None where a real number can apply."""
        if any(parameter.count() is None for parameter in self.parameters.values()):
            return None
        if any((parameter.count() or 0) > most for parameter in self.parameters.values()):
            return most
        return sum(1 for _ in islice(enumerate_grid(self.suggest, most), most))

    def flat(self, drawn: Drawn) -> dict[str, Scalar]:
        """The draw as `suggest` asked for it: one scalar for each name, the entries of a list as `name/i`.

        Raises:
            InputError: a value that the space doesn't have.
        """
        found: dict[str, Scalar] = {}
        for name, value in drawn.items():
            if name not in self.parameters:
                raise InputError(f"space {self.name} has no parameter {name}\n{nearest(name, self.parameters)}")
            parameter = self.parameters[name]
            try:
                if parameter.length is None:
                    found[name] = parameter.flat(value)
                else:
                    found.update({f"{name}/{place}": parameter.flat(entry) for place, entry in enumerate(value)})
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"space {self.name}: {name} cannot be {json.dumps(value)}: {error}\n"
                    f"hint: {parameter.kind} {json.dumps(parameter.domain)}"
                ) from error
        return found

    def from_flat(self, values: Mapping[str, Scalar]) -> Drawn:
        """The way back from `flat`.

        Raises:
            InputError: values are missing or left over.
        """
        fixed = FixedSuggester(values)
        try:
            drawn = self.suggest(fixed)
        except (KeyError, IndexError) as error:
            raise InputError(
                f"space {self.name} needs a value of {error.args[0]}\nhint: the space has changed since they were drawn"
            ) from error
        if left := sorted(set(values) - fixed.used):
            raise InputError(
                f"space {self.name} does not ask for {', '.join(left)} here\n"
                "hint: the space has changed since they were drawn"
            )
        return drawn

    def contains(self, drawn: Drawn) -> bool:
        """Whether this draw could have been made here: a former sweep's trials may not fit."""
        try:
            return self.from_flat(self.flat(drawn)) == drawn
        except InputError:
            return False

    # ---- a draw's configuration ----

    def settings(self, drawn: Drawn) -> dict[str, Any]:
        """Dotted configuration key -> value: all in which the trial differs from the resolved base.

        Raises:
            InputError: two parameters that apply set the same key.
        """
        found: dict[str, Any] = {
            f"{self.stage}.train.images": self.images,
            f"{self.stage}.train.evaluate_every_images": self.min_images,
            f"{self.stage}.train.checkpoint_every_images": self.min_images,
        }
        setters: dict[str, str] = {}
        for name, value in drawn.items():
            if (key := self.key_of(name)) is None:
                continue
            if key in setters:
                raise InputError(
                    f"space {self.name}: {setters[key]} and {name} both set {key}\n"
                    "hint: give them `when` conditions of which only one holds"
                )
            setters[key], found[key] = name, value
        for key, expression in self._computed.items():
            try:
                found[key] = expression.evaluate(lambda name: _drawn_value(drawn, name))
            except NotDrawn:
                continue
        return found

    def overrides(self, drawn: Drawn) -> list[str]:
        """`settings` as the command line's `--set` takes them."""
        return [f"{key}={_as_yaml(value)}" for key, value in self.settings(drawn).items()]

    def configuration(self, drawn: Drawn) -> RunConfig:
        """The trial's resolved configuration.

        Raises:
            Refusal: the configuration refuses the values.
        """
        values = self.resolved_base.model_dump()
        for key, value in self.settings(drawn).items():
            group = values
            *parents, last = key.split(".")
            for parent in parents:
                group = group[parent]
            group[last] = value
        try:
            return config_from(values)
        except InputError as error:
            first = str(error).splitlines()[0]
            raise Refusal(str(error), first.rpartition(": ")[0] or first) from error

    def check(self, drawn: Drawn, memory: MemoryEstimate | None = estimate_memory) -> RunConfig:
        """The trial's resolved configuration, if nothing speaks against it.

        Args:
            memory: how memory_gib is estimated; None leaves out the constraints that ask for it.

        Raises:
            Refusal: the configuration refuses the values, or a constraint does not hold.
        """
        config = self.configuration(drawn)
        quantities = Quantities(config, self.job, memory or estimate_memory)

        def lookup(name: str) -> Any:
            if name in self.parameters:
                return _drawn_value(drawn, name)
            return quantities[name] if name in MEANINGS else value_at(config, name)

        for constraint in sorted(self._constraints, key=_is_slow):
            if memory is None and _is_slow(constraint):
                continue
            try:
                holds = constraint.evaluate(lookup)
            except NotDrawn:
                continue
            if not holds:
                known = explain({name: _shown(lookup, name) for name in sorted(constraint.names)})
                raise Refusal(
                    f"the constraint {constraint.text} does not hold: {known}\n"
                    "hint: draw again, or relax the constraint",
                    constraint.text,
                    _PLANNED_WEIGHT if _is_slow(constraint) else 1,
                )
        return config

    def measured(
        self, figures: Mapping[str, float], config: RunConfig, memory: MemoryEstimate = estimate_memory
    ) -> dict[str, float]:
        """What a trial reports: its figures, and the space's metrics that can be worked out from them."""
        found = dict(figures)
        quantities = Quantities(config, self.job, memory)

        def lookup(name: str) -> Any:
            if name in figures:
                return figures[name]
            if name in MEANINGS:
                return quantities[name]
            if "." in name:
                return value_at(config, name)
            raise NotDrawn(name)

        for metric in self.metrics:
            if metric.expression is not None:
                try:
                    found[metric.name] = float(Expression(metric.expression, f"metric {metric.name}").evaluate(lookup))
                except NotDrawn:
                    continue
        return found

    # ---- inside ----

    @cached_property
    def _order(self) -> tuple[str, ...]:
        """The parameters, each after those that its `when` and `length` ask for."""
        asked: dict[str, set[str]] = {}
        for name in self.parameters:
            asked[name] = set()
            for expression in (self._whens.get(name), self._lengths.get(name)):
                if expression is not None:
                    check_names(expression, self.parameters)
                    asked[name] |= expression.names
        found: list[str] = []
        while len(found) < len(self.parameters):
            ready = [name for name in self.parameters if name not in found and asked[name] <= set(found)]
            if not ready:
                circle = ", ".join(name for name in self.parameters if name not in found)
                raise ValueError(
                    f"parameters must not wait for each other in a circle: {circle}\n"
                    "hint: `when` and `length` may ask only for parameters that can be drawn before"
                )
            found.append(ready[0])
        return tuple(found)

    @cached_property
    def _whens(self) -> dict[str, Expression]:
        return {
            name: Expression(parameter.when, f"parameters.{name}.when")
            for name, parameter in self.parameters.items()
            if parameter.when is not None
        }

    @cached_property
    def _lengths(self) -> dict[str, Expression]:
        return {
            name: Expression(parameter.length, f"parameters.{name}.length")
            for name, parameter in self.parameters.items()
            if parameter.length is not None
        }

    @cached_property
    def _computed(self) -> dict[str, Expression]:
        return {key: Expression(text, f"computed.{key}") for key, text in self.computed.items()}

    @cached_property
    def _constraints(self) -> tuple[Expression, ...]:
        return tuple(Expression(text, f"constraint {place}") for place, text in enumerate(self.constraints, 1))

    def _applies(self, name: str, drawn: Drawn) -> bool:
        condition = self._whens.get(name)
        try:
            return condition is None or bool(condition.evaluate(lambda asked: _drawn_value(drawn, asked)))
        except NotDrawn:
            return False

    def _length(self, name: str, drawn: Drawn) -> int | None:
        """How many entries the value has; None for a value that is no list."""
        expression = self._lengths.get(name)
        if expression is None:
            return None
        try:
            value = expression.evaluate(lambda asked: _drawn_value(drawn, asked))
        except NotDrawn as missing:
            raise InputError(
                f"{expression.where} asks for {missing.args[0]}, which does not apply here\n"
                f"hint: give {name} the same `when`"
            ) from missing
        count = len(value) if isinstance(value, list) else value
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InputError(
                f"{expression.where} must be a count of at least 1, or a list: {value!r}\nhint: {expression.text}"
            )
        return count

    def _check_budgeted(self) -> None:
        budgeted = {
            f"{self.stage}.train.{key}" for key in ("images", "evaluate_every_images", "checkpoint_every_images")
        }
        for name in self.parameters:
            if self.key_of(name) in budgeted:
                raise ValueError(
                    f"parameters must leave {self.key_of(name)} to the budget: {name}\n"
                    "hint: set budget.images and budget.min_images"
                )
        for key in self.computed:
            if key in budgeted or key in {self.key_of(name) for name in self.parameters}:
                raise ValueError(
                    f"computed must not set what a parameter or the budget sets: {key}\nhint: leave one out"
                )


def _is_slow(constraint: Expression) -> bool:
    return "memory_gib" in constraint.names


def value_at(config: RunConfig, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _drawn_value(drawn: Drawn, name: str) -> Any:
    if name not in drawn:
        raise NotDrawn(name)
    return drawn[name]


def _shown(lookup: Any, name: str) -> Any:
    try:
        return lookup(name)
    except NotDrawn:
        return "nothing"


def _as_yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()
