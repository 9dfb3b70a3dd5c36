"""The groups of a search space: its base, what is sought, and the budget; and the checks of names between them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from hvqd_model.config import Settings
from infra.errors import InputError
from tuning.constraints import Expression
from tuning.quantities import MEANINGS
from tuning.reported import Job, check_reported

_FIXED = ("root", "tracking.", "compute.address")
"""Keys that a sweep sets itself."""


class Base(Settings):
    """What every trial has in common."""

    preset: str | None = "tiny"
    """A preset's name."""
    config: str | None = None
    """A YAML file with settings, over the preset."""
    set: dict[str, Any] = Field({})
    """Dotted key -> value, over both."""


class Metric(Settings):
    """One figure that is sought; the first of a space steers early stopping."""

    name: str = Field(min_length=1)
    """Of a figure that the job reports, or of its own with an expression."""
    direction: Literal["min", "max"] = "min"
    """Whether smaller or larger is better."""
    expression: str | None = None
    """Over reported figures, derived quantities and dotted configuration keys."""

    @property
    def figures(self) -> frozenset[str]:
        """The names that it is made of."""
        if self.expression is None:
            return frozenset({self.name})
        return frozenset(Expression(self.expression, f"metric {self.name}").names)


class Budget(Settings):
    """How much a sweep may cost."""

    trials: int = Field(12, ge=1)
    """Configurations to try."""
    images: int | None = Field(None, ge=1)
    """Images of a whole trial; null: those of the base."""
    min_images: int | None = Field(None, ge=1)
    """Images before a trial can be stopped; null: the whole over the reduction factor squared."""
    reduction_factor: int = Field(2, ge=2)
    """One in so many trials goes on at each rung, for so many times the images."""
    rung_samples: int = Field(128, ge=2)
    """Pictures drawn to compare trials before their end, where drawn pictures are what is sought."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.images is not None and self.min_images is not None and self.min_images > self.images:
            raise ValueError(
                f"min_images must be at most images ({self.images}): {self.min_images}\n"
                f"hint: min_images={max(1, self.images // self.reduction_factor**2)}"
            )
        return self


def check_key(key: str, keys: Sequence[str], where: str) -> None:
    """Whether a trial may set this dotted key.

    Raises:
        InputError: it does not exist (the nearest is named), or belongs to the sweep.
    """
    if key not in keys:
        raise InputError(f"{where}: unknown key: {key}\n{nearest(key, keys)}")
    if key.startswith(_FIXED):
        raise InputError(f"{where}: a sweep sets {key} itself\nhint: give it to `hvqd tune`, as --root or --set")


def check_names(expression: Expression, allowed: Iterable[str]) -> None:
    """Whether an expression asks only for these names.

    Raises:
        InputError: it asks for another one; the nearest is named.
    """
    known = list(allowed)
    for name in sorted(expression.names):
        if name not in known:
            raise InputError(f"{expression.where}: unknown name: {name}\n{nearest(name, known)}")


def check_metrics(metrics: Sequence[Metric], job: Job, keys: Sequence[str]) -> None:
    """Whether the job reports what is sought, and what its expressions ask for.

    Raises:
        InputError: it does not, or two metrics have one name.
    """
    for place, metric in enumerate(metrics):
        if any(other.name == metric.name for other in metrics[:place]):
            raise InputError(f"metrics must have different names: {metric.name}\nhint: name each figure once")
        if metric.expression is None:
            check_reported(job, metric.name, "metrics")
            continue
        expression = Expression(metric.expression, f"metric {metric.name}")
        for name in sorted(expression.names):
            if name not in MEANINGS and name not in keys:
                check_reported(job, name, expression.where)


def nearest(name: str, allowed: Iterable[str] | Mapping[str, Any]) -> str:
    """A hint that names the most alike, by the whole name or by its last part."""
    options = list(allowed)
    by_last: dict[str, str] = {}
    for option in options:
        by_last.setdefault(option.rpartition(".")[2], option)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    close = close or [by_last[found] for found in difflib.get_close_matches(name.rpartition(".")[2], by_last, n=1)]
    return f"hint: did you mean {close[0]}?" if close else "hint: `hvqd config show` documents every key"
