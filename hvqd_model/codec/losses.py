"""Reconstruction losses and similarity, one number a picture.

SSIM: Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 2004, with its
11 x 11 Gaussian window of 1.5 pixels.

Axes: B pictures, H x W pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PixelLoss = Literal["l1", "l2", "l1+l2"]


def pixel_loss(pictures: Tensor, targets: Tensor, kind: PixelLoss) -> Tensor:
    """(B,) mean absolute or squared error, or their sum, of (B, 3, H, W) pictures in float32."""
    difference = (pictures.float() - targets.float()).flatten(1)
    match kind:
        case "l1":
            return difference.abs().mean(1)
        case "l2":
            return difference.square().mean(1)
        case "l1+l2":
            return difference.abs().mean(1) + difference.square().mean(1)
    raise ValueError(f"pixel_loss must be l1, l2 or l1+l2: {kind}\nhint: set pixel_loss=l2")


def with_gradient(value: Tensor, pictures: Tensor, gradient: Tensor) -> Tensor:
    """A scalar that equals `value` and whose gradient with respect to the pictures is the one given.

    For a loss that has been differentiated already: the way to the weights is then walked once for all losses.

    Args:
        value: scalar; its own graph is not followed.
        pictures, gradient: (B, 3, H, W).
    """
    return value.detach() + (gradient * (pictures - pictures.detach())).sum()


def ssim(pictures: Tensor, targets: Tensor, data_range: float) -> Tensor:
    """(B,) structural similarity of (B, 3, H, W) pictures, at most 1; the window shrinks to fit small pictures.

    Args:
        pictures, targets: pixels from 0 (black: the luminance term compares means as ratios) to `data_range`.
        data_range: the largest value a pixel can take.
    """
    size = min(11, *(side - 1 + side % 2 for side in pictures.shape[-2:]))
    axis = torch.arange(size, dtype=torch.float32, device=pictures.device) - size // 2
    gaussian = torch.exp(-axis.square() / (2 * 1.5**2))
    gaussian = gaussian / gaussian.sum()
    x, y = pictures.float(), targets.float()
    moments = torch.cat([x, y, x * x, y * y, x * y], 1)
    channels = moments.shape[1]
    for shape in ((1, 1, size, 1), (1, 1, 1, size)):
        kernel = gaussian.view(shape).expand(channels, 1, *shape[2:])
        moments = F.conv2d(moments, kernel, groups=channels)
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = moments.chunk(5, 1)
    c_1, c_2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    variance_x, variance_y = mean_xx - mean_x.square(), mean_yy - mean_y.square()
    covariance = mean_xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c_1) / (mean_x.square() + mean_y.square() + c_1)
    structure = (2 * covariance + c_2) / (variance_x + variance_y + c_2)
    return (luminance * structure).flatten(1).mean(1)
