"""Latents as the denoiser reads and writes them, and what brings them to the scale of the noise.

Axes: B images, N positions of a level, C latent channels (the code's dimensions), D channels, R rows, K codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvqd_model.codec.search import nearest_codes
from hvqd_model.prior.frozen import FrozenBuffers


class LatentStatistics(NamedTuple):
    """Of one level's latents over the training pictures."""

    mean: Tensor
    """(C,)"""
    deviation: Tensor
    """(C,), above 0; what latents are divided by."""

    def of_level(self) -> LatentStatistics:
        """The same with one deviation for all channels, the largest."""
        return LatentStatistics(self.mean, self.deviation.max().expand_as(self.deviation).clone())


class LatentEmbedding(FrozenBuffers):
    """Normalised latents of one level as vectors: a projection, and the place. The codebook says what they snap to."""

    codebook: Tensor

    def __init__(self, codebook: Tensor, positions: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(codebook.shape[1], width)
        self.position = nn.Embedding(positions, width)
        self.register_buffer("codebook", codebook.float().clone())
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, N, D) from (B, N, C) normalised latents."""
        places = self.position(torch.arange(latents.shape[1], device=latents.device))
        embedded: Tensor = self.project(latents.to(self.project.weight.dtype)) + places
        return embedded


class LatentHead(nn.Module):
    """What is predicted of one level's latents; nothing at first, so that the error of a predicted noise is 1."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.own = nn.Linear(width, channels)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """(R, C) from (R, D) features."""
        predicted: Tensor = self.own(features)
        return predicted


class Normalizer(FrozenBuffers):
    """The statistics of every level, kept with the model, and the way from latents to codes and back."""

    def __init__(self, channels: Sequence[int], statistics: Sequence[LatentStatistics] | None) -> None:
        """Keep the statistics; zeros and ones when they come with loaded weights.

        Raises:
            ValueError: statistics of other shapes, or a deviation that is not above 0.
        """
        super().__init__()
        if statistics is None:
            statistics = [LatentStatistics(torch.zeros(count), torch.ones(count)) for count in channels]
        found = [tuple(part.shape) for level in statistics for part in level]
        if found != [(count,) for count in channels for _ in range(2)]:
            raise ValueError(
                f"latent statistics must be a mean and a deviation of {list(channels)} channels a level: {found}\n"
                "hint: take them from the codes that `hvqd encode` made for a Gaussian prior"
            )
        for level, (mean, deviation) in enumerate(statistics):
            if not bool((deviation > 0).all()) or not bool((mean.isfinite() & deviation.isfinite()).all()):
                raise ValueError(
                    f"latent deviations of level {level} must be above 0 and finite: {float(deviation.min())}\n"
                    "hint: run `hvqd encode` again"
                )
            self.register_buffer(f"mean_{level}", mean.float().clone())
            self.register_buffer(f"deviation_{level}", deviation.float().clone())

    def statistics(self, level: int) -> LatentStatistics:
        """Of one level."""
        return LatentStatistics(self.get_buffer(f"mean_{level}"), self.get_buffer(f"deviation_{level}"))

    def normalized(self, level: int, latents: Tensor) -> Tensor:
        """(..., C) float32 latents of mean 0, divided by their deviations."""
        mean, deviation = self.statistics(level)
        return (latents.float() - mean) / deviation

    def snapped(self, level: int, latents: Tensor, codebook: Tensor) -> Tensor:
        """(B, N) int64: the code that the tokenizer gives to normalised (B, N, C) latents."""
        mean, deviation = self.statistics(level)
        rows = (latents.float() * deviation + mean).flatten(0, 1)
        return nearest_codes(rows, codebook).view(latents.shape[:2])

    def vectors(self, level: int, codes: Tensor, codebook: Tensor) -> Tensor:
        """(B, N, C) normalised vectors of (B, N) codes."""
        return self.normalized(level, codebook[codes])
