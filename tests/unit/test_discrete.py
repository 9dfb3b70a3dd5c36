"""Mask-and-replace noise against full transition matrices, and its bound."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

from hvqd_model.diffusion.discrete import add_copy_prior, copy_prior, corrupt, posterior, posterior_kl
from hvqd_model.diffusion.schedules import Schedule, absorbing, mask_and_replace, tabulated
from hvqd_model.randomness import uniform

CODES = 4
MASK = CODES
STEPS = 5
SCHEDULES = {
    "absorbing linear": absorbing("linear"),
    "absorbing cosine": absorbing("cosine"),
    "absorbing table": tabulated((1.0, 0.9, 0.3, 0.0), (0.0, 0.1, 0.7, 1.0)),
    "mixed linear": mask_and_replace(0.1, "linear"),
    "mixed cosine": mask_and_replace(0.4, "cosine"),
    "mixed table": tabulated((1.0, 0.8, 0.4, 0.0), (0.0, 0.1, 0.3, 0.6)),
    "uniform": mask_and_replace(1.0, "linear"),
}
ALL = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
STRIDES = [(s, t) for s, t in itertools.combinations(range(STEPS + 1), 2)]


def time(step: int) -> Tensor:
    return torch.tensor(step / STEPS, dtype=torch.float64)


def one_step(schedule: Schedule, step: int) -> Tensor:
    """(K + 1, K + 1) transition matrix of one step, rows from, columns to, built entry by entry."""
    before, after = time(step - 1), time(step)
    keep = float(schedule.kept.value(after) / schedule.kept.value(before))
    mask = 1 - float((1 - schedule.masked.value(after)) / (1 - schedule.masked.value(before)))
    replace = max(0.0, 1 - keep - mask) / CODES
    replace = 0.0 if replace < 1e-12 else replace  # tables add to 1 up to rounding
    matrix = torch.zeros(CODES + 1, CODES + 1, dtype=torch.float64)
    for source, target in itertools.product(range(CODES), range(CODES)):
        matrix[source, target] = replace + (keep if source == target else 0.0)
    matrix[:CODES, MASK] = mask
    matrix[MASK, MASK] = 1
    return matrix


@functools.cache
def product(schedule: Schedule, s: int, t: int) -> Tensor:
    matrix = torch.eye(CODES + 1, dtype=torch.float64)
    for step in range(s + 1, t + 1):
        matrix = matrix @ one_step(schedule, step)
    return matrix


@functools.cache
def bayes(schedule: Schedule, s: int, t: int, x_0: int, x_t: int) -> Tensor:
    """(K + 1,) q(x_s | x_t, x_0) by enumeration."""
    joint = product(schedule, 0, s)[x_0] * product(schedule, s, t)[:, x_t]
    return joint / joint.sum()


def soft_prediction(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(CODES, generator=generator, dtype=torch.float64).log_softmax(0)


def possible(schedule: Schedule, t: int, x_0: int, x_t: int) -> bool:
    return bool(product(schedule, 0, t)[x_0, x_t] > 1e-12)


@functools.cache
def every_case(schedule: Schedule) -> list[tuple[int, int, int, int]]:
    """(s, t, x_0, x_t) of every stride and every pair of codes that the noise can join."""
    pairs = itertools.product(STRIDES, range(CODES), range(CODES + 1))
    return [(s, t, x_0, x_t) for (s, t), x_0, x_t in pairs if possible(schedule, t, x_0, x_t)]


@functools.cache
def mixed_posterior(schedule: Schedule, s: int, t: int, seed: int, x_t: int) -> Tensor:
    """(K + 1,) sum over x_0 of q(x_s | x_t, x_0) p(x_0): clean codes that cannot have become x_t drop out."""
    log_p0 = soft_prediction(seed)
    sources = [x_0 for x_0 in range(CODES) if possible(schedule, t, x_0, x_t)]
    weights = log_p0[sources].softmax(0)
    return (torch.stack([bayes(schedule, s, t, x_0, x_t) for x_0 in sources]) * weights[:, None]).sum(0)


@ALL
def test_the_product_of_one_step_matrices_is_the_cumulative_schedule(schedule: Schedule) -> None:
    for step in range(STEPS + 1):
        matrix = product(schedule, 0, step)
        torch.testing.assert_close(matrix.sum(1), torch.ones(CODES + 1, dtype=torch.float64))
        torch.testing.assert_close(matrix[0, MASK], schedule.masked.value(time(step)))
        torch.testing.assert_close(matrix[0, 1], schedule.replaced(time(step)) / CODES, atol=1e-15, rtol=1e-9)
        torch.testing.assert_close(matrix[0, 0] - matrix[0, 1], schedule.kept.value(time(step)), atol=1e-15, rtol=1e-9)


@ALL
def test_the_posterior_equals_bayes_rule_with_full_matrices(schedule: Schedule) -> None:
    cases = [
        (s, t, x_t)
        for (s, t), x_t in itertools.product(STRIDES, range(CODES + 1))
        if any(possible(schedule, t, x_0, x_t) for x_0 in range(CODES))
    ]
    # Absorbing noise ends with masks alone, uniform noise has none.
    assert len(cases) == {"absorbing": 55, "mixed": 75, "uniform": 60}[_kind(schedule)]
    s, t, x_t = torch.tensor(cases).unbind(1)
    log_p0 = soft_prediction(0).expand(len(cases), CODES)
    found = posterior(log_p0, x_t, s.double() / STEPS, t.double() / STEPS, schedule).exp()
    expected = torch.stack([mixed_posterior(schedule, s, t, 0, x_t) for s, t, x_t in cases])
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-10)


def _kind(schedule: Schedule) -> str:
    return "absorbing" if schedule.is_absorbing else "mixed" if schedule.has_masks else "uniform"


@ALL
def test_the_posterior_of_a_known_code_equals_bayes_rule_in_every_case(schedule: Schedule) -> None:
    cases = every_case(schedule)
    s, t, x_0, x_t = torch.tensor(cases).unbind(1)
    certain = torch.full((len(cases), CODES), -1e4, dtype=torch.float64).scatter(1, x_0[:, None], 0.0)
    found = posterior(certain, x_t, s.double() / STEPS, t.double() / STEPS, schedule).exp()
    expected = torch.stack([bayes(schedule, *case) for case in cases])
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-10)
    seen = {"mask" if x_t == MASK else "own" if x_t == x_0 else "other" for _, _, x_0, x_t in cases}
    assert (
        seen
        == {"absorbing": {"mask", "own"}, "mixed": {"mask", "own", "other"}, "uniform": {"own", "other"}}[
            _kind(schedule)
        ]
    )


@ALL
def test_the_kl_of_posteriors_equals_its_sum_over_enumerated_distributions(schedule: Schedule) -> None:
    cases = every_case(schedule)
    q = torch.stack([bayes(schedule, *case) for case in cases])
    p = torch.stack([mixed_posterior(schedule, s, t, 1, x_t) for s, t, _, x_t in cases])
    expected = (torch.xlogy(q, q) - torch.xlogy(q, p)).sum(1)
    s, t, x_0, x_t = torch.tensor(cases).unbind(1)
    log_p0 = soft_prediction(1).expand(len(cases), CODES)
    found = posterior_kl(log_p0, x_0, x_t, s.double() / STEPS, t.double() / STEPS, schedule)
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-9)
    assert int((found > 1e-6).sum()) > 50


@ALL
def test_the_kl_in_float32_agrees_with_float64_at_many_codes(schedule: Schedule) -> None:
    generator = torch.Generator().manual_seed(0)
    num_codes, rows = 1024, 200
    log_p0 = (3 * torch.randn(rows, num_codes, generator=generator, dtype=torch.float64)).log_softmax(1)
    x_0 = torch.randint(num_codes, (rows,), generator=generator)
    t = torch.randint(1, 101, (rows,), generator=generator).double() / 100
    s = t - 0.01
    x_t = corrupt(x_0[:, None], t, uniform(torch.arange(rows), (1,)), schedule, num_codes)[:, 0]
    exact = posterior_kl(log_p0, x_0, x_t, s, t, schedule)
    assert bool((exact > -1e-12).all())
    torch.testing.assert_close(
        posterior_kl(log_p0.float(), x_0, x_t, s, t, schedule), exact, atol=2e-5, rtol=1e-4, check_dtype=False
    )


@ALL
def test_the_kl_of_the_true_prediction_is_zero_and_its_gradient_finite(schedule: Schedule) -> None:
    rows = [(x_0, x_t) for x_0 in range(CODES) for x_t in range(CODES + 1) if possible(schedule, 3, x_0, x_t)]
    x_0, x_t = torch.tensor(rows).unbind(1)
    s, t = (time(step).expand(len(rows)) for step in (2, 3))
    log_p0 = torch.full((len(rows), CODES), -50.0).scatter(1, x_0[:, None], 0.0).requires_grad_()
    loss = posterior_kl(log_p0, x_0, x_t, s, t, schedule)
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-6, rtol=0)
    loss.sum().backward()
    assert log_p0.grad is not None and bool(log_p0.grad.isfinite().all())


def test_corrupt_follows_the_cumulative_distribution() -> None:
    count = 40_000
    codes = torch.tensor([2]).expand(1, count)
    for schedule in SCHEDULES.values():
        for step in range(STEPS + 1):
            noisy = corrupt(codes, time(step)[None], uniform(torch.tensor([step]), (count,)), schedule, CODES)
            expected = product(schedule, 0, step)[2]
            found = torch.bincount(noisy[0], minlength=CODES + 1).double() / count
            deviation = (found - expected).abs() / (expected * (1 - expected) / count).sqrt().clamp_min(1e-9)
            assert float(deviation.max()) < 4


@ALL
def test_corrupt_gives_a_code_or_a_mask_at_the_ends_of_the_uniform_numbers(schedule: Schedule) -> None:
    ends = torch.tensor([[2.0**-53, 0.5, 1 - 2.0**-53]], dtype=torch.float64)
    for step in range(STEPS + 1):
        noisy = corrupt(torch.zeros(1, 3, dtype=torch.int64), time(step)[None], ends, schedule, CODES)
        assert int(noisy.min()) >= 0 and int(noisy.max()) <= MASK
    assert corrupt(torch.ones(1, 3, dtype=torch.int64), time(0)[None], ends, schedule, CODES).tolist() == [[1, 1, 1]]


@ALL
def test_a_uniform_predictors_chain_costs_log_k_exactly(schedule: Schedule) -> None:
    """KL at time 1 plus the KL of every step, over all paths: a predictor that knows nothing pays for the code once."""
    total = torch.zeros((), dtype=torch.float64)
    for step in range(1, STEPS + 1):
        marginal = product(schedule, 0, step)[1]
        for x_t in range(CODES + 1):
            if not possible(schedule, step, 1, x_t):
                continue
            row, t = torch.tensor([x_t]), time(step)[None]
            # The truth about a noisy code under a flat law of codes: only the copy prior.
            log_p0 = add_copy_prior(torch.zeros(1, CODES, dtype=torch.float64), row, t, schedule).log_softmax(1)
            total += marginal[x_t] * posterior_kl(log_p0, torch.tensor([1]), row, time(step - 1)[None], t, schedule)[0]
    torch.testing.assert_close(total, torch.tensor(math.log(CODES), dtype=torch.float64), atol=1e-12, rtol=0)


@ALL
def test_the_copy_prior_is_the_likelihood_ratio_of_a_codes_own_value(schedule: Schedule) -> None:
    for step in range(1, STEPS + 1):
        matrix = product(schedule, 0, step)
        x_t = torch.arange(CODES + 1)
        bonus = copy_prior(x_t, time(step).expand(CODES + 1), schedule, CODES)
        assert float(bonus[MASK]) == 0
        if not schedule.is_absorbing:
            torch.testing.assert_close(bonus[0], (matrix[0, 0] / matrix[1, 0]).log(), atol=1e-12, rtol=0)
            posterior_of_code = matrix[:CODES, 0] / matrix[:CODES, 0].sum()
            added = add_copy_prior(torch.zeros(1, CODES, dtype=torch.float64), x_t[:1], time(step)[None], schedule)
            torch.testing.assert_close(added.softmax(1)[0], posterior_of_code)


def test_an_earlier_time_that_is_not_earlier_is_refused() -> None:
    same = torch.tensor([0.5], dtype=torch.float64)
    row = torch.tensor([0])
    with pytest.raises(ValueError, match=r"every s must be before its t\nhint: "):
        posterior(soft_prediction()[None], row, same, same, absorbing())
    with pytest.raises(ValueError, match=r"every s must be before its t\nhint: "):
        posterior_kl(soft_prediction()[None], row, row, same, same, absorbing())
