"""Gaussian noise: schedules, predictions and weights."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from hvqd_model.config import GaussianScheduleName, Prediction
from hvqd_model.diffusion.gaussian import add_noise, loss_weight, target, to_clean, to_noise
from hvqd_model.diffusion.gaussian_schedules import (
    CurveSchedule,
    EDMSchedule,
    GaussianSchedule,
    gaussian_schedule,
    root_progress,
)

NAMES: tuple[GaussianScheduleName, ...] = get_args(GaussianScheduleName)
CURVES: tuple[GaussianScheduleName, ...] = ("linear", "scaled-linear", "cosine", "sigmoid")
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
SCHEDULES: dict[str, GaussianSchedule] = {
    **{name: gaussian_schedule(name) for name in NAMES},
    **{f"{name}, zero terminal SNR": gaussian_schedule(name, True) for name in CURVES},
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
TIMES = torch.linspace(0, 1, 2001, dtype=torch.float64)


def at(schedule: GaussianSchedule, time: float) -> tuple[float, float]:
    signal, noise = schedule.rates(torch.tensor(time, dtype=torch.float64))
    return float(signal), float(noise)


def test_there_are_five_schedules_and_three_predictions() -> None:
    assert len(NAMES) == 5 and len(PREDICTIONS) == 3 and len(SCHEDULES) == 9


@every_schedule
def test_variance_is_preserved_and_noise_rises_from_none(schedule: GaussianSchedule) -> None:
    signal, noise = schedule.rates(TIMES)
    torch.testing.assert_close(signal.square() + noise.square(), torch.ones_like(signal), rtol=0, atol=1e-12)
    assert (float(signal[0]), float(noise[0])) == (1.0, 0.0)
    assert bool((noise.diff() > 0).all()) and bool((signal.diff() < 0).all())


@every_schedule
def test_the_root_of_the_noise_level_rises_with_time(schedule: GaussianSchedule) -> None:
    progress = root_progress(schedule, TIMES)
    assert float(progress[0]) == 0 and 0.5 < float(progress[-1]) <= 1
    assert bool((progress.diff() > 0).all())


@pytest.mark.parametrize("name", CURVES)
def test_zero_terminal_snr_leaves_no_signal_and_the_start_as_it_was(name: GaussianScheduleName) -> None:
    stretched, plain = CurveSchedule(name, True), CurveSchedule(name)
    assert at(stretched, 1.0) == (0.0, 1.0)
    assert 0 < at(plain, 1.0)[0] < 0.1
    assert at(stretched, 1e-3)[0] == pytest.approx(at(plain, 1e-3)[0], abs=1e-4)


@pytest.mark.parametrize("name", ["linear", "scaled-linear"])
def test_the_limits_of_the_thousand_steps_agree_with_their_products(name: GaussianScheduleName) -> None:
    """The published tables of beta, multiplied out."""
    steps = 1000
    if name == "linear":
        betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
    else:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64).square()
    products = (1 - betas).cumprod(0)
    signal, _ = CurveSchedule(name).rates(torch.arange(1, steps + 1, dtype=torch.float64) / steps)
    torch.testing.assert_close(signal.square().log(), products.log(), rtol=0.03, atol=1e-3)


def test_the_cosine_is_the_published_one() -> None:
    times = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    f = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    signal, _ = CurveSchedule("cosine", True).rates(times)
    torch.testing.assert_close(signal.square(), f, rtol=1e-12, atol=0)


def test_the_sigmoid_is_symmetric_in_power() -> None:
    power = CurveSchedule("sigmoid", True).rates(TIMES)[0].square()
    torch.testing.assert_close(power + power.flip(0), torch.ones_like(power), rtol=0, atol=1e-12)


def test_edm_meets_log_normal_noise_in_training_and_steps_by_the_seventh_root() -> None:
    schedule = EDMSchedule()
    logarithm = schedule.sigma((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000).log()
    assert float(logarithm.mean()) == pytest.approx(schedule.mean, abs=1e-3)
    assert float(logarithm.std()) == pytest.approx(schedule.deviation, abs=1e-3)
    assert [float(schedule.sigma(torch.tensor(time))) for time in (0.0, 1.0)] == pytest.approx([0.004, 160.0])
    middle = (0.5 * (160 ** (1 / 7) + 0.004 ** (1 / 7))) ** 7
    quantile = (math.log(middle) - schedule.mean) / schedule.deviation
    time = torch.special.ndtr(torch.tensor(quantile, dtype=torch.float64))
    assert float(root_progress(schedule, time)) == pytest.approx(0.5, abs=1e-3)


def test_edm_with_v_prediction_is_its_published_preconditioning() -> None:
    """c_skip, c_out and c_in of table 1, and the weight of the loss, at a data deviation of 1; F is minus v."""
    generator = torch.Generator().manual_seed(0)
    clean, noise, network = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    signal, strength = EDMSchedule().rates(torch.linspace(0.01, 0.99, 50, dtype=torch.float64))
    sigma = strength / signal
    blurred = clean + sigma * noise
    skip, out, into = 1 / (1 + sigma**2), sigma / (1 + sigma**2).sqrt(), 1 / (1 + sigma**2).sqrt()
    noisy = add_noise(clean, noise, signal, strength)
    torch.testing.assert_close(noisy, into * blurred)
    torch.testing.assert_close(to_clean("v", network, noisy, signal, strength), skip * blurred - out * network)
    weight = (sigma**2 + 1) / sigma**2 * out**2  # lambda c_out^2 is what the error of F is weighted with
    torch.testing.assert_close(weight, loss_weight("v", signal, strength, None))


def inputs(schedule: GaussianSchedule) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, 200, generator=generator)
    signal, strength = schedule.rates(torch.linspace(0.02, 0.98, 200, dtype=torch.float64))
    return clean, noise, signal, strength, add_noise(clean, noise, signal, strength)


@every_prediction
@every_schedule
def test_predictions_go_round(schedule: GaussianSchedule, prediction: Prediction) -> None:
    clean, noise, signal, strength, noisy = inputs(schedule)
    clean, noise = clean.double(), noise.double()
    noisy = add_noise(clean, noise, signal, strength)
    output = target(prediction, clean, noise, signal, strength)
    torch.testing.assert_close(to_clean(prediction, output, noisy, signal, strength), clean, rtol=0, atol=1e-9)
    torch.testing.assert_close(to_noise(prediction, output, noisy, signal, strength), noise, rtol=0, atol=1e-9)


def test_v_goes_round_in_float32_within_a_hundred_thousandth() -> None:
    for schedule in SCHEDULES.values():
        clean, noise, signal, strength, noisy = inputs(schedule)
        signal, strength = signal.float(), strength.float()
        output = target("v", clean, noise, signal, strength)
        assert float((to_clean("v", output, noisy, signal, strength) - clean).abs().max()) < 1e-5
        assert float((to_noise("v", output, noisy, signal, strength) - noise).abs().max()) < 1e-5


@every_prediction
def test_min_snr_weighs_the_error_of_x0_by_the_capped_ratio_whatever_is_predicted(prediction: Prediction) -> None:
    clean, noise, signal, strength, noisy = inputs(SCHEDULES["cosine"])
    clean, noise = clean.double(), noise.double()
    noisy = add_noise(clean, noise, signal, strength)
    output = target(prediction, clean, noise, signal, strength) + 0.1
    by_output = loss_weight(prediction, signal, strength, 5.0) * 0.1**2
    error = (to_clean(prediction, output, noisy, signal, strength) - clean).square()
    ratio = (signal / strength).square().clamp_max(5.0)
    torch.testing.assert_close(by_output, ratio * error, rtol=1e-9, atol=1e-12)


@every_prediction
def test_weights_at_the_ends_are_finite(prediction: Prediction) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for gamma in (None, 5.0):
        weight = loss_weight(prediction, 1 - ends, ends, gamma)
        assert bool(weight.isfinite().all()) and bool((weight >= 0).all())


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule must be linear, scaled-linear, cosine or sigmoid: square\nhint: "):
        gaussian_schedule("square")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"zero_terminal_snr(.)*schedule=edm(.)*\nhint: zero_terminal_snr=false"):
        gaussian_schedule("edm", zero_terminal_snr=True)
    one = torch.ones(1)
    for call in (
        lambda: target("noise", one, one, one, one),  # type: ignore[arg-type]
        lambda: to_clean("noise", one, one, one, one),  # type: ignore[arg-type]
        lambda: to_noise("noise", one, one, one, one),  # type: ignore[arg-type]
        lambda: loss_weight("noise", one, one, 5.0),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"prediction must be epsilon, x0 or v: noise\nhint: v"):
            call()
