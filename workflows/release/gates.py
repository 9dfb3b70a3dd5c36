"""Promotion gates: what a version must show, judged on figures and on what checks of its files found.

A figure that is missing or not a number fails its gate: what was not shown does not count. A version is compared with
the champion only under the same protocol; otherwise the comparison refuses, because it would compare different things.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvqd_model.metrics import KidParts, kid_difference
from workflows.config import GateSettings
from workflows.release.gate_files import OwnGate
from workflows.tables import aligned

Figures = Mapping[str, float]
Interval = tuple[float, float]
_RESAMPLES = 2_000
_SPREAD = 1.96
CHECKS = ("bundle_integrity", "lineage_complete", "licences", "smoke_test")
"""Gates that hold or not, without a figure."""


@dataclass(frozen=True)
class GateResult:
    """One gate's answer."""

    name: str
    """The setting in `gates`, or the name that a gate file gives."""
    figure: str
    """What was judged, as text."""
    value: float | None
    """None where it was not shown; a check has 1 or 0."""
    threshold: float
    passed: bool
    at_least: bool = True
    """Whether the threshold is a floor."""
    interval: Interval | None = None
    """95 %, where the figure has one."""
    is_check: bool = False
    """Whether it holds or not, without a figure."""

    def as_text(self) -> str:
        """One line for people."""
        verdict = "holds" if self.passed else "fails"
        if self.is_check:
            return f"{self.name} {verdict}: {self.figure}"
        return f"{self.name} {verdict}: {self.figure} is {self._shown}, {self._asked} is asked"

    @property
    def _shown(self) -> str:
        if self.value is None:
            return "not shown"
        return f"{self.value:.4g}" + (f" [{self._span}]" if self.interval else "")

    @property
    def _span(self) -> str:
        return "" if self.interval is None else f"{self.interval[0]:.4g} to {self.interval[1]:.4g}"

    @property
    def _asked(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.threshold:g}"

    def as_row(self) -> list[str]:
        """Name, verdict, value, interval, what is asked, and of what."""
        verdict = "holds" if self.passed else "FAILS"
        if self.is_check:
            return [self.name, verdict, "-", "", "", self.figure]
        value = "not shown" if self.value is None else f"{self.value:.4g}"
        return [self.name, verdict, value, self._span, self._asked, self.figure]

    def as_json(self) -> dict[str, Any]:
        """For records."""
        found = {
            "gate": self.name,
            "figure": self.figure,
            "value": self.value,
            "threshold": self.threshold,
            "passed": self.passed,
        }
        return {**found, "interval": list(self.interval)} if self.interval else found


def table(results: Sequence[GateResult]) -> str:
    """Every gate in a line, for people."""
    head = ["gate", "verdict", "value", "95 % interval", "asked", "of"]
    return aligned([head, *(result.as_row() for result in results)])


@dataclass(frozen=True)
class Growth:
    """How the KID of a version differs from the champion's, judged by the same protocol."""

    value: float
    """Relative to the champion's KID; above 0 is worse."""
    error: float | None
    """Standard error; None where a version keeps too little to tell."""


@dataclass(frozen=True)
class Inspection:
    """What a look at a version's files found (workflows.release.inspection); what was not looked at fails its gate."""

    problems: Mapping[str, str | None] = field(default_factory=dict)
    """By the name of a check: what is wrong, or None when it holds."""
    latency_seconds: float | None = None
    memory_gib: float | None = None


def judge(
    figures: Figures,
    gates: GateSettings,
    *,
    conditional: bool,
    own: Sequence[OwnGate] = (),
    intervals: Mapping[str, Interval] | None = None,
    against_champion: bool = False,
    growth: Growth | None = None,
    inspection: Inspection | None = None,
) -> list[GateResult]:
    """Every gate's answer, in the order of the settings, then those of a gate file; gates that are null are left out.

    Args:
        figures: the version's.
        conditional: whether the model was trained with classes.
        own: gates of a gate file over figures that are there (see `workflows.release.gate_files.check_measured`).
        intervals: of the figures that have one.
        against_champion: whether there is a champion to compare with.
        growth: how the KID compares; None when the two were not judged by one protocol.
        inspection: of the version's files.
    """
    found = [*_floors(figures, gates, conditional, intervals or {})]
    if against_champion:
        found += _regression(gates, growth)
    found += _checks(gates, inspection or Inspection())
    for gate in own:
        interval = (intervals or {}).get(gate.metric)
        for limit, at_least in ((gate.at_least, True), (gate.at_most, False)):
            found.append(_result(gate.name, gate.metric, gate.value(figures), limit, at_least, interval))
    return [result for result in found if result is not None]


