"""Promotion gates: each holds or fails by its own figure, and what was not shown does not count."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from hvqd_model.metrics import KidParts
from workflows.config import GateSettings
from workflows.release.gates import CHECKS, GateResult, Growth, Inspection, growth_of, judge, table

GOOD = {
    "psnr": 24.0,
    "usage_0": 0.9,
    "usage_1": 1.0,
    "kid_samples": 0.1,
    "kid_untrained": 0.5,
    "kid_marginals": 0.4,
    "class_accuracy_samples": 0.6,
    "class_shuffled_samples": 0.1,
    "coverage_samples": 0.2,
    "coverage_reconstructions": 0.8,
    "nearest_train_samples": 36.0,
    "nearest_train_reconstructions": 34.0,
    "memorised_share": 0.01,
    "class_coverage": 0.9,
}
INTACT = Inspection(dict.fromkeys(CHECKS), latency_seconds=1.0, memory_gib=2.0)
GATES = GateSettings(
    min_psnr=23.0,
    min_codebook_usage=0.8,
    max_kid_to_untrained=0.4,
    max_kid_to_marginals=0.5,
    min_class_accuracy_to_chance=3.0,
    max_kid_regression=0.1,
    min_coverage_to_reconstructions=0.2,
    min_memorisation_ratio=1.0,
    max_memorised_share=0.05,
    min_class_coverage=0.5,
    licences=("MIT",),
)
FILES = {**dict.fromkeys((name for name in CHECKS if name != "licences"), False), "licences": None}
FIGURES_ALONE = GATES.model_copy(update={**FILES, "max_latency_seconds": None, "max_memory_gib": None})
"""The gates over figures of the evaluation."""


PARTS = KidParts(within=1.0, across=(3.0, 5.0, 4.0), counts=(3, 4, 4), set_error=0.001)
SAME = Growth(0.0, 0.02)
REGRESSION = ("max_kid_regression", "max_kid_regression_error")


def failed(results: list[GateResult]) -> list[str]:
    return [result.name for result in results if not result.passed]


def test_every_setting_is_a_gate_in_its_order() -> None:
    results = judge(GOOD, GATES, conditional=True, against_champion=True, growth=SAME, inspection=INTACT)
    asked = [name for name in GateSettings.model_fields if name != "file"]
    assert [result.name for result in results] == asked and len(results) == 17
    assert failed(results) == []


@pytest.mark.parametrize(
    ("gate", "figures"),
    [
        ("min_psnr", {"psnr": 22.9}),
        ("min_codebook_usage", {"usage_0": 0.79}),
        ("min_codebook_usage", {"usage_1": 0.0}),
        ("max_kid_to_untrained", {"kid_untrained": 0.24}),
        ("max_kid_to_marginals", {"kid_marginals": 0.19}),
        ("min_class_accuracy_to_chance", {"class_accuracy_samples": 0.29}),
        ("min_coverage_to_reconstructions", {"coverage_samples": 0.159}),
        ("min_memorisation_ratio", {"nearest_train_samples": 33.9}),
        ("max_memorised_share", {"memorised_share": 0.06}),
        ("min_class_coverage", {"class_coverage": 0.4}),
    ],
)
def test_a_figure_below_what_is_asked_fails_its_gate_alone(gate: str, figures: dict[str, float]) -> None:
    assert failed(judge({**GOOD, **figures}, FIGURES_ALONE, conditional=True, against_champion=True, growth=SAME)) == [
        gate
    ]


def test_exactly_what_is_asked_holds() -> None:
    gates = GateSettings(min_psnr=24.0, min_codebook_usage=0.9, max_kid_to_untrained=0.2)
    results = judge({**GOOD, "kid_untrained": 0.5}, gates, conditional=False)
    assert {result.name: result.passed for result in results if result.name in ("min_psnr", "min_codebook_usage")} == {
        "min_psnr": True,
        "min_codebook_usage": True,
    }


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", sorted(GOOD))
def test_a_figure_that_is_missing_or_no_number_fails_every_gate_it_enters(name: str, value: float | None) -> None:
    figures = {key: number for key, number in GOOD.items() if key != name}
    if value is not None:
        figures[name] = value
    elif name.startswith("usage_"):  # levels are what the figures say they are; without any there is no usage
        figures = {key: number for key, number in figures.items() if not key.startswith("usage_")}
    enters = {
        "psnr": {"min_psnr"},
        "usage_0": {"min_codebook_usage"},
        "usage_1": {"min_codebook_usage"},
        "kid_samples": {"max_kid_to_untrained", "max_kid_to_marginals", *REGRESSION},
        "kid_untrained": {"max_kid_to_untrained"},
        "kid_marginals": {"max_kid_to_marginals"},
        "class_accuracy_samples": {"min_class_accuracy_to_chance"},
        "class_shuffled_samples": {"min_class_accuracy_to_chance"},
        "coverage_samples": {"min_coverage_to_reconstructions"},
        "coverage_reconstructions": {"min_coverage_to_reconstructions"},
        "nearest_train_samples": {"min_memorisation_ratio"},
        "memorised_share": {"max_memorised_share"},
        "class_coverage": {"min_class_coverage"},
        "nearest_train_reconstructions": {"min_memorisation_ratio"},
    }
    growth = growth_of(figures, GOOD, PARTS, PARTS)
    results = judge(figures, FIGURES_ALONE, conditional=True, against_champion=True, growth=growth)
    expected = enters[name] - ({REGRESSION[1]} if growth is not None else set())  # the champion's KID alone scales it
    assert set(failed(results)) == expected


def test_gates_that_are_null_and_gates_that_do_not_apply_are_left_out() -> None:
    nothing = GateSettings.model_validate(
        {name: False if isinstance(field.default, bool) else None for name, field in GateSettings.model_fields.items()}
    )
    assert judge({}, nothing, conditional=True, against_champion=True) == []
    names = [result.name for result in judge(GOOD, FIGURES_ALONE, conditional=False)]
    assert "min_class_accuracy_to_chance" not in names and "max_kid_regression" not in names and len(names) == 8


@pytest.mark.parametrize(
    ("new", "old", "growth"),
    [
        (0.11, 0.1, 0.1),
        (0.12, 0.1, 0.2),
        (0.05, 0.1, -0.5),
        (0.1, -0.01, 11.0),
        (-0.02, -0.01, -1.0),
        (-0.1, 0.1, -2.0),
    ],
)
def test_a_larger_kid_than_the_champions_is_growth_whatever_the_signs(new: float, old: float, growth: float) -> None:
    found = growth_of({"kid_samples": new}, {"kid_samples": old}, PARTS, PARTS)
    result = judge(GOOD, FIGURES_ALONE, conditional=True, against_champion=True, growth=found)[-2]
    assert result.name == "max_kid_regression" and result.value == pytest.approx(growth)
    assert result.passed == (result.value <= 0.1)


def test_a_baseline_without_distance_shows_nothing() -> None:
    for name in ("kid_untrained", "kid_marginals"):
        for value in (0.0, -0.1):
            gate = name.replace("kid_", "max_kid_to_")
            assert failed(judge({**GOOD, name: value}, FIGURES_ALONE, conditional=True)) == [gate]


def test_a_champion_judged_by_another_protocol_is_not_compared() -> None:
    result, error = judge(GOOD, FIGURES_ALONE, conditional=True, against_champion=True)[-2:]
    assert (result.name, result.value, result.passed) == ("max_kid_regression", None, False)
    assert (error.name, error.value, error.passed) == ("max_kid_regression_error", None, False)
    assert "judged by another protocol: `hvqd evaluate --model champion`" in result.as_text()


def test_a_comparison_that_is_not_sure_enough_is_refused() -> None:
    """The error is that of the samples' number and of the test concepts, relative to the champion's KID."""
    noisy = replace(PARTS, set_error=0.009)
    for parts, sure in ((PARTS, True), (noisy, False)):
        found = growth_of(GOOD, GOOD, parts, parts)
        assert found is not None and found.error == pytest.approx(parts.set_error * 2**0.5 / 0.1)
        refused = failed(judge(GOOD, FIGURES_ALONE, conditional=True, against_champion=True, growth=found))
        assert refused == ([] if sure else ["max_kid_regression_error"])
    unknown = growth_of(GOOD, GOOD, PARTS, None)
    assert unknown == Growth(0.0, None)
    assert failed(judge(GOOD, FIGURES_ALONE, conditional=True, against_champion=True, growth=unknown)) == [
        REGRESSION[1]
    ]
    indifferent = FIGURES_ALONE.model_copy(update={"max_kid_regression": None})
    assert failed(judge(GOOD, indifferent, conditional=True, against_champion=True)) == []


def test_an_answer_is_one_line_for_people_and_json_for_records() -> None:
    low, missing = judge({"psnr": 22.94321}, GATES, conditional=False)[:2]
    assert low.as_text() == "min_psnr fails: PSNR on test pictures, dB is 22.94, at least 23 is asked"
    assert missing.as_text() == "min_codebook_usage fails: smallest codebook usage is not shown, at least 0.8 is asked"
    held = judge(GOOD, GATES, conditional=True)[2]
    assert held.as_text().startswith("max_kid_to_untrained holds: ") and held.as_text().endswith("at most 0.4 is asked")
    record = json.loads(json.dumps([low.as_json(), missing.as_json()], allow_nan=False))
    assert record[0] == {
        "gate": "min_psnr",
        "figure": "PSNR on test pictures, dB",
        "value": 22.94321,
        "threshold": 23.0,
        "passed": False,
    }
    assert record[1]["value"] is None


def test_a_check_that_was_not_made_or_found_something_fails_its_gate_alone() -> None:
    for name in CHECKS:
        broken = replace(INTACT, problems={**INTACT.problems, name: "prior/weights.safetensors has been changed"})
        results = judge(GOOD, GATES, conditional=True, inspection=broken)
        assert failed(results) == [name]
        line = next(result.as_text() for result in results if result.name == name)
        assert line == f"{name} fails: prior/weights.safetensors has been changed"
    unseen = judge(GOOD, GATES, conditional=True)
    assert failed(unseen) == [*CHECKS, "max_latency_seconds", "max_memory_gib"]
    assert unseen[-3].as_text() == "smoke_test fails: was not looked at"
    for slow in (replace(INTACT, latency_seconds=121.0), replace(INTACT, memory_gib=17.0)):
        assert len(failed(judge(GOOD, GATES, conditional=True, inspection=slow))) == 1


def test_intervals_are_shown_and_recorded_and_decide_nothing() -> None:
    result = judge(GOOD, GATES, conditional=False, intervals={"psnr": (22.0, 26.0)})[0]
    assert result.as_text() == "min_psnr holds: PSNR on test pictures, dB is 24 [22 to 26], at least 23 is asked"
    assert result.as_json()["interval"] == [22.0, 26.0]
    grown = judge(GOOD, FIGURES_ALONE, conditional=True, against_champion=True, growth=Growth(0.05, 0.02))[-2]
    assert (
        grown.interval == pytest.approx((0.0108, 0.0892))
        and "interval" not in judge(GOOD, GATES, conditional=False)[1].as_json()
    )


def test_the_table_has_every_gate_in_a_line() -> None:
    results = judge({**GOOD, "psnr": 20.0}, GATES, conditional=True, inspection=INTACT)
    lines = table(results).splitlines()
    assert len(lines) == 1 + len(results) and lines[0].split()[:3] == ["gate", "verdict", "value"]
    assert lines[1].split()[:3] == ["min_psnr", "FAILS", "20"] and lines[2].split()[:3] == [
        "min_codebook_usage",
        "holds",
        "0.9",
    ]
    assert lines[lines.index(next(line for line in lines if line.startswith("smoke_test")))].split()[1:3] == [
        "holds",
        "-",
    ]
