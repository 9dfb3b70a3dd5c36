"""Measures of pictures and of sets of pictures; features come from outside.

psnr, ssim             a picture against its original.
kid                    unbiased MMD^2 with the kernel (x.y / D + 1)^3 (Binkowski et al., arXiv:1801.01401).
fid                    Frechet distance of two Gaussians (Heusel et al., arXiv:1706.08500); small sets raise it.
neighbourhood          precision and recall (Kynkaanniemi et al., arXiv:1904.06991), density and coverage (Naeem et al.,
                       arXiv:2002.09797).
usage, perplexity      how evenly a codebook is used.

Intervals are 95 % bootstrap intervals that resample groups (concepts), because the pictures of a group resemble each
other.

Axes: N real pictures, M other pictures, D features, G groups, R resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from hvqd_model.codec.losses import ssim

__all__ = [
    "KidParts",
    "Neighbourhood",
    "fid",
    "group_weights",
    "interval",
    "kid",
    "kid_difference",
    "kid_interval",
    "kid_parts",
    "nearest",
    "neighbourhood",
    "perplexity",
    "psnr",
    "ssim",
    "usage",
]

Interval = tuple[float, float] | None
"""(low, high), or None where there are fewer than two groups to resample."""

_PERCENTILES = (2.5, 97.5)
_ROWS_AT_ONCE = 1024
_LARGEST_PSNR = 100.0


# ---- pictures ----


def psnr(pictures: Tensor, targets: Tensor, data_range: float) -> Tensor:
    """(B,) decibels of (B, ...) pictures, at most 100 (equal pictures).

    Args:
        data_range: largest minus smallest value a pixel can take.
    """
    error = (pictures.double() - targets.double()).square().flatten(1).mean(1)
    decibels = 10 * torch.log10(data_range**2 / error.clamp_min(1e-300))
    return decibels.clamp_max(_LARGEST_PSNR)


# ---- codes ----


def usage(counts: Tensor) -> float:
    """Share of the (K,) codes that were used at all."""
    return float((counts > 0).double().mean())


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of (K,) counts: how many codes an evenly used codebook would need."""
    share = counts.double() / counts.sum().clamp_min(1)
    return float(torch.exp(-torch.xlogy(share, share).sum()))


# ---- intervals ----


def group_weights(groups: int, resamples: int, seed: int) -> Tensor:
    """(R, G) float64: how often each group is drawn when G groups are drawn with replacement."""
    generator = np.random.Generator(np.random.PCG64(seed & (2**63 - 1)))
    return torch.from_numpy(generator.multinomial(groups, np.full(groups, 1 / groups), size=resamples)).double()


def _percentiles(draws: Tensor) -> tuple[float, float]:
    low, high = np.percentile(draws.numpy(), _PERCENTILES)
    return float(low), float(high)


def _group_indices(groups: ArrayLike) -> tuple[Tensor, int]:
    names, indices = np.unique(np.asarray(groups), return_inverse=True)
    return torch.from_numpy(indices.reshape(-1).astype(np.int64)), len(names)


def interval(
    values: ArrayLike,
    groups: ArrayLike,
    resamples: int,
    seed: int,
    statistic: Literal["mean", "median"] = "mean",
) -> Interval:
    """The 95 % interval of a mean or median over pictures.

    Args:
        values: (N,) one a picture.
        groups: (N,) names or numbers; pictures of one group are drawn together.
        resamples: bootstrap resamples.
        seed: the same seed draws the same resamples.
        statistic: what is estimated.

    Raises:
        ValueError: values and groups of different lengths.
    """
    x = torch.as_tensor(np.asarray(values), dtype=torch.float64)
    indices, count = _group_indices(groups)
    if len(x) != len(indices):
        raise ValueError(f"values and groups must be as many: {len(x)} and {len(indices)}\nhint: one group a picture")
    if count < 2:
        return None
    weights = group_weights(count, resamples, seed)
    if statistic == "mean":
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, indices, x)
        sizes = torch.bincount(indices, minlength=count).double()
        return _percentiles((weights @ sums) / (weights @ sizes))
    x, order = x.sort(stable=True)
    cumulative = weights[:, indices[order]].cumsum(1)
    place = torch.searchsorted(cumulative, cumulative[:, -1:] / 2)[:, 0]
    return _percentiles(x[place.clamp_max(len(x) - 1)])


# ---- KID ----


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    kernel: Tensor = (x @ y.T / x.shape[1] + 1) ** 3
    return kernel


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"both sets must have at least 2 pictures, with equal features: {tuple(x.shape)}, {tuple(y.shape)}\n"
            "hint: pass (pictures, features) of one extractor"
        )
    return x.double(), y.double()


