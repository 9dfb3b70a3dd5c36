"""How the gradient passes a quantizer, which has none of its own.

Straight-through: van den Oord et al., arXiv:1711.00937. Rotation trick: Fifty et al., arXiv:2410.06424.

Axes: N vectors, D dimensions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["straight-through", "rotation"]


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
