"""The tokenizer's encoder: feature maps of falling resolution, from one pass down the strides.

Pixels are folded into channels first (a 2 x 2 pixel-unshuffle costs nothing and quarters the most expensive
convolutions), then each stage shrinks the grid by a prime factor an axis, mostly two. Without normalisation layers:
residual branches start at zero, so that depth is harmless at the start, and no picture's features depend on another's.

Axes: B pictures, C channels, H x W grid; a cell is r rows by c columns of pixels.
"""

from __future__ import annotations

from itertools import zip_longest
from math import prod

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


Cell = tuple[int, int]


def fold(images: Tensor, cell: Cell) -> Tensor:
    """(B, C r c, H / r, W / c) from (B, C, H, W): a pixel-unshuffle whose cell need not be square."""
    rows, columns = cell
    if rows == columns:
        return F.pixel_unshuffle(images, rows)
    pictures, channels, height, width = images.shape
    parts = images.view(pictures, channels, height // rows, rows, width // columns, columns)
    return parts.permute(0, 1, 3, 5, 2, 4).reshape(pictures, -1, height // rows, width // columns)


def unfold(x: Tensor, cell: Cell) -> Tensor:
    """(B, C, H, W) from (B, C r c, H / r, W / c): undoes `fold`."""
    rows, columns = cell
    if rows == columns:
        return F.pixel_shuffle(x, rows)
    pictures, channels, height, width = x.shape
    parts = x.view(pictures, channels // (rows * columns), rows, columns, height, width)
    return parts.permute(0, 1, 4, 2, 5, 3).reshape(pictures, -1, height * rows, width * columns)


def factors(ratio: Cell) -> list[Cell]:
    """Steps of a prime factor an axis, small ones first, that multiply to a ratio of two cells."""
    rows, columns = ratio
    return list(zip_longest(_primes(rows), _primes(columns), fillvalue=1))


def _primes(number: int) -> list[int]:
    found = []
    factor = 2
    while number > 1:
        while number % factor == 0:
            found.append(factor)
            number //= factor
        factor += 1
    return found


def ratio(coarse: Cell, fine: Cell) -> Cell:
    """How many fine cells a coarse one spans, by axis."""
    return coarse[0] // fine[0], coarse[1] // fine[1]


def stage_cells(config: VQConfig) -> list[Cell]:
    """Pixels (rows, columns) a cell of each stage spans, finest first; the first is what the pixel-unshuffle leaves.

    Every level's cell is among them, and a stage spans a prime factor more an axis than the one before.
    """
    first = next(iter(factors(config.cells[-1])), (1, 1))
    cells = [first]
    for target in reversed(config.cells):
        for rows, columns in factors(ratio(target, cells[-1])):
            cells.append((cells[-1][0] * rows, cells[-1][1] * columns))
    return cells


def stage_channels(config: VQConfig) -> list[int]:
    """Channels of each stage, finest first; the last multiplier repeats."""
    multipliers = config.width_multipliers
    return [config.width * multipliers[min(stage, len(multipliers) - 1)] for stage in range(len(stage_cells(config)))]


def shrink(channels_in: int, channels_out: int, factor: Cell, *, even_kernel: int = 3) -> nn.Conv2d:
    """A convolution to a grid with 1 / factor of the rows and columns.

    Args:
        even_kernel: side of the kernel along axes that shrink by 2.
    """
    kernels = [even_kernel if step == 2 else max(3, step) for step in factor]
    padding = [1 if step <= 2 else 0 for step in factor]
    return nn.Conv2d(
        channels_in,
        channels_out,
        (kernels[0], kernels[1]),
        stride=factor,
        padding=(padding[0], padding[1]),
    )


class Encoder(nn.Module):
    """Feature maps at the strides that the hierarchy quantizes from."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.wanted = config.cells if config.hierarchy == "features" else config.cells[-1:]
        cells = stage_cells(config)
        self.cells = cells[: cells.index(self.wanted[0]) + 1]
        channels = stage_channels(config)[: len(self.cells)]
        self.stem = nn.Conv2d(3 * prod(cells[0]), channels[0], 3, padding=1)
        self.downs = nn.ModuleList(
            nn.Identity()
            if stage == 0
            else shrink(channels[stage - 1], channels[stage], ratio(cells[stage], cells[stage - 1]))
            for stage in range(len(channels))
        )
        self.stages = nn.ModuleList(blocks(config.blocks, count) for count in channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, h, w) at each wanted level's grid, coarse first, from (B, 3, H, W) in [-1, 1]."""
        x = fold(images, self.cells[0]).contiguous(memory_format=torch.channels_last)
        x = self.stem(x.to(self.stem.weight.dtype))
        found: dict[Cell, Tensor] = {}
        for cell, down, stage in zip(self.cells, self.downs, self.stages, strict=True):
            x = stage(down(x))
            found[cell] = x
        return [found[cell] for cell in self.wanted]
