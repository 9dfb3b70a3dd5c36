"""What every noise process of the prior shares: a training step's answer, and flawed context.

Axes: B images, L levels (coarse first) of N codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvqd_model.config import PriorConfig
from hvqd_model.randomness import uniform


@dataclass(frozen=True)
class PriorOutput:
    """What a training step returns."""

    loss: Tensor
    """Scalar: the mean over images of the training objective per token."""
    metrics: dict[str, Tensor]
    """Detached scalars by level: cross_entropy_0 (nats a corrupted code), accuracy_0, bits_0 (bound a code); with
    Gaussian noise error_0 (mean squared error of the clean latents)."""


def corrupt_context(codes: Sequence[Tensor], at: Tensor, keys: Tensor, config: PriorConfig) -> list[Tensor]:
    """Replace some codes of levels that are already clean: in sampling they come from the model and have errors.

    Args:
        codes: (B, N) int64 of each level.
        at: (B, L) times of the levels; a level is clean at 0.
        keys: (B,) int64.
        config: says up to which fraction is replaced.
    """
    if config.context_corruption == 0:
        return list(codes)
    share = uniform(keys, stream="context share") * config.context_corruption
    corrupted = []
    for level, (clean, num_codes) in enumerate(zip(codes, config.codebook_sizes, strict=True)):
        draws = uniform(keys, (2, clean.shape[1]), f"context {level}")
        hit = (draws[:, 0] < share[:, None]) & (at[:, level] == 0)[:, None]
        corrupted.append(torch.where(hit, (draws[:, 1] * num_codes).long(), clean))
    return corrupted
