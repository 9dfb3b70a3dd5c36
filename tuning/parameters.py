"""One parameter of a search space: its kind, when it applies, how many entries it has, and how a value is chosen.

Choosing is asked of a `Suggester`, whose form is that of an Optuna trial: the same walk serves random draws, a grid,
Optuna's define-by-run and the replay of a trial that was drawn before.
"""

from __future__ import annotations

import builtins
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, Self

import numpy as np
from pydantic import model_validator

from hvqd_model.config import Settings

Kind = Literal["choice", "int", "log_int", "uniform", "log_uniform"]
KINDS: tuple[Kind, ...] = ("choice", "int", "log_int", "uniform", "log_uniform")
Scalar = bool | int | float | str | None
_GRID_POINTS = 3
"""A grid's values along a range of real numbers."""


class Suggester(Protocol):
    """Who chooses: Optuna's `Trial`, or one of the classes below."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the choices."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """A whole number of [low, high]."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """A real number of [low, high]."""


class Parameter(Settings):
    """One entry under `parameters`; exactly one of the five kinds is given."""

    choice: tuple[Any, ...] | None = None
    """Any of these values, each as likely."""
    int: tuple[Any, ...] | None = None
    """[low, high], whole numbers, both included."""
    log_int: tuple[Any, ...] | None = None
    """The same, evenly spread over the logarithm."""
    uniform: tuple[Any, ...] | None = None
    """[low, high], real numbers."""
    log_uniform: tuple[Any, ...] | None = None
    """The same, evenly spread over the logarithm."""
    key: str | None = None
    """The dotted configuration key it sets, where the parameter has a shorter name of its own."""
    when: str | None = None
    """An expression over other parameters; where it is false the parameter does not apply."""
    length: str | None = None
    """The value is a list of so many entries, each drawn by itself: an expression over other parameters, a number or a
    list whose length is meant."""
    ordered: bool = False
    """A choice whose values rise or fall: the searcher may use their order."""

    @property
    def kind(self) -> Kind:
        """Which of the five."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def domain(self) -> tuple[Any, ...]:
        """The choices, or (low, high)."""
        found: tuple[Any, ...] = getattr(self, self.kind)
        return found

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"one of {', '.join(KINDS)} must say what it can be: {', '.join(given) or 'none is given'}\n"
                "hint: for example {choice: [1, 2]} or {log_uniform: [0.0001, 0.01]}"
            )
        if self.ordered and self.kind != "choice":
            raise ValueError(f"ordered is for a choice, {self.kind} has an order: true\nhint: leave ordered out")
        if self.kind == "choice":
            if not self.domain:
                raise ValueError("choice must name at least one value: []\nhint: for example {choice: [1, 2]}")
            if len(set(map(_label, self.domain))) < len(self.domain):
                raise ValueError(
                    f"choice must name different values: {json.dumps(self.domain)}\nhint: name each of them once"
                )
            return self
        self._check_range()
        return self

    def _check_range(self) -> None:
        kind, shown = self.kind, json.dumps(self.domain)
        whole = kind in ("int", "log_int")
        numbers = [end for end in self.domain if isinstance(end, _numbers(whole)) and not isinstance(end, bool)]
        if len(self.domain) != 2 or len(numbers) != 2 or not all(map(math.isfinite, numbers)):
            what = "whole numbers" if whole else "numbers"
            raise ValueError(f"{kind} must be [low, high], two {what}: {shown}\nhint: for example {_example(kind)}")
        low, high = numbers
        if low > high or (low == high and not whole):
            raise ValueError(f"{kind} must rise, [low, high]: {shown}\nhint: {kind}: {json.dumps([high, low])}")
        if kind.startswith("log_") and low <= 0:
            raise ValueError(
                f"{kind} must begin above 0: {shown}\nhint: for example {_example(kind)}, or a linear range"
            )

    def count(self) -> builtins.int | None:
        """How many values an entry can have; None for real numbers."""
        match self.kind:
            case "choice":
                return len(self.domain)
            case "int" | "log_int":
                return int(self.domain[1] - self.domain[0]) + 1
            case "uniform" | "log_uniform":
                return None

    def suggest(self, name: str, suggester: Suggester) -> Any:
        """One entry's value."""
        low, high = self.domain[0], self.domain[-1]
        match self.kind:
            case "choice" if self.ordered:
                return self.domain[suggester.suggest_int(name, 0, len(self.domain) - 1)]
            case "choice":
                labels = {_label(value): value for value in self.domain}
                return labels[suggester.suggest_categorical(name, list(labels))]
            case "int" | "log_int":
                return suggester.suggest_int(name, low, high, log=self.kind == "log_int")
            case "uniform" | "log_uniform":
                return suggester.suggest_float(name, float(low), float(high), log=self.kind == "log_uniform")

    def flat(self, value: Any) -> Scalar:
        """What a suggester answers for this value: `suggest` undone.

        Raises:
            ValueError: it is none of the parameter's values.
        """
        if self.kind == "choice":
            labels = [_label(choice) for choice in self.domain]
            place = labels.index(_label(value))
            return place if self.ordered else labels[place]
        low, high = self.domain
        if isinstance(value, bool) or not isinstance(value, _numbers(self.kind in ("int", "log_int"))):
            raise ValueError(f"{value!r} is no number of the range")
        if not low <= value <= high:
            raise ValueError(f"{value} is outside {low} to {high}")
        found: Scalar = value
        return found


