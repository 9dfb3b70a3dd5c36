"""Samplers of Gaussian noise, with denoisers that know the law."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import get_args

import pytest
import torch
from torch import Tensor

from hvqd_model.diffusion.gaussian_samplers import (
    GaussianSamplerName,
    GaussianSamplerSettings,
    Stride,
    ddim_step,
    heun_step,
    sample_latents,
    sampling_times,
    solver_step,
)
from hvqd_model.diffusion.gaussian_schedules import EDMSchedule, GaussianSchedule, gaussian_schedule

SAMPLERS: tuple[GaussianSamplerName, ...] = get_args(GaussianSamplerName)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
MEAN, DEVIATION = 0.7, 0.4
ENOUGH = {"ddpm": 250, "ddim": 250, "dpm-solver++": 60, "heun": 60}
"""Steps after which the laws below are met within a percent."""


def test_there_are_four_samplers() -> None:
    assert len(SAMPLERS) == 4


# ---- one normal law, known exactly ----


def exact(x: Tensor, signal: float, noise: float) -> Tensor:
    """E[x_0 | x_t] for x_0 normal: D(x, s/a) of the blurred x/a, without dividing by a."""
    return (DEVIATION**2 * signal * x + noise**2 * MEAN) / (DEVIATION**2 * signal**2 + noise**2)


def strides_of(sigmas: Sequence[float]) -> list[Stride]:
    rates = [(1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)) for sigma in sigmas]
    return [Stride(*now, *then) for now, then in itertools.pairwise(rates)]


def final_deviation(step: Callable[[Tensor, Stride], Tensor], sigmas: Sequence[float]) -> float:
    """Every step is affine in x for this denoiser, so two paths tell how much of the start's deviation is left."""
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for stride in strides_of(sigmas):
        x = step(x, stride)
    return float(x[1] - x[0])


def roots(steps: int, lowest: float = 0.002, highest: float = 80.0) -> list[float]:
    share = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    ends = highest ** (1 / 7), lowest ** (1 / 7)
    return [*((ends[0] + share * (ends[1] - ends[0])) ** 7).tolist(), 0.0]