def _floors(
    figures: Figures, gates: GateSettings, conditional: bool, intervals: Mapping[str, Interval]
) -> list[GateResult | None]:
    levels = [value for name, value in figures.items() if name.startswith("usage_")]
    usage = min(levels) if levels and all(map(math.isfinite, levels)) else None
    psnr = figures.get("psnr")

    def ratio(name: str, text: str, above: str, below: str, limit: float | None) -> GateResult | None:
        return _result(name, text, _ratio(figures, above, below), limit, name.startswith("min_"))

    def figure(name: str, text: str, limit: float | None, at_least: bool) -> GateResult | None:
        gate = f"{'min' if at_least else 'max'}_{name}"
        return _result(gate, text, figures.get(name), limit, at_least, intervals.get(name))

    found = [
        _result("min_psnr", "PSNR on test pictures, dB", psnr, gates.min_psnr, True, intervals.get("psnr")),
        _result("min_codebook_usage", "smallest codebook usage", usage, gates.min_codebook_usage, True),
        ratio(
            "max_kid_to_untrained",
            "KID of samples over KID of an untrained prior",
            "kid_samples",
            "kid_untrained",
            gates.max_kid_to_untrained,
        ),
        ratio(
            "max_kid_to_marginals",
            "KID of samples over KID of independent codes",
            "kid_samples",
            "kid_marginals",
            gates.max_kid_to_marginals,
        ),
    ]
    if conditional:
        found.append(
            ratio(
                "min_class_accuracy_to_chance",
                "accuracy of the asked class over chance",
                "class_accuracy_samples",
                "class_shuffled_samples",
                gates.min_class_accuracy_to_chance,
            )
        )
    return [
        *found,
        ratio(
            "min_coverage_to_reconstructions",
            "coverage of samples over coverage of reconstructions",
            "coverage_samples",
            "coverage_reconstructions",
            gates.min_coverage_to_reconstructions,
        ),
        ratio(
            "min_memorisation_ratio",
            "distance to training pictures of samples over that of held-out reconstructions",
            "nearest_train_samples",
            "nearest_train_reconstructions",
            gates.min_memorisation_ratio,
        ),
        figure("memorised_share", "share of samples that are near copies", gates.max_memorised_share, False),
        figure("class_coverage", "overlap with the data's classes, unasked", gates.min_class_coverage, True),
    ]


def _regression(gates: GateSettings, growth: Growth | None) -> list[GateResult | None]:
    what = "growth of KID over the champion's"
    how = "" if growth else " (judged by another protocol: `hvqd evaluate --model champion` judges it by this one)"
    grown, unsure = (growth.value, growth.error) if growth else (None, None)
    span = None if grown is None or unsure is None else (grown - _SPREAD * unsure, grown + _SPREAD * unsure)
    # Where nothing is compared, how sure the comparison would be is no question.
    error = gates.max_kid_regression_error if gates.max_kid_regression is not None else None
    return [
        _result("max_kid_regression", what + how, grown, gates.max_kid_regression, False, span),
        _result("max_kid_regression_error", f"standard error of the {what}", unsure, error, False),
    ]


def _checks(gates: GateSettings, inspection: Inspection) -> list[GateResult | None]:
    asked = {
        "bundle_integrity": (gates.bundle_integrity, "every byte is as it was registered"),
        "lineage_complete": (gates.lineage_complete, "data, models, codes and evaluation are known"),
        "licences": (gates.licences is not None, "the training pictures have allowed licences"),
        "smoke_test": (gates.smoke_test, "loads by itself and draws"),
    }
    assert tuple(asked) == CHECKS
    found: list[GateResult | None] = []
    for name, (wanted, text) in asked.items():
        if wanted:
            problem = inspection.problems.get(name, "was not looked at")
            found.append(GateResult(name, problem or text, float(problem is None), 1.0, problem is None, is_check=True))
    latency, memory = inspection.latency_seconds, inspection.memory_gib
    found.append(_result("max_latency_seconds", "seconds for one picture", latency, gates.max_latency_seconds, False))
    found.append(_result("max_memory_gib", "GiB to load and draw", memory, gates.max_memory_gib, False))
    return found


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


def _result(
    name: str,
    figure: str,
    value: float | None,
    threshold: float | None,
    at_least: bool,
    interval: Interval | None = None,
) -> GateResult | None:
    if threshold is None:
        return None
    if value is None or not math.isfinite(value):
        return GateResult(name, figure, None, threshold, False, at_least)
    passed = value >= threshold if at_least else value <= threshold
    return GateResult(name, figure, value, threshold, passed, at_least, interval)
