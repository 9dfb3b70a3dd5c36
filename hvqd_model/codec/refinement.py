"""Codes by analysis and synthesis: the encoder's codes are a first guess, the decoder says which are better.

An encoder chooses each code by itself, by the distance of vectors. What counts is the picture that all codes decode to
together. So cells that lie apart are changed at once, each to the candidates that the gradient of the picture's squared
error points to, and a cell keeps the candidate that leaves the least error in its surroundings. This is the closed-loop
search of speech coders (Atal and Remde, ICASSP 1982); it closes the gap between an encoder's answer and the best
one for this decoder (Cremer et al., arXiv:1801.03558). No picture gets worse: changes that raise its error are taken
back.

Axes: B pictures, L levels of h x w cells, D dimensions of a code, M candidates. A lattice is every PITCH-th cell of a
level in both directions, r x c of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hvqd_model.codec.search import nearest_few

CANDIDATES = 4
"""Tried at each cell; one more costs one more decoding of each lattice."""
PITCH = 3
"""So a cell has the eight around it for itself."""
REACH = 1.0
"""How far along the gradient candidates are looked for, in mean distances between neighbouring codes."""
_SPACING_SAMPLE = 256

Decode = Callable[[Sequence[Tensor]], Tensor]
Lattice = tuple[slice, slice, slice]


def refine(
    decode: Decode,
    codebooks: Sequence[Tensor],
    cells: Sequence[tuple[int, int]],
    images: Tensor,
    codes: Sequence[Tensor],
    rounds: int,
    levels: Sequence[int],
) -> tuple[Tensor, ...]:
    """Codes that decode nearer to the pictures, after so many passes over all cells of some levels.

    A picture's codes depend on no other picture. Its squared error, of pixels within [-1, 1], never rises.

    Args:
        decode: (B, 3, H, W) pictures from each level's (B, D, h, w) code vectors; differentiable.
        codebooks: (K, D) of each level.
        cells: rows and columns of pixels that a code of each level spans.
        images: (B, 3, H, W) in [-1, 1].
        codes: (B, h, w) int64 of each level: where to begin.
        rounds: 0 and more.
        levels: whose codes may change, in the order in which they do.
    """
    search = _Search(decode, codebooks, cells, images, codes)
    for _ in range(rounds):
        for level in levels:
            for lattice in _lattices(codes[level]):
                search.improve(level, lattice)
    return search.settled()


class _Search:
    """Codes under way, and the best ones so far."""

    def __init__(
        self,
        decode: Decode,
        codebooks: Sequence[Tensor],
        cells: Sequence[tuple[int, int]],
        images: Tensor,
        codes: Sequence[Tensor],
    ) -> None:
        self._decode, self._images, self._cells = decode, images.float(), cells
        self._codebooks = [codebook.detach().float() for codebook in codebooks]
        self._reach = [REACH * _spacing(codebook) for codebook in self._codebooks]
        self._codes = [level.clone() for level in codes]
        self._best = self._codes
        self._errors = self._images.new_full((len(images), *images.shape[2:]), torch.inf)
        """(B, H, W) of the best."""

    def improve(self, level: int, lattice: Lattice) -> None:
        """Let the cells of a lattice choose again."""
        gradient = self._gradient(level)  # and of codes that made a picture worse, the best again
        cell = self._cells[level]
        present = self._codes[level][lattice]
        chosen, least = present, _around(self._errors, cell, self._codes[level].shape[1:])[lattice]
        for candidate in self._candidates(level, present, gradient[lattice]).unbind(-1):
            found = _around(self._errors_of(self._with(level, lattice, candidate)), cell, gradient.shape[1:3])[lattice]
            chosen, least = torch.where(found < least, candidate, chosen), torch.minimum(found, least)
        self._codes = self._with(level, lattice, chosen)

    def settled(self) -> tuple[Tensor, ...]:
        """The best codes of each picture."""
        self._keep(self._errors_of(self._codes))
        return tuple(self._best)

    def _gradient(self, level: int) -> Tensor:
        """(B, h, w, D) of the pictures' squared error by a level's code vectors; keeps the better codes on the way."""
        with torch.enable_grad():
            vectors = self._vectors(self._codes)
            vectors[level].requires_grad_()
            errors = self._errors_by(vectors)
            (gradient,) = torch.autograd.grad(errors.sum(), vectors[level])
        self._keep(errors.detach())
        return gradient.permute(0, 2, 3, 1)

    def _keep(self, errors: Tensor) -> None:
        """Take the present codes for the pictures that they are no worse for, the best ones for the others."""
        better = errors.sum((1, 2)) <= self._errors.sum((1, 2))
        self._errors = torch.where(better[:, None, None], errors, self._errors)
        self._codes = [
            torch.where(better[:, None, None], now, best) for now, best in zip(self._codes, self._best, strict=True)
        ]
        self._best = self._codes

    def _candidates(self, level: int, present: Tensor, gradient: Tensor) -> Tensor:
        """(B, r, c, M) the codes nearest to where the (B, r, c, D) gradient points from the (B, r, c) present ones."""
        codebook = self._codebooks[level]
        mean = gradient.square().sum(-1).sqrt().mean((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
        aims = F.embedding(present, codebook) - gradient * (self._reach[level] / mean)[:, None, None, None]
        found = nearest_few(aims.flatten(0, 2), codebook, min(CANDIDATES, len(codebook)))
        return found.view(*present.shape, -1)

    def _with(self, level: int, lattice: Lattice, values: Tensor) -> list[Tensor]:
        """The codes with others at the cells of a lattice."""
        changed = self._codes[level].clone()
        changed[lattice] = values
        return [*self._codes[:level], changed, *self._codes[level + 1 :]]

    def _errors_of(self, codes: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            return self._errors_by(self._vectors(codes))

    def _errors_by(self, vectors: Sequence[Tensor]) -> Tensor:
        """(B, H, W) squared, over the colours."""
        return (self._decode(vectors).clamp(-1, 1) - self._images).square().sum(1)

    def _vectors(self, codes: Sequence[Tensor]) -> list[Tensor]:
        both = zip(codes, self._codebooks, strict=True)
        return [F.embedding(level, codebook).permute(0, 3, 1, 2) for level, codebook in both]


def _lattices(codes: Tensor) -> Iterator[Lattice]:
    """The lattices that make up (B, h, w) codes."""
    height, width = codes.shape[1:]
    for row in range(min(PITCH, height)):
        for column in range(min(PITCH, width)):
            yield slice(None), slice(row, None, PITCH), slice(column, None, PITCH)


def _around(errors: Tensor, cell: tuple[int, int], grid: Sequence[int]) -> Tensor:
    """(B, h, w) sums of (B, H, W) errors over each cell of a grid and the cells around it."""
    below, right = grid[0] * cell[0] - errors.shape[1], grid[1] * cell[1] - errors.shape[2]  # what padding added
    of_cells = F.avg_pool2d(F.pad(errors, (0, right, 0, below))[:, None], cell)
    return F.avg_pool2d(of_cells, PITCH, 1, PITCH // 2)[:, 0]


def _spacing(codebook: Tensor) -> Tensor:
    """Mean distance from a code to its nearest other one, from an even sample of (K, D)."""
    some = codebook[:: max(1, len(codebook) // _SPACING_SAMPLE)]
    nearest = codebook[nearest_few(some, codebook, 2)[:, -1]]
    distances: Tensor = (some - nearest).square().sum(1).sqrt()
    return distances.mean()
