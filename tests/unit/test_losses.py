"""Reconstruction losses against loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvqd_model.codec.losses import PixelLoss, pixel_loss, ssim

Picture = NDArray[np.float64]


def pair(height: int, width: int, largest: float = 1.0) -> tuple[Tensor, Tensor]:
    """Three pictures, and the same with rising noise."""
    generator = torch.Generator().manual_seed(height * 100 + width)
    pictures = torch.rand(3, 3, height, width, generator=generator)
    noise = torch.rand(3, 3, height, width, generator=generator) * torch.tensor([0.05, 0.3, 1.0]).view(3, 1, 1, 1)
    return largest * pictures, largest * (0.5 * pictures + 0.5 * noise)


def reference_ssim(x: Picture, y: Picture, largest: float, size: int) -> float:
    """The mean over all windows inside one channel, one window at a time (Wang et al. 2004, eq. 13 to 17)."""
    axis = [math.exp(-((i - size // 2) ** 2) / (2 * 1.5**2)) for i in range(size)]
    window = np.outer(axis, axis) / np.outer(axis, axis).sum()
    c_1, c_2 = (0.01 * largest) ** 2, (0.03 * largest) ** 2
    found = []
    for row in range(x.shape[0] - size + 1):
        for column in range(x.shape[1] - size + 1):
            a, b = x[row : row + size, column : column + size], y[row : row + size, column : column + size]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            variance_a, variance_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + c_1) / (mean_a**2 + mean_b**2 + c_1)
            found.append(luminance * (2 * covariance + c_2) / (variance_a + variance_b + c_2))
    return float(np.mean(found))


@pytest.mark.parametrize(
    ("height", "width", "largest", "size"),
    [(16, 13, 1.0, 11), (14, 16, 255.0, 11), (16, 8, 2.0, 7), (9, 12, 1.0, 9), (1, 4, 1.0, 1)],
)
def test_ssim_equals_a_loop_over_windows_that_shrink_with_the_picture(
    height: int, width: int, largest: float, size: int
) -> None:
    pictures, targets = pair(height, width, largest)
    x, y = pictures.double().numpy(), targets.double().numpy()
    expected = [np.mean([reference_ssim(x[b, c], y[b, c], largest, size) for c in range(3)]) for b in range(3)]
    assert ssim(pictures, targets, largest).tolist() == pytest.approx(expected, abs=2e-5)


def test_ssim_is_one_for_equal_pictures_alone_and_symmetric() -> None:
    pictures, targets = pair(12, 16)
    torch.testing.assert_close(ssim(pictures, pictures, 1.0), torch.ones(3))
    assert float(ssim(pictures, targets, 1.0).max()) < 0.99
    torch.testing.assert_close(ssim(pictures, targets, 1.0), ssim(targets, pictures, 1.0))


def test_ssim_of_flat_pictures_is_the_luminance_term() -> None:
    dark, bright = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert float(ssim(dark, bright, 1.0)) == pytest.approx(expected, rel=1e-4)


def test_ssim_does_not_depend_on_the_unit() -> None:
    pictures, targets = pair(16, 16)
    torch.testing.assert_close(ssim(pictures, targets, 1.0), ssim(255 * pictures, 255 * targets, 255.0))


@pytest.mark.parametrize("kind", ["l1", "l2", "l1+l2"])
def test_pixel_loss_equals_loops(kind: PixelLoss) -> None:
    pictures, targets = pair(3, 2)
    expected = []
    for picture, target in zip(pictures.double(), targets.double(), strict=True):
        errors = [float(a - b) for a, b in zip(picture.flatten(), target.flatten(), strict=True)]
        absolute = sum(abs(error) for error in errors) / len(errors)
        squared = sum(error**2 for error in errors) / len(errors)
        expected.append({"l1": absolute, "l2": squared, "l1+l2": absolute + squared}[kind])
    assert pixel_loss(pictures, targets, kind).tolist() == pytest.approx(expected, rel=1e-5)


def test_losses_are_computed_in_float32_whatever_the_pictures_precision() -> None:
    pictures, targets = pair(8, 8)
    low, exact = pictures.bfloat16(), pictures.bfloat16().float()
    for found in (pixel_loss(low, targets, "l2"), ssim(low, targets, 1.0)):
        assert found.dtype == torch.float32
    torch.testing.assert_close(pixel_loss(low, targets, "l2"), pixel_loss(exact, targets, "l2"), rtol=0, atol=0)
    torch.testing.assert_close(ssim(low, targets, 1.0), ssim(exact, targets, 1.0), rtol=0, atol=0)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^pixel_loss must be l1, l2 or l1\+l2: huber\nhint: set pixel_loss=l2$"):
        pixel_loss(*pair(4, 4), "huber")  # type: ignore[arg-type]