def kid(x: Tensor, y: Tensor) -> float:
    """Kernel inception distance of (N, D) and (M, D) features over all pairs; may be negative.

    Raises:
        ValueError: fewer than two pictures, or different features.
    """
    x, y = _checked(x, y)
    return _within(x) + _within(y) - 2 * float(_kernel(x, y).mean())


def _within(x: Tensor) -> float:
    kernel = _kernel(x, x)
    count = len(x)
    return float((kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1)))


def _between_groups(kernel: Tensor, rows: tuple[Tensor, int], columns: tuple[Tensor, int]) -> Tensor:
    """(G_rows, G_columns) sums of a kernel matrix over pairs of groups."""
    by_row = torch.zeros(rows[1], kernel.shape[1], dtype=kernel.dtype).index_add_(0, rows[0], kernel)
    return torch.zeros(rows[1], columns[1], dtype=kernel.dtype).index_add_(1, columns[0], by_row)


def _resampled_mean(sums: Tensor, pairs: Tensor, left: Tensor, right: Tensor, shared: bool) -> Tensor:
    """(R,) mean kernel under group weights; nan where a resample of few groups leaves no pair.

    A pair within one group counts once a copy of the group (`shared`): copies of a group drawn twice are no independent
    pictures, and pairing them would raise every resample above the estimate.
    """

    def total(matrix: Tensor) -> Tensor:
        if not shared:
            return ((left @ matrix) * right).sum(1)
        inside = matrix.diagonal()
        return ((left @ matrix) * right).sum(1) - (left * right) @ inside + left @ inside

    return total(sums) / total(pairs)


def kid_interval(
    x: Tensor,
    y: Tensor,
    groups_x: ArrayLike,
    groups_y: ArrayLike,
    resamples: int,
    seed: int,
    *,
    paired: bool = False,
) -> Interval:
    """The 95 % interval of `kid`, by reweighting kernel matrices that are computed once.

    Args:
        x, y: (N, D) and (M, D) features.
        groups_x, groups_y: what is drawn together.
        resamples: bootstrap resamples.
        seed: the same seed draws the same resamples.
        paired: the groups of both sets are the same things (a picture and its reconstruction) and are drawn together.

    Raises:
        ValueError: fewer than two pictures, different features, or paired sets of different groups.
    """
    x, y = _checked(x, y)
    rows, columns = _group_indices(groups_x), _group_indices(groups_y)
    if min(rows[1], columns[1]) < 2:
        return None
    if paired and not np.array_equal(np.unique(np.asarray(groups_x)), np.unique(np.asarray(groups_y))):
        raise ValueError("paired sets must have the same groups\nhint: pass paired=False")
    left = group_weights(rows[1], resamples, seed)
    right = left if paired else group_weights(columns[1], resamples, seed + 1)

    def mean(a: Tensor, b: Tensor, i: tuple[Tensor, int], j: tuple[Tensor, int], kind: str) -> Tensor:
        kernel, pairs = _kernel(a, b), torch.ones(len(a), len(b), dtype=torch.float64)
        if kind != "xy":
            kernel.fill_diagonal_(0)
            pairs.fill_diagonal_(0)
        weights = {"xx": (left, left), "yy": (right, right), "xy": (left, right)}[kind]
        sums = [_between_groups(matrix, i, j) for matrix in (kernel, pairs)]
        return _resampled_mean(sums[0], sums[1], *weights, shared=kind != "xy" or paired)

    draws = mean(x, x, rows, rows, "xx") + mean(y, y, columns, columns, "yy") - 2 * mean(x, y, rows, columns, "xy")
    draws = draws[draws.isfinite()]
    return _percentiles(draws) if len(draws) else None


@dataclass(frozen=True)
class KidParts:
    """What is needed of a set's KID to compare it later with another set's, against the same reference pictures.

    The kernel among the reference pictures is the same for both and cancels.
    """

    within: float
    """Mean kernel of two pictures of the set."""
    across: tuple[float, ...]
    """(G,) sum, over the reference pictures of a block, of the mean kernel with the set."""
    counts: tuple[int, ...]
    """(G,) reference pictures of each block."""
    set_error: float
    """Standard error of the KID that comes from the set having so many pictures and no more."""


def kid_parts(reference: Tensor, other: Tensor, groups: ArrayLike, most_blocks: int = 128) -> KidParts:
    """The parts of a set's KID.

    Args:
        reference: (N, D) features.
        other: (M, D) features of the set; its pictures are independent of each other.
        groups: (N,) reference pictures of one group are drawn together.
        most_blocks: larger numbers of groups are put together at random, which leaves resampling valid.

    Raises:
        ValueError: fewer than two pictures, or different features.
    """
    x, y = _checked(reference, other)
    indices, count = _group_indices(groups)
    if count > most_blocks:
        order = torch.from_numpy(np.random.Generator(np.random.PCG64(count)).permutation(count))
        indices, count = order[indices] * most_blocks // count, most_blocks
    across, among = _kernel(x, y), _kernel(y, y)
    row = among.sum(1) - among.diagonal()
    influence = 2 * (row / (len(y) - 1) - across.mean(0))
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, indices, across.mean(1))
    return KidParts(
        within=float(row.sum() / (len(y) * (len(y) - 1))),
        across=tuple(sums.tolist()),
        counts=tuple(torch.bincount(indices, minlength=count).tolist()),
        set_error=float(influence.std() / len(y) ** 0.5),
    )


