"""The tokenizer's decoder: from the coarse grid up, joined by each level's codes on its own grid.

Any prefix of the levels decodes to a picture: a level that is missing adds a learned vector instead of its codes. A
transposed convolution is written as a convolution and a pixel-shuffle, which leaves no checkerboard at the start.

Axes: B pictures, C channels, H x W grid, D dimensions of a code.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvqd_model.codec.encoder import Cell, blocks, ratio, stage_cells, stage_channels, unfold
from hvqd_model.config import VQConfig


class GridAttention(nn.Module):
    """Self-attention over the cells of a small grid, the identity at the start."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(1, channels)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) from the same."""
        pictures, channels, rows, columns = x.shape
        mixed = self.query_key_value(self.norm(x)).flatten(2)
        query, key, value = mixed.view(pictures, 3, self.heads, channels // self.heads, rows * columns).unbind(1)
        attended = F.scaled_dot_product_attention(
            query.transpose(2, 3), key.transpose(2, 3), value.transpose(2, 3)
        ).transpose(2, 3)
        y: Tensor = self.out(attended.reshape(pictures, channels, rows, columns))
        return x + self.scale * y


class Upsample(nn.Module):
    """A finer grid: `factor` times the rows and columns, mostly twice."""

    def __init__(self, channels_in: int, channels_out: int, factor: Cell) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(channels_in, prod(factor) * channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C', r H, c W) from (B, C, H, W)."""
        return unfold(self.conv(F.silu(x)), self.factor)


class Decoder(nn.Module):
    """Pictures from the code vectors of a prefix of the levels; walked level by level by the hierarchy."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        cells, channels = stage_cells(config)[::-1], stage_channels(config)[::-1]
        self.finest = cells[-1]
        self.stage_of_level = [cells.index(cell) for cell in config.cells]
        widths = [channels[stage] for stage in self.stage_of_level]
        self.joins = nn.ModuleList(
            nn.Conv2d(dim, width, 3, padding=1) for dim, width in zip(config.code_dims, widths, strict=True)
        )
        self.missing = nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in widths[1:])
        self.attention = GridAttention(channels[0]) if config.attention else nn.Identity()
        self.stages = nn.ModuleList(blocks(config.blocks, count) for count in channels)
        self.ups = nn.ModuleList(
            nn.Identity()
            if stage == 0
            else Upsample(channels[stage - 1], channels[stage], ratio(cells[stage - 1], cells[stage]))
            for stage in range(len(channels))
        )
        self.out = nn.Conv2d(channels[-1], 3 * prod(self.finest), 3, padding=1)

    def start(self, pictures: int, grid: tuple[int, int]) -> Tensor:
        """(B, C, h, w) zeros on the coarsest grid, where the walk begins."""
        join = self.joins[0]
        assert isinstance(join, nn.Conv2d)
        weight = join.weight
        empty = torch.zeros(pictures, join.out_channels, *grid, dtype=weight.dtype, device=weight.device)
        return empty.contiguous(memory_format=torch.channels_last)

    def approach(self, x: Tensor, level: int) -> Tensor:
        """The features from the level before (or `start`), brought to the grid of `level`, before its codes join.

        One more than the last level goes on to the finest stage.
        """
        last_level = level == len(self.stage_of_level)
        first = 0 if level == 0 else self.stage_of_level[level - 1] + 1
        last = len(self.stages) - 1 if last_level else self.stage_of_level[level]
        for stage in range(first, last + 1):
            x = self.ups[stage](x)
            if stage < last or last_level:
                x = self.stages[stage](x)
        return x

    def join(self, x: Tensor, codes: Tensor | None, present: Tensor | None, level: int) -> Tensor:
        """Add a level's code vectors to the features on its grid.

        Args:
            x: (B, C, h, w) from `approach`.
            codes: (B, D, h, w) code vectors; None when no picture has the level.
            present: (B,) whether a picture has the level; None when all have it.
            level: which.
        """
        if level == 0:
            assert codes is not None  # every prefix has the coarsest level
            x = self.attention(x + self.joins[0](codes.to(x.dtype)))
        else:
            absent = self.missing[level - 1][None, :, None, None]
            joined = absent if codes is None else self.joins[level](codes.to(x.dtype))
            if codes is not None and present is not None:
                joined = torch.where(present[:, None, None, None], joined, absent)
            x = x + joined
        y: Tensor = self.stages[self.stage_of_level[level]](x)
        return y

    def finish(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) float32 pictures from the features of the finest stage."""
        return unfold(self.out(F.silu(x)).float(), self.finest)
