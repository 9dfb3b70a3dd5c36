"""What every vector quantizer is: features to codes of a codebook, and what the codebook learns from.

Every quantizer is pure in `forward` (nothing is changed, nothing is sent) and learns in `update`, once an optimizer
step, from statistics that were merged over micro-batches and ranks. So activation checkpointing, gradient accumulation
and a sampler without a process group all stay right. Codebooks and statistics are fp32 whatever the module's precision.

VQ: van den Oord et al., arXiv:1711.00937 (losses: eq. 3). The kinds are in `codebooks`.

Axes: N vectors, D dimensions, K codes, R candidates for restarts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvqd_model.codec.estimators import Estimator, pass_gradient
from hvqd_model.codec.search import nearest_codes

NOBODY = torch.iinfo(torch.int64).max
"""The priority of a candidate that may not be used."""
CANDIDATES = 256
"""Vectors that a batch offers for restarts, whatever parts it was computed in."""


@dataclass(frozen=True)
class CodebookStatistics:
    """What a codebook learns from: sums over vectors, and vectors that may replace dead codes."""

    counts: Tensor
    """(K,) fp32 vectors assigned to each code."""
    sums: Tensor
    """(K, D) fp32 sums of the vectors assigned to each code; (K, 0) for a codebook that does not learn."""
    candidates: Tensor
    """(R, D) fp32 vectors, those of lowest priority first."""
    candidate_priorities: Tensor
    """(R,) int64, ascending; drawn from the samples' keys. The largest int64 marks a vector that may not be used."""


def merge_statistics(a: CodebookStatistics, b: CodebookStatistics) -> CodebookStatistics:
    """The statistics of two parts of a batch together, however it was split."""
    priorities = torch.cat([a.candidate_priorities, b.candidate_priorities])
    kept = torch.argsort(priorities, stable=True)[:CANDIDATES]
    return CodebookStatistics(
        a.counts + b.counts,
        a.sums + b.sums,
        torch.cat([a.candidates, b.candidates])[kept],
        priorities[kept],
    )


class Quantized(NamedTuple):
    """A quantizer's answer for N vectors; a tuple, because ZeRO-3 hooks the tensors of no other structure."""

    values: Tensor
    """(N, D) quantized vectors that carry the gradient to the encoder."""
    indices: Tensor
    """(N,) int64."""
    vectors: Tensor
    """(N, D) fp32 what was quantized, detached."""
    loss: Tensor
    """Scalar alignment loss, weighted."""
    statistics: CodebookStatistics


class Quantizer(nn.Module, ABC):
    """One level's quantizer. Until `start` it is the identity, so that the model warms up as an auto-encoder."""

    started: Tensor

    def __init__(self, codes: int, dim: int, commitment: float, estimator: Estimator, normalize: bool) -> None:
        super().__init__()
        self.codes, self.dim = codes, dim
        self.commitment, self.estimator, self.normalize = commitment, estimator, normalize
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """(K, D) fp32 code vectors."""

    @abstractmethod
    def start(self, vectors: Tensor, key: int) -> None:
        """Begin quantizing, with a codebook fitted to (N, D) vectors; deterministic in the key."""

    @abstractmethod
    def update(self, statistics: CodebookStatistics, key: int) -> Tensor:
        """Learn from the merged statistics of one optimizer step; return the number of restarted codes."""

    @property
    def codebook_learns_by_gradient(self) -> bool:
        """Whether the loss pulls the codes (otherwise `update` does)."""
        return False

    def assign(self, vectors: Tensor) -> Tensor:
        """(N,) int64 codes of (N, D) vectors."""
        return self._nearest(self.prepare(vectors))

    def prepare(self, vectors: Tensor) -> Tensor:
        """(N, D) fp32 vectors in the space of the codes (on the unit sphere when normalised)."""
        vectors = vectors.float()
        return F.normalize(vectors, dim=1) if self.normalize else vectors

    def lookup(self, indices: Tensor) -> Tensor:
        """(..., D) code vectors of int64 indices."""
        return F.embedding(indices, self.codebook)

    def forward(self, vectors: Tensor, keys: Tensor | None, counted: Tensor | None = None) -> Quantized:
        """Quantize (N, D) vectors.

        Args:
            vectors: (N, D), any floating type; computed in fp32.
            keys: (N,) int64, one a vector, which decide the candidates for restarts; None when nothing is to be
                learned: then there are no statistics, and the loss is 0.
            counted: (N,) whether a vector takes part in the loss and the statistics; None for all. The loss stays a
                share of all N, so that parts of a batch add up whatever they count.
        """
        with torch.autocast(vectors.device.type, enabled=False):
            z = self.prepare(vectors)
            if not bool(self.started):
                indices = torch.zeros(len(z), dtype=torch.int64, device=z.device)
                return Quantized(z, indices, z.detach(), z.new_zeros(()), self._no_statistics(z))
            indices = self._nearest(z.detach())
            e = self.lookup(indices)
            if keys is None:
                return Quantized(e, indices, z.detach(), z.new_zeros(()), self._no_statistics(z))
            loss = self._alignment(z, e, counted)
            # Without a gradient to pass, the values are the codes themselves, to the bit: decoding them gives the same.
            values = pass_gradient(z, e, self.estimator) if z.requires_grad else e
            return Quantized(values, indices, z.detach(), loss, self._statistics(z.detach(), indices, keys, counted))

    def _nearest(self, z: Tensor) -> Tensor:
        """(N,) int64 codes of prepared vectors."""
        return nearest_codes(z, self.codebook)

    def _alignment(self, z: Tensor, e: Tensor, counted: Tensor | None) -> Tensor:
        """The loss that draws vectors and codes to each other (arXiv:1711.00937, eq. 3)."""

        def distance(a: Tensor, b: Tensor) -> Tensor:
            if counted is None:
                return F.mse_loss(a, b)
            return ((a - b).square() * counted[:, None]).mean()

        loss = self.commitment * distance(z, e.detach())
        return loss + distance(e, z.detach()) if self.codebook_learns_by_gradient else loss

    def _statistics(self, z: Tensor, indices: Tensor, keys: Tensor, counted: Tensor | None) -> CodebookStatistics:
        weights = None if counted is None else counted.float()
        counts = torch.bincount(indices, weights, minlength=self.codes).float()
        sums = self._sums(z, indices, weights)
        if counted is not None:
            keys = torch.where(counted, keys, NOBODY)
        priorities, order = torch.topk(keys, min(CANDIDATES, len(keys)), largest=False, sorted=True)
        return CodebookStatistics(counts, sums, z[order], priorities)

    def _sums(self, z: Tensor, indices: Tensor, weights: Tensor | None) -> Tensor:
        """(K, D) fp32 sums of the vectors assigned to each code."""
        weighted = z if weights is None else z * weights[:, None]
        return torch.zeros(self.codes, self.dim, device=z.device).index_add_(0, indices, weighted)

    def _no_statistics(self, z: Tensor) -> CodebookStatistics:
        device = z.device
        return CodebookStatistics(
            torch.zeros(self.codes, device=device),
            self._sums(z[:0], torch.zeros(0, dtype=torch.int64, device=device), None),
            torch.zeros(0, self.dim, device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves between devices but never a change of precision: a count of 100 is lost in bf16."""
        kept: dict[str, Tensor] = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self
