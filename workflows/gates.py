"""Promotion gates: what a version must show, judged on figures alone.

A figure that is missing or not a number fails its gate: what was not shown does not count. A version is compared with
the champion only under the same protocol; otherwise the comparison refuses, because it would compare different things.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hvqd_model.metrics import KidParts, kid_difference
from workflows.config import GateSettings

Figures = Mapping[str, float]
_RESAMPLES = 2_000


@dataclass(frozen=True)
class GateResult:
    """One gate's answer."""

    name: str
    """The setting in `gates`."""
    figure: str
    """What was judged, as text."""
    value: float | None
    threshold: float
    passed: bool

    def as_text(self) -> str:
        """One line for people."""
        value = "not shown" if self.value is None else f"{self.value:.4g}"
        verdict = "holds" if self.passed else "fails"
        side = "at least" if self.name.startswith("min_") else "at most"
        return f"{self.name} {verdict}: {self.figure} is {value}, {side} {self.threshold:g} is asked"

    def as_json(self) -> dict[str, Any]:
        """For records."""
        return {
            "gate": self.name,
            "figure": self.figure,
            "value": self.value,
            "threshold": self.threshold,
            "passed": self.passed,
        }


@dataclass(frozen=True)
class Growth:
    """How the KID of a version differs from the champion's, judged by the same protocol."""

    value: float
    """Relative to the champion's KID; above 0 is worse."""
    error: float | None
    """Standard error; None where a version keeps too little to tell."""


def judge(
    figures: Figures,
    gates: GateSettings,
    *,
    conditional: bool,
    against_champion: bool = False,
    growth: Growth | None = None,
) -> list[GateResult]:
    """Every gate's answer, in the order of the settings; gates that are null are left out.

    Args:
        figures: the version's.
        conditional: whether the model was trained with classes.
        against_champion: whether there is a champion to compare with.
        growth: how the KID compares; None when the two were not judged by one protocol.
    """
    levels = [value for name, value in figures.items() if name.startswith("usage_")]
    usage = min(levels) if levels and all(map(math.isfinite, levels)) else None
    asked: list[tuple[str, str, float | None, float | None]] = [
        ("min_psnr", "PSNR on test pictures, dB", figures.get("psnr"), gates.min_psnr),
        ("min_codebook_usage", "smallest codebook usage", usage, gates.min_codebook_usage),
        (
            "max_kid_to_untrained",
            "KID of samples over KID of an untrained prior",
            _ratio(figures, "kid_samples", "kid_untrained"),
            gates.max_kid_to_untrained,
        ),
        (
            "max_kid_to_marginals",
            "KID of samples over KID of independent codes",
            _ratio(figures, "kid_samples", "kid_marginals"),
            gates.max_kid_to_marginals,
        ),
    ]
    if conditional:
        accuracy = _ratio(figures, "class_accuracy_samples", "class_shuffled_samples")
        asked.append(
            (
                "min_class_accuracy_to_chance",
                "accuracy of the asked class over chance",
                accuracy,
                gates.min_class_accuracy_to_chance,
            )
        )
    if against_champion:
        what = "growth of KID over the champion's"
        how = "" if growth else " (judged by another protocol: `hvqd evaluate --model champion` judges it by this one)"
        grown, unsure = (growth.value, growth.error) if growth else (None, None)
        asked.append(("max_kid_regression", what + how, grown, gates.max_kid_regression))
        # Where nothing is compared, how sure the comparison would be is no question.
        error = gates.max_kid_regression_error if gates.max_kid_regression is not None else None
        asked.append(("max_kid_regression_error", f"standard error of the {what}", unsure, error))
    return [
        _result(name, figure, value, threshold) for name, figure, value, threshold in asked if threshold is not None
    ]


def _ratio(figures: Figures, above: str, below: str) -> float | None:
    if above not in figures or not 0 < figures.get(below, 0.0) < math.inf:
        return None
    return figures[above] / figures[below]


def growth_of(figures: Figures, champion: Figures, parts: KidParts | None, before: KidParts | None) -> Growth | None:
    """How the KID of the samples grew; None when one of the two shows none.

    Args:
        parts, before: of the version's and the champion's KID, where they are kept.
    """
    new, old = figures.get("kid_samples"), champion.get("kid_samples")
    if new is None or not old:
        return None
    # An unbiased estimate of KID may fall below zero, where a ratio would call the worse one better.
    value = (new - old) / abs(old)
    if parts is None or before is None:
        return Growth(value, None)
    _, error = kid_difference(parts, before, _RESAMPLES, seed=0)
    return Growth(value, error / abs(old))


def _result(name: str, figure: str, value: float | None, threshold: float) -> GateResult:
    if value is None or not math.isfinite(value):
        return GateResult(name, figure, None, threshold, False)
    passed = value >= threshold if name.startswith("min_") else value <= threshold
    return GateResult(name, figure, value, threshold, passed)
