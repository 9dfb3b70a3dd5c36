"""The prior's Gaussian noise, on the normalised latents behind the codes; samples snap to codes.

The training objective is the mean squared error of what the network predicts, weighted by `loss_weight` and by the rate
at which a level passes through its times, so that every level counts alike for every stagger. A level that is clean is
its codes: as context the network sees code vectors, in training as in sampling, whether they were sampled or given.

Axes: B images, L levels (coarse first) of N positions, C latent channels, K codes a level, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvqd_model.config import PriorConfig
from hvqd_model.diffusion.gaussian import add_noise, loss_weight, target, to_clean
from hvqd_model.diffusion.gaussian_samplers import GaussianSamplerSettings, Progress, sample_latents
from hvqd_model.diffusion.gaussian_schedules import gaussian_schedule
from hvqd_model.diffusion.samplers import Predictor
from hvqd_model.diffusion.stagger import level_rates, level_times, levels_present
from hvqd_model.prior.conditions import Conditions
from hvqd_model.prior.denoiser import Denoiser
from hvqd_model.prior.frozen import FrozenBuffers
from hvqd_model.prior.latents import LatentEmbedding, LatentStatistics, Normalizer
from hvqd_model.prior.process import PriorOutput, corrupt_context
from hvqd_model.randomness import normal, split_keys, uniform


@dataclass(frozen=True)
class _LevelError:
    """Terms of one level, an image each."""

    images: Tensor
    error: Tensor
    """(R,) mean squared error of the prediction, times dt_l/dt: its mean over times is that of the level."""
    objective: Tensor
    """(R,) the same with the training weight."""


class GaussianProcess(FrozenBuffers):
    """Noise on latents, and the way back; the weights are the denoiser's, the statistics are kept here."""

    def __init__(self, config: PriorConfig, statistics: Sequence[LatentStatistics] | None) -> None:
        super().__init__()
        self.config = config
        self.sizes = [rows * columns for rows, columns in config.grids]
        self.schedule = gaussian_schedule(config.gaussian.schedule, config.gaussian.zero_terminal_snr)
        if statistics is not None and config.gaussian.latent_scale == "level":
            statistics = [level.of_level() for level in statistics]
        self.normalizer = Normalizer(config.code_dims, statistics)

    def objective(
        self, denoiser: Denoiser, clean: list[Tensor], given: Conditions, times: Tensor, keys: Tensor
    ) -> PriorOutput:
        """The training objective of (B, N, C) latents of each level, already without the conditions training hides."""
        losses = self._errors(denoiser, self._normalized(clean), given, times, keys, training=True)
        images = len(times)
        total = sum(loss.objective.sum() * size for loss, size in zip(losses, self.sizes, strict=True))
        assert isinstance(total, Tensor)
        metrics = {f"error_{level}": loss.error.detach().sum() / images for level, loss in enumerate(losses)}
        return PriorOutput(total / (images * self.config.tokens), metrics)

    def errors(
        self, denoiser: Denoiser, clean: list[Tensor], given: Conditions, keys: Tensor, draws: int
    ) -> tuple[Tensor, ...]:
        """(B,) float64 mean squared error of the prediction on each level, over times that are spread evenly."""
        normalized = self._normalized(clean)
        offset = uniform(keys, stream="bound time")
        totals = [torch.zeros(len(keys), dtype=torch.float64, device=keys.device) for _ in clean]
        for draw in range(draws):
            times, drawn = (draw + offset) / draws, split_keys(keys, f"bound {draw}")
            losses = self._errors(denoiser, normalized, given, times, drawn, training=False)
            for total, loss in zip(totals, losses, strict=True):
                total.index_add_(0, loss.images, loss.error.double() / draws)
        return tuple(totals)

    def _normalized(self, latents: Sequence[Tensor]) -> list[Tensor]:
        return [self.normalizer.normalized(level, found) for level, found in enumerate(latents)]

    def _errors(
        self,
        denoiser: Denoiser,
        clean: list[Tensor],
        given: Conditions,
        times: Tensor,
        keys: Tensor,
        *,
        training: bool,
    ) -> list[_LevelError]:
        """The terms of every level at one time an image; images for which a level stands still have none."""
        config, gaussian, levels = self.config, self.config.gaussian, len(clean)
        at, rates = (function(times, levels, config.stagger) for function in (level_times, level_rates))
        present = levels_present(at) if config.stagger > 0 else None
        signal, strength = self.schedule.rates(at)
        noisy, targets = [], []
        for level, latents in enumerate(clean):
            noise = normal(keys, latents.shape[1:], f"noise {level}")
            a, s = signal[:, level, None, None], strength[:, level, None, None]
            noisy.append(add_noise(latents, noise, a, s))
            targets.append(target(gaussian.prediction, latents, noise, a, s).float())
        if config.stagger > 0:
            noisy = self._with_codes(denoiser, noisy, clean, at, keys, training=training)
        active = [(rates[:, level] > 0).nonzero()[:, 0] for level in range(levels)]
        rows = [
            (images[:, None] * size + torch.arange(size, device=images.device)).reshape(-1)
            for images, size in zip(active, self.sizes, strict=True)
        ]
        outputs = denoiser(noisy, at, given, present, rows)

        losses = []
        for level, images in enumerate(active):
            wanted = targets[level][images]
            error = (outputs[level].float().view(wanted.shape) - wanted).square().mean((1, 2))
            rate = rates[images, level]
            weight = loss_weight(
                gaussian.prediction, signal[images, level], strength[images, level], gaussian.min_snr_gamma
            )
            losses.append(_LevelError(images, error.detach() * rate.float(), error * (rate * weight).float()))
        return losses

    @torch.no_grad()
    def _with_codes(
        self, denoiser: Denoiser, noisy: list[Tensor], clean: list[Tensor], at: Tensor, keys: Tensor, *, training: bool
    ) -> list[Tensor]:
        """Levels that are clean as their codes' vectors; in training a few of the codes are replaced."""
        codes = [
            self.normalizer.snapped(level, latents, codebook_of(denoiser, level)) for level, latents in enumerate(clean)
        ]
        if training:
            codes = corrupt_context(codes, at, keys, self.config)
        return [
            torch.where(
                (at[:, level] == 0)[:, None, None],
                self.normalizer.vectors(level, codes[level], codebook_of(denoiser, level)),
                latents,
            )
            for level, latents in enumerate(noisy)
        ]

    def sample(
        self,
        denoiser: Denoiser,
        network: Predictor,
        seeds: Tensor,
        settings: GaussianSamplerSettings,
        known: Sequence[Tensor | None] | None,
        progress: Progress | None,
        watch: Callable[[Sequence[Tensor]], None] | None,
        held: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    ) -> list[Tensor]:
        """(B, N) int64 codes of each level.

        Args:
            network: the guided prediction of (B, N, C) for the wanted positions.
            known: (B, N) codes of levels that are given, None for the others.
            watch: shown before every step the codes that the predicted clean latents are nearest to.
            held: (B, N) codes of a level and (B, N) bool where they are unknown; the rest comes back unchanged. None
                for a level of which nothing is known. What is known stands in the prediction of the clean latents, so
                every sampler brings its places to it with the noise of each time.
        """
        codes: list[Tensor | None] = list(known) if known is not None else [None] * len(self.sizes)
        shapes = list(zip(self.sizes, self.config.code_dims, strict=True))
        everywhere = [torch.arange(size, device=seeds.device).expand(len(seeds), size) for size in self.sizes]
        told_codes = list(held) if held is not None else [None] * len(self.sizes)
        told_latents = [
            None if told is None else (self.normalizer.vectors(level, told[0], codebook_of(denoiser, level)), told[1])
            for level, told in enumerate(told_codes)
        ]

        def predict(
            latents: Sequence[Tensor], level_times: Sequence[float], time: float, wanted: Sequence[bool]
        ) -> list[Tensor | None]:
            places = [everywhere[level] if is_wanted else None for level, is_wanted in enumerate(wanted)]
            outputs = network(latents, level_times, time, places)
            signal, strength = self.schedule.rates(torch.tensor(list(level_times), dtype=torch.float64))
            clean: list[Tensor | None] = [
                None
                if output is None
                else to_clean(self.config.gaussian.prediction, output, latents[level], float(a), float(s))
                for level, (output, a, s) in enumerate(zip(outputs, signal, strength, strict=True))
            ]
            clean = [
                latents if latents is None or told is None else torch.where(told[1][..., None], latents, told[0])
                for latents, told in zip(clean, told_latents, strict=False)
            ]
            if watch is not None:
                shown = [latents[level] if found is None else found for level, found in enumerate(clean)]
                watch([self._shown(denoiser, level, found, codes[level]) for level, found in enumerate(shown)])
            return clean

        def finish(level: int, latents: Tensor) -> Tensor:
            found, told = self.normalizer.snapped(level, latents, codebook_of(denoiser, level)), told_codes[level]
            found = found if told is None else torch.where(told[1], found, told[0])
            codes[level] = found
            return self.normalizer.vectors(level, found, codebook_of(denoiser, level))

        fixed = [
            None if level is None else self.normalizer.vectors(place, level, codebook_of(denoiser, place))
            for place, level in enumerate(codes)
        ]
        sample_latents(predict, shapes, seeds, self.schedule, self.config.stagger, settings, finish, fixed, progress)
        done = [level for level in codes if level is not None]
        assert len(done) == len(self.sizes), "the walk ends when every level is clean"
        return done

    def _shown(self, denoiser: Denoiser, level: int, clean: Tensor, settled: Tensor | None) -> Tensor:
        if settled is not None:
            return settled
        return self.normalizer.snapped(level, clean, codebook_of(denoiser, level))


def codebook_of(denoiser: Denoiser, level: int) -> Tensor:
    """(K, C) float32 of one level."""
    embedding = denoiser.embeddings[level]
    assert isinstance(embedding, LatentEmbedding)
    return embedding.codebook
