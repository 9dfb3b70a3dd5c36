"""Vector quantizers: features to codes of a codebook, and how a codebook learns.

Every quantizer is pure in `forward` (nothing is changed, nothing is sent) and learns in `update`, once an optimizer
step, from statistics that were merged over micro-batches and ranks. So activation checkpointing, gradient accumulation
and a sampler without a process group all stay right. Codebooks and statistics are fp32 whatever the module's precision.

VQ: van den Oord et al., arXiv:1711.00937 (losses: eq. 3; EMA: appendix A.1). Rotation trick: Fifty et al.,
arXiv:2410.06424. SimVQ: Zhu et al., arXiv:2411.02038.

Axes: N vectors, D dimensions, K codes, R candidates for restarts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvqd_model.config import QuantizerKind
from hvqd_model.randomness import derive_key, uniform

Estimator = Literal["straight-through", "rotation"]

_CHUNK_ELEMENTS = 1 << 21  # distances computed at once: 8 MiB in fp32, still in the cache when they are searched
_BLOCK = 64
_EPSILON = 1e-5
_NOBODY = torch.iinfo(torch.int64).max
CANDIDATES = 256
"""Vectors that a batch offers for restarts, whatever parts it was computed in."""


@dataclass(frozen=True)
class CodebookStatistics:
    """What a codebook learns from: sums over vectors, and vectors that may replace dead codes."""

    counts: Tensor
    """(K,) fp32 vectors assigned to each code."""
    sums: Tensor
    """(K, D) fp32 sums of the vectors assigned to each code."""
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


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """(N,) index of the nearest code of each vector, the lowest index among equals; in chunks of rows.

    Args:
        vectors: (N, D).
        codebook: (K, D).
    """
    codebook = codebook.float()
    norms = codebook.square().sum(1)
    elements = _CHUNK_ELEMENTS if vectors.device.type == "cpu" else 8 * _CHUNK_ELEMENTS  # fewer launches
    rows = max(1, elements // len(codebook))
    found = [_lowest(torch.addmm(norms, chunk.float(), codebook.t(), alpha=-2)) for chunk in torch.split(vectors, rows)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=vectors.device)


def _lowest(distances: Tensor) -> Tensor:
    """(N,) the place of each row's smallest of (N, K) distances, the first among equals: what argmin says.

    First the block, then the place in it: torch finds a minimum several times faster than where it stands.
    """
    if distances.shape[1] % _BLOCK:
        return torch.argmin(distances, dim=1)
    blocks = distances.view(len(distances), distances.shape[1] // _BLOCK, _BLOCK)
    block = torch.argmin(blocks.amin(2), dim=1)
    inside = blocks[torch.arange(len(block), device=block.device), block]
    return block * _BLOCK + torch.argmin(inside, dim=1)


def rotate_gradient(vectors: Tensor, quantized: Tensor) -> Tensor:
    """(N, D) the quantized vectors, with the gradient rotated and rescaled from code to vector (arXiv:2410.06424,
    eq. 4).

    Where the two point in nearly opposite directions no rotation is defined, and the gradient goes straight through.
    """
    e, q = vectors.detach(), quantized.detach()
    e_norm, q_norm = e.norm(dim=1, keepdim=True), q.norm(dim=1, keepdim=True)
    e_unit, q_unit = e / e_norm.clamp_min(1e-12), q / q_norm.clamp_min(1e-12)
    total = e_unit + q_unit
    size = total.norm(dim=1, keepdim=True)
    r = total / size.clamp_min(1e-12)
    rotated = (
        vectors - 2 * (vectors * r).sum(1, keepdim=True) * r + 2 * (vectors * e_unit).sum(1, keepdim=True) * q_unit
    ) * (q_norm / e_norm.clamp_min(1e-12))
    straight = vectors + (q - e)
    degenerate = (size < 1e-6) | (e_norm < 1e-12) | (q_norm < 1e-12)
    return torch.where(degenerate, straight, rotated)


def pass_gradient(vectors: Tensor, quantized: Tensor, estimator: Estimator) -> Tensor:
    """(N, D) the quantized vectors, differentiable with respect to the vectors."""
    match estimator:
        case "straight-through":
            return vectors + (quantized - vectors).detach()
        case "rotation":
            return rotate_gradient(vectors, quantized)
    raise ValueError(f"estimator must be straight-through or rotation: {estimator}\nhint: set estimator=rotation")


def _spread_choice(vectors: Tensor, count: int, stream: int) -> Tensor:
    """(count,) indices of vectors, each drawn in proportion to its squared distance from those drawn before.

    k-means++ (Arthur and Vassilvitskii, SODA 2007): from an even choice, Lloyd's iterations leave some clusters with
    two centres and others without, for good.
    """
    items = torch.arange(count, device=vectors.device)
    draws = uniform(items, (1,), stream)
    weights = torch.ones(len(vectors), dtype=torch.float64, device=vectors.device)
    norms = vectors.square().sum(1)
    distances = torch.full_like(norms, torch.inf)
    chosen = torch.zeros_like(items)
    for place in range(count):
        cumulative = weights.cumsum(0)
        drawn = torch.searchsorted(cumulative, draws[place] * cumulative[-1], right=True).clamp_max(len(vectors) - 1)
        chosen[place] = drawn[0]
        # One product with a matrix that is there: subtracting first would write all vectors anew each time.
        near = torch.addmv(norms + norms[drawn], vectors, vectors[drawn[0]], alpha=-2)
        distances = torch.minimum(distances, near.clamp_min_(0).index_fill_(0, drawn, 0))
        weights = distances.double()
    return chosen


def kmeans(vectors: Tensor, clusters: int, key: int, iterations: int = 10) -> Tensor:
    """(clusters, D) centres by Lloyd's iterations from a spread choice of vectors; deterministic in the key.

    An empty cluster moves to the vector that is farthest from its centre. With fewer vectors than clusters, the rest
    are vectors with a little noise.
    """
    vectors = vectors.float()
    if clusters <= len(vectors):
        centres = vectors[_spread_choice(vectors, clusters, derive_key("kmeans", key))]
    else:
        centres = vectors[torch.arange(clusters, device=vectors.device) % len(vectors)]
        noise = uniform(torch.arange(clusters, device=vectors.device), (vectors.shape[1],), derive_key("noise", key))
        centres += ((noise - 0.5) * 1e-3 * vectors.std()).float()
    for _ in range(iterations):
        indices = nearest_codes(vectors, centres)
        counts = torch.bincount(indices, minlength=clusters).float()
        sums = torch.zeros_like(centres).index_add_(0, indices, vectors)
        moved = sums / counts.clamp_min(1)[:, None]
        empty = torch.nonzero(counts == 0).squeeze(1)
        if len(empty) and len(vectors) >= clusters:
            distances = (vectors - centres[indices]).square().sum(1)
            moved[empty] = vectors[torch.argsort(distances, descending=True, stable=True)[: len(empty)]]
        else:
            moved[empty] = centres[empty]
        centres = moved
    return centres


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
        if counted is None:
            counts = torch.bincount(indices, minlength=self.codes).float()
            sums = torch.zeros(self.codes, self.dim, device=z.device).index_add_(0, indices, z)
        else:
            weights = counted.float()
            counts = torch.bincount(indices, weights, minlength=self.codes).float()
            sums = torch.zeros(self.codes, self.dim, device=z.device).index_add_(0, indices, z * weights[:, None])
            keys = torch.where(counted, keys, _NOBODY)
        priorities, order = torch.topk(keys, min(CANDIDATES, len(keys)), largest=False, sorted=True)
        return CodebookStatistics(counts, sums, z[order], priorities)

    def _no_statistics(self, z: Tensor) -> CodebookStatistics:
        device = z.device
        return CodebookStatistics(
            torch.zeros(self.codes, device=device),
            torch.zeros(self.codes, self.dim, device=device),
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


class EMAQuantizer(Quantizer):
    """Codes are moving averages of the vectors assigned to them; codes that fall out of use restart."""

    counts: Tensor
    sums: Tensor
    embedding: Tensor

    def __init__(self, *, decay: float, restart_threshold: float, **base: Any) -> None:
        super().__init__(**base)
        self.decay, self.restart_threshold = decay, restart_threshold
        self.register_buffer("counts", torch.ones(self.codes))
        self.register_buffer("sums", torch.zeros(self.codes, self.dim))
        self.register_buffer("embedding", torch.zeros(self.codes, self.dim))

    @property
    def codebook(self) -> Tensor:
        """(K, D) fp32 code vectors."""
        return self.embedding

    @torch.no_grad()
    def start(self, vectors: Tensor, key: int) -> None:
        """Begin with the centres of k-means."""
        centres = kmeans(self.prepare(vectors), self.codes, key)
        self.embedding.copy_(F.normalize(centres, dim=1) if self.normalize else centres)
        self.counts.fill_(0.0)  # filled by the first update: see the debiased average there
        self.sums.zero_()
        self.started.fill_(True)

    @torch.no_grad()
    def update(self, statistics: CodebookStatistics, key: int) -> Tensor:
        """Move the averages (arXiv:1711.00937, eq. 6-8), then restart what is hardly used.

        The first update after a start takes the k-means codes as if they had been seen at the batch's mean use.
        """
        device = self.counts.device
        if not bool(self.started):
            return torch.zeros((), device=device)
        n, s = statistics.counts.to(device), statistics.sums.to(device)
        if not torch.isfinite(s).all() or n.sum() == 0:
            return torch.zeros((), device=device)
        expected = n.sum() / self.codes
        if self.counts.sum() == 0:
            self.counts.fill_(float(expected))
            self.sums.copy_(self.embedding * expected)
        self.counts.mul_(self.decay).add_(n, alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(s, alpha=1 - self.decay)
        restarted = self._restart(statistics, expected, key)
        total = self.counts.sum()
        smoothed = (self.counts + _EPSILON) / (total + self.codes * _EPSILON) * total
        codes = self.sums / smoothed.clamp_min(1e-12)[:, None]
        self.embedding.copy_(F.normalize(codes, dim=1) if self.normalize else codes)
        return restarted

    def _restart(self, statistics: CodebookStatistics, expected: Tensor, key: int) -> Tensor:
        """Give the least used codes, below a share of the expected use, a fresh vector of this step and mean use."""
        candidates = statistics.candidates[statistics.candidate_priorities != _NOBODY].to(self.sums.device)
        dead = torch.nonzero(self.counts < self.restart_threshold * expected).squeeze(1)
        if len(dead) == 0 or len(candidates) == 0:
            return torch.zeros((), device=self.counts.device)
        dead = dead[torch.argsort(self.counts[dead], stable=True)][: len(candidates)]
        self.counts[dead] = expected
        self.sums[dead] = candidates[: len(dead)] * expected
        return torch.tensor(float(len(dead)), device=self.counts.device)


class GradientQuantizer(Quantizer):
    """Codes are parameters pulled by the alignment loss."""

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self.embedding = nn.Parameter(torch.zeros(self.codes, self.dim))

    @property
    def codebook(self) -> Tensor:
        """(K, D) fp32 code vectors."""
        codes = self.embedding.float()
        return F.normalize(codes, dim=1) if self.normalize else codes

    @property
    def codebook_learns_by_gradient(self) -> bool:
        """The loss pulls the codes."""
        return True

    @torch.no_grad()
    def start(self, vectors: Tensor, key: int) -> None:
        """Begin with the centres of k-means."""
        self.embedding.copy_(kmeans(self.prepare(vectors), self.codes, key))
        self.started.fill_(True)

    def update(self, statistics: CodebookStatistics, key: int) -> Tensor:
        """Nothing to do: the optimizer moves the codes."""
        return torch.zeros(())


class SimVQQuantizer(Quantizer):
    """Codes are a learned linear map of frozen random vectors, so that every code moves with every step."""

    frozen: Tensor

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        items = torch.arange(self.codes)
        gaussian = torch.sqrt(-2 * torch.log(uniform(items, (self.dim,), "radius"))) * torch.cos(
            2 * torch.pi * uniform(items, (self.dim,), "angle")
        )
        self.register_buffer("frozen", (gaussian * self.dim**-0.5).float())
        self.map = nn.Parameter(torch.eye(self.dim))  # no module of its own: ZeRO-3 gathers what is called

    @property
    def codebook(self) -> Tensor:
        """(K, D) fp32 code vectors."""
        codes = F.linear(self.frozen, self.map.float())
        return F.normalize(codes, dim=1) if self.normalize else codes

    @property
    def codebook_learns_by_gradient(self) -> bool:
        """The loss pulls the map."""
        return True

    @torch.no_grad()
    def start(self, vectors: Tensor, key: int) -> None:
        """Scale the frozen vectors to the spread of the vectors: the map is learned from there."""
        spread = self.prepare(vectors).std() * self.dim**0.5
        self.frozen.mul_(spread / self.frozen.norm(dim=1).mean().clamp_min(1e-12))
        self.started.fill_(True)

    def update(self, statistics: CodebookStatistics, key: int) -> Tensor:
        """Nothing to do: the optimizer moves the map."""
        return torch.zeros(())


class FSQQuantizer(Quantizer):
    """Finite scalar quantization (arXiv:2309.15505): each dimension is squashed and rounded to its own few steps.

    There is no codebook to learn, to restart or to collapse: the codes are the points of a fixed grid in [-1, 1]^D,
    numbered with the first dimension fastest.
    """

    grid: Tensor
    steps: Tensor
    strides: Tensor

    def __init__(self, *, steps: tuple[int, ...], **base: Any) -> None:
        super().__init__(**base)
        if prod(steps) != self.codes or len(steps) != self.dim:
            raise ValueError(
                f"the {self.dim} fsq_steps must multiply to the codebook size ({self.codes}): {list(steps)}\n"
                "hint: fsq_steps=[8,8,4,4] makes 1024 codes"
            )
        sizes = torch.tensor(steps)
        self.register_buffer("steps", sizes, persistent=False)
        self.register_buffer("strides", torch.cat([torch.ones(1, dtype=torch.int64), sizes[:-1].cumprod(0)]), False)
        places = torch.arange(self.codes)[:, None] // self.strides % sizes
        self.register_buffer("grid", self._values(places), persistent=False)

    def _values(self, places: Tensor) -> Tensor:
        """(N, D) from the (N, D) steps, 0 to the dimension's number less one."""
        return places * (2 / (self.steps - 1)) - 1

    @property
    def codebook(self) -> Tensor:
        """(K, D) fp32 code vectors."""
        return self.grid

    def prepare(self, vectors: Tensor) -> Tensor:
        """(N, D) fp32 vectors squashed into (-1, 1)."""
        return torch.tanh(vectors.float())

    def _nearest(self, z: Tensor) -> Tensor:
        places = ((z + 1) * ((self.steps - 1) / 2)).round().long().clamp_min(0)
        return (torch.minimum(places, self.steps - 1) * self.strides).sum(1)

    def _alignment(self, z: Tensor, e: Tensor, counted: Tensor | None) -> Tensor:
        return z.new_zeros(())  # nothing to align: the grid does not move, and vectors cannot leave it

    @torch.no_grad()
    def start(self, vectors: Tensor, key: int) -> None:
        """Begin rounding."""
        self.started.fill_(True)

    def update(self, statistics: CodebookStatistics, key: int) -> Tensor:
        """Nothing to do: nothing is learned."""
        return torch.zeros((), device=statistics.counts.device)


def make_quantizer(
    kind: QuantizerKind,
    codes: int,
    dim: int,
    *,
    commitment: float = 0.25,
    estimator: Estimator = "straight-through",
    normalize: bool = False,
    decay: float = 0.99,
    restart_threshold: float = 0.05,
    steps: tuple[int, ...] = (),
) -> Quantizer:
    """A quantizer of the named kind with `codes` codes of `dim` dimensions.

    Args:
        steps: of quantizer fsq, one a dimension; they multiply to `codes`.

    Raises:
        ValueError: no such kind, or steps that do not multiply to `codes`.
    """
    base = {"codes": codes, "dim": dim, "commitment": commitment, "estimator": estimator, "normalize": normalize}
    match kind:
        case "ema":
            return EMAQuantizer(decay=decay, restart_threshold=restart_threshold, **base)
        case "gradient":
            return GradientQuantizer(**base)
        case "simvq":
            return SimVQQuantizer(**base)
        case "fsq":
            return FSQQuantizer(steps=steps, **base)
    raise ValueError(f"quantizer must be ema, gradient, simvq or fsq: {kind}\nhint: set quantizer=ema")
