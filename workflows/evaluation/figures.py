"""The figures of an evaluation, from arrays alone: each with its interval over concepts and its n.

Every figure about a set of pictures is given for real pictures, reconstructions, samples and baselines alike, because
the tokenizer bounds what samples can reach: without its neighbours a figure says little.

Axes: N test pictures, n pictures of a set, D features, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvqd_model import metrics
from workflows.drawing.generate import Pictures
from workflows.evaluation.judge import ClassJudge

_DIGITS = 6
_AT_ONCE = 256


def rounded(value: float) -> float:
    """Six significant digits: more would be noise of the arithmetic."""
    return float(f"{value:.{_DIGITS}g}")


@dataclass(frozen=True)
class Figure:
    """One figure of metrics.json."""

    value: float
    n: int
    """How many pictures it is about."""
    interval: metrics.Interval = None
    """95 %, over concepts; None where there is none."""

    @property
    def json(self) -> dict[str, Any]:
        """The figure's entry in metrics.json."""
        low, high = (None, None) if self.interval is None else map(rounded, self.interval)
        return {"value": rounded(self.value), "low": low, "high": high, "n": self.n}


@dataclass(frozen=True)
class PictureSet:
    """Pictures that are compared with the test pictures."""

    pictures: Pictures
    features: NDArray[np.float32]
    """(n, D)"""
    labels: NDArray[np.int64]
    """(n,) the class that was asked for, or that the picture has; -1 for none."""
    groups: NDArray[Any]
    """(n,) concepts; drawn pictures are a group each."""


@dataclass(frozen=True)
class Resampling:
    """How intervals are made."""

    resamples: int
    seed: int

    def mean(self, values: NDArray[Any] | Tensor, groups: NDArray[Any]) -> Figure:
        """The mean over pictures."""
        x = np.asarray(values, dtype=np.float64)
        return Figure(float(x.mean()), len(x), metrics.interval(x, groups, self.resamples, self.seed))

    def median(self, values: NDArray[Any] | Tensor, groups: NDArray[Any]) -> Figure:
        """The median over pictures."""
        x = np.asarray(values, dtype=np.float64)
        return Figure(float(np.median(x)), len(x), metrics.interval(x, groups, self.resamples, self.seed, "median"))


def reconstruction_figures(
    originals: Pictures, prefixes: Sequence[Pictures], groups: NDArray[Any], resampling: Resampling
) -> dict[str, Figure]:
    """PSNR of each prefix of levels (the last one is the whole) and SSIM, on 8-bit RGB pictures."""

    def pairs(pictures: Pictures) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(pictures), _AT_ONCE):
            x, y = (torch.from_numpy(np.array(both[start : start + _AT_ONCE])) for both in (pictures, originals))
            yield x.permute(0, 3, 1, 2).float(), y.permute(0, 3, 1, 2).float()

    figures = {}
    for level, pictures in enumerate(prefixes, start=1):
        decibels = torch.cat([metrics.psnr(x, y, 255.0) for x, y in pairs(pictures)])
        figures[f"psnr_prefix_{level}"] = resampling.mean(decibels, groups)
    similarity = torch.cat([metrics.ssim(x, y, 255.0) for x, y in pairs(prefixes[-1])])
    figures["psnr"] = figures[f"psnr_prefix_{len(prefixes)}"]
    figures["ssim"] = resampling.mean(similarity, groups)
    return figures


def code_figures(
    counts: Sequence[NDArray[np.int64]],
    pictures: int,
    bits: Sequence[NDArray[np.float64]] | None,
    grids: Sequence[tuple[int, int]],
    groups: NDArray[Any],
    resampling: Resampling,
) -> dict[str, Figure]:
    """Rate, usage and perplexity of the codebooks, and the prior's bound on the code length where it has one.

    Args:
        counts: (K,) of each level, how often each code occurs in all encoded pictures.
        pictures: how many pictures were counted.
        bits: (N,) of each level, the bound on a test picture's codes; None for a prior without one.
        grids: (rows, columns) of each level.
    """
    sizes = [rows * columns for rows, columns in grids]
    rate = sum(size * math.log2(len(count)) for size, count in zip(sizes, counts, strict=True))
    figures = {"rate_bits": Figure(rate, pictures)}
    for level, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        used = torch.from_numpy(count)
        figures[f"usage_{level}"] = Figure(metrics.usage(used), pictures)
        figures[f"perplexity_{level}"] = Figure(metrics.perplexity(used), pictures)
        if bits is not None:
            figures[f"bits_{level}"] = resampling.mean(bits[level] / size, groups)
    if bits is not None:
        figures["bits_total"] = resampling.mean(np.sum(bits, axis=0), groups)
    return figures


def set_figures(name: str, reference: PictureSet, other: PictureSet, resampling: Resampling) -> dict[str, Figure]:
    """KID, FID, recall, density and coverage of a set against the test pictures.

    The last three depend on how many pictures are compared, so at most as many as there are test pictures take part.
    """
    x, y = torch.from_numpy(reference.features), torch.from_numpy(other.features)
    span = metrics.kid_interval(
        x,
        y,
        reference.groups,
        other.groups,
        resampling.resamples,
        resampling.seed,
        paired=name == "reconstructions",
    )
    count = len(y)
    near = metrics.neighbourhood(x, y[: len(x)])
    figures = {f"kid_{name}": Figure(metrics.kid(x, y), count, span), f"fid_{name}": Figure(metrics.fid(x, y), count)}
    for kind in ("recall", "density", "coverage"):
        found = resampling.mean(getattr(near, kind), reference.groups)
        figures[f"{kind}_{name}"] = Figure(found.value, min(count, len(x)), found.interval)
    return figures


def class_figures(
    judge: ClassJudge, sets: Mapping[str, PictureSet], majority: int, resampling: Resampling
) -> dict[str, Figure]:
    """How often the judge sees the class that was asked for, how often by chance, and the share of the largest class.

    Chance is the accuracy of the same pictures with their asked classes shuffled, in expectation: what is left when the
    class that was asked for has no influence.

    Args:
        sets: by name; `real` holds the test pictures.
        majority: the largest class of the training pictures, what a judge without eyes would say.
    """
    figures = {}
    for name, found in sets.items():
        known = found.labels >= 0
        if known.any():
            seen, asked = judge.judge(found.features[known]), found.labels[known]
            figures[f"class_accuracy_{name}"] = resampling.mean(seen == asked, found.groups[known])
            shares = (np.bincount(classes, minlength=judge.classes) / len(asked) for classes in (seen, asked))
            figures[f"class_shuffled_{name}"] = Figure(float(np.prod(list(shares), axis=0).sum()), len(asked))
    real = sets["real"]
    known = real.labels >= 0
    if known.any():
        figures["class_majority"] = resampling.mean(real.labels[known] == majority, real.groups[known])
    return figures


def nearest_figures(
    train: NDArray[np.float32], sets: Mapping[str, PictureSet], resampling: Resampling
) -> tuple[dict[str, Figure], dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]]:
    """Median feature distance to the nearest training picture, and each picture's distance and neighbour, by set."""
    figures, found = {}, {}
    for name, pictures in sets.items():
        distances, places = metrics.nearest(torch.from_numpy(pictures.features), torch.from_numpy(train))
        figures[f"nearest_train_{name}"] = resampling.median(distances, pictures.groups)
        found[name] = (distances.numpy(), places.numpy())
    return figures, found
