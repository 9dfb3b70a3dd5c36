"""The tokenizer's encoder: feature maps of falling resolution, from one pass down the strides.

Pixels are folded into channels first (a 2 x 2 pixel-unshuffle costs nothing and quarters the most expensive
convolutions), then each stage halves the grid. Without normalisation layers: residual branches start at zero, so that
depth is harmless at the start, and no picture's features depend on another's.

Axes: B pictures, C channels, H x W grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvqd_model.config import VQConfig


class ResidualBlock(nn.Module):
    """x + conv(act(conv(act(x)))), the identity at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) from the same."""
        branch: Tensor = self.conv_2(F.silu(self.conv_1(F.silu(x))))
        return x + self.scale * branch


def blocks(count: int, channels: int) -> nn.Sequential:
    """`count` residual blocks."""
    return nn.Sequential(*(ResidualBlock(channels) for _ in range(count)))


def stage_strides(config: VQConfig) -> list[int]:
    """Pixels a cell of each stage spans, finest first; the first is what the pixel-unshuffle leaves."""
    first = min(2, config.strides[-1])
    return [first << stage for stage in range((config.strides[0] // first).bit_length())]


def stage_channels(config: VQConfig) -> list[int]:
    """Channels of each stage, finest first; the last multiplier repeats."""
    multipliers = config.width_multipliers
    return [config.width * multipliers[min(stage, len(multipliers) - 1)] for stage in range(len(stage_strides(config)))]


class Encoder(nn.Module):
    """Feature maps at the strides that the hierarchy quantizes from."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.wanted = config.strides if config.hierarchy == "features" else config.strides[-1:]
        self.strides = [stride for stride in stage_strides(config) if stride <= self.wanted[0]]
        channels = stage_channels(config)[: len(self.strides)]
        self.stem = nn.Conv2d(3 * self.strides[0] ** 2, channels[0], 3, padding=1)
        self.downs = nn.ModuleList(
            nn.Identity() if stage == 0 else nn.Conv2d(channels[stage - 1], channels[stage], 3, stride=2, padding=1)
            for stage in range(len(channels))
        )
        self.stages = nn.ModuleList(blocks(config.blocks, count) for count in channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, h, w) at each wanted stride, coarse first, from (B, 3, H, W) in [-1, 1]."""
        x = F.pixel_unshuffle(images, self.strides[0]).contiguous(memory_format=torch.channels_last)
        x = self.stem(x.to(self.stem.weight.dtype))
        found: dict[int, Tensor] = {}
        for stride, down, stage in zip(self.strides, self.downs, self.stages, strict=True):
            x = stage(down(x))
            found[stride] = x
        return [found[stride] for stride in self.wanted]
