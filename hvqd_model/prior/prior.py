"""The hierarchical prior: one diffusion process over all levels, of codes or of the latents behind them.

forward  the training objective, mean a token (see discrete_prior and gaussian_prior).
bits     the true upper bound on the code length, level by level (noise on codes).
errors   the mean squared error of what is predicted, level by level (Gaussian noise, which bounds no code length).
sample   codes, one seed an image.

Axes: B images, L levels (coarse first) of h x w = N codes, K codes a level, R rows (positions of any images).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvqd_model.config import ConditionName, PriorConfig
from hvqd_model.diffusion.gaussian_samplers import GaussianSamplerName, GaussianSamplerSettings
from hvqd_model.diffusion.gaussian_schedules import GaussianSchedule
from hvqd_model.diffusion.samplers import Progress, SamplerName, SamplerSettings
from hvqd_model.diffusion.schedules import Schedule
from hvqd_model.prior.conditions import Conditions, check_conditions
from hvqd_model.prior.denoiser import Denoiser
from hvqd_model.prior.discrete_prior import DiscreteProcess
from hvqd_model.prior.gaussian_prior import GaussianProcess
from hvqd_model.prior.guided import Guidance, GuidedPredictor, Watcher
from hvqd_model.prior.latents import LatentStatistics
from hvqd_model.prior.process import PriorOutput
from hvqd_model.randomness import uniform

_DROPOUT: dict[ConditionName, str] = {
    "class": "label dropout",
    "style": "style dropout",
    "text": "text dropout",
    "map": "map dropout",
}
"""The stream of each condition's own dropout."""


