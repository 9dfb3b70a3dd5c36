"""What the denoiser is told beside the codes: every level's time, and the class or that there is none.

One vector an image carries the times of all levels and the class to the adaptive norms (Peebles and Xie,
arXiv:2212.09748, section 3.2); each token is told its own level's time a second time at the input.

Axes: B images, L levels, D channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FREQUENCIES = 64
_MAX_PERIOD = 10_000.0
_TIME_SCALE = 1000.0


def time_features(times: Tensor) -> Tensor:
    """(..., 128) float32 sines and cosines of times in [0, 1]."""
    exponents = torch.arange(_FREQUENCIES, dtype=torch.float64, device=times.device) / _FREQUENCIES
    angles = times.double()[..., None] * _TIME_SCALE * torch.exp(-math.log(_MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], -1).float()


class Conditioning(nn.Module):
    """The vector of an image's condition, and the time of each token's level."""

    def __init__(self, levels: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.time_in = nn.Linear(2 * _FREQUENCIES * levels, width)
        self.time_out = nn.Linear(width, width)
        self.class_embedding = nn.Embedding(num_classes + 1, width)  # the last row: no class
        self.level_time = nn.Linear(2 * _FREQUENCIES, width, bias=False)
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        nn.init.zeros_(self.level_time.weight)

    def forward(self, level_times: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The (B, D) condition, activated, and the (B, L, D) time of each level.

        Args:
            level_times: (B, L) in [0, 1].
            labels: (B,) int64, -1 where there is no class.
        """
        features = time_features(level_times).to(self.time_in.weight.dtype)
        time = self.time_out(F.silu(self.time_in(features.flatten(1))))
        classes = self.class_embedding(torch.where(labels < 0, self.num_classes, labels))
        return F.silu(time + classes), self.level_time(features)
