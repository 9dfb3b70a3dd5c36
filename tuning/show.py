"""`hvqd tune show`: a search space in a table, how much of it is possible, example draws, and what a sweep costs."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tuning.parameters import Parameter
from tuning.quantities import Quantities, estimate_memory
from tuning.space import Drawn, Refusal, SearchSpace

_TRIED = 200
_COUNTED = 100_000
_QUANTITIES = ("tokens", "bits", "parameters_millions")


@dataclass(frozen=True)
class Shown:
    """A space as `show` describes it."""

    space: SearchSpace
    combinations: int | None
    """None where a real number can apply; `_COUNTED` when there are more."""
    possible: int
    """Of `_TRIED` draws, leaving memory out."""
    reasons: dict[str, int]
    """Why the others are not."""
    examples: tuple[tuple[Drawn, dict[str, float]], ...]
    """Possible draws and their derived quantities."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        space = self.space
        return {
            "space": space.model_dump(mode="json", exclude={"resolved_base"}, exclude_none=True),
            "combinations": self.combinations,
            "draws": {"tried": _TRIED, "possible": self.possible, "refused": self.reasons},
            "examples": [
                {"drawn": drawn, "settings": space.settings(drawn), "quantities": quantities}
                for drawn, quantities in self.examples
            ],
            "rungs": list(space.rungs),
            "images_at_most": space.budget.trials * space.images,
        }

    def as_text(self, width: int) -> str:
        """For a terminal of so many columns."""
        stream = io.StringIO()
        console = Console(file=stream, width=width, highlight=False, emoji=False, color_system=None)
        space = self.space
        console.print(f"{space.name}: {space.about}" if space.about else space.name, markup=False)
        console.print(self._parameters())
        console.print("\n" + "\n".join(self._facts()) + "\n", markup=False)
        console.print(self._examples())
        return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())

    def _parameters(self) -> Table:
        table = _table("parameter", "sets", "kind", "count", "values", "applies")
        for name, parameter in self.space.parameters.items():
            key = self.space.key_of(name)
            sets = "" if key is None else key if key != name else "itself"
            count = parameter.count()
            shown = "" if count is None else f"{count:,}" + (" each" if parameter.length else "")
            kind = f"ordered {parameter.kind}" if parameter.ordered else parameter.kind
            table.add_row(*map(Text, (name, sets, kind, shown, _values(parameter), _applies(parameter))))
        for key, expression in self.space.computed.items():
            table.add_row(*map(Text, ("", key, "computed", "", expression, "")))
        return table

    def _facts(self) -> list[str]:
        space, budget = self.space, self.space.budget
        match self.combinations:
            case None:
                combinations = "endless, a real number is among them"
            case count if count >= _COUNTED:
                combinations = f"more than {_COUNTED:,}"
            case count:
                combinations = f"{count:,}"
        lines = [f"combinations  {combinations}", f"possible      {self.possible} of {_TRIED} random draws"]
        lines += [f"              {count} refused: {reason}" for reason, count in self.reasons.items()]
        for place, constraint in enumerate(space.constraints):
            lines.append(f"{'' if place else 'constraints':<14}{constraint}")
        for place, metric in enumerate(space.metrics):
            worked_out = f" = {metric.expression}" if metric.expression else ""
            lines.append(f"{'' if place else 'sought':<14}{metric.direction} {metric.name}{worked_out}")
        rungs = ", ".join(f"{images:,}" for images in space.rungs)
        lines.append(f"{'job':<14}{space.job}; base {space.base.config or space.base.preset}")
        lines.append(f"{'budget':<14}{budget.trials} trials, compared after {rungs} images,")
        lines.append(f"{'':<14}{budget.trials * space.images:,} images at most")
        return lines

    def _examples(self) -> Table:
        names = list(self.examples[0][1]) if self.examples else []
        table = _table("example", "draw", *(name.replace("_", " ") for name in names))
        for place, (drawn, quantities) in enumerate(self.examples, 1):
            shown = ", ".join(f"{name.rpartition('.')[2]}={_short(value)}" for name, value in drawn.items())
            table.add_row(*map(Text, (str(place), shown, *(f"{quantities[name]:.4g}" for name in names))))
        return table


def describe(space: SearchSpace, examples: int = 3, seed: int = 0) -> Shown:
    """What `hvqd tune show` tells of a space.

    Raises:
        InputError: nothing in it is possible.
    """
    generator = np.random.default_rng(seed)
    reasons: Counter[str] = Counter()
    for _ in range(_TRIED):
        try:
            space.check(space.draw_any(generator), memory=None)
        except Refusal as refusal:
            reasons[refusal.reason] += 1
    asks_memory = any("memory_gib" in constraint for constraint in space.constraints)  # else it isn't worth the wait
    names = (*_QUANTITIES, "memory_gib") if asks_memory else _QUANTITIES
    found = []
    for _ in range(examples):
        drawn = space.draw(generator)
        quantities = Quantities(space.configuration(drawn), space.job, estimate_memory)
        found.append((drawn, {name: float(quantities[name]) for name in names}))
    possible = _TRIED - reasons.total()
    return Shown(space, space.count(_COUNTED), possible, dict(reasons.most_common()), tuple(found))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for place, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=place < 2 and "draw" not in columns)
    return table


def _values(parameter: Parameter) -> str:
    if parameter.kind == "choice":
        return ", ".join(_short(value) for value in parameter.domain)
    low, high = parameter.domain
    return f"{_short(low)} to {_short(high)}"


def _applies(parameter: Parameter) -> str:
    parts = []
    if parameter.when:
        parts.append(f"when {parameter.when}")
    if parameter.length:
        parts.append(f"length {parameter.length}")
    return ", ".join(parts) or "always"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(_short(item) for item in value) + "]"
    return value if isinstance(value, str) else json.dumps(value)
