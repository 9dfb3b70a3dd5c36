"""How much of the codes survives at each time: the cumulative curves of mask-and-replace noise.

At time t of [0, 1] a code is kept with kept(t), masked with masked(t), and else replaced by a uniform code (which may
be the same one). Gu et al., arXiv:2111.14822, in continuous time; masked = 1 - kept is the absorbing noise of Sahoo et
al., arXiv:2406.07524; masked = 0 is uniform noise. A discrete schedule is a table of such a curve.

Times and probabilities are float64 tensors of any shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

ScheduleName = Literal["linear", "cosine"]
_CHECKED_TIMES = 2001
_TOLERANCE = 1e-9
_ROUNDING = 1e-14


class Curve(Protocol):
    """A probability as a function of time."""

    def value(self, times: Tensor) -> Tensor:
        """The probability at each time."""
        ...

    def slope(self, times: Tensor) -> Tensor:
        """Its derivative at each time."""
        ...

    def inverse(self, values: Tensor) -> Tensor:
        """The time at which a falling curve takes each value."""
        ...


@dataclass(frozen=True)
class LinearCurve:
    """1 - t."""

    def value(self, times: Tensor) -> Tensor:
        """The probability at each time."""
        return 1 - times

    def slope(self, times: Tensor) -> Tensor:
        """Its derivative at each time."""
        return -torch.ones_like(times)

    def inverse(self, values: Tensor) -> Tensor:
        """The time at which the curve takes each value."""
        return 1 - values


@dataclass(frozen=True)
class CosineCurve:
    """1 - sin(pi t / 2): the masked share follows the cosine of MaskGIT, arXiv:2202.04200."""

    def value(self, times: Tensor) -> Tensor:
        """The probability at each time."""
        # The sine of the ends is exact to 1e-16 only; a share of 1e-17 left over would be a probability below zero.
        return (1 - torch.sin(times * (math.pi / 2))).clamp(0, 1)

    def slope(self, times: Tensor) -> Tensor:
        """Its derivative at each time."""
        return -(math.pi / 2) * torch.cos(times * (math.pi / 2))

    def inverse(self, values: Tensor) -> Tensor:
        """The time at which the curve takes each value."""
        return torch.asin(1 - values) * (2 / math.pi)


@dataclass(frozen=True)
class TableCurve:
    """Straight lines between values at equally spaced times, the first at 0 and the last at 1."""

    values: tuple[float, ...]

    def _segment(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table = torch.tensor(self.values, dtype=torch.float64, device=times.device)
        place = times * (len(self.values) - 1)
        index = place.floor().long().clamp(0, len(self.values) - 2)
        return place - index, table[index], table[index + 1]

    def value(self, times: Tensor) -> Tensor:
        """The probability at each time."""
        share, left, right = self._segment(times)
        return torch.lerp(left, right, share)

    def slope(self, times: Tensor) -> Tensor:
        """Its derivative at each time."""
        _, left, right = self._segment(times)
        return (right - left) * (len(self.values) - 1)

    def inverse(self, values: Tensor) -> Tensor:
        """The first time at which the falling curve is at or below each value."""
        falling = torch.tensor(self.values, dtype=torch.float64, device=values.device)
        right = torch.searchsorted(-falling, -values.contiguous()).clamp(1, len(self.values) - 1)
        high, low = falling[right - 1], falling[right]
        share = ((high - values) / (high - low).clamp_min(1e-300)).clamp(0, 1)
        return (right - 1 + share) / (len(self.values) - 1)


@dataclass(frozen=True)
class ComplementCurve:
    """A share of what another curve has lost: share x (1 - curve)."""

    curve: Curve
    share: float

    def value(self, times: Tensor) -> Tensor:
        """The probability at each time."""
        return self.share * (1 - self.curve.value(times))

    def slope(self, times: Tensor) -> Tensor:
        """Its derivative at each time."""
        return -self.share * self.curve.slope(times)

    def inverse(self, values: Tensor) -> Tensor:
        """The time at which the complement takes each value."""
        return self.curve.inverse(1 - values / self.share)


@dataclass(frozen=True)
class Schedule:
    """The cumulative probabilities of keeping and of masking a code; the rest is replaced uniformly.

    Raises:
        ValueError: the curves are no Markov chain's: from some s to a later t a transition would be negative.
    """

    kept: Curve
    masked: Curve

    def __post_init__(self) -> None:
        times = torch.linspace(0, 1, _CHECKED_TIMES, dtype=torch.float64, device="cpu")
        kept, masked = self.kept.value(times), self.masked.value(times)
        # Between s < t: keep a_t/a_s <= 1, mask 1-(1-c_t)/(1-c_s) >= 0, replace >= 0 <=> a/(1-c) does not rise.
        unmasked_kept = torch.where(masked < 1, kept / (1 - masked).clamp_min(1e-300), torch.zeros_like(kept))
        rules = {
            "kept starts at 1 and ends at 0": bool(abs(kept[0] - 1) < _TOLERANCE) and bool(abs(kept[-1]) < _TOLERANCE),
            "masked starts at 0": bool(abs(masked[0]) < _TOLERANCE),
            "kept, masked and their sum stay within 0 and 1": bool(
                ((kept > -_TOLERANCE) & (masked > -_TOLERANCE) & (kept + masked < 1 + _TOLERANCE)).all()
            ),
            "kept never rises": bool((kept.diff() < _TOLERANCE).all()),
            "masked never falls": bool((masked.diff() > -_TOLERANCE).all()),
            "kept / (1 - masked) never rises": bool((unmasked_kept.diff() < _TOLERANCE).all()),
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ValueError(
                f"the schedule is no probability of a Markov chain; it breaks: {'; '.join(broken)}\n"
                "hint: let kept fall from 1 to 0 and masked be a fixed share of 1 - kept, as mask_and_replace() does"
            )

    @property
    def is_absorbing(self) -> bool:
        """Whether every corrupted code is a mask."""
        times = torch.linspace(0, 1, _CHECKED_TIMES, dtype=torch.float64, device="cpu")
        return bool((self.replaced(times) < _TOLERANCE).all())

    @property
    def has_masks(self) -> bool:
        """Whether any code is ever masked."""
        return bool(self.masked.value(torch.ones((), dtype=torch.float64)) > _TOLERANCE)

    def replaced(self, times: Tensor) -> Tensor:
        """The probability of a uniform code in the old one's place: K times beta-bar."""
        share = 1 - self.kept.value(times) - self.masked.value(times)
        # A rounding error here would count as noise that replaces, and every other code would get its share of it.
        return torch.where(share > _ROUNDING, share, 0.0)

    def bound_weight(self, times: Tensor) -> Tensor:
        """-kept'(t) / (1 - kept(t)): the weight of a masked code's cross-entropy in the absorbing bound."""
        return -self.kept.slope(times) / (1 - self.kept.value(times))