class HierarchicalPrior(nn.Module):
    """A diffusion prior over the codes of one tokenizer."""

    def __init__(
        self,
        config: PriorConfig,
        codebooks: Sequence[Tensor] | None = None,
        statistics: Sequence[LatentStatistics] | None = None,
    ) -> None:
        """Build with fresh weights.

        Args:
            config: what to build.
            codebooks: (K, code_dim) of each level, kept frozen in float32; zeros when they come with loaded weights.
            statistics: with Gaussian noise, mean and deviation of each level's latents; 0 and 1 when left out.

        Raises:
            ValueError: the codebooks or the statistics do not fit the configuration.
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
        self.process: DiscreteProcess | GaussianProcess = (
            GaussianProcess(config, statistics) if config.noise == "gaussian" else DiscreteProcess(config)
        )
        self.denoiser = Denoiser(config, codebooks)

    @property
    def schedule(self) -> Schedule | GaussianSchedule:
        """The noise."""
        return self.process.schedule

    @property
    def statistics(self) -> list[LatentStatistics] | None:
        """Mean and deviation of each level's latents, which a Gaussian prior keeps."""
        if not isinstance(self.process, GaussianProcess):
            return None
        return [self.process.normalizer.statistics(level) for level in range(len(self.sizes))]

    @property
    def sizes(self) -> list[int]:
        """N of each level."""
        return self.denoiser.sizes

    def forward(self, codes: Sequence[Tensor], labels: Tensor | Conditions, times: Tensor, keys: Tensor) -> PriorOutput:
        """The training objective.

        Args:
            codes: (B, h, w) int64 of each level, coarse first; under Gaussian noise (B, h, w, code_dim) latents.
            labels: (B,) int64 classes, -1 for none, or all conditions.
            times: (B,) float64 in (0, 1), best of low discrepancy.
            keys: (B,) int64; every random draw follows from an image's key.

        Raises:
            ValueError: codes or conditions that are not this prior's.
        """
        clean, given = self._flatten(codes, keys), check_conditions(labels, len(keys), self.config)
        hidden: dict[ConditionName, Tensor] = {
            name: uniform(keys, stream=stream) < self.config.label_dropout for name, stream in _DROPOUT.items()
        }
        return self.process.objective(self.denoiser, clean, given.hidden(hidden), times, keys)

    @torch.no_grad()
    def bits(
        self, codes: Sequence[Tensor], labels: Tensor | Conditions, keys: Tensor, draws: int = 8
    ) -> tuple[Tensor, ...]:
        """(B,) float64 bits of all codes of each level: a true upper bound on the code length, in expectation.

        Args:
            codes: (B, h, w) int64 of each level.
            labels: (B,) int64 classes, -1 for none, or all conditions.
            keys: (B,) int64, which noise each image meets.
            draws: noise levels an image is met at, spread evenly over time.

        Raises:
            ValueError: draws < 1, or codes or conditions that are not this prior's.
        """
        if isinstance(self.process, GaussianProcess):
            raise ValueError(
                "bits are a bound of noise on codes, and noise=gaussian gives none\n"
                "hint: prior.errors() says how well it predicts; noise=absorbing gives bits"
            )
        _check_draws(draws)
        clean, given = self._flatten(codes, keys), check_conditions(labels, len(keys), self.config)
        return self.process.bits(self.denoiser, clean, given, keys, draws)

    @torch.no_grad()
    def errors(
        self, latents: Sequence[Tensor], labels: Tensor | Conditions, keys: Tensor, draws: int = 8
    ) -> tuple[Tensor, ...]:
        """(B,) float64 mean squared error of what is predicted of each level's latents; 1 for a noise never learned.

        Args:
            latents: (B, h, w, code_dim) of each level.
            labels, keys, draws: see `bits`.

        Raises:
            ValueError: draws < 1, latents or conditions that are not this prior's, or a prior of codes.
        """
        if not isinstance(self.process, GaussianProcess):
            raise ValueError(
                f"errors are of predicted latents, and noise={self.config.noise} is on codes\nhint: prior.bits()"
            )
        _check_draws(draws)
        clean, given = self._flatten(latents, keys), check_conditions(labels, len(keys), self.config)
        return self.process.errors(self.denoiser, clean, given, keys, draws)

    @torch.no_grad()
    def sample(
        self,
        seeds: Tensor,
        labels: Tensor | Conditions | None = None,
        *,
        steps: int = 16,
        sampler: SamplerName | GaussianSamplerName | None = None,
        guidance: Guidance = 3.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        fine_guidance: float | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        gumbel_scale: float = 1.0,
        eta: float = 0.0,
        known: Sequence[Tensor | None] | None = None,
        progress: Progress | None = None,
        watch: Watcher | None = None,
    ) -> tuple[Tensor, ...]:
        """(B, h, w) int64 codes of each level.

        Image i depends on the weights, seeds[i], its conditions and the batch size alone, so callers pad to one.

        Args:
            seeds: (B,) int64.
            labels: (B,) int64 classes, -1 for none, or all conditions; None for no condition at all.
            steps: of the reverse process.
            sampler: which reverse process; None is confidence for codes and dpm-solver++ for latents.
            guidance: 0 ignores the conditions, 1 follows them, more exaggerates them; doubles the cost unless 0 or 1. A
                scale for each condition by name costs a pass for each (see `hvqd_model.prior.guided`).
            guidance_interval: (from, to) times within [0, 1] at which guidance acts; outside it is 1.
            fine_guidance: the most that the finest level is guided, with the levels evenly between; None: all alike.
            temperature, top_k, top_p: truncation of the predicted distributions (noise on codes).
            gumbel_scale: noise on the order in which codes are settled (confidence, purity).
            eta: share of fresh noise (ddim).
            known: (B, h, w) codes of levels that are given and come back unchanged, None for the others.
            progress: called with (steps done, steps).
            watch: shown the codes before every step, masks filled with the likeliest codes (early previews).

        Raises:
            ValueError: a setting out of range, guidance on a prior without conditions, codes or conditions that are
                not this prior's.
        """
        given = self._check_known(known, len(seeds))
        asked = (self.denoiser, len(seeds), labels, guidance, guidance_interval)
        if isinstance(self.process, GaussianProcess):
            walk = GaussianSamplerSettings(steps, sampler or "dpm-solver++", eta)  # type: ignore[arg-type]
            network = GuidedPredictor(*asked, fine_guidance=fine_guidance)
            codes = self.process.sample(self.denoiser, network, seeds, walk, given, progress, watch)
        else:
            settings = SamplerSettings(steps, sampler or "confidence", temperature, top_k, top_p, gumbel_scale)  # type: ignore[arg-type]
            codes = self.process.sample(GuidedPredictor(*asked, watch, fine_guidance), seeds, settings, given, progress)
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

    def _flatten(self, codes: Sequence[Tensor], keys: Tensor) -> list[Tensor]:
        """(B, N) codes of each level, or (B, N, code_dim) latents, checked."""
        if len(codes) != len(self.sizes):
            raise ValueError(
                f"codes must have one entry a level ({len(self.sizes)}): {len(codes)}\n"
                "hint: encode the pictures with the tokenizer this prior was trained for"
            )
        if self.config.noise == "gaussian":
            for level, latents in enumerate(codes):
                self._check_latents(level, latents, len(keys))
            return [latents.flatten(1, 2) for latents in codes]
        for level, level_codes in enumerate(codes):
            self._check_codes(level, level_codes, len(keys))
        return [level_codes.flatten(1) for level_codes in codes]

    def _check_latents(self, level: int, latents: Tensor, images: int) -> None:
        shape = (images, *self.config.grids[level], self.config.code_dims[level])
        if tuple(latents.shape) != shape or not latents.is_floating_point():
            raise ValueError(
                f"latents of level {level} must be floating, of shape {shape}: {latents.dtype} {tuple(latents.shape)}\n"
                "hint: a Gaussian prior learns from the latents of the tokenizer it was configured for"
            )


def _check_draws(draws: int) -> None:
    if draws < 1:
        raise ValueError(f"draws must be at least 1: {draws}\nhint: 8 draws are a good start")
