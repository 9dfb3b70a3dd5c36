"""A pyramid of pictures: each level codes a picture, patch by patch.

The levels of a plain pyramid add up: each codes what the coarser ones leave over. In a nested one each level shows the
whole picture by itself: the finest codes what is given, a coarser one what the finer one shows, so that its codes are
a function of the finer codes and cost a prior little.

What a level sees and adds are overlapping linear transforms, as in the Laplacian pyramid (Burt and Adelson, IEEE Trans.
Comm. 31, 1983) and in transform coders. They start as discrete cosine transforms, so nothing has to be learned before
pictures of any colour come through, and codes of smooth patches are zero, which costs an entropy coder next to nothing.
Small convolutions clean the sum.

Axes: B pictures, L levels of h x w cells, D dimensions of a code; a cell is r rows by c columns of pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvqd_model.codec.encoder import Cell, blocks, fold, unfold
from hvqd_model.config import VQConfig

STEP = 0.6
"""At the start, how far apart neighbouring steps of quantizer fsq are, as a coefficient of pictures in [-1, 1]."""
COLOURS = ((0.577, 0.577, 0.577), (-0.408, -0.408, 0.816), (0.707, -0.707, 0.0))
"""Brightness, blue and red against it; orthonormal."""
Quantize = Callable[[int, Tensor], Tensor]
_COLOUR_COST = 2.2
"""How much sooner the transform of a colour difference ends than that of brightness."""


class Pyramid(nn.Module):
    """The transforms of all levels, and the convolutions that finish a picture."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.nested = config.hierarchy == "nested-pyramid"
        transforms = []
        for level, (cell, dim) in enumerate(zip(config.cells, config.code_dims, strict=True)):
            before = zip(config.cells[:level], config.code_dims, strict=False)
            taken = 0 if self.nested else sum(dims for other, dims in before if other == cell)
            transforms.append(PatchTransform(cell, dim, taken, config.steps[level]))
        self.transforms = nn.ModuleList(transforms)
        self.cell: Cell = (2 - config.padded_size[0] % 2, 2 - config.padded_size[1] % 2)
        pixels = 3 * prod(self.cell)
        self.stem = nn.Conv2d(pixels, config.width, 3, padding=1)
        self.stage = blocks(config.blocks, config.width)
        self.out = nn.Conv2d(config.width, pixels, 3, padding=1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)
        if self.nested and config.levels > 1:
            # Which level a picture is of: they differ in what has to be cleaned. A module of its own: ZeRO-3 gathers
            # weights when the module that owns them is called.
            self.level_shift = nn.Embedding(config.levels, config.width)
            nn.init.zeros_(self.level_shift.weight)

    def forward(self, pictures: Tensor, quantize: Quantize, kept: Tensor | None) -> Tensor:
        """(B, 3, H, W) float32 what `finish` is to clean, with the codes that `quantize` finds.

        Args:
            pictures: (B, 3, H, W), padded.
            quantize: (level, what it sees (B, D, h, w)) to the vectors of its codes; called once for each level.
            kept: (B,) how many levels each picture is to be decoded from; None for all.
        """
        return self._nested(pictures, quantize, kept) if self.nested else self._summed(pictures, quantize, kept)

    def _summed(self, pictures: Tensor, quantize: Quantize, kept: Tensor | None) -> Tensor:
        rest, shown = pictures, torch.zeros_like(pictures)
        for level in range(len(self.transforms)):
            added = self.synthesise(level, quantize(level, self.analyse(level, rest)))
            rest = rest - added
            if kept is not None:
                added = torch.where((kept > level)[:, None, None, None], added, 0.0)
            shown = shown + added
        return shown

    def _nested(self, pictures: Tensor, quantize: Quantize, kept: Tensor | None) -> Tensor:
        finest = len(self.transforms) - 1
        shown = level_picture = self.synthesise(finest, quantize(finest, self.analyse(finest, pictures)))
        for level in range(finest - 1, -1, -1):
            # A coarse level describes the finer one; it has no say in what that shows.
            level_picture = self.synthesise(level, quantize(level, self.analyse(level, level_picture.detach())))
            if kept is not None:
                shown = torch.where((kept > level + 1)[:, None, None, None], shown, level_picture)
        return shown

    def decode(self, vectors: Sequence[Tensor]) -> Tensor:
        """(B, 3, H, W) float32 pictures from the (B, D, h, w) code vectors of any prefix of the levels."""
        count = len(vectors)
        levels = range(count - 1, count) if self.nested else range(count)
        shown = sum((self.synthesise(level, vectors[level]) for level in levels), torch.zeros(()))
        return self.finish(shown, torch.full((len(shown),), count, device=shown.device))

    def analyse(self, level: int, picture: Tensor) -> Tensor:
        """(B, D, h, w) what a level sees of a (B, 3, H, W) picture."""
        seen: Tensor = self.transforms[level](picture)
        return seen

    def synthesise(self, level: int, vectors: Tensor) -> Tensor:
        """(B, 3, H, W) float32 what a level's (B, D, h, w) code vectors show."""
        shown: Tensor = self.transforms[level](vectors, inverse=True)
        return shown

    def finish(self, pictures: Tensor, kept: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) float32 cleaned pictures; `kept` (B,) says how many levels they are of, None for all."""
        x = fold(pictures, self.cell).to(self.stem.weight.dtype).contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        if self.nested and len(self.transforms) > 1:
            if kept is None:
                kept = torch.full((len(x),), len(self.transforms), device=x.device)
            x = x + self.level_shift(kept - 1)[:, :, None, None]
        y = self.out(F.silu(self.stage(x)))
        return pictures + unfold(y.float(), self.cell)


class PatchTransform(nn.Module):
    """A linear transform of overlapping patches, a cell and half of its neighbours each, and one back."""

    def __init__(self, cell: Cell, dim: int, first: int, steps: tuple[int, ...]) -> None:
        """
        Args:
            cell: rows and columns of pixels.
            dim: coefficients.
            first: how many of the cell's coefficients other levels have already; they are in order of frequency.
            steps: of quantizer fsq in each dimension; empty for other kinds.
        """
        super().__init__()
        self.cell, self.overlap = cell, (cell[0] // 2, cell[1] // 2)
        self.unit = math.sqrt(prod(cell))
        rows, columns = self.overlap
        # In units that make the entries about 1, as the optimizer's steps are.
        kernels = F.pad(cosines(cell, dim, first) * self.unit, (columns, columns, rows, rows))
        self.analysis = nn.Parameter(kernels.clone())
        self.synthesis = nn.Parameter(kernels.clone())
        if steps:
            gain = 2 / (STEP * (torch.tensor(steps, dtype=torch.float32) - 1))
        else:
            gain = torch.full((dim,), 1 / self.unit)
        self.log_gain = nn.Parameter(gain.log())

    def forward(self, x: Tensor, inverse: bool = False) -> Tensor:
        """(B, D, h, w) coefficients of (B, 3, H, W) pictures, or back, in float32."""
        gain = self.log_gain.float().exp()[:, None, None, None]
        (rows, columns), (above, left) = self.cell, self.overlap
        if inverse:
            kernels = self._of_cells(self.synthesis / (gain * self.unit).to(self.synthesis.dtype))
            added = unfold(F.conv_transpose2d(x.to(kernels.dtype), kernels), self.cell)
            return added[..., above : above + rows * x.shape[2], left : left + columns * x.shape[3]].float()
        kernels = self._of_cells(self.analysis * (gain / self.unit).to(self.analysis.dtype))
        around = F.pad(x, (left, columns - left, above, rows - above), mode="replicate")
        return F.conv2d(fold(around.to(kernels.dtype), self.cell), kernels).float()

    def _of_cells(self, kernels: Tensor) -> Tensor:
        """(D, 3 r c, 2, 2) kernels over whole cells from those over pixels: the same sums in half the time."""
        rows, columns = self.cell
        # A side of odd length overlaps by one pixel less.
        kernels = F.pad(kernels, (0, 2 * columns - kernels.shape[3], 0, 2 * rows - kernels.shape[2]))
        cells = kernels.reshape(*kernels.shape[:2], 2, rows, 2, columns)
        return cells.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def cosines(cell: Cell, dim: int, first: int = 0) -> Tensor:
    """(D, 3, r, c) float32: orthonormal products of a colour and two cosines, from coarse to fine.

    Args:
        cell: r rows and c columns.
        dim: D, at most 3 r c.
        first: where to begin in that order; after the last comes the first again.
    """
    rows, columns = cell
    places = [
        ((_COLOUR_COST if colour else 1.0) * math.hypot(row / rows, column / columns) + (0.1 if colour else 0.0), key)
        for key in range(3 * rows * columns)
        for colour, row, column in [(key // (rows * columns), key // columns % rows, key % columns)]
    ]
    order = [key for _, key in sorted(places)]
    chosen = torch.tensor([order[(first + index) % len(order)] for index in range(dim)])
    colours = torch.tensor(COLOURS, dtype=torch.float64)
    colours = colours / colours.norm(dim=1, keepdim=True)
    down, across = _cosine_transform(rows), _cosine_transform(columns)
    of_colour, of_row, of_column = chosen // (rows * columns), chosen // columns % rows, chosen % columns
    found = torch.einsum("dk,dr,dc->dkrc", colours[of_colour], down[of_row], across[of_column])
    return found.float()


def _cosine_transform(side: int) -> Tensor:
    """(n, n) float64: the orthonormal DCT-II, a frequency a row."""
    places = torch.arange(side, dtype=torch.float64)
    waves = torch.cos(math.pi * (2 * places + 1) * places[:, None] / (2 * side)) * math.sqrt(2 / side)
    waves[0] /= math.sqrt(2)
    return waves