def _numbers(whole: bool) -> Any:
    return int if whole else (int, float)


def _example(kind: str) -> str:
    return {"int": "[1, 4]", "log_int": "[64, 4096]", "uniform": "[0.0, 1.0]", "log_uniform": "[0.0001, 0.01]"}[kind]


def _label(value: Any) -> Scalar:
    """A choice as a scalar that Optuna can store: lists and groups as JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value, separators=(",", ":"))


class RandomSuggester:
    """Turns numbers of [0, 1) into values: independent draws where the numbers are."""

    def __init__(self, source: np.random.Generator | Callable[[str], float]) -> None:
        """Begin.

        Args:
            source: gives a number of [0, 1) for a name; of a generator, its next one.
        """
        self._source: Callable[[str], float] = (
            (lambda _: float(source.random())) if isinstance(source, np.random.Generator) else source
        )

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Each choice is as likely."""
        return choices[int(self._source(name) * len(choices))]

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Evenly spread, over the logarithm if asked."""
        if not log:
            return low + step * int(self._source(name) * ((high - low) // step + 1))
        # Every whole number has the same share of the logarithm's range as its neighbourhood of half a unit.
        found = (low - 0.5) * ((high + 0.5) / (low - 0.5)) ** self._source(name)
        return int(min(max(round(found), low), high))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Evenly spread, over the logarithm if asked."""
        place = self._source(name)
        return min(max(low * (high / low) ** place, low), high) if log else low + (high - low) * place


class FixedSuggester:
    """The values of a trial that was drawn before."""

    def __init__(self, values: Mapping[str, Scalar]) -> None:
        self._values = values
        self.used: set[str] = set()

    def _value(self, name: str) -> Any:
        self.used.add(name)
        return self._values[name]

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """The one of before."""
        return self._value(name)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """The one of before."""
        return int(self._value(name))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """The one of before."""
        return float(self._value(name))


class _GridSuggester:
    """Follows a path of places through the tree of choices, and takes the first one beyond its end."""

    def __init__(self, path: Sequence[int], points: int) -> None:
        self._path, self._points = path, points
        self.places: list[int] = []
        self.widths: list[int] = []

    def _place(self, width: int) -> int:
        place = self._path[len(self.places)] if len(self.places) < len(self._path) else 0
        self.places.append(place)
        self.widths.append(width)
        return place

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return choices[self._place(len(choices))]

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        if not log:
            return low + step * self._place((high - low) // step + 1)
        values: list[int] = sorted({round(value) for value in np.geomspace(low, high, self._points).tolist()})
        return values[self._place(len(values))]

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        space: Any = np.geomspace if log else np.linspace
        return float(space(low, high, self._points)[self._place(self._points)])


def enumerate_grid(walk: Callable[[Suggester], Any], points: int = _GRID_POINTS) -> Iterator[Any]:
    """What `walk` makes of every combination of values, each once, the last parameter changing fastest.

    Args:
        points: values along a range of real numbers, or of whole ones on a logarithm.
    """
    path: list[int] = []
    while True:
        suggester = _GridSuggester(path, points)
        yield walk(suggester)
        path = suggester.places
        while path and path[-1] + 1 == suggester.widths[len(path) - 1]:
            path.pop()
        if not path:
            return
        path[-1] += 1
