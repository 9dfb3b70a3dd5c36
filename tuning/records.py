"""What a sweep knows of its trials: the plain values that the searcher, the analysis and the report work on.

A trial's curve is a list of rungs, a rung what was measured after so many images. Nothing here knows Ray or MLflow.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

Status = Literal["waiting", "running", "finished", "stopped", "failed", "refused"]
"""`stopped` is stopped early because others were better, `refused` an impossible configuration that cost nothing."""


@dataclass(frozen=True)
class Rung:
    """What was measured after so many images."""

    images: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a sweep."""

    number: int
    drawn: Mapping[str, Any]
    """What the search saw: parameter -> value; parameters that do not apply are absent."""
    settings: Mapping[str, Any]
    """Dotted configuration key -> value, all that differs from the space's base."""
    status: Status = "waiting"
    rungs: tuple[Rung, ...] = ()
    """By rising images."""
    seconds: float = 0.0
    """Time that its workers ran."""
    error: str | None = None
    """Why it failed or was refused."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else is known: parameters, bits, workers, folder, MLflow run."""

    @property
    def images(self) -> int:
        """Images trained on so far."""
        return self.rungs[-1].images if self.rungs else 0

    def value(self, metric: str, images: int | None = None) -> float | None:
        """The metric at the last rung that has it, or at the last such rung of at most `images`; None without one.

        A figure that is not finite counts as none.
        """
        for rung in reversed(self.rungs):
            if images is not None and rung.images > images:
                continue
            found = rung.metrics.get(metric)
            if found is not None and math.isfinite(found):
                return float(found)
        return None

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The way back."""
        rungs = tuple(Rung(int(rung["images"]), dict(rung["metrics"])) for rung in value.get("rungs", ()))
        return cls(**{**value, "rungs": rungs})


def dump_records(records: Iterable[TrialRecord]) -> str:
    """JSON, a trial a line, so that two sweeps can be compared by eye."""
    return "[\n" + ",\n".join(json.dumps(record.as_json(), ensure_ascii=False) for record in records) + "\n]\n"


def parse_records(text: str) -> list[TrialRecord]:
    """The way back from `dump_records`."""
    return [TrialRecord.from_json(value) for value in json.loads(text)]
