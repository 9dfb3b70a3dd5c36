"""The prior's discrete noise: codes are masked or replaced.

The training objective is the simplified absorbing bound (arXiv:2406.07524) reweighted by a power of time, or the KL of
posteriors with an auxiliary cross-entropy (arXiv:2111.14822); both come with the true upper bound on the code length.

Axes: B images, L levels (coarse first) of N codes, K codes a level, R rows (positions of any images).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hvqd_model.config import PriorConfig
from hvqd_model.diffusion.chunks import row_terms
from hvqd_model.diffusion.discrete import add_copy_prior, corrupt, posterior_kl
from hvqd_model.diffusion.samplers import Predictor, Progress, SamplerSettings, sample_codes
from hvqd_model.diffusion.schedules import mask_and_replace
from hvqd_model.diffusion.stagger import level_rates, level_times, levels_present
from hvqd_model.prior.conditions import Conditions
from hvqd_model.prior.denoiser import Denoiser
from hvqd_model.prior.process import PriorOutput, corrupt_context
from hvqd_model.randomness import split_keys, uniform


@dataclass(frozen=True)
class _LevelLoss:
    """Terms of one level, a row each."""

    images: Tensor
    cross_entropy: Tensor
    correct: Tensor
    bound: Tensor
    """(R,) nats of the true bound."""
    objective: Tensor
    """(R,) what training minimises."""


class DiscreteProcess:
    """Noise on codes, and the way back; the weights are the denoiser's."""

    def __init__(self, config: PriorConfig) -> None:
        self.config = config
        self.sizes = [rows * columns for rows, columns in config.grids]
        share = config.uniform_share if config.noise == "mask-and-replace" else 0.0
        self.schedule = mask_and_replace(share, config.schedule)

    def objective(
        self, denoiser: Denoiser, clean: list[Tensor], labels: Tensor | Conditions, times: Tensor, keys: Tensor
    ) -> PriorOutput:
        """The training objective of (B, N) codes of each level, already without the conditions that training hides."""
        losses = self._losses(denoiser, clean, labels, times, keys, training=True)
        images = len(times)
        total = torch.stack([loss.objective.sum() for loss in losses]).sum()
        metrics: dict[str, Tensor] = {}
        for level, loss in enumerate(losses):
            count = max(len(loss.images), 1)
            metrics[f"cross_entropy_{level}"] = loss.cross_entropy.detach().sum() / count
            metrics[f"accuracy_{level}"] = loss.correct.float().sum() / count
            metrics[f"bits_{level}"] = loss.bound.detach().sum() / (images * self.sizes[level] * math.log(2))
        return PriorOutput(total / (images * self.config.tokens), metrics)

    def bits(
        self, denoiser: Denoiser, clean: list[Tensor], labels: Tensor | Conditions, keys: Tensor, draws: int
    ) -> tuple[Tensor, ...]:
        """(B,) float64 bits of all codes of each level, a true upper bound in expectation."""
        offset = uniform(keys, stream="bound time")
        totals = [torch.zeros(len(keys), dtype=torch.float64, device=keys.device) for _ in clean]
        for draw in range(draws):
            times = (draw + offset) / draws
            losses = self._losses(denoiser, clean, labels, times, split_keys(keys, f"bound {draw}"), training=False)
            for total, loss in zip(totals, losses, strict=True):
                total.index_add_(0, loss.images, loss.bound / (draws * math.log(2)))
        return tuple(totals)

    def sample(
        self,
        predict: Predictor,
        seeds: Tensor,
        settings: SamplerSettings,
        known: Sequence[Tensor | None] | None,
        progress: Progress | None,
    ) -> list[Tensor]:
        """(B, N) int64 codes of each level; see `sample_codes`."""
        return sample_codes(
            predict,
            self.sizes,
            self.config.codebook_sizes,
            seeds,
            self.schedule,
            self.config.stagger,
            settings,
            known,
            progress,
        )

    def _losses(
        self,
        denoiser: Denoiser,
        clean: list[Tensor],
        labels: Tensor | Conditions,
        times: Tensor,
        keys: Tensor,
        *,
        training: bool,
    ) -> list[_LevelLoss]:
        """The loss terms of every level at one time an image."""
        config, levels = self.config, len(clean)
        if config.loss == "kl":
            # The bound of a chain with that many steps: times move to the end of their step.
            step = (times * config.diffusion_steps).ceil().clamp_min(1)
            times, earlier = step / config.diffusion_steps, (step - 1) / config.diffusion_steps
        else:
            earlier = times
        at, before = (level_times(when, levels, config.stagger) for when in (times, earlier))
        rates = level_rates(times, levels, config.stagger)
        present = levels_present(before) if config.stagger > 0 else None

        noisy = [
            corrupt(codes, at[:, level], uniform(keys, codes.shape[1:], f"noise {level}"), self.schedule, num_codes)
            for level, (codes, num_codes) in enumerate(zip(clean, config.codebook_sizes, strict=True))
        ]
        rows = []
        for level, num_codes in enumerate(config.codebook_sizes):
            if config.loss == "simplified":
                wanted = (noisy[level] == num_codes) & (at[:, level] < 1)[:, None]
            else:
                wanted = (before[:, level] < at[:, level])[:, None].expand_as(noisy[level])
                if self.schedule.is_absorbing:
                    wanted = wanted & (noisy[level] == num_codes)
            rows.append(wanted.reshape(-1).nonzero()[:, 0])
        context = corrupt_context(noisy, at, keys, config) if training else noisy
        logits = denoiser(context, at, labels, present, rows)

        losses = []
        for level, size in enumerate(self.sizes):
            images = rows[level] // size
            x_0, x_t = clean[level].reshape(-1)[rows[level]], noisy[level].reshape(-1)[rows[level]]
            t = at[images, level]
            if config.loss == "simplified":
                losses.append(self._simplified(logits[level], x_0, t, rates[images, level], images))
            else:
                losses.append(self._kl(logits[level], x_0, x_t, before[images, level], t, images))
        return losses

    def _simplified(self, logits: Tensor, x_0: Tensor, t: Tensor, rate: Tensor, images: Tensor) -> _LevelLoss:
        cross_entropy = F.cross_entropy(logits.float(), x_0, reduction="none")
        weight = self.schedule.bound_weight(t) * rate
        training_weight = weight * t ** (1 + self.config.time_weight_power)
        return _LevelLoss(
            images=images,
            cross_entropy=cross_entropy,
            correct=logits.detach().argmax(1) == x_0,
            bound=cross_entropy.detach() * weight,
            objective=cross_entropy * training_weight.to(cross_entropy.dtype),
        )

    def _kl(self, logits: Tensor, x_0: Tensor, x_t: Tensor, s: Tensor, t: Tensor, images: Tensor) -> _LevelLoss:
        steps = self.config.diffusion_steps

        def terms(scores: Tensor, rows: slice) -> tuple[Tensor, ...]:
            log_p0 = add_copy_prior(scores, x_t[rows], t[rows], self.schedule).log_softmax(1)
            cross_entropy = -log_p0.gather(1, x_0[rows, None])[:, 0]
            bound = steps * posterior_kl(log_p0, x_0[rows], x_t[rows], s[rows], t[rows], self.schedule)
            objective = bound.to(cross_entropy.dtype) + steps * self.config.auxiliary_weight * cross_entropy
            return objective, bound, cross_entropy, log_p0.argmax(1) == x_0[rows]

        objective, bound, cross_entropy, correct = row_terms(logits, terms)
        return _LevelLoss(images, cross_entropy, correct, bound.detach(), objective)
