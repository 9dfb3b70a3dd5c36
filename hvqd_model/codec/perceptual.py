"""A distance of pictures in the feature maps of a network that knows pictures.

After Zhang et al., arXiv:1801.03924, eq. 1, with all channel weights equal to one: those learned for other networks
mean nothing here. The network itself comes from outside.

Axes: B pictures, C channels, h x w positions of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FeatureNetwork = Callable[[Tensor], Sequence[Tensor]]
"""(B, C, h, w) maps of any number of layers, from (B, 3, H, W) pictures in [-1, 1]."""

_LEAST_SQUARED_NORM = 1e-4


def perceptual_distance(maps: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """(B,) float32 distance in [0, 4]: the mean over layers and positions of |a/|a| - b/|b||^2.

    Where a position's features vanish they count as zero; the gradient is finite there, and where maps are equal.

    Args:
        maps, targets: (B, C, h, w) of each layer, the same layers.

    Raises:
        ValueError: other layers or shapes.
    """
    shapes, expected = [tuple(one.shape) for one in maps], [tuple(one.shape) for one in targets]
    if shapes != expected or not shapes:
        raise ValueError(
            f"feature maps must have the shapes of the targets' and be at least one layer: {shapes} for {expected}\n"
            "hint: take both from the same network, for pictures of equal size"
        )
    layers = [
        (_directions(one) - _directions(other)).square().sum(1).flatten(1).mean(1)
        for one, other in zip(maps, targets, strict=True)
    ]
    return torch.stack(layers).mean(0)


def _directions(x: Tensor) -> Tensor:
    """(B, C, h, w) with each position's features brought to length one, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(1, keepdim=True) + _LEAST_SQUARED_NORM)
