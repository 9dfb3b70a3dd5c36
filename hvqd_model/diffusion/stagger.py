"""One reverse process over all levels: every level's own time from one time and one number, the stagger.

t_l = clip((1 + (L-1) d) t - (L-1-l) d, 0, 1). With stagger d = 0 all levels are denoised together, with d = 1 strictly
one after the other, coarse first. A level's loss carries dt_l/dt, or the sum over levels bounds nothing.

Axes: B images, L levels, coarse first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _offsets(levels: int, device: torch.device) -> Tensor:
    return torch.arange(levels - 1, -1, -1, dtype=torch.float64, device=device)


def _check(levels: int, stagger: float) -> None:
    if levels < 1 or not 0 <= stagger <= 1:
        raise ValueError(
            f"stagger must be between 0 and 1, with at least one level: stagger={stagger}, levels={levels}\n"
            "hint: 0 denoises all levels together, 1 coarse before fine"
        )


def level_times(times: Tensor, levels: int, stagger: float) -> Tensor:
    """(B, L) float64 times of the levels.

    Args:
        times: (B,) float64 in [0, 1].
        levels: L.
        stagger: in [0, 1].
    """
    _check(levels, stagger)
    rate = 1 + (levels - 1) * stagger
    unclipped = rate * times.double()[:, None] - stagger * _offsets(levels, times.device)
    # 12 digits: a level that is pure noise or clean must be exactly 1 or 0, whatever the rounding of the products.
    return unclipped.round(decimals=12).clamp(0, 1)


def level_rates(times: Tensor, levels: int, stagger: float) -> Tensor:
    """(B, L) float64 derivatives dt_l/dt: the rate while a level is being denoised, else 0."""
    at = level_times(times, levels, stagger)
    return torch.where((at > 0) & (at < 1), 1 + (levels - 1) * stagger, 0.0).double()


def levels_present(at: Tensor) -> Tensor:
    """(B,) int64: how many leading levels have left pure noise, from (B, L) level times; at least one.

    The finer ones carry no information and stay out of the sequence.
    """
    return (at < 1).sum(1).clamp_min(1)


def active_span(levels: int, stagger: float, known: list[bool]) -> tuple[float, float]:
    """The (first, last) time, first > last, between which some level that is not known changes.

    Raises:
        ValueError: every level is known.
    """
    _check(levels, stagger)
    unknown = [level for level in range(levels) if not known[level]]
    if not unknown:
        raise ValueError("every level is given, so nothing is left to sample\nhint: leave at least one level None")
    rate = 1 + (levels - 1) * stagger
    first = max((1 + (levels - 1 - level) * stagger) / rate for level in unknown)
    last = min((levels - 1 - level) * stagger / rate for level in unknown)
    return first, last
