"""Guidance, truncation and exact draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hvqd_model.diffusion.guidance import draw, guide, truncate
from hvqd_model.randomness import uniform

ENDS = [2.0**-53, 0.5, 1 - 2.0**-53]


def test_guidance_gives_the_published_golden_value() -> None:
    conditional, unconditional = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.4, 0.4, 0.2]).log()
    found = guide(conditional, unconditional, 2.0).softmax(0)
    torch.testing.assert_close(found, torch.tensor([0.8909, 0.0727, 0.0364]), atol=5e-5, rtol=0)


def test_guidance_at_zero_and_one_is_unconditional_and_conditional() -> None:
    conditional, unconditional = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guide(conditional, unconditional, 0.0), unconditional, rtol=0, atol=0)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional, rtol=0, atol=0)


def test_guidance_does_not_depend_on_the_constant_of_either_input() -> None:
    conditional, unconditional = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).double()
    expected = guide(conditional.log_softmax(1), unconditional.log_softmax(1), 3.0).softmax(1)
    torch.testing.assert_close(guide(conditional + 5, unconditional - 2, 3.0).softmax(1), expected)


def test_top_k_keeps_the_k_most_likely_codes() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 4.0, 3.0, 9.0]])
    assert truncate(logits, top_k=2).isfinite().tolist() == [[False, True, False, True], [True, False, False, True]]
    assert torch.equal(truncate(logits, top_k=4), logits)
    assert torch.equal(truncate(logits, top_k=99), logits)


def test_top_p_keeps_the_smallest_set_with_the_mass() -> None:
    probability = torch.tensor([0.1, 0.5, 0.15, 0.25])
    kept = {
        0.01: [1],
        0.49: [1],
        0.51: [1, 3],
        0.74: [1, 3],
        0.76: [1, 2, 3],
        0.95: [0, 1, 2, 3],
        1.0: [0, 1, 2, 3],
    }
    for top_p, expected in kept.items():
        found = truncate(probability.log()[None], top_p=top_p)[0]
        assert found.isfinite().nonzero()[:, 0].tolist() == expected
    assert len(kept) == 7


def test_top_p_applies_to_what_top_k_leaves() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of two codes the first has 4/7 of the mass.
    assert truncate(logits, top_k=2, top_p=0.57).isfinite().sum() == 1
    assert truncate(logits, top_k=2, top_p=0.58).isfinite().sum() == 2


@pytest.mark.parametrize("top_k", [0, -3])
def test_a_top_k_below_one_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"top_k must be at least 1: {top_k}\nhint: leave it out"):
        truncate(torch.zeros(1, 4), top_k=top_k)


@pytest.mark.parametrize("top_p", [0.0, -0.5, 1.5, math.nan])
def test_a_top_p_outside_its_range_is_refused(top_p: float) -> None:
    with pytest.raises(ValueError, match=rf"top_p must be above 0 and at most 1: {top_p}\nhint: leave it out"):
        truncate(torch.zeros(1, 4), top_p=top_p)


def test_draws_are_the_inverse_of_the_cumulative_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    for num_codes in (1, 2, 3, 5, 16, 17, 100, 1025):
        weights = torch.rand(num_codes, generator=generator) ** 4
        uniforms = uniform(torch.tensor([num_codes]), (500,))[0]
        cumulative = weights.double().cumsum(0)
        expected = torch.searchsorted(cumulative, uniforms * cumulative[-1], right=True)
        found = draw(weights.expand(500, num_codes), uniforms)
        # Two sums in another order may differ in the last bit; then a number on an edge may fall to its neighbour.
        assert int((found != expected).sum()) == 0


@pytest.mark.parametrize("num_codes", [3, 7, 30])
def test_draws_have_the_asked_distribution(num_codes: int) -> None:
    count = 100_000
    weights = torch.rand(num_codes, generator=torch.Generator().manual_seed(num_codes)) ** 3
    expected = weights.double() / weights.double().sum()
    drawn = draw(weights.expand(count, num_codes), uniform(torch.tensor([1]), (count,))[0])
    found = torch.bincount(drawn, minlength=num_codes).double() / count
    deviation = (found - expected).abs() / (expected * (1 - expected) / count).sqrt()
    assert float(deviation.max()) < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_code_of_weight_zero_is_never_drawn(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.tensor(ENDS, dtype=torch.float64)
    for num_codes in (2, 9, 16, 50):
        weights = torch.rand(2000, num_codes, generator=generator, dtype=dtype)
        weights *= torch.rand(2000, num_codes, generator=generator) < 0.3
        weights[:, int(torch.randint(num_codes, (), generator=generator))] = 1e-30
        for place in range(3):
            chosen = draw(weights, uniforms[place].expand(2000))
            assert bool((weights.gather(1, chosen[:, None]) > 0).all())


def test_a_single_positive_weight_is_always_drawn() -> None:
    for num_codes in (1, 4, 5, 10):
        weights = torch.eye(num_codes) * 1e-20
        for end in ENDS:
            drawn = draw(weights, torch.full((num_codes,), end, dtype=torch.float64))
            assert drawn.tolist() == list(range(num_codes))


def test_rare_codes_are_drawn_at_their_rate() -> None:
    """Single precision noise would lose them: 1 in 16 million of a code that weighs 2^-24."""
    weights = torch.tensor([[1.0, 2.0**-24]])
    edge = 1 / (1 + 2.0**-24)
    uniforms = torch.tensor([edge * (1 - 1e-12), edge * (1 + 1e-12)], dtype=torch.float64)
    assert draw(weights.expand(2, 2), uniforms).tolist() == [0, 1]


def test_draws_take_any_leading_axes_and_none() -> None:
    weights: Tensor = torch.rand(2, 3, 4, 10, generator=torch.Generator().manual_seed(0))
    uniforms = uniform(torch.arange(2), (3, 4))
    expected = draw(weights.flatten(0, 2), uniforms.flatten()).view(2, 3, 4)
    assert torch.equal(draw(weights, uniforms), expected)
    assert draw(weights[:0], uniforms[:0]).shape == (0, 3, 4)
