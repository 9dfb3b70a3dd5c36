"""Each level's own time."""

from __future__ import annotations

import pytest
import torch

from hvqd_model.diffusion.stagger import active_span, level_rates, level_times, levels_present

TIMES = torch.linspace(0, 1, 1001, dtype=torch.float64)
CASES = [(levels, stagger) for levels in (1, 2, 3, 5) for stagger in (0.0, 0.25, 1 / 3, 0.5, 1.0)]
ALL = pytest.mark.parametrize(("levels", "stagger"), CASES)


@ALL
def test_level_times_are_the_clipped_lines(levels: int, stagger: float) -> None:
    found = level_times(TIMES, levels, stagger)
    for level in range(levels):
        line = (1 + (levels - 1) * stagger) * TIMES - (levels - 1 - level) * stagger
        torch.testing.assert_close(found[:, level], line.clamp(0, 1), atol=1e-11, rtol=0)


@ALL
def test_all_levels_go_from_pure_noise_to_clean_and_coarse_is_never_behind(levels: int, stagger: float) -> None:
    found = level_times(TIMES, levels, stagger)
    assert found[0].tolist() == [0.0] * levels
    assert found[-1].tolist() == [1.0] * levels
    assert bool((found.diff(dim=0) >= 0).all())
    assert bool((found.diff(dim=1) >= 0).all())


@ALL
def test_rates_integrate_to_one(levels: int, stagger: float) -> None:
    middles = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    rates = level_rates(middles, levels, stagger)
    torch.testing.assert_close(rates.mean(0), torch.ones(levels, dtype=torch.float64), atol=1e-4, rtol=0)


def test_without_stagger_all_levels_share_the_time() -> None:
    torch.testing.assert_close(level_times(TIMES, 3, 0.0), TIMES[:, None].expand(-1, 3), atol=1e-12, rtol=0)


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
def test_with_full_stagger_one_level_at_a_time_is_between_noise_and_clean(levels: int) -> None:
    at = level_times(TIMES, levels, 1.0)
    assert int(((at > 0) & (at < 1)).sum(1).max()) == 1
    edges = level_times(torch.arange(levels + 1, dtype=torch.float64) / levels, levels, 1.0)
    assert bool(((edges == 0) | (edges == 1)).all())


def test_levels_present_counts_what_has_left_pure_noise() -> None:
    at = level_times(torch.tensor([1.0, 0.9, 0.5, 0.4, 0.1], dtype=torch.float64), 3, 1.0)
    assert levels_present(at).tolist() == [1, 1, 2, 2, 3]
    assert levels_present(level_times(TIMES[:-1], 3, 0.0)).unique().tolist() == [3]


@ALL
def test_the_active_span_is_where_an_unknown_level_changes(levels: int, stagger: float) -> None:
    for pattern in range(2**levels - 1):
        known = [bool(pattern >> level & 1) for level in range(levels)]
        unknown = [level for level in range(levels) if not known[level]]
        first, last = active_span(levels, stagger, known)
        ends = level_times(torch.tensor([first, last], dtype=torch.float64), levels, stagger)[:, unknown]
        assert ends[0].tolist() == [1.0] * len(unknown)
        assert ends[1].tolist() == [0.0] * len(unknown)
        inside = torch.linspace(first, last, 201, dtype=torch.float64)
        moving = level_times(inside, levels, stagger)[:, unknown].diff(dim=0)
        assert bool((moving[[0, -1]] < 0).any(1).all())


def test_values_out_of_range_are_refused() -> None:
    for stagger in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"stagger must be between 0 and 1(.)*\nhint: 0 denoises"):
            level_times(TIMES, 2, stagger)
    with pytest.raises(ValueError, match=r"at least one level(.)*levels=0\nhint: "):
        level_times(TIMES, 0, 0.5)


def test_nothing_left_to_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=r"every level is given(.)*\nhint: leave at least one level None"):
        active_span(2, 0.5, [True, True])
