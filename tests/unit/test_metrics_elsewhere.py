"""KID, FID, SSIM and PSNR are those of torchmetrics on the same features, to 1e-4, however the pictures come in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image import StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from hvqd_model.metrics import fid, kid, psnr, ssim

TOLERANCE = 1e-4


class Means(nn.Module):
    """Features of (n, 3, 8, 8) pictures: the means of 48 patches."""

    num_features = 48

    def forward(self, pictures: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(pictures.float(), 2).flatten(1) / 64


def pictures(count: int, seed: int, brighter: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 200, (count, 3, 8, 8)) + brighter * rng.random((count, 1, 1, 1))
    return torch.from_numpy(base.clip(0, 255).astype(np.uint8))


REAL, OTHER = pictures(120, 0), pictures(90, 1, brighter=60)


def streamed(metric: FrechetInceptionDistance | KernelInceptionDistance, *chunks: slice) -> float:
    """The metric's value when the pictures come in these chunks."""
    for chunk in chunks:
        metric.update(REAL[chunk], real=True)
        metric.update(OTHER[chunk], real=False)
    found = metric.compute()
    return float(found[0] if isinstance(found, tuple) else found)


@pytest.mark.parametrize("chunks", [(slice(0, 120),), (slice(0, 7), slice(7, 64), slice(64, 120))])
def test_fid_equals_torchmetrics_at_once_and_streamed(chunks: tuple[slice, ...]) -> None:
    features = Means()
    metric = FrechetInceptionDistance(feature=features).set_dtype(torch.float64)
    assert fid(features(REAL), features(OTHER)) == pytest.approx(streamed(metric, *chunks), rel=TOLERANCE)


@pytest.mark.parametrize("chunks", [(slice(0, 120),), (slice(0, 7), slice(7, 64), slice(64, 120))])
def test_kid_equals_torchmetrics_at_once_and_streamed(chunks: tuple[slice, ...]) -> None:
    features = Means()
    metric = KernelInceptionDistance(feature=features, subsets=1, subset_size=90)
    equal = REAL[:90]
    for chunk in chunks:
        metric.update(equal[chunk], real=True)
        metric.update(OTHER[chunk], real=False)
    found = float(metric.compute()[0])
    assert kid(features(equal), features(OTHER)) == pytest.approx(found, rel=TOLERANCE)


def test_psnr_equals_torchmetrics_averaged_over_pictures() -> None:
    noisy = (REAL.float() + torch.randn(REAL.shape, generator=torch.Generator().manual_seed(0)) * 9).clamp(0, 255)
    expected = peak_signal_noise_ratio(noisy, REAL.float(), data_range=255.0, dim=(1, 2, 3), reduction="none")
    torch.testing.assert_close(psnr(noisy, REAL.float(), 255.0).float(), expected, rtol=TOLERANCE, atol=0)


def test_ssim_equals_torchmetrics_streamed() -> None:
    """Averaged over the windows that lie within the picture, as Wang et al. do."""
    generator = torch.Generator().manual_seed(0)
    originals = torch.rand(6, 3, 24, 24, generator=generator)
    noisy = (originals + torch.randn(originals.shape, generator=generator) * 0.1).clamp(0, 1)
    metric = StructuralSimilarityIndexMeasure(data_range=1.0, reduction="none", return_full_image=True)
    for start in (0, 2):
        metric.update(noisy[start : start + 2 + start], originals[start : start + 2 + start])
    _, windows = metric.compute()
    expected = windows[..., 5:-5, 5:-5].mean((1, 2, 3))
    torch.testing.assert_close(ssim(noisy, originals, data_range=1.0), expected, rtol=TOLERANCE, atol=0)


def _share(rank: int, folder: str) -> None:
    """One of two workers: the features of every second picture."""
    torch.set_num_threads(1)
    for name, given in (("real", REAL), ("other", OTHER)):
        torch.save(Means()(given[rank::2]), f"{folder}/{name}-{rank}.pt")


def test_two_workers_give_what_one_gives(tmp_path: Path) -> None:
    """Figures are of sets: who computed a picture's features, and in which order they come back, changes nothing."""
    multiprocessing.spawn(_share, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]
    shared = {
        name: torch.cat([torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1)]) for name in ("real", "other")
    }
    features = Means()
    assert fid(shared["real"], shared["other"]) == pytest.approx(fid(features(REAL), features(OTHER)), rel=1e-9)
    assert kid(shared["real"], shared["other"]) == pytest.approx(kid(features(REAL), features(OTHER)), rel=1e-9)
