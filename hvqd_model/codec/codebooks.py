"""The kinds of quantizers: how a codebook begins, and how it learns.

EMA: van den Oord et al., arXiv:1711.00937, appendix A.1. SimVQ: Zhu et al., arXiv:2411.02038. FSQ: Mentzer et al.,
arXiv:2309.15505.

Axes: N vectors, D dimensions, K codes.
"""

from __future__ import annotations

import math
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvqd_model.codec.estimators import Estimator
from hvqd_model.codec.quantizer import NOBODY, CodebookStatistics, Quantizer
from hvqd_model.codec.search import kmeans
from hvqd_model.config import QuantizerKind

_EPSILON = 1e-5
DEAD_ZONE = 0.12
"""How much nearer to the middle, in steps, a value of quantizer fsq is taken to be where bits cost something."""


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
        candidates = statistics.candidates[statistics.candidate_priorities != NOBODY].to(self.sums.device)
        dead = torch.nonzero(self.counts < self.restart_threshold * expected).squeeze(1)
        if len(dead) == 0 or len(candidates) == 0:
            return torch.zeros((), device=self.counts.device)
        dead = dead[torch.argsort(self.counts[dead], stable=True)][: len(candidates)]
        self.counts[dead] = expected
        self.sums[dead] = candidates[: len(dead)] * expected
        return torch.tensor(float(len(dead)), device=self.counts.device)


class _PulledQuantizer(Quantizer):
    """Codes follow from parameters that the alignment loss pulls."""

    @property
    def codebook_learns_by_gradient(self) -> bool:
        """The loss pulls them."""
        return True

    def update(self, statistics: CodebookStatistics, key: int) -> Tensor:
        """Nothing to do: the optimizer moves them."""
        return torch.zeros(())


class GradientQuantizer(_PulledQuantizer):
    """Codes are parameters pulled by the alignment loss."""

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self.embedding = nn.Parameter(torch.zeros(self.codes, self.dim))

    @property
    def codebook(self) -> Tensor:
        """(K, D) fp32 code vectors."""
        codes = self.embedding.float()
        return F.normalize(codes, dim=1) if self.normalize else codes

    @torch.no_grad()
    def start(self, vectors: Tensor, key: int) -> None:
        """Begin with the centres of k-means."""
        self.embedding.copy_(kmeans(self.prepare(vectors), self.codes, key))
        self.started.fill_(True)


class SimVQQuantizer(_PulledQuantizer):
    """Codes are a learned linear map of frozen vectors, so that every code moves with every step.

    The frozen vectors are the centres of k-means and not random ones as in the paper: random ones lie around zero, the
    vectors elsewhere, and of a coarse level's 1,024 codes 16 were ever used.
    """

    frozen: Tensor

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self.register_buffer("frozen", torch.zeros(self.codes, self.dim))
        self.map = nn.Parameter(torch.eye(self.dim))  # no module of its own: ZeRO-3 gathers what is called

    @property
    def codebook(self) -> Tensor:
        """(K, D) fp32 code vectors."""
        codes = F.linear(self.frozen, self.map.float())
        return F.normalize(codes, dim=1) if self.normalize else codes

    @torch.no_grad()
    def start(self, vectors: Tensor, key: int) -> None:
        """Freeze the centres of k-means; the map begins as the identity."""
        self.frozen.copy_(kmeans(self.prepare(vectors), self.codes, key))
        self.started.fill_(True)


