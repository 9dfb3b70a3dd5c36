"""The hierarchical prior: one diffusion process over the codes of all levels.

forward  the training objective, mean a token: the simplified absorbing bound (arXiv:2406.07524) reweighted by a power
         of time, or the KL of posteriors with an auxiliary cross-entropy (arXiv:2111.14822).
bits     the true upper bound on the code length, level by level.
sample   codes, one seed an image.

Axes: B images, L levels (coarse first) of h x w = N codes, K codes a level, R rows (positions of any images).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvqd_model.config import PriorConfig
from hvqd_model.diffusion.discrete import add_copy_prior, corrupt, posterior_kl
from hvqd_model.diffusion.guidance import guide
from hvqd_model.diffusion.samplers import Progress, SamplerName, SamplerSettings, sample_codes
from hvqd_model.diffusion.schedules import mask_and_replace
from hvqd_model.diffusion.stagger import level_rates, level_times, levels_present
from hvqd_model.prior.denoiser import Denoiser
from hvqd_model.randomness import split_keys, uniform


@dataclass(frozen=True)
class PriorOutput:
    """What a training step returns."""

    loss: Tensor
    """Scalar: the mean over images of the training objective per token."""
    metrics: dict[str, Tensor]
    """Detached scalars by level: cross_entropy_0 (nats a corrupted code), accuracy_0, bits_0 (bound a code)."""


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


class HierarchicalPrior(nn.Module):
    """A diffusion prior over the codes of one tokenizer."""

    def __init__(self, config: PriorConfig, codebooks: Sequence[Tensor] | None = None) -> None:
        """Build with fresh weights.

        Args:
            config: what to build.
            codebooks: (K, code_dim) of each level, kept frozen in float32; zeros when they come with loaded weights.

        Raises:
            ValueError: the codebooks do not fit the configuration.
        """
        super().__init__()
        self.config = config
        shapes = list(zip(config.codebook_sizes, config.code_dims, strict=True))
        if codebooks is None:
            codebooks = [torch.zeros(shape) for shape in shapes]
        if [tuple(codebook.shape) for codebook in codebooks] != shapes:
            raise ValueError(
                f"codebooks must have the shapes {shapes}: {[tuple(codebook.shape) for codebook in codebooks]}\n"
                "hint: pass the codebooks of the tokenizer this prior was configured for"
            )
        share = config.uniform_share if config.noise == "mask-and-replace" else 0.0
        self.schedule = mask_and_replace(share, config.schedule)
        self.denoiser = Denoiser(config, codebooks)

    @property
    def sizes(self) -> list[int]:
        """N of each level."""
        return self.denoiser.sizes

    def forward(self, codes: Sequence[Tensor], labels: Tensor, times: Tensor, keys: Tensor) -> PriorOutput:
        """The training objective.

        Args:
            codes: (B, h, w) int64 of each level, coarse first.
            labels: (B,) int64, -1 for no class.
            times: (B,) float64 in (0, 1), best of low discrepancy.
            keys: (B,) int64; every random draw follows from an image's key.

        Raises:
            ValueError: codes or labels that are not this prior's.
        """
        clean = self._flatten(codes, labels)
        hidden = uniform(keys, stream="label dropout") < self.config.label_dropout
        losses = self._losses(clean, torch.where(hidden, -1, labels), times, keys, training=True)
        images = len(labels)
        total = torch.stack([loss.objective.sum() for loss in losses]).sum()
        metrics: dict[str, Tensor] = {}
        for level, loss in enumerate(losses):
            count = max(len(loss.images), 1)
            metrics[f"cross_entropy_{level}"] = loss.cross_entropy.detach().sum() / count
            metrics[f"accuracy_{level}"] = loss.correct.float().sum() / count
            metrics[f"bits_{level}"] = loss.bound.detach().sum() / (images * self.sizes[level] * math.log(2))
        return PriorOutput(total / (images * self.config.tokens), metrics)

    @torch.no_grad()
    def bits(self, codes: Sequence[Tensor], labels: Tensor, keys: Tensor, draws: int = 8) -> tuple[Tensor, ...]:
        """(B,) float64 bits of all codes of each level: a true upper bound on the code length, in expectation.

        Args:
            codes: (B, h, w) int64 of each level.
            labels: (B,) int64, -1 for no class.
            keys: (B,) int64, which noise each image meets.
            draws: noise levels an image is met at, spread evenly over time.

        Raises:
            ValueError: draws < 1, or codes or labels that are not this prior's.
        """
        if draws < 1:
            raise ValueError(f"draws must be at least 1: {draws}\nhint: 8 draws are a good start")
        clean = self._flatten(codes, labels)
        offset = uniform(keys, stream="bound time")
        totals = [torch.zeros(len(labels), dtype=torch.float64, device=labels.device) for _ in clean]
        for draw in range(draws):
            times = (draw + offset) / draws
            losses = self._losses(clean, labels, times, split_keys(keys, f"bound {draw}"), training=False)
            for total, loss in zip(totals, losses, strict=True):
                total.index_add_(0, loss.images, loss.bound / (draws * math.log(2)))
        return tuple(totals)

    def _losses(
        self, clean: list[Tensor], labels: Tensor, times: Tensor, keys: Tensor, *, training: bool
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
        context = self._corrupt_context(noisy, at, keys) if training else noisy
        logits = self.denoiser(context, at, labels, present, rows)

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
        log_p0 = add_copy_prior(logits.float(), x_t, t, self.schedule).log_softmax(1)
        cross_entropy = -log_p0.gather(1, x_0[:, None])[:, 0]
        steps = self.config.diffusion_steps
        bound = steps * posterior_kl(log_p0, x_0, x_t, s, t, self.schedule)
        auxiliary = steps * self.config.auxiliary_weight * cross_entropy
        return _LevelLoss(
            images=images,
            cross_entropy=cross_entropy,
            correct=log_p0.detach().argmax(1) == x_0,
            bound=bound.detach(),
            objective=bound.to(cross_entropy.dtype) + auxiliary,
        )

    def _corrupt_context(self, noisy: list[Tensor], at: Tensor, keys: Tensor) -> list[Tensor]:
        """Replace some codes of levels that are already clean: in sampling they come from the model and have errors."""
        if self.config.context_corruption == 0:
            return noisy
        share = uniform(keys, stream="context share") * self.config.context_corruption
        corrupted = []
        for level, (codes, num_codes) in enumerate(zip(noisy, self.config.codebook_sizes, strict=True)):
            draws = uniform(keys, (2, codes.shape[1]), f"context {level}")
            hit = (draws[:, 0] < share[:, None]) & (at[:, level] == 0)[:, None]
            corrupted.append(torch.where(hit, (draws[:, 1] * num_codes).long(), codes))
        return corrupted

    @torch.no_grad()
    def sample(
        self,
        seeds: Tensor,
        labels: Tensor | None = None,
        *,
        steps: int = 16,
        sampler: SamplerName = "confidence",
        guidance: float = 3.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        gumbel_scale: float = 1.0,
        known: Sequence[Tensor | None] | None = None,
        progress: Progress | None = None,
    ) -> tuple[Tensor, ...]:
        """(B, h, w) int64 codes of each level.

        Image i depends on the weights, seeds[i], labels[i] and the batch size alone, so callers pad to a fixed one.

        Args:
            seeds: (B,) int64.
            labels: (B,) int64, -1 for no class; None for no class at all.
            steps: of the reverse process.
            sampler: which reverse process.
            guidance: 0 ignores the class, 1 follows it, more exaggerates it; doubles the cost unless 0 or 1.
            guidance_interval: (from, to) times within [0, 1] at which guidance acts; outside it is 1.
            temperature, top_k, top_p: truncation of the predicted distributions.
            gumbel_scale: noise on the order in which codes are settled (confidence, purity).
            known: (B, h, w) codes of levels that are given and come back unchanged, None for the others.
            progress: called with (steps done, steps).

        Raises:
            ValueError: a setting out of range, guidance on a prior without classes, codes or labels not this prior's.
        """
        settings = SamplerSettings(steps, sampler, temperature, top_k, top_p, gumbel_scale)
        predictor = _GuidedPredictor(self, len(seeds), labels, guidance, guidance_interval)
        given = self._check_known(known, len(seeds))
        codes = sample_codes(
            predictor,
            self.sizes,
            self.config.codebook_sizes,
            seeds,
            self.schedule,
            self.config.stagger,
            settings,
            given,
            progress,
        )
        return tuple(level.reshape(len(seeds), *grid) for level, grid in zip(codes, self.config.grids, strict=True))

    def _check_known(self, known: Sequence[Tensor | None] | None, images: int) -> list[Tensor | None] | None:
        if known is None:
            return None
        if len(known) != len(self.sizes):
            raise ValueError(
                f"known must have one entry a level ({len(self.sizes)}): {len(known)}\nhint: None for a level to sample"
            )
        for level, codes in enumerate(known):
            if codes is not None:
                self._check_codes(level, codes, images)
        return [None if codes is None else codes.flatten(1) for codes in known]

    def _check_codes(self, level: int, codes: Tensor, images: int) -> None:
        shape, num_codes = (images, *self.config.grids[level]), self.config.codebook_sizes[level]
        if tuple(codes.shape) != shape or codes.dtype != torch.int64:
            raise ValueError(
                f"codes of level {level} must be int64 of shape {shape}: {codes.dtype} {tuple(codes.shape)}\n"
                "hint: encode the pictures with the tokenizer this prior was trained for"
            )
        # On an accelerator this look would stall every step; there a bad index fails in the embedding.
        if codes.device.type == "cpu" and codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < num_codes:
            raise ValueError(
                f"codes of level {level} must be in 0..{num_codes - 1}: {int(codes.min())}..{int(codes.max())}\n"
                "hint: encode the pictures with the tokenizer this prior was trained for"
            )

    def _check_labels(self, labels: Tensor, images: int) -> None:
        classes = len(self.config.classes)
        bad_shape = tuple(labels.shape) != (images,)
        if bad_shape or (
            labels.device.type == "cpu" and images and not -1 <= int(labels.min()) <= int(labels.max()) < classes
        ):
            given = tuple(labels.shape) if bad_shape else labels[(labels < -1) | (labels >= classes)].tolist()
            raise ValueError(
                f"labels must be ({images},) numbers from -1 (no class) to {classes - 1}: {given}\n"
                f"hint: the classes are {', '.join(self.config.classes) or 'none: this prior is unconditional'}"
            )

    def _flatten(self, codes: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
        """(B, N) codes of each level, checked."""
        if len(codes) != len(self.sizes):
            raise ValueError(
                f"codes must have one entry a level ({len(self.sizes)}): {len(codes)}\n"
                "hint: encode the pictures with the tokenizer this prior was trained for"
            )
        for level, level_codes in enumerate(codes):
            self._check_codes(level, level_codes, len(labels))
        self._check_labels(labels, len(labels))
        return [level_codes.flatten(1) for level_codes in codes]


class _GuidedPredictor:
    """The network as samplers see it: guided logits at the wanted positions."""

    def __init__(
        self,
        prior: HierarchicalPrior,
        images: int,
        labels: Tensor | None,
        guidance: float,
        interval: tuple[float, float],
    ) -> None:
        if not math.isfinite(guidance) or guidance < 0:
            raise ValueError(f"guidance must be at least 0: {guidance}\nhint: 1 follows the class, 3 exaggerates it")
        if guidance not in (0, 1) and not prior.config.classes:
            raise ValueError(
                f"guidance needs a prior with classes, and this one is unconditional: {guidance}\nhint: guidance=1"
            )
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"guidance_interval must rise within 0 and 1: {interval}\nhint: (0, 1) guides always")
        if labels is not None:
            prior._check_labels(labels, images)
        self.prior, self.labels, self.guidance, self.interval = prior, labels, guidance, interval

    def __call__(
        self, codes: Sequence[Tensor], level_times: Sequence[float], time: float, wanted: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """(B, M, K) logits a level."""
        scale = self.guidance if self.interval[0] <= time <= self.interval[1] else 1.0
        nobody = torch.full((len(codes[0]),), -1, dtype=torch.int64, device=codes[0].device)
        if self.labels is None or scale == 0:
            return self._network(codes, level_times, nobody, wanted)
        conditional = self._network(codes, level_times, self.labels, wanted)
        if scale == 1:
            return conditional
        # Two passes of the same size, not one of twice: whether guidance acts must not change a row's rounding.
        unconditional = self._network(codes, level_times, nobody, wanted)
        return [
            None if c is None or u is None else guide(c, u, scale)
            for c, u in zip(conditional, unconditional, strict=True)
        ]

    def _network(
        self, codes: Sequence[Tensor], level_times: Sequence[float], labels: Tensor, wanted: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        images = len(labels)
        missing = len(self.prior.sizes) - len(level_times)  # levels not present are pure noise
        at = torch.tensor([*level_times, *[1.0] * missing], dtype=torch.float64, device=labels.device)
        rows = [
            None
            if places is None
            else (torch.arange(images, device=places.device)[:, None] * level.shape[1] + places).reshape(-1)
            for level, places in zip(codes, wanted, strict=True)
        ]
        logits = self.prior.denoiser(codes, at.expand(images, -1), labels, None, rows)
        return [
            None if places is None else scores.float().view(images, places.shape[1], -1)
            for scores, places in zip(logits, wanted, strict=True)
        ]