def even_in_log_ratio(steps: int) -> list[float]:
    """Between the noise levels of the linear schedule's thousandth and first of a thousand steps."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    power = (1 - betas).cumprod(0)
    sigmas = ((1 - power) / power).sqrt()
    ends = sigmas[-1].log(), sigmas[0].log()
    return [*torch.linspace(float(ends[0]), float(ends[1]), steps, dtype=torch.float64).exp().tolist(), 0.0]


@pytest.mark.parametrize(("steps", "deviation"), [(18, 0.423), (36, 0.405), (72, 0.401)])
def test_heun_with_the_exact_denoiser(steps: int, deviation: float) -> None:
    def step(x: Tensor, stride: Stride) -> Tensor:
        clean = exact(x, stride.signal, stride.noise)
        euler = ddim_step(x, clean, stride)
        if stride.next_noise == 0:
            return euler
        return heun_step(x, clean, exact(euler, stride.next_signal, stride.next_noise), euler, stride)

    assert final_deviation(step, roots(steps)) == pytest.approx(deviation, abs=1e-3)


@pytest.mark.parametrize(("steps", "deviation"), [(10, 0.305), (20, 0.351), (50, 0.380)])
def test_ddim_with_the_exact_denoiser(steps: int, deviation: float) -> None:
    def step(x: Tensor, stride: Stride) -> Tensor:
        return ddim_step(x, exact(x, stride.signal, stride.noise), stride)

    assert final_deviation(step, even_in_log_ratio(steps)) == pytest.approx(deviation, abs=1.5e-3)


@pytest.mark.parametrize(("steps", "deviation"), [(10, 0.411), (20, 0.405), (50, 0.400)])
def test_the_multistep_solver_with_the_exact_denoiser(steps: int, deviation: float) -> None:
    memory: list[tuple[Tensor, float]] = []

    def step(x: Tensor, stride: Stride) -> Tensor:
        clean = exact(x, stride.signal, stride.noise)
        before = memory[-1] if memory else None
        memory.append((clean, stride.log_ratio))
        return solver_step(x, clean, stride, before)

    assert final_deviation(step, even_in_log_ratio(steps)) == pytest.approx(deviation, abs=1.5e-3)


# ---- steps ----


def some_stride() -> tuple[Tensor, Tensor, Tensor, Stride]:
    generator = torch.Generator().manual_seed(0)
    x, clean, fresh = torch.randn(3, 1000, generator=generator, dtype=torch.float64)
    return x, clean, fresh, strides_of([2.0, 0.7])[0]


def test_ddim_with_all_its_noise_is_the_posterior_written_out() -> None:
    """Ho et al., eq. 7, between any two times."""
    x, clean, fresh, stride = some_stride()
    ratio = stride.signal / stride.next_signal
    between = stride.noise**2 - ratio**2 * stride.next_noise**2
    mean = (ratio * stride.next_noise**2 * x + stride.next_signal * between * clean) / stride.noise**2
    deviation = math.sqrt(between) * stride.next_noise / stride.noise
    torch.testing.assert_close(ddim_step(x, clean, stride, 1.0, fresh), mean + deviation * fresh)


def test_the_first_step_of_the_solver_is_that_of_ddim() -> None:
    x, clean, _, stride = some_stride()
    torch.testing.assert_close(solver_step(x, clean, stride, None), ddim_step(x, clean, stride))


def test_a_solver_whose_prediction_does_not_change_takes_the_step_of_ddim() -> None:
    x, clean, _, stride = some_stride()
    torch.testing.assert_close(solver_step(x, clean, stride, (clean, -2.0)), ddim_step(x, clean, stride))


def test_the_solver_is_exact_for_a_prediction_that_is_linear_in_the_log_ratio() -> None:
    """dx/dl = (s'/s) x + ... integrated finely: the second order misses nothing but the curvature of exp."""
    _, _, _, stride = some_stride()
    start, end = stride.log_ratio, math.log(stride.next_signal / stride.next_noise)

    def clean_at(ratio: float) -> Tensor:
        return torch.tensor([0.3 + 0.5 * ratio], dtype=torch.float64)

    x = torch.tensor([1.1], dtype=torch.float64)
    ratios = torch.linspace(start, end, 4001, dtype=torch.float64).tolist()
    fine = x.clone()
    for now, then in itertools.pairwise(ratios):
        piece = strides_of([math.exp(-now), math.exp(-then)])[0]
        fine = ddim_step(fine, clean_at((now + then) / 2), piece)
    second = solver_step(x, clean_at(start), stride, (clean_at(start - 0.5), start - 0.5))
    first = ddim_step(x, clean_at(start), stride)
    assert float((second - fine).abs()) < 0.25 * float((first - fine).abs())


@every_sampler
def test_a_step_from_pure_noise_needs_no_signal(sampler: GaussianSamplerName) -> None:
    schedule = gaussian_schedule("cosine", zero_terminal_snr=True)
    for steps in (1, 2, 7):
        (latents,) = one_level(sampler, schedule, steps, images=4)
        assert bool(latents.isfinite().all())


# ---- the whole walk ----


def one_level(
    sampler: GaussianSamplerName, schedule: GaussianSchedule, steps: int, images: int, eta: float = 0.0
) -> list[Tensor]:
    def predict(
        latents: Sequence[Tensor], level_times: Sequence[float], time: float, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        signal, noise = (float(rate) for rate in schedule.rates(torch.tensor(level_times[0], dtype=torch.float64)))
        return [exact(latents[0], signal, noise)]

    settings = GaussianSamplerSettings(steps, sampler, eta)
    return sample_latents(predict, [(1, 1)], torch.arange(images), schedule, 0.0, settings, lambda _, x: x)


def assert_same_law(found: Tensor, mean: float, deviation: float, slack: float = 0.0) -> None:
    """Mean and deviation within three standard errors (and the slack of finitely many steps)."""
    count = found.numel()
    assert abs(float(found.mean()) - mean) < 3 * deviation / count**0.5 + slack
    assert abs(float(found.std()) - deviation) < 3 * deviation / (2 * count) ** 0.5 + slack


@every_sampler
@pytest.mark.parametrize("name", ["linear", "scaled-linear", "cosine", "sigmoid", "edm"])
def test_every_sampler_recovers_a_normal_law_with_every_schedule(sampler: GaussianSamplerName, name: str) -> None:
    schedule = gaussian_schedule(name, zero_terminal_snr=name == "scaled-linear")  # type: ignore[arg-type]
    (latents,) = one_level(sampler, schedule, ENOUGH[sampler], images=8_000)
    assert latents.shape == (8_000, 1, 1) and latents.dtype == torch.float32
    assert_same_law(latents, MEAN, DEVIATION, slack=0.012)


def test_zero_terminal_snr_mends_the_mean_of_a_schedule_that_never_forgets_it() -> None:
    """Lin et al.: sampling starts without the seven percent of the picture that training always saw."""
    kept, mended = (gaussian_schedule("scaled-linear", stretched) for stretched in (False, True))
    assert float(one_level("ddim", kept, 200, 8_000)[0].mean()) < MEAN - 0.015
    assert_same_law(one_level("ddim", mended, 200, 8_000)[0], MEAN, DEVIATION, slack=0.012)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_share_of_fresh_noise_gives_the_same_law(eta: float) -> None:
    (latents,) = one_level("ddim", gaussian_schedule("cosine"), 200, images=8_000, eta=eta)
    assert_same_law(latents, MEAN, DEVIATION, slack=0.012)


def test_ddpm_is_ddim_with_all_its_noise() -> None:
    schedule = gaussian_schedule("cosine")
    assert torch.equal(one_level("ddpm", schedule, 9, 50)[0], one_level("ddim", schedule, 9, 50, eta=1.0)[0])


# ---- two levels ----


class Joint:
    """coarse x ~ N(0, 1); fine y = .8 x + .6 e: all is normal, so E[clean | noisy] is a matrix."""

    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)

    def __init__(self, schedule: GaussianSchedule) -> None:
        self.schedule = schedule
        self.calls: list[tuple[int, list[float], list[bool]]] = []

    def __call__(
        self, latents: Sequence[Tensor], level_times: Sequence[float], time: float, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        self.calls.append((len(latents), list(level_times), list(wanted)))
        count = len(latents)
        signal, noise = self.schedule.rates(torch.tensor(level_times, dtype=torch.float64))
        prior = self.covariance[:count, :count]
        noisy = signal[:, None] * prior * signal + torch.diag(noise.square())
        gain = (prior * signal) @ torch.linalg.inv(noisy)
        clean = torch.cat([level.flatten(1) for level in latents], 1).double() @ gain.T
        return [clean[:, level, None, None].float() if wanted[level] else None for level in range(count)]


def two_levels(
    joint: Joint,
    sampler: GaussianSamplerName,
    stagger: float,
    steps: int,
    images: int,
    known: Sequence[Tensor | None] | None = None,
    seeds: Tensor | None = None,
    **settings: float,
) -> list[Tensor]:
    return sample_latents(
        joint,
        [(1, 1), (1, 1)],
        torch.arange(images) if seeds is None else seeds,
        joint.schedule,
        stagger,
        GaussianSamplerSettings(steps, sampler, **settings),
        lambda _, x: x,
        known,
    )


@every_sampler
@pytest.mark.parametrize("stagger", [0.0, 0.5, 1.0])
def test_every_sampler_recovers_a_joint_law_of_two_levels(sampler: GaussianSamplerName, stagger: float) -> None:
    joint = Joint(gaussian_schedule("cosine"))
    images = 8_000
    coarse, fine = two_levels(joint, sampler, stagger, ENOUGH[sampler], images)
    for level in (coarse, fine):
        assert_same_law(level, 0.0, 1.0, slack=0.012)
    rest = fine - 0.8 * coarse
    assert_same_law(rest, 0.0, 0.6, slack=0.012)
    assert abs(float((rest * coarse).mean())) < 3 * 0.6 / images**0.5 + 0.012


@every_sampler
def test_given_levels_come_back_bitwise_and_the_rest_follows_them(sampler: GaussianSamplerName) -> None:
    for stagger in (0.0, 1.0):
        joint = Joint(gaussian_schedule("cosine"))
        given = torch.full((8_000, 1, 1), 1.5)
        coarse, fine = two_levels(joint, sampler, stagger, ENOUGH[sampler], 8_000, known=[given, None])
        assert torch.equal(coarse, given)
        assert_same_law(fine, 1.2, 0.6, slack=0.012)
        coarse, fine = two_levels(joint, sampler, stagger, ENOUGH[sampler], 8_000, known=[None, given])
        assert torch.equal(fine, given)
        assert_same_law(coarse, 1.2, 0.6, slack=0.012)


@every_sampler
def test_at_full_stagger_levels_of_pure_noise_stay_out_of_the_sequence(sampler: GaussianSamplerName) -> None:
    joint = Joint(gaussian_schedule("cosine"))
    two_levels(joint, sampler, 1.0, 8, 3)
    present = [count for count, _, _ in joint.calls]
    assert present == sorted(present) and set(present) == {1, 2}
    assert all(times[0] == 0 and wanted == [False, True] for count, times, wanted in joint.calls if count == 2)
    assert present.count(1) == present.count(2)


def test_given_levels_spend_no_steps() -> None:
    joint = Joint(gaussian_schedule("cosine"))
    two_levels(joint, "ddim", 1.0, 4, 3, known=[torch.zeros(3, 1, 1), None])
    assert [times for _, times, _ in joint.calls] == [pytest.approx([0.0, at]) for at in (1.0, 0.75, 0.5, 0.25)]


@every_sampler
def test_an_image_depends_on_its_own_seed_alone_to_the_bit(sampler: GaussianSamplerName) -> None:
    joint = Joint(gaussian_schedule("cosine"))
    seeds = torch.arange(64) * 7919 - 1000

    def draw_with(seeds: Tensor) -> Tensor:
        return torch.cat(two_levels(joint, sampler, 0.5, 6, 0, seeds=seeds), 1)

    latents = draw_with(seeds)
    assert torch.equal(draw_with(seeds), latents)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw_with(seeds[order]), latents[order])
    assert torch.equal(torch.cat([draw_with(part) for part in seeds.split(16)]), latents)
    assert len(latents.unique(dim=0)) == 64
    assert not torch.equal(draw_with(seeds + 1), latents)


def test_progress_counts_steps_whatever_they_cost() -> None:
    joint, reported = Joint(gaussian_schedule("cosine")), []
    sample_latents(
        joint,
        [(1, 1), (1, 1)],
        torch.arange(2),
        joint.schedule,
        0.0,
        GaussianSamplerSettings(5, "heun"),
        lambda _, x: x,
        progress=lambda done, steps: reported.append((done, steps)),
    )
    assert reported == [(step, 5) for step in range(1, 6)]
    assert len(joint.calls) == 9  # twice a step but for the last, which ends without noise


def test_a_level_is_finished_once_when_it_is_clean() -> None:
    joint, finished = Joint(gaussian_schedule("cosine")), []

    def finish(level: int, latents: Tensor) -> Tensor:
        finished.append(level)
        return latents.round()

    coarse, fine = sample_latents(
        joint, [(1, 1), (1, 1)], torch.arange(9), joint.schedule, 1.0, GaussianSamplerSettings(6, "heun"), finish
    )
    assert finished == [0, 1]
    assert torch.equal(coarse, coarse.round()) and torch.equal(fine, fine.round())


# ---- steps over time ----


@pytest.mark.parametrize("stagger", [0.0, 1.0])
def test_steps_of_a_curve_are_even_in_time(stagger: float) -> None:
    times = sampling_times(8, gaussian_schedule("cosine"), stagger, [False, False])
    torch.testing.assert_close(times, torch.linspace(1, 0, 9, dtype=torch.float64), rtol=0, atol=1e-11)


def test_steps_of_edm_are_even_in_the_seventh_root_of_the_noise_level() -> None:
    schedule = EDMSchedule()
    times = sampling_times(10, schedule, 0.0, [False, False])
    found = schedule.sigma(times[:-1]) ** (1 / 7)
    torch.testing.assert_close(found.diff(), found.diff().mean().expand(9), rtol=5e-3, atol=0)


@pytest.mark.parametrize("stagger", [0.0, 0.3, 1.0])
def test_steps_fall_from_where_the_first_unknown_level_begins_to_where_the_last_ends(stagger: float) -> None:
    for known in ([False] * 3, [True, False, False], [False, True, True]):
        for steps in (1, 2, 9):
            times = sampling_times(steps, EDMSchedule(), stagger, known)
            assert len(times) == steps + 1 and bool((times.diff() < 0).all())


BAD = {
    r"steps must be at least 1: 0": {"steps": 0},
    r"the sampler of Gaussian noise must be ddpm, ddim, dpm-solver\+\+ or heun: confidence": {"sampler": "confidence"},
    r"eta must be between 0 and 1: 1\.5": {"eta": 1.5},
    r"eta must be between 0 and 1: nan": {"eta": math.nan},
}


@pytest.mark.parametrize(("message", "setting"), BAD.items(), ids=["steps", "sampler", "eta", "nan"])
def test_a_setting_out_of_range_is_refused(message: str, setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"{message}\nhint: "):
        GaussianSamplerSettings(**setting)  # type: ignore[arg-type]