class FSQQuantizer(Quantizer):
    """Finite scalar quantization (arXiv:2309.15505): each dimension is squashed and rounded to its own few steps.

    There is no codebook to learn, to restart or to collapse: the codes are the points of a fixed grid in [-1, 1]^D,
    numbered with the first dimension fastest. Where bits cost something, the loss holds what an entropy coder would
    spend under a Laplace distribution of learned width in each dimension (Balle et al., arXiv:1611.01704), and values
    are rounded a little towards the middle, as coders do (Sullivan, IEEE Trans. Inf. Theory 42, 1996).
    """

    grid: Tensor
    steps: Tensor
    strides: Tensor

    def __init__(self, *, steps: tuple[int, ...], bounded: bool, bit_cost: float, **base: Any) -> None:
        """
        Args:
            steps: of each dimension; they multiply to the number of codes.
            bounded: whether vectors are in [-1, 1] already but for a few, which are clipped; others are squashed.
            bit_cost: what a bit of a vector's code costs in the loss.
            base: of every quantizer.
        """
        super().__init__(**base)
        if prod(steps) != self.codes or len(steps) != self.dim:
            raise ValueError(
                f"the {self.dim} fsq_steps must multiply to the codebook size ({self.codes}): {list(steps)}\n"
                "hint: fsq_steps=[8,8,4,4] makes 1024 codes"
            )
        self.bounded, self.bit_cost = bounded, bit_cost
        sizes = torch.tensor(steps)
        self.register_buffer("steps", sizes, persistent=False)
        self.register_buffer("strides", torch.cat([torch.ones(1, dtype=torch.int64), sizes[:-1].cumprod(0)]), False)
        places = torch.arange(self.codes)[:, None] // self.strides % sizes
        self.register_buffer("grid", self._values(places), persistent=False)
        if bit_cost:
            self.log_width = nn.Parameter(torch.zeros(self.dim))

    def _values(self, places: Tensor) -> Tensor:
        """(N, D) from the (N, D) steps, 0 to the dimension's number less one."""
        return places * (2 / (self.steps - 1)) - 1

    @property
    def codebook(self) -> Tensor:
        """(K, D) fp32 code vectors."""
        return self.grid

    def prepare(self, vectors: Tensor) -> Tensor:
        """(N, D) fp32 vectors, within [-1, 1]."""
        return vectors.float().clamp(-1, 1) if self.bounded else torch.tanh(vectors.float())

    def _nearest(self, z: Tensor) -> Tensor:
        middle = (self.steps - 1) / 2
        from_middle = z * middle
        if self.bit_cost:
            from_middle = from_middle.sign() * (from_middle.abs() - DEAD_ZONE).clamp_min(0)
        places = (from_middle + middle).round().long().clamp_min(0)
        return (torch.minimum(places, self.steps - 1) * self.strides).sum(1)

    def _alignment(self, z: Tensor, e: Tensor, counted: Tensor | None) -> Tensor:
        """What the codes cost. The grid does not move, and vectors cannot leave it: there is nothing to align."""
        if not self.bit_cost:
            return z.new_zeros(())
        bits = laplace_bits(z * ((self.steps - 1) / 2), self.log_width.float().exp().clamp_min(0.02)).sum(1)
        return self.bit_cost * (bits if counted is None else bits * counted).mean()

    def _sums(self, z: Tensor, indices: Tensor, weights: Tensor | None) -> Tensor:
        return z.new_zeros(self.codes, 0)  # nothing is learned from them, and grids have many codes

    @torch.no_grad()
    def start(self, vectors: Tensor, key: int) -> None:
        """Begin rounding."""
        self.started.fill_(True)

    def update(self, statistics: CodebookStatistics, key: int) -> Tensor:
        """Nothing to do: nothing is learned."""
        return torch.zeros((), device=statistics.counts.device)


def laplace_bits(distances: Tensor, widths: Tensor) -> Tensor:
    """(N, D) bits of an interval of length 1 around each of (N, D) distances from the middle of Laplace distributions.

    Args:
        distances: in units of the interval.
        widths: (D,) mean distances from the middle, above 0.
    """
    far = distances.abs()
    half = 0.5 / widths
    tail = far / widths - half - torch.log(-torch.expm1(-2 * half)) + math.log(2)
    near = torch.minimum(far, far.new_tensor(0.5))  # the other branch's values would overflow, and their gradient
    share = 1 - 0.5 * (torch.exp(-half - near / widths) + torch.exp(-half + near / widths))
    inside = -torch.log(share.clamp_min(torch.finfo(share.dtype).tiny))
    return torch.where(far < 0.5, inside, tail) / math.log(2)


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
    bounded: bool = False,
    bit_cost: float = 0.0,
) -> Quantizer:
    """A quantizer of the named kind with `codes` codes of `dim` dimensions.

    Args:
        steps: of quantizer fsq, one a dimension; they multiply to `codes`.
        bounded: quantizer fsq: whether vectors are in [-1, 1] already.
        bit_cost: quantizer fsq: what a bit of a vector's code costs in the loss.

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
            return FSQQuantizer(steps=steps, bounded=bounded, bit_cost=bit_cost, **base)
    raise ValueError(f"quantizer must be ema, gradient, simvq or fsq: {kind}\nhint: set quantizer=ema")
