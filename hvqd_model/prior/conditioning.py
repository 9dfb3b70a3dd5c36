"""What the denoiser is told beside the codes: every level's time, and each condition or that there is none.

One vector an image carries the times of all levels, the class, the style and the caption to the adaptive norms (Peebles
and Xie, arXiv:2212.09748, section 3.2). Each token is told at the input its own level's time, and what the label map
shows where it stands: the shares of the labels in its cell, in four quarters where the cell can be halved.

Axes: B images, L levels of h x w = N cells, D channels, M labels of a map, H x W pixels, Q parts of a cell.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvqd_model.config import PriorConfig
from hvqd_model.prior.conditions import Conditions, as_conditions

_FREQUENCIES = 64
_MAX_PERIOD = 10_000.0
_TIME_SCALE = 1000.0


def time_features(times: Tensor) -> Tensor:
    """(..., 128) float32 sines and cosines of times in [0, 1]."""
    exponents = torch.arange(_FREQUENCIES, dtype=torch.float64, device=times.device) / _FREQUENCIES
    angles = times.double()[..., None] * _TIME_SCALE * torch.exp(-math.log(_MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], -1).float()


def cell_parts(grid: tuple[int, int], map_size: tuple[int, int]) -> int:
    """Q: into how many parts a level's cells are cut, 4 or 1."""
    cell = [side // cells for side, cells in zip(map_size, grid, strict=True)]
    return 4 if all(side % 2 == 0 for side in cell) else 1


def cell_shares(maps: Tensor, grid: tuple[int, int], labels: int) -> Tensor:
    """(B, N, Q M + 1) float32 shares of the labels in the parts of each cell; the last is the share of all labels.

    Args:
        maps: (B, H, W) integers in -1..M - 1, -1 for no label; the grid divides its sides.
        grid: (h, w) of the level.
        labels: M.
    """
    images, (rows, columns) = len(maps), grid
    height, width = maps.shape[1:]
    parts = cell_parts(grid, (height, width))
    halves = 2 if parts == 4 else 1
    sub_rows, sub_columns = rows * halves, columns * halves
    places = maps.long().view(images, sub_rows, height // sub_rows, sub_columns, width // sub_columns)
    pixels = places.transpose(2, 3).reshape(images, sub_rows * sub_columns, -1)
    # A column for pixels without a label, which is cut off again: no one-hot of all pixels is ever built.
    pixels = torch.where(pixels < 0, labels, pixels)
    counts = torch.zeros(*pixels.shape[:2], labels + 1, device=maps.device)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels, dtype=counts.dtype))
    shares = (counts[..., :labels] / pixels.shape[2]).view(images, rows, halves, columns, halves, labels)
    cells = shares.transpose(2, 3).reshape(images, rows * columns, parts * labels)
    return torch.cat([cells, cells.sum(2, keepdim=True) / parts], 2)


class Conditioning(nn.Module):
    """The vector of an image's conditions, the time of each token's level, and what a label map shows at each token."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        width, levels = config.width, len(config.grids)
        self.num_classes = len(config.classes)
        self.time_in = nn.Linear(2 * _FREQUENCIES * levels, width)
        self.time_out = nn.Linear(width, width)
        self.class_embedding = nn.Embedding(self.num_classes + 1, width)  # the last row: no class
        self.level_time = nn.Linear(2 * _FREQUENCIES, width, bias=False)
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        nn.init.zeros_(self.level_time.weight)
        self.style_embedding, self.text_in, self.text_out = None, None, None
        if config.styles:
            self.style_embedding = nn.Embedding(len(config.styles) + 1, width)  # the last row: no style
            nn.init.normal_(self.style_embedding.weight, std=0.02)
        if config.text_dim:
            self.text_in = nn.Linear(config.text_dim, width)
            self.text_out = nn.Linear(width, width, bias=False)
        self.map_in = nn.ModuleList()
        if config.map_labels:
            for grid in config.grids:
                shares = cell_parts(grid, config.map_size) * config.map_labels + 1
                layer = nn.Linear(shares, width, bias=False)
                nn.init.zeros_(layer.weight)
                self.map_in.append(layer)

    def forward(self, level_times: Tensor, given: Tensor | Conditions) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The (B, D) condition, activated; the (B, L, D) time of each level; the (B, N, D) map of each level, or none.

        Args:
            level_times: (B, L) in [0, 1].
            given: classes or all conditions; a condition that is missing is hidden.
        """
        conditions, dtype = as_conditions(given), self.time_in.weight.dtype
        features = time_features(level_times).to(dtype)
        told = self.time_out(F.silu(self.time_in(features.flatten(1))))
        labels = conditions.labels
        told = told + self.class_embedding(torch.where(labels < 0, self.num_classes, labels))
        if self.style_embedding is not None:
            styles = torch.full_like(labels, -1) if conditions.styles is None else conditions.styles
            told = told + self.style_embedding(torch.where(styles < 0, len(self.config.styles), styles))
        if self.text_in is not None and self.text_out is not None:
            dim = self.config.text_dim
            texts = features.new_zeros(len(labels), dim) if conditions.texts is None else conditions.texts.to(dtype)
            told = told + self.text_out(F.silu(self.text_in(texts * dim**0.5)))  # embeddings have length 1
        return F.silu(told), self.level_time(features), self._maps(conditions, dtype)

    def _maps(self, conditions: Conditions, dtype: torch.dtype) -> list[Tensor]:
        if not len(self.map_in):
            return []
        maps, labels = conditions.maps, conditions.labels
        if maps is None:
            maps = labels.new_full((len(labels), *self.config.map_size), -1)
        return [
            layer(cell_shares(maps, grid, self.config.map_labels).to(dtype))
            for layer, grid in zip(self.map_in, self.config.grids, strict=True)
        ]
