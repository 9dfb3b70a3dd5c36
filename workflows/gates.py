"""Promotion gates: what a version must show, judged on figures alone.

A figure that is missing or not a number fails its gate: what was not shown does not count. A version is compared with
the champion only under the same protocol; otherwise the comparison refuses, because it would compare different things.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workflows.config import GateSettings

Figures = Mapping[str, float]


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


def judge(
    figures: Figures, champion: Figures | None, gates: GateSettings, *, conditional: bool, comparable: bool = True
) -> list[GateResult]:
    """Every gate's answer, in the order of the settings; gates that are null are left out.

    Args:
        figures: the version's.
        champion: the champion's; None when there is no champion to compare with.
        conditional: whether the model was trained with classes.
        comparable: whether both were evaluated by the same protocol on the same pictures.
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
    if champion is not None:
        regression = _regression(figures, champion) if comparable else None
        what = "growth of KID over the champion's" + (
            ""
            if comparable
            else " (judged by another protocol: `hvqd evaluate --model champion` judges it by this one)"
        )
        asked.append(("max_kid_regression", what, regression, gates.max_kid_regression))
    return [
        _result(name, figure, value, threshold) for name, figure, value, threshold in asked if threshold is not None
    ]


def _ratio(figures: Figures, above: str, below: str) -> float | None:
    if above not in figures or not 0 < figures.get(below, 0.0) < math.inf:
        return None
    return figures[above] / figures[below]


def _regression(figures: Figures, champion: Figures) -> float | None:
    new, old = figures.get("kid_samples"), champion.get("kid_samples")
    # An unbiased estimate of KID may fall below zero, where a ratio would call the worse one better.
    return None if new is None or not old else (new - old) / abs(old)


def _result(name: str, figure: str, value: float | None, threshold: float) -> GateResult:
    if value is None or not math.isfinite(value):
        return GateResult(name, figure, None, threshold, False)
    passed = value >= threshold if name.startswith("min_") else value <= threshold
    return GateResult(name, figure, value, threshold, passed)
