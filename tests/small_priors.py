"""Priors so small that a test can afford them, of either kind of noise, and what they are asked with.

Axes: B images, L levels (coarse first) of h x w codes, D dimensions of a level's code vectors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hvqd_model.config import PriorConfig
from hvqd_model.prior.latents import LatentStatistics
from hvqd_model.prior.prior import HierarchicalPrior

GRIDS = ((1, 2), (2, 4), (4, 4))
CLASSES = ("animals", "faces", "flags")


def settings(**changes: Any) -> PriorConfig:
    """Three levels of grids that are not square, absorbing noise unless said otherwise."""
    base: dict[str, Any] = {
        "grids": GRIDS,
        "codebook_sizes": (5, 7, 6),
        "code_dim": 3,
        "classes": CLASSES,
        "width": 16,
        "depth": 2,
        "heads": 2,
    }
    return PriorConfig.model_validate(base | changes)


def gaussian_settings(**changes: Any) -> PriorConfig:
    """The same with Gaussian noise, on latents of another number of channels at each level.

    Every channel has a deviation of 1 and the network says v, unless asked otherwise, so that a network that says
    nothing is wrong by 1.
    """
    gaussian = {"schedule": "cosine", "latent_scale": "channel", "prediction": "v"} | changes.pop("gaussian", {})
    return settings(**{"noise": "gaussian", "code_dim": (3, 2, 4), "gaussian": gaussian} | changes)


def statistics(config: PriorConfig) -> list[LatentStatistics]:
    """Mean and deviation of each level's latents, different for every channel."""
    return [LatentStatistics(torch.linspace(-1, 1, count), torch.linspace(0.5, 2, count)) for count in config.code_dims]


def fresh(config: PriorConfig) -> HierarchicalPrior:
    """A prior as training starts it: its first prediction is uniform."""
    torch.manual_seed(0)
    codebooks = [torch.randn(size, dim) for size, dim in zip(config.codebook_sizes, config.code_dims, strict=True)]
    return HierarchicalPrior(config, codebooks, statistics(config) if config.noise == "gaussian" else None)


def random_prior(config: PriorConfig) -> HierarchicalPrior:
    """A prior whose every weight matters: nothing is zero, nothing is the identity."""
    prior = fresh(config)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return prior


def random_codes(config: PriorConfig, images: int) -> tuple[Tensor, ...]:
    """(B, h, w) codes of each level."""
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randint(size, (images, *grid), generator=generator)
        for size, grid in zip(config.codebook_sizes, config.grids, strict=True)
    )


def random_latents(config: PriorConfig, images: int) -> tuple[Tensor, ...]:
    """(B, h, w, D) latents of each level, with the statistics that the prior is told."""
    generator = torch.Generator().manual_seed(1)
    return tuple(
        mean + deviation * torch.randn(images, *grid, len(mean), generator=generator)
        for grid, (mean, deviation) in zip(config.grids, statistics(config), strict=True)
    )


def some_labels(images: int) -> Tensor:
    """(B,) classes, some of them none."""
    return torch.arange(images) % 4 - 1


def spread_times(images: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """(B,) times, evenly from low to high."""
    return low + (high - low) * (torch.arange(images, dtype=torch.float64) + 0.5) / images


def gradients(prior: HierarchicalPrior) -> dict[str, Tensor]:
    """Of every parameter that has one."""
    found = {name: parameter.grad for name, parameter in prior.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def codebook_of(prior: HierarchicalPrior, level: int) -> Tensor:
    """(K, D) code vectors of a level."""
    return prior.denoiser.embeddings[level].get_buffer("codebook")


def refusal(message: str) -> Any:
    """Expects a ValueError that begins so and ends with a hint."""
    return pytest.raises(ValueError, match=rf"{message}(.|\n)*\nhint: \S")
