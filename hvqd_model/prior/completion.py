"""Completing codes of which some are known: the known ones come back as they were, the others are drawn to fit.

Where noise masks codes, the confidence sampler (MaskGIT, arXiv:2202.04200) for pictures whose unknown codes differ in
place and number: the surest guesses settle first. The network sees the known codes all along and is told how much of
each level is masked, as in training. With Gaussian noise, any of its samplers, with what is known in place of what is
predicted. With everything unknown both are the sampler itself. Levels follow each other by the prior's stagger.

Axes: B images, L levels (coarse first) of h x w = N codes, K codes; index K is the mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hvqd_model.diffusion.gaussian_samplers import GaussianSamplerSettings
from hvqd_model.diffusion.guidance import draw, truncate
from hvqd_model.diffusion.samplers import Progress, SamplerSettings
from hvqd_model.diffusion.schedules import Schedule
from hvqd_model.diffusion.stagger import active_span, level_times
from hvqd_model.prior.conditions import Conditions
from hvqd_model.prior.gaussian_prior import GaussianProcess
from hvqd_model.prior.guided import Guidance, GuidedPredictor, Watcher
from hvqd_model.prior.prior import HierarchicalPrior
from hvqd_model.randomness import gumbel, uniform


@torch.no_grad()
def complete(
    prior: HierarchicalPrior,
    codes: Sequence[Tensor],
    unknown: Sequence[Tensor],
    seeds: Tensor,
    given: Tensor | Conditions | None = None,
    *,
    settings: SamplerSettings | GaussianSamplerSettings | None = None,
    guidance: Guidance = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    fine_guidance: float | None = None,
    progress: Progress | None = None,
    watch: Watcher | None = None,
) -> tuple[Tensor, ...]:
    """(B, h, w) int64 codes of each level: the given ones where they are known, drawn ones elsewhere.

    Image i depends on its own codes, conditions and seed, and the batch size alone.

    Args:
        codes: (B, h, w) int64 of each level; what stands at unknown places does not matter.
        unknown: (B, h, w) bool of each level.
        seeds: (B,) int64.
        given: classes or conditions; None for none.
        settings: steps and randomness; with noise on codes the sampler is always the confidence sampler. Those of
            another kind of noise say the steps alone.
        guidance, interval, fine_guidance, progress, watch: see `HierarchicalPrior.sample`.

    Raises:
        ValueError: noise on codes that masks none, or codes, masks or conditions that are not this prior's.
    """
    of_latents = isinstance(prior.process, GaussianProcess)
    predictor = GuidedPredictor(
        prior.denoiser, len(seeds), given, guidance, interval, None if of_latents else watch, fine_guidance
    )
    if isinstance(prior.process, GaussianProcess):
        return _complete_latents(prior, prior.process, predictor, codes, unknown, seeds, settings, progress, watch)
    steps = 16 if settings is None else settings.steps
    settings = settings if isinstance(settings, SamplerSettings) else SamplerSettings(steps)
    schedule = prior.schedule
    if not isinstance(schedule, Schedule) or not schedule.has_masks:
        raise ValueError(
            f"completing codes needs a prior whose noise masks them, and this one has noise={prior.config.noise}\n"
            "hint: noise=absorbing"
        )
    state = _start(prior, codes, unknown)
    totals = [marks.flatten(1).sum(1) for marks in unknown]
    if all(not bool(total.any()) for total in totals):
        return tuple(level.clone() for level in codes)
    fixed = [not bool(total.any()) for total in totals]
    first, last = active_span(len(state), prior.config.stagger, fixed)
    times = torch.linspace(first, last, settings.steps + 1, dtype=torch.float64)
    table = level_times(times, len(state), prior.config.stagger)
    table[:, torch.tensor(fixed)] = 0.0
    masked = list(totals)
    for index, (_, to) in enumerate(pairwise(table.tolist())):
        present = max(level + 1 for level in range(len(state)) if to[level] < 1)
        after = [_still_masked(total, time) for total, time in zip(totals, to, strict=True)]
        changing = [level for level in range(present) if bool((after[level] < masked[level]).any())]
        if changing:
            # As large for every picture as a whole level, so that none depends on what others know.
            wanted = [_everywhere(state[level]) if level in changing else None for level in range(present)]
            at: list[float | Tensor] = [
                schedule.kept.inverse(1 - masked[level].double() / prior.sizes[level]) for level in range(present)
            ]
            logits = predictor([state[level] for level in range(present)], at, float(times[index]), wanted)
            for level in changing:
                scores = logits[level]
                assert scores is not None
                stream = f"{level}.{index}"
                _settle(state[level], scores, masked[level] - after[level], seeds, settings, stream, to[level])
                masked[level] = torch.minimum(masked[level], after[level])
        if progress is not None:
            progress(index + 1, settings.steps)
    return tuple(level.view(len(seeds), *grid) for level, grid in zip(state, prior.config.grids, strict=True))


def _complete_latents(
    prior: HierarchicalPrior,
    process: GaussianProcess,
    network: GuidedPredictor,
    codes: Sequence[Tensor],
    unknown: Sequence[Tensor],
    seeds: Tensor,
    settings: SamplerSettings | GaussianSamplerSettings | None,
    progress: Progress | None,
    watch: Watcher | None,
) -> tuple[Tensor, ...]:
    """`complete` for Gaussian noise."""
    _start(prior, codes, unknown)  # checks them
    if not any(bool(marks.any()) for marks in unknown):
        return tuple(level.clone() for level in codes)
    steps = 16 if settings is None else settings.steps
    walk = settings if isinstance(settings, GaussianSamplerSettings) else GaussianSamplerSettings(steps)
    # What stands in a hole is no code that counts; 0 is one that exists.
    flat = [torch.where(marks, 0, level).flatten(1) for level, marks in zip(codes, unknown, strict=True)]
    marks = [level.flatten(1) for level in unknown]
    found = process.sample(
        prior.denoiser,
        network,
        seeds,
        walk,
        [None if bool(some.any()) else level for level, some in zip(flat, marks, strict=True)],
        progress,
        watch,
        [(level, some) if bool(some.any()) else None for level, some in zip(flat, marks, strict=True)],
    )
    return tuple(level.view(len(seeds), *grid) for level, grid in zip(found, prior.config.grids, strict=True))


def _start(prior: HierarchicalPrior, codes: Sequence[Tensor], unknown: Sequence[Tensor]) -> list[Tensor]:
    """(B, N) codes with masks at the unknown places."""
    if len(codes) != len(prior.sizes) or len(unknown) != len(prior.sizes):
        raise ValueError(
            f"codes and masks must have one entry a level ({len(prior.sizes)}): {len(codes)} and {len(unknown)}\n"
            "hint: encode the pictures with the tokenizer this prior was trained for"
        )
    state = []
    for level, (found, marks, size) in enumerate(zip(codes, unknown, prior.config.codebook_sizes, strict=True)):
        shape = (*codes[0].shape[:1], *prior.config.grids[level])
        if tuple(found.shape) != shape or tuple(marks.shape) != shape or marks.dtype != torch.bool:
            raise ValueError(
                f"codes of level {level} must be {shape}, with a bool mask of that shape: {tuple(found.shape)} and "
                f"{marks.dtype} {tuple(marks.shape)}\nhint: encode the pictures with this prior's tokenizer"
            )
        known = found[~marks]
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < size:
            raise ValueError(
                f"codes of level {level} must be in 0..{size - 1}: {int(known.min())}..{int(known.max())}\n"
                "hint: encode the pictures with the tokenizer this prior was trained for"
            )
        state.append(torch.where(marks, size, found).flatten(1))
    return state


def _still_masked(totals: Tensor, time: float) -> Tensor:
    """(B,) how many stay masked, floor(n sin(pi/2 t)): the cosine schedule of the confidence sampler."""
    if time <= 0:
        return torch.zeros_like(totals)
    return (totals.double() * math.sin(math.pi / 2 * time) + 1e-9).floor().long()


def _everywhere(level: Tensor) -> Tensor:
    return torch.arange(level.shape[1], device=level.device).expand(*level.shape)


def _settle(
    codes: Tensor,
    logits: Tensor,
    counts: Tensor,
    seeds: Tensor,
    settings: SamplerSettings,
    stream: str,
    remaining: float,
) -> None:
    """Write the surest `counts` of the masked codes of each image, in place."""
    shape = (codes.shape[1],)
    is_mask = codes == logits.shape[2]
    shifted = (logits - logits.amax(-1, keepdim=True)).div_(settings.temperature)
    weights = truncate(shifted, settings.top_k, settings.top_p).exp_()
    drawn = draw(weights, uniform(seeds, shape, f"code.{stream}"))
    sureness = weights.gather(2, drawn[..., None])[..., 0].double() / weights.sum(2, dtype=torch.float64)
    score = sureness.log()
    if settings.gumbel_scale * remaining > 0:
        score += settings.gumbel_scale * remaining * gumbel(seeds, shape, f"order.{stream}")
    order = torch.argsort(torch.where(is_mask, score, -math.inf), dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, _everywhere(codes))
    codes.copy_(torch.where(is_mask & (rank < counts[:, None]), drawn, codes))
