"""The reverse process on the codes of all levels, for any predictor of the clean codes.

ancestral   the exact strided posterior of the noise: correct for any number of steps as far as codes are independent.
confidence  MaskGIT, arXiv:2202.04200: all masks are guessed, the surest guesses stay; counts follow the cosine.
purity      Improved VQ-Diffusion, arXiv:2205.16007: positions are drawn in proportion to the probability of their
            surest code; counts follow the noise schedule.

Every random number is keyed by the image's seed, the level, the step and the position: neighbours in a batch do not
matter.

Axes: B images, N code positions of a level, M of them wanted, K codes (index K is the mask), L levels, coarse first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from hvqd_model.diffusion.discrete import add_copy_prior, posterior
from hvqd_model.diffusion.guidance import check_truncation, draw, truncate
from hvqd_model.diffusion.schedules import Schedule
from hvqd_model.diffusion.stagger import active_span, level_times
from hvqd_model.randomness import gumbel, uniform

SamplerName = Literal["confidence", "ancestral", "purity"]
Progress = Callable[[int, int], None]


class Predictor(Protocol):
    """What a sampler asks: logits of the clean codes, given noisy codes of the leading levels."""

    def __call__(
        self, codes: Sequence[Tensor], level_times: Sequence[float], time: float, wanted: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """(B, M, K) logits a level, None where none are wanted.

        Args:
            codes: (B, N) of each level that is present; finer levels are still pure noise.
            level_times: of the levels that are present.
            time: of the whole process, from 1 down to 0.
            wanted: (B, M) positions of each level that is present, or None.
        """
        ...


@dataclass(frozen=True)
class SamplerSettings:
    """How to walk from noise to codes."""

    steps: int = 16
    """Steps of the whole process."""
    sampler: SamplerName = "confidence"
    """Which reverse process."""
    temperature: float = 1.0
    """Divides the logits."""
    top_k: int | None = None
    """Keep the k most likely codes."""
    top_p: float | None = None
    """Keep the smallest set of codes with this mass."""
    gumbel_scale: float = 1.0
    """Noise on the order in which codes are settled; confidence lets it fall to 0 over the steps."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1: {self.steps}\nhint: 16 steps are enough for most models")
        if self.sampler not in ("confidence", "ancestral", "purity"):
            raise ValueError(
                f"sampler must be confidence, ancestral or purity: {self.sampler}\nhint: confidence needs fewest steps"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0: {self.temperature}\nhint: 1 samples the model as it is")
        if not 0 <= self.gumbel_scale < math.inf:
            raise ValueError(f"gumbel_scale must not be negative: {self.gumbel_scale}\nhint: 1 or 2 keep variety")
        check_truncation(self.top_k, self.top_p)


def confidence_counts(positions: int, steps: int) -> list[int]:
    """How many of the positions are still masked after each step: floor(N cos(pi/2 i/S))."""
    return [_cosine_count(positions, 1 - (step + 1) / steps) for step in range(steps)]


def _cosine_count(positions: int, time: float) -> int:
    return 0 if time <= 0 else math.floor(positions * math.sin(math.pi / 2 * time) + 1e-9)


def _purity_count(positions: int, time: float, schedule: Schedule) -> int:
    kept = float(schedule.kept.value(torch.tensor(time, dtype=torch.float64)))
    return round(positions * (1 - kept))


@dataclass(frozen=True)
class _Step:
    """One stride of the process; lists are over the levels."""

    index: int
    time: float
    at: list[float]
    to: list[float]
    present: int


@dataclass(frozen=True)
class _Walk:
    """What stays the same from noise to codes; see `sample_codes`."""

    predict: Predictor
    sizes: Sequence[int]
    codebook_sizes: Sequence[int]
    seeds: Tensor
    schedule: Schedule
    stagger: float
    settings: SamplerSettings
    known: list[Tensor | None]
    progress: Progress | None

    def strides(self) -> list[_Step]:
        """The strides, with times of known levels at 0."""
        levels, fixed = len(self.known), [given is not None for given in self.known]
        first, last = active_span(levels, self.stagger, fixed)
        times = torch.linspace(first, last, self.settings.steps + 1, dtype=torch.float64)
        table = level_times(times, levels, self.stagger)
        table[:, torch.tensor(fixed)] = 0.0
        rows: list[list[float]] = table.tolist()
        strides = []
        for index, (at, to) in enumerate(pairwise(rows)):
            present = max(level + 1 for level in range(levels) if to[level] < 1)
            strides.append(_Step(index, float(times[index]), at, to, present))
        return strides

    def all_masks(self) -> list[Tensor]:
        """(B, N) codes of each level: those that are known, masks elsewhere."""
        return [
            given.clone()
            if given is not None
            else torch.full((len(self.seeds), size), num_codes, dtype=torch.int64, device=self.seeds.device)
            for size, num_codes, given in zip(self.sizes, self.codebook_sizes, self.known, strict=True)
        ]

    def pure_noise(self) -> list[Tensor]:
        """The noise at time 1: masks, and uniform codes in the share that is replaced."""
        codes = self.all_masks()
        replaced = float(self.schedule.replaced(torch.ones((), dtype=torch.float64)))
        for level, (num_codes, given) in enumerate(zip(self.codebook_sizes, self.known, strict=True)):
            if given is None and replaced > 0:
                draws = uniform(self.seeds, codes[level].shape[1:], f"start.{level}")
                random_codes = (draws / replaced * num_codes).long().clamp_max(num_codes - 1)
                codes[level] = torch.where(draws < replaced, random_codes, codes[level])
        return codes

    def report(self, step: _Step) -> None:
        """Tell who asked that a step is done."""
        if self.progress is not None:
            self.progress(step.index + 1, self.settings.steps)


def sample_codes(
    predict: Predictor,
    sizes: Sequence[int],
    codebook_sizes: Sequence[int],
    seeds: Tensor,
    schedule: Schedule,
    stagger: float,
    settings: SamplerSettings,
    known: Sequence[Tensor | None] | None = None,
    progress: Progress | None = None,
) -> list[Tensor]:
    """(B, N) int64 codes of each level.

    Args:
        predict: logits of the clean codes.
        sizes: N of each level.
        codebook_sizes: K of each level.
        seeds: (B,) int64, one an image.
        schedule: the noise the predictor was trained on.
        stagger: how the levels follow each other.
        settings: which sampler, how many steps, how random.
        known: (B, N) codes of levels that are given and come back unchanged, None for the others.
        progress: called with (steps done, steps).

    Raises:
        ValueError: settings that the noise does not allow.
    """
    given: list[Tensor | None] = [None] * len(sizes) if known is None else list(known)
    walk = _Walk(predict, sizes, codebook_sizes, seeds, schedule, stagger, settings, given, progress)
    if settings.sampler == "ancestral":
        return _ancestral(walk)
    if not schedule.has_masks:
        raise ValueError(
            f"the {settings.sampler} sampler unmasks codes, and this noise never masks any\nhint: sampler=ancestral"
        )
    return _unmask(walk)


def _unmask(walk: _Walk) -> list[Tensor]:
    """Confidence and purity: every step settles a count of codes that is the same for all images."""
    codes, sizes = walk.all_masks(), walk.sizes
    masked = [0 if given is not None else size for given, size in zip(walk.known, sizes, strict=True)]
    for step in walk.strides():
        after = [_count_after(walk, size, time) for size, time in zip(sizes, step.to, strict=True)]
        changing = [level for level in range(len(sizes)) if after[level] < masked[level]]
        if changing:
            # The network is told how much is masked, not how far the sampler has come: that is what it was trained on.
            fractions = torch.tensor([m / n for m, n in zip(masked, sizes, strict=True)], dtype=torch.float64)
            times: list[float] = walk.schedule.kept.inverse(1 - fractions).tolist()
            wanted: list[Tensor | None] = [None] * step.present
            for level in changing:
                is_mask = codes[level] == walk.codebook_sizes[level]
                wanted[level] = is_mask.nonzero()[:, 1].reshape(len(walk.seeds), masked[level])
            logits = walk.predict(codes[: step.present], times[: step.present], step.time, wanted)
            for level in changing:
                places, scores = wanted[level], logits[level]
                assert places is not None and scores is not None
                count = masked[level] - after[level]
                _settle(walk, codes[level], places, scores, count, f"{level}.{step.index}", step.to[level])
                masked[level] = after[level]
        walk.report(step)
    return codes


def _count_after(walk: _Walk, size: int, time: float) -> int:
    if walk.settings.sampler == "confidence":
        return _cosine_count(size, time)
    return _purity_count(size, time, walk.schedule)


def _settle(
    walk: _Walk, codes: Tensor, places: Tensor, logits: Tensor, count: int, stream: str, remaining: float
) -> None:
    """Write `count` of the masked codes of each image, in place."""
    shape, seeds, settings = (codes.shape[1],), walk.seeds, walk.settings
    weights = _weights(logits, settings)
    drawn = draw(weights, uniform(seeds, shape, f"code.{stream}").gather(1, places))
    match settings.sampler:
        case "confidence":
            sureness = weights.gather(2, drawn[..., None])[..., 0]
            noise = settings.gumbel_scale * remaining
        case _:
            sureness = weights.amax(2)
            noise = settings.gumbel_scale
    score = (sureness.double() / weights.sum(2, dtype=torch.float64)).log()
    if noise > 0:
        score += noise * gumbel(seeds, shape, f"order.{stream}").gather(1, places)
    chosen = score.topk(count, 1).indices
    codes.scatter_(1, places.gather(1, chosen), drawn.gather(1, chosen))


def _weights(logits: Tensor, settings: SamplerSettings) -> Tensor:
    """(..., K) weights in proportion to the probabilities; the largest is 1. Truncation sees the temperature."""
    logits = truncate(
        (logits - logits.amax(-1, keepdim=True)).div_(settings.temperature), settings.top_k, settings.top_p
    )
    return logits.exp_()


def _ancestral(walk: _Walk) -> list[Tensor]:
    codes, seeds = walk.pure_noise(), walk.seeds
    everywhere = [torch.arange(size, device=seeds.device).expand(len(seeds), size) for size in walk.sizes]
    reverse = _unmask_stride if walk.schedule.is_absorbing else _posterior_stride
    for step in walk.strides():
        changing = [level for level in range(len(walk.sizes)) if step.to[level] < step.at[level]]
        wanted = [everywhere[level] if level in changing else None for level in range(step.present)]
        logits = walk.predict(codes[: step.present], step.at[: step.present], step.time, wanted)
        for level in changing:
            scores = logits[level]
            assert scores is not None
            stream = f"{level}.{step.index}"
            codes[level] = reverse(walk, codes[level], scores, step.to[level], step.at[level], stream)
        walk.report(step)
    return codes


def _unmask_stride(walk: _Walk, codes: Tensor, logits: Tensor, s: float, t: float, stream: str) -> Tensor:
    """The posterior of absorbing noise: a mask stays with masked(s)/masked(t), else takes a predicted code."""
    masked = walk.schedule.masked.value(torch.tensor([s, t], dtype=torch.float64))
    stay = float(masked[0] / masked[1])
    is_mask = codes == logits.shape[2]
    leaves = is_mask & (uniform(walk.seeds, (codes.shape[1],), f"stay.{stream}") >= stay)
    weights = _weights(logits[leaves], walk.settings)
    drawn = draw(weights, uniform(walk.seeds, (codes.shape[1],), f"code.{stream}")[leaves])
    return codes.masked_scatter(leaves, drawn)


def _posterior_stride(walk: _Walk, codes: Tensor, logits: Tensor, s: float, t: float, stream: str) -> Tensor:
    """The posterior of any mask-and-replace noise."""
    rows, schedule, settings = codes.reshape(-1), walk.schedule, walk.settings
    at_s, at_t = (torch.full(rows.shape, time, dtype=torch.float64, device=rows.device) for time in (s, t))
    flat = add_copy_prior(logits.flatten(0, 1) / settings.temperature, rows, at_t, schedule)
    log_p0 = truncate(flat, settings.top_k, settings.top_p).log_softmax(1)
    weights = posterior(log_p0, rows, at_s, at_t, schedule).exp()
    return draw(weights, uniform(walk.seeds, (codes.shape[1],), f"code.{stream}").reshape(-1)).reshape(codes.shape)
