"""Gate files: what they say counts instead of the settings, and what they cannot say is refused by name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from infra.errors import InputError
from workflows.config import GateSettings
from workflows.release.gate_files import OwnGate, check_measured, read_gates
from workflows.release.gates import judge

FIGURES = {"psnr": 25.0, "class_accuracy_samples": 0.4, "class_accuracy_real": 0.8, "usage_0": 0.9, "usage_1": 0.7}


def written(folder: Path, text: str) -> GateSettings:
    """Settings whose gate file has this content."""
    path = folder / "gates.yaml"
    path.write_text(text)
    return GateSettings(file=str(path), min_psnr=10.0, min_codebook_usage=0.3)


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    settings = written(tmp_path, "min_psnr: 22\nmax_kid_to_untrained: null\nsmoke_test: false\nlicences: [MIT]\n")
    gates, own = read_gates(settings)
    changed = {"min_psnr": 22.0, "max_kid_to_untrained": None, "smoke_test": False, "licences": ("MIT",)}
    assert gates == settings.model_copy(update=changed) and own == ()
    assert read_gates(GateSettings()) == (GateSettings(), ())


def test_gates_of_its_own_are_asked_last_and_by_their_names(tmp_path: Path) -> None:
    text = (
        "sees classes: {metric: class_accuracy_samples / class_accuracy_real, at_least: 0.4}\n"
        "every level: {metric: min( usage_* ), at_least: 0.8}\n"
        "not too sharp: {metric: psnr, at_least: 20, at_most: 24.5}\n"
    )
    gates, own = read_gates(written(tmp_path, text))
    check_measured(own, FIGURES, "version 1 of hvqd")
    found = judge(FIGURES, gates, conditional=False, own=own, intervals={"psnr": (24.0, 26.0)})[-4:]
    assert [(gate.name, gate.value, gate.passed) for gate in found] == [
        ("sees classes", 0.5, True),
        ("every level", 0.7, False),
        ("not too sharp", 25.0, True),
        ("not too sharp", 25.0, False),
    ]
    assert found[3].as_text() == "not too sharp fails: psnr is 25 [24 to 26], at most 24.5 is asked"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_no_number_fails(value: float) -> None:
    for metric in ("psnr", "max(psn*)", "psnr / other", "other / psnr"):
        figures = {"psnr": value, "other": 1.0}
        (found,) = judge(figures, _nothing(), conditional=False, own=[OwnGate("x", metric, 0.0, None)])
        assert (found.value, found.passed) == (None, False)


def _nothing() -> GateSettings:
    fields = GateSettings.model_fields.items()
    return GateSettings.model_validate({name: False if isinstance(f.default, bool) else None for name, f in fields})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min_psrn: 20", r"unknown gate in .*gates\.yaml: min_psrn \(.*\)\nhint: did you mean min_psnr\?"),
        ("zzz: 20", r"unknown gate in .*: zzz \(.*\)\nhint: a gate of your own is NAME: \{metric: FIGURE"),
        ("min_psnr: high", r"min_psnr in .*: input should be a valid number, .*, not 'high'\nhint: `hvqd config show`"),
        ("smoke_test: 3", r"smoke_test in .*, not 3\nhint: "),
        ("a: {metric: psnr}", r"the gate a in .* cannot be read: .*\nhint: NAME: \{metric: FIGURE, at_least: NUMBER"),
        ("a: {at_least: 1}", r"the gate a in .* cannot be read"),
        ("a: {metric: psnr, at_leats: 1}", r"the gate a in .* cannot be read"),
        ("a: {metric: psnr + 1, at_least: 1}", r"the gate a in .* has no metric: psnr \+ 1\nhint: a figure, a ratio"),
        ("a: {metric: psnr, at_least: x}", r"the gate a in .* must ask for a number at_least: x\nhint: "),
        ("a: {metric: psnr, at_least: .nan}", r"must ask for a number at_least: nan\nhint: "),
        ("a: {metric: psnr, at_most: true}", r"must ask for a number at_most: True\nhint: "),
        ("- min_psnr", r"the gate file .* must hold gates by name, not a list\nhint: docs/release.md"),
        ("", r"the gate file .* must hold gates by name, not a NoneType\nhint: "),
        ("a: [", r"the gate file .* is not valid YAML: .*\nhint: "),
    ],
)
def test_what_a_file_cannot_say_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_gates(written(tmp_path, text))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such gate file: .*/absent\.yaml\nhint: docs/release\.md shows one"):
        read_gates(GateSettings(file=str(tmp_path / "absent.yaml")))
    with pytest.raises(InputError, match=r"cannot read the gate file .*\nhint: give a YAML file"):
        read_gates(GateSettings(file=str(tmp_path)))


@pytest.mark.parametrize(
    ("metric", "missing", "hint"),
    [
        ("psnrr", "psnrr", r"did you mean psnr\?"),
        ("psnr / zzz", "zzz", "`hvqd models show VERSION`"),
        ("min(memorisation_*)", r"memorisation_\*", "`hvqd models show VERSION`"),
    ],
)
def test_a_metric_that_nobody_measured_is_refused_by_name(metric: str, missing: str, hint: str) -> None:
    message = rf"the gate g asks for the figure {missing}, which nobody measured for version 3 of hvqd\nhint: {hint}"
    with pytest.raises(InputError, match=message):
        check_measured([OwnGate("g", metric, 1.0, None)], FIGURES, "version 3 of hvqd")
