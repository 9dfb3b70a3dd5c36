"""The reverse process on the latents of all levels, for any predictor of the clean latents.

ddpm          ancestral: the posterior of the noise at any stride (Ho et al., arXiv:2006.11239, eq. 7).
ddim          with the share eta of ddpm's fresh noise; none at eta = 0 (Song et al., arXiv:2010.02502, eq. 12).
dpm-solver++  the multistep solver of second order in half the log-SNR, 2M (Lu et al., arXiv:2211.01095, alg. 2).
heun          the second-order solver of the flow in s/a (Karras et al., arXiv:2206.00364, alg. 1); asks twice a step.

Each level walks by its own times; a level that arrives at time 0 is finished once and stays. Every random number is
keyed by the image's seed, the level and the step: neighbours in a batch do not matter.

Axes: B images, N positions of a level, D dimensions of a latent, L levels, coarse first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from hvqd_model.diffusion.gaussian_schedules import GaussianSchedule, root_progress
from hvqd_model.diffusion.stagger import active_span, level_times
from hvqd_model.randomness import normal

GaussianSamplerName = Literal["ddpm", "ddim", "dpm-solver++", "heun"]
Progress = Callable[[int, int], None]
_BISECTIONS = 60


class CleanPredictor(Protocol):
    """What a sampler asks: clean latents, given noisy latents of the leading levels."""

    def __call__(
        self, latents: Sequence[Tensor], level_times: Sequence[float], time: float, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """(B, N, D) a level, None where none are wanted.

        Args:
            latents: (B, N, D) of each level that is present; finer levels are still pure noise.
            level_times: of the levels that are present.
            time: of the whole process, from 1 down to 0.
            wanted: whether each level that is present is wanted.
        """
        ...


@dataclass(frozen=True)
class GaussianSamplerSettings:
    """How to walk from noise to latents."""

    steps: int = 16
    """Steps of the whole process."""
    sampler: GaussianSamplerName = "dpm-solver++"
    """Which reverse process."""
    eta: float = 0.0
    """Share of fresh noise a step of ddim adds, of what ddpm would."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1: {self.steps}\nhint: 16 steps are enough for most models")
        if self.sampler not in ("ddpm", "ddim", "dpm-solver++", "heun"):
            raise ValueError(
                f"the sampler of Gaussian noise must be ddpm, ddim, dpm-solver++ or heun: {self.sampler}\n"
                "hint: dpm-solver++ needs fewest steps"
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be between 0 and 1: {self.eta}\nhint: 0 adds no noise, 1 is ddpm")


@dataclass(frozen=True)
class Stride:
    """Signal and noise of one level before and after a step."""

    signal: float
    noise: float
    next_signal: float
    next_noise: float

    @property
    def log_ratio(self) -> float:
        """Half the log-SNR before the step; minus infinity without signal."""
        return math.log(self.signal / self.noise) if self.signal > 0 else -math.inf


def ddim_step(x: Tensor, clean: Tensor, stride: Stride, eta: float = 0.0, fresh: Tensor | None = None) -> Tensor:
    """x_s from x_t and the predicted x_0: deterministic, or with a share eta of the posterior's noise; at 1 it is ddpm.

    Args:
        fresh: standard normal numbers like x; needed when eta is above 0.
    """
    noise = (x - stride.signal * clean) / stride.noise
    added = eta * _posterior_deviation(stride)
    kept = math.sqrt(max(stride.next_noise**2 - added**2, 0.0))
    moved = stride.next_signal * clean + kept * noise
    return moved if fresh is None or added == 0 else moved + added * fresh


def _posterior_deviation(stride: Stride) -> float:
    """Of q(x_s | x_t, x_0)."""
    between = max(stride.noise**2 - (stride.signal / stride.next_signal) ** 2 * stride.next_noise**2, 0.0)
    return math.sqrt(between) * stride.next_noise / stride.noise


def solver_step(x: Tensor, clean: Tensor, stride: Stride, before: tuple[Tensor, float] | None) -> Tensor:
    """One step of DPM-Solver++(2M).

    Args:
        before: the last step's predicted x_0 and half log-SNR; without it, and into clean latents, the step is of first
            order, and so is the one after pure noise.
    """
    guess = clean
    if before is not None and stride.next_noise > 0 and math.isfinite(before[1]):
        length = math.log(stride.next_signal / stride.next_noise) - stride.log_ratio
        share = length / (2 * (stride.log_ratio - before[1]))  # 1 / 2r, with r the last step over this one
        guess = clean + share * (clean - before[0])
    ratio = stride.next_noise / stride.noise
    return ratio * x + (stride.next_signal - stride.signal * ratio) * guess


def heun_step(x: Tensor, clean: Tensor, ahead: Tensor, euler: Tensor, stride: Stride) -> Tensor:
    """The corrected step, from the predictions at both ends of Euler's (which is ddim's); both ends have some noise."""
    sigma, next_sigma = stride.noise / stride.signal, stride.next_noise / stride.next_signal
    slope = (x / stride.signal - clean) / sigma
    next_slope = (euler / stride.next_signal - ahead) / next_sigma
    return stride.next_signal * (x / stride.signal + (next_sigma - sigma) * 0.5 * (slope + next_slope))


def sampling_times(
    steps: int, schedule: GaussianSchedule, stagger: float, known: list[bool], *, by_root: bool = False
) -> Tensor:
    """(steps + 1,) float64 falling times that cut what the unknown levels still have to go through evenly.

    Args:
        by_root: measure it by the root of the noise level, as schedule edm always does, and not by time.
    """
    levels, unknown = len(known), torch.tensor([not is_known for is_known in known])
    first, last = active_span(levels, stagger, known)

    def left(times: Tensor) -> Tensor:
        at = level_times(times, levels, stagger)[:, unknown]
        return (root_progress(schedule, at) if by_root or schedule.steps_by_root else at).mean(1)

    ends = torch.tensor([first, last], dtype=torch.float64)
    begin, end = left(ends).tolist()
    wanted = begin + (end - begin) * torch.arange(1, steps, dtype=torch.float64) / steps
    low, high = torch.full_like(wanted, last), torch.full_like(wanted, first)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        above = left(middle) > wanted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return torch.cat([ends[:1], (low + high) / 2, ends[1:]])


@dataclass(frozen=True)
class _Step:
    """One step of the process; lists are over the levels."""

    index: int
    time: float
    next_time: float
    at: list[float]
    to: list[float]
    strides: list[Stride]

    @property
    def present(self) -> int:
        """How many leading levels have left pure noise when the step is over."""
        return max(level + 1 for level, to in enumerate(self.to) if to < 1)

    @property
    def moves(self) -> list[bool]:
        """Which of the present levels change."""
        return [self.to[level] < self.at[level] for level in range(self.present)]


def _walk(
    settings: GaussianSamplerSettings, schedule: GaussianSchedule, stagger: float, known: list[bool]
) -> list[_Step]:
    """The steps, with times of known levels at 0."""
    times = sampling_times(settings.steps, schedule, stagger, known, by_root=settings.sampler == "heun")
    # 10 digits: the search above is good to 12, and a level must be exactly pure noise or clean when it is.
    table = level_times(times, len(known), stagger).round(decimals=10)
    table[:, torch.tensor(known)] = 0.0
    signals, noises = schedule.rates(table)
    moments: list[float] = times.tolist()
    rows: list[list[list[float]]] = torch.stack([table, signals, noises], 1).tolist()
    walk = []
    for index, ((at, signal, noise), (to, next_signal, next_noise)) in enumerate(pairwise(rows)):
        strides = [Stride(*numbers) for numbers in zip(signal, noise, next_signal, next_noise, strict=True)]
        walk.append(_Step(index, moments[index], moments[index + 1], at, to, strides))
    return walk


def sample_latents(
    predict: CleanPredictor,
    shapes: Sequence[tuple[int, int]],
    seeds: Tensor,
    schedule: GaussianSchedule,
    stagger: float,
    settings: GaussianSamplerSettings,
    finish: Callable[[int, Tensor], Tensor],
    known: Sequence[Tensor | None] | None = None,
    progress: Progress | None = None,
) -> list[Tensor]:
    """(B, N, D) float32 latents of each level, finished.

    Args:
        predict: clean latents.
        shapes: (N, D) of each level.
        seeds: (B,) int64, one an image.
        schedule: the noise the predictor was trained on.
        stagger: how the levels follow each other.
        settings: which sampler, how many steps.
        finish: (level, latents) -> what a level becomes when it is clean, such as vectors of codes.
        known: (B, N, D) finished latents of levels that are given, None for the others.
        progress: called with (steps done, steps).
    """
    given: list[Tensor | None] = list(known) if known is not None else [None] * len(shapes)
    latents = [
        normal(seeds, shape, f"start.{level}").float() if latent is None else latent
        for level, (shape, latent) in enumerate(zip(shapes, given, strict=True))
    ]
    memory: list[tuple[Tensor, float] | None] = [None] * len(shapes)
    for step in _walk(settings, schedule, stagger, [latent is not None for latent in given]):
        guesses = predict(latents[: step.present], step.at[: step.present], step.time, step.moves)
        moved = list(latents)
        for level, guess in enumerate(guesses):
            if guess is None:
                continue
            x, stride = latents[level], step.strides[level]
            match settings.sampler:
                case "dpm-solver++":
                    moved[level] = solver_step(x, guess, stride, memory[level])
                    memory[level] = guess, stride.log_ratio
                case "heun":
                    moved[level] = ddim_step(x, guess, stride)
                case _:
                    eta = 1.0 if settings.sampler == "ddpm" else settings.eta
                    shape = x.shape[1:]
                    fresh = normal(seeds, shape, f"step.{level}.{step.index}").float() if eta > 0 else None
                    moved[level] = ddim_step(x, guess, stride, eta, fresh)
            if step.to[level] == 0:
                moved[level] = finish(level, moved[level])
        latents = _corrected(predict, latents, moved, guesses, step) if settings.sampler == "heun" else moved
        if progress is not None:
            progress(step.index + 1, settings.steps)
    return latents


def _corrected(
    predict: CleanPredictor, latents: list[Tensor], moved: list[Tensor], guesses: Sequence[Tensor | None], step: _Step
) -> list[Tensor]:
    """Heun's second look, at levels whose step has noise at its end and signal at its beginning."""
    wanted = [
        moves and stride.next_noise > 0 and stride.signal > 0
        for moves, stride in zip(step.moves, step.strides, strict=False)
    ]
    if not any(wanted):
        return moved
    ahead = predict(moved[: step.present], step.to[: step.present], step.next_time, wanted)
    corrected = list(moved)
    for level, (first, second) in enumerate(zip(guesses, ahead, strict=True)):
        if first is not None and second is not None:
            stride = step.strides[level]
            corrected[level] = heun_step(latents[level], first, second, moved[level], stride)
    return corrected