def kid_difference(new: KidParts, old: KidParts, resamples: int, seed: int) -> tuple[float, float]:
    """How much larger the KID of a set is than another's, and the standard error of that.

    Paired over the reference pictures, whose choice moves both alike; both sets are taken as drawn independently.

    Raises:
        ValueError: the two were not judged against the same reference pictures.
    """
    if new.counts != old.counts:
        raise ValueError(
            f"the two sets were compared with other pictures: {sum(new.counts)} and {sum(old.counts)}\n"
            "hint: judge both by one protocol"
        )
    moved = torch.tensor(new.across, dtype=torch.float64) - torch.tensor(old.across, dtype=torch.float64)
    counts = torch.tensor(new.counts, dtype=torch.float64)
    difference = new.within - old.within - 2 * float(moved.sum() / counts.sum())
    weights = group_weights(len(counts), resamples, seed)
    drawn = 2 * (weights @ moved) / (weights @ counts)
    error = float(drawn.std()) if len(counts) > 1 else math.nan
    return difference, math.sqrt(error**2 + new.set_error**2 + old.set_error**2)


# ---- FID ----


def _factor(x: Tensor) -> Tensor:
    """A with A'A the covariance of (N, D) features, of at most D rows."""
    centred: Tensor = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    if len(centred) <= centred.shape[1]:
        return centred
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    factor: Tensor = values.clamp_min(0).sqrt()[:, None] * vectors.T
    return factor


def fid(x: Tensor, y: Tensor) -> float:
    """Frechet distance of (N, D) and (M, D) features: |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)).

    With S_x = A'A and S_y = B'B the last trace is the sum of the singular values of AB', which also holds for
    singular covariances and costs little when there are fewer pictures than features.

    Raises:
        ValueError: fewer than two pictures, or different features.
    """
    x, y = _checked(x, y)
    a, b = _factor(x), _factor(y)
    shift = (x.mean(0) - y.mean(0)).square().sum()
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float((shift + a.square().sum() + b.square().sum() - 2 * cross).clamp_min(0))


# ---- neighbours ----


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, M) float64 Euclidean distances."""
    x, y = x.double(), y.double()
    squared = x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.T
    return squared.clamp_min(0).sqrt()


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (M,) float64 and index (M,) of the picture of (N, D) `y` that is nearest to each of (M, D) `x`."""
    found = [_distances(x[start : start + _ROWS_AT_ONCE], y).min(1) for start in range(0, len(x), _ROWS_AT_ONCE)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _radii(x: Tensor, k: int) -> Tensor:
    """(N,) distance of each picture to its k-th nearest other one."""
    distances = _distances(x, x)
    distances.fill_diagonal_(torch.inf)
    return distances.kthvalue(k, dim=1).values


@dataclass(frozen=True)
class Neighbourhood:
    """How two sets cover each other. A row each; a figure is the mean of its rows."""

    precision: NDArray[np.float64]
    """(M,) whether the picture lies within reach of a real one; easily fooled by blurred pictures."""
    recall: NDArray[np.float64]
    """(N,) whether the real picture lies within reach of one of the others."""
    density: NDArray[np.float64]
    """(N,) how many of the others lie within the real picture's reach, over how many are expected there."""
    coverage: NDArray[np.float64]
    """(N,) whether one of the others lies within the real picture's reach."""
    neighbours: int
    """k: a picture's reach is the distance to its k-th neighbour in its own set."""


def neighbourhood(real: Tensor, other: Tensor, neighbours: int = 5) -> Neighbourhood:
    """Precision, recall, density and coverage of (M, D) features against (N, D) real ones.

    Args:
        neighbours: k, reduced where a set has no more than k pictures.

    Raises:
        ValueError: fewer than two pictures, or different features.
    """
    real, other = _checked(real, other)
    k = min(neighbours, len(real) - 1, len(other) - 1)
    reach_real, reach_other = _radii(real, k), _radii(other, k)
    distances = _distances(real, other)
    within_real = distances <= reach_real[:, None]
    within_other = distances <= reach_other[None]
    scale = len(real) / (k * len(other))
    return Neighbourhood(
        precision=within_real.any(0).double().numpy(),
        recall=within_other.any(1).double().numpy(),
        density=(within_real.double().sum(1) * scale).numpy(),
        coverage=within_real.any(1).double().numpy(),
        neighbours=k,
    )