def _curve(name: ScheduleName) -> Curve:
    match name:
        case "linear":
            return LinearCurve()
        case "cosine":
            return CosineCurve()
        case _:
            raise ValueError(f"schedule must be linear or cosine: {name}\nhint: set prior.model.schedule=linear")


def absorbing(name: ScheduleName = "linear") -> Schedule:
    """Noise that only masks."""
    return mask_and_replace(0.0, name)


def mask_and_replace(uniform_share: float, name: ScheduleName = "linear") -> Schedule:
    """Noise in which a fixed share of the corrupted codes is replaced and the rest masked; 1 never masks."""
    if not 0 <= uniform_share <= 1:
        raise ValueError(f"uniform_share must be between 0 and 1: {uniform_share}\nhint: 0.1 is a good start")
    curve = _curve(name)
    return Schedule(curve, ComplementCurve(curve, 1 - uniform_share))


def tabulated(kept: tuple[float, ...], masked: tuple[float, ...]) -> Schedule:
    """A schedule from cumulative values at equally spaced times, time 0 included."""
    if len(kept) != len(masked) or len(kept) < 2:
        raise ValueError(
            f"kept and masked must be tables of one length, at least 2: {len(kept)} and {len(masked)}\n"
            "hint: give both for the same times, from 0 to 1"
        )
    return Schedule(TableCurve(kept), TableCurve(masked))
