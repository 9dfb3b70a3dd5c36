"""How much signal and how much noise a latent holds at each time: x_t = a x_0 + s e, variance preserving.

linear         beta from .1 to 20, the limit of a thousand steps from 1e-4 to .02 (Ho et al., arXiv:2006.11239,
               section 4; Song et al., arXiv:2011.13456, eq. 33).
scaled-linear  sqrt(beta) linear from sqrt(.85) to sqrt(12) (Rombach et al., arXiv:2112.10752).
cosine         Nichol and Dhariwal, arXiv:2102.09672, eq. 17.
sigmoid        Jabri et al., arXiv:2212.11972, with ends -3 and 3 and temperature 1.
edm            log-normal noise levels in training, steps by the seventh root in sampling (Karras et al.,
               arXiv:2206.00364, table 1); with v-prediction at weight 1 this is EDM, preconditioning included, because
               D = a x - s F at a data deviation of 1.

The first four can be stretched so that nothing of the signal is left at time 1 (zero terminal SNR: Lin et al.,
arXiv:2305.08891, algorithm 1); cosine and sigmoid otherwise keep as much as linear does, so that noise can be told from
the signal at all times.

Times, a and s are float64 tensors of any shape. Time 0 is clean whatever the schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hvqd_model.config import GaussianScheduleName

_LINEAR_BETAS = 0.1, 20.0
_SCALED_BETAS = 0.85, 12.0
_COSINE_OFFSET = 0.008
_SIGMOID_END = 3.0
_ROOT = 7.0
LOWEST, HIGHEST = 0.004, 160.0
"""Noise levels s/a between which steps by the root are cut: EDM's for a data deviation of .5, doubled."""


class GaussianSchedule(Protocol):
    """Noise levels as a function of time."""

    def rates(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Signal a and noise s at each time, a^2 + s^2 = 1; a = 1 exactly at time 0."""
        ...

    @property
    def steps_by_root(self) -> bool:
        """Whether steps are even in the root of the noise level, not in time."""
        ...


def root_progress(schedule: GaussianSchedule, times: Tensor) -> Tensor:
    """The seventh root of the noise level s/a at each time, rising from 0 at the lowest to 1 at the highest.

    Karras et al., eq. 5: steps that are even in it spend most of themselves where the flow bends. A thousandth of time
    itself is mixed in, so that it rises beyond both ends too.
    """
    signal, noise = schedule.rates(times)
    sigma = (noise / signal.clamp_min(1e-300)).clamp(LOWEST, HIGHEST)
    low, high = LOWEST ** (1 / _ROOT), HIGHEST ** (1 / _ROOT)
    progress: Tensor = 0.999 * (sigma ** (1 / _ROOT) - low) / (high - low) + 0.001 * times.double()
    return progress


def _log_linear(times: Tensor) -> Tensor:
    low, high = _LINEAR_BETAS
    return -0.5 * (low * times + (high - low) * times.square() / 2)


def _log_scaled_linear(times: Tensor) -> Tensor:
    low, high = (math.sqrt(beta) for beta in _SCALED_BETAS)
    return -0.5 * ((low + (high - low) * times) ** 3 - low**3) / (3 * (high - low))


def _cosine(times: Tensor) -> Tensor:
    angle = (times + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * (math.pi / 2)
    return torch.cos(angle) / math.cos(_COSINE_OFFSET / (1 + _COSINE_OFFSET) * (math.pi / 2))


def _sigmoid(times: Tensor) -> Tensor:
    end = torch.sigmoid(torch.tensor(_SIGMOID_END, dtype=torch.float64))
    share = (end - torch.sigmoid(2 * _SIGMOID_END * times - _SIGMOID_END)) / (2 * end - 1)
    return share.clamp(0, 1).sqrt()


LINEAR_END = math.exp(float(_log_linear(torch.ones((), dtype=torch.float64))))
"""The signal that the linear schedule keeps at time 1."""


@dataclass(frozen=True)
class CurveSchedule:
    """One of the four named curves, stretched to end where it should."""

    name: GaussianScheduleName
    zero_terminal_snr: bool = False

    def _raw(self, times: Tensor) -> Tensor:
        match self.name:
            case "linear":
                return _log_linear(times).exp()
            case "scaled-linear":
                return _log_scaled_linear(times).exp()
            case "cosine":
                return _cosine(times)
            case "sigmoid":
                return _sigmoid(times)
            case _:
                raise ValueError(
                    f"schedule must be linear, scaled-linear, cosine or sigmoid: {self.name}\n"
                    "hint: cosine is a good start"
                )

    def rates(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise at each time."""
        times = times.double()
        raw, raw_end = self._raw(times), self._raw(torch.ones((), dtype=torch.float64, device=times.device))
        if self.zero_terminal_snr:
            end = torch.zeros_like(raw_end)
        elif self.name in ("cosine", "sigmoid"):
            end = torch.full_like(raw_end, LINEAR_END)
        else:
            end = raw_end
        signal = end + (raw - raw_end) * ((1 - end) / (1 - raw_end))
        signal = torch.where(times <= 0, 1.0, signal).clamp(0, 1)
        return signal, (1 - signal.square()).clamp_min(0).sqrt()

    @property
    def steps_by_root(self) -> bool:
        """They are even in time."""
        return False


@dataclass(frozen=True)
class EDMSchedule:
    """Noise levels relative to the latents, whose deviation is 1: EDM's numbers for a deviation of .5, doubled."""

    mean: float = -1.2 + math.log(2)
    """Of the logarithm of the noise level in training."""
    deviation: float = 1.2
    lowest: float = LOWEST
    """Smallest noise level before none."""
    highest: float = HIGHEST

    def sigma(self, times: Tensor) -> Tensor:
        """The noise level s/a: training at even times meets it log-normally, cut at both ends."""
        ends = torch.tensor([self.lowest, self.highest], dtype=torch.float64, device=times.device).log()
        low, high = torch.special.ndtr((ends - self.mean) / self.deviation)
        quantile = torch.special.ndtri(low + times.double() * (high - low))
        return torch.exp(self.mean + self.deviation * quantile).clamp(self.lowest, self.highest)

    def rates(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise at each time."""
        sigma = torch.where(times <= 0, 0.0, self.sigma(times))
        signal = torch.rsqrt(1 + sigma.square())
        return signal, signal * sigma

    @property
    def steps_by_root(self) -> bool:
        """As published."""
        return True


def gaussian_schedule(name: GaussianScheduleName, zero_terminal_snr: bool = False) -> GaussianSchedule:
    """The named schedule.

    Raises:
        ValueError: no such schedule, or edm with zero terminal SNR.
    """
    if name == "edm":
        if zero_terminal_snr:
            raise ValueError(
                "zero_terminal_snr stretches a curve, and schedule=edm has its own highest noise level\n"
                "hint: zero_terminal_snr=false, or schedule=cosine"
            )
        return EDMSchedule()
    schedule = CurveSchedule(name, zero_terminal_snr)
    schedule.rates(torch.zeros((), dtype=torch.float64))  # an unknown name is refused here
    return schedule
