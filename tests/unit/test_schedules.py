"""The cumulative curves of the noise, and the check that they are a Markov chain's."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from torch import Tensor

from hvqd_model.diffusion.schedules import (
    ComplementCurve,
    CosineCurve,
    Curve,
    LinearCurve,
    Schedule,
    ScheduleName,
    TableCurve,
    absorbing,
    mask_and_replace,
    tabulated,
)

TIMES = torch.linspace(0, 1, 101, dtype=torch.float64)
CURVES = {
    "linear": LinearCurve(),
    "cosine": CosineCurve(),
    "table": TableCurve((1.0, 0.9, 0.5, 0.45, 0.0)),
    "complement": ComplementCurve(CosineCurve(), 0.7),
}
SCHEDULES = {
    "absorbing linear": absorbing("linear"),
    "absorbing cosine": absorbing("cosine"),
    "absorbing table": tabulated((1.0, 0.9, 0.3, 0.0), (0.0, 0.1, 0.7, 1.0)),
    "mixed linear": mask_and_replace(0.1, "linear"),
    "mixed cosine": mask_and_replace(0.4, "cosine"),
    "mixed table": tabulated((1.0, 0.8, 0.4, 0.0), (0.0, 0.1, 0.3, 0.6)),
    "uniform": mask_and_replace(1.0, "linear"),
}


def at(time: float) -> Tensor:
    return torch.tensor(time, dtype=torch.float64)


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_the_inverse_of_a_curve_finds_the_time(curve: Curve) -> None:
    torch.testing.assert_close(curve.inverse(curve.value(TIMES)), TIMES, atol=1e-7, rtol=0)


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_the_slope_of_a_curve_is_its_difference_quotient(curve: Curve) -> None:
    inner, step = TIMES[:-1] + 0.0037, 1e-6
    quotient = (curve.value(inner + step) - curve.value(inner - step)) / (2 * step)
    torch.testing.assert_close(curve.slope(inner), quotient, atol=1e-7, rtol=1e-7)


def test_the_inverse_of_a_flat_piece_is_its_first_time() -> None:
    curve = TableCurve((1.0, 0.5, 0.5, 0.0))
    assert float(curve.inverse(at(0.5))) == pytest.approx(1 / 3, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_goes_from_clean_to_pure_noise(schedule: Schedule) -> None:
    assert float(schedule.kept.value(at(0))) == 1
    assert float(schedule.masked.value(at(0))) == 0
    assert float(schedule.kept.value(at(1))) == 0
    total = schedule.kept.value(TIMES) + schedule.masked.value(TIMES) + schedule.replaced(TIMES)
    torch.testing.assert_close(total, torch.ones_like(TIMES))


@pytest.mark.parametrize(("name", "schedule"), SCHEDULES.items(), ids=SCHEDULES)
def test_a_schedule_knows_whether_it_masks_and_replaces(name: str, schedule: Schedule) -> None:
    assert schedule.is_absorbing == name.startswith("absorbing")
    assert schedule.has_masks == (name != "uniform")


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name.startswith("absorbing")])
def test_absorbing_noise_replaces_nothing_whatever_the_rounding(name: str) -> None:
    assert float(SCHEDULES[name].replaced(torch.rand(10_000, dtype=torch.float64)).max()) == 0


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_bound_weight_is_the_rate_at_which_a_mask_is_lifted(name: ScheduleName) -> None:
    schedule, times = absorbing(name), TIMES[1:-1]
    expected = {
        "linear": 1 / times,
        "cosine": (math.pi / 2) * torch.cos(math.pi / 2 * times) / torch.sin(math.pi / 2 * times),
    }[name]
    torch.testing.assert_close(schedule.bound_weight(times), expected)


INVALID = {
    "kept rises": ((1.0, 0.2, 0.5, 0.0), (0.0, 0.5, 0.5, 1.0), "kept never rises"),
    "masked falls": ((1.0, 0.5, 0.2, 0.0), (0.0, 0.5, 0.4, 1.0), "masked never falls"),
    "replacement is undone": ((1.0, 0.4, 0.35, 0.0), (0.0, 0.0, 0.6, 1.0), r"kept / \(1 - masked\) never rises"),
    "too much": ((1.0, 0.7, 0.0), (0.0, 0.5, 1.0), "their sum stay within 0 and 1"),
    "negative": ((1.0, -0.1, 0.0), (0.0, 0.5, 1.0), "stay within 0 and 1"),
    "starts noisy": ((0.9, 0.5, 0.0), (0.0, 0.5, 1.0), "kept starts at 1"),
    "ends readable": ((1.0, 0.5, 0.1), (0.0, 0.5, 0.9), "ends at 0"),
    "starts masked": ((1.0, 0.5, 0.0), (0.1, 0.5, 1.0), "masked starts at 0"),
}


@pytest.mark.parametrize(("kept", "masked", "message"), INVALID.values(), ids=INVALID)
def test_a_schedule_that_is_no_markov_chain_is_refused(
    kept: tuple[float, ...], masked: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"{message}(.|\n)*hint: let kept fall"):
        tabulated(kept, masked)


def test_a_valid_table_has_no_negative_transition() -> None:
    schedule = SCHEDULES["mixed table"]
    s, t = torch.combinations(TIMES[:-1], 2).unbind(1)
    stay = schedule.kept.value(t) / schedule.kept.value(s)
    unmasked = (1 - schedule.masked.value(t)) / (1 - schedule.masked.value(s))
    assert float(stay.max()) <= 1 + 1e-12
    assert float((unmasked - stay).min()) >= -1e-12
    assert float(unmasked.max()) <= 1 + 1e-12


def test_a_share_that_is_no_probability_is_refused() -> None:
    with pytest.raises(ValueError, match=r"uniform_share must be between 0 and 1: 1\.5\nhint: "):
        mask_and_replace(1.5)
    with pytest.raises(ValueError, match=r"uniform_share must be between 0 and 1: -0\.1\nhint: "):
        mask_and_replace(-0.1)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule must be linear or cosine: cubic\nhint: "):
        mask_and_replace(0.1, cast(ScheduleName, "cubic"))


def test_tables_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tables of one length, at least 2: 3 and 2\nhint: "):
        tabulated((1.0, 0.5, 0.0), (0.0, 1.0))
