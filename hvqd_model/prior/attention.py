"""Attention of the denoiser: normalised queries and keys, turned by their place in the picture.

Queries and keys have length 1 and a learned temperature a head (arXiv:2010.04245); rotary positions (arXiv:2104.09864)
in two dimensions turn them by the centre of their cell, in coordinates that every level's grid shares.

Axes: B images, N tokens, H heads, W channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

always_fused: ContextVar[bool] = ContextVar("always_fused", default=False)
"""Set while a model is looked at as if on a GPU, wherever its weights lie: attention then takes the fused kernel."""

_ROTARY_BASE = 100.0
_EPSILON = 1e-12


def rotary_angles(grids: Sequence[tuple[int, int]], head_width: int) -> Tensor:
    """(tokens, W / 2) float64 angles of every level's cells, in units of the finest grid's cells.

    The first half of the frequencies turns with the row of the cell's centre, the second with its column.
    """
    count = head_width // 4
    frequencies = _ROTARY_BASE ** (-torch.arange(count, dtype=torch.float64) / count)
    height, width = grids[-1]
    angles = []
    for rows, columns in grids:
        row = (torch.arange(rows, dtype=torch.float64) + 0.5) * (height / rows)
        column = (torch.arange(columns, dtype=torch.float64) + 0.5) * (width / columns)
        by_row = (row[:, None, None] * frequencies).expand(rows, columns, count)
        by_column = (column[None, :, None] * frequencies).expand(rows, columns, count)
        angles.append(torch.cat([by_row, by_column], -1).reshape(rows * columns, 2 * count))
    return torch.cat(angles)


def _turn(x: Tensor, rotation: Tensor) -> Tensor:
    """Multiply neighbouring pairs of channels, as complex numbers, by the rotation."""
    turned = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)) * rotation
    return torch.view_as_real(turned).flatten(-2)


def _sum_channels(x: Tensor) -> Tensor:
    """(..., 1) sums over the last axis; a matrix product is several times faster than sum() on short rows."""
    return (x.flatten(0, -2) @ x.new_ones(x.shape[-1], 1)).view(*x.shape[:-1], 1)


class _NormalizeAndTurn(torch.autograd.Function):
    """y = s R x / |x| in few passes over memory: autograd's own chain takes more than twice as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor, scale: Tensor) -> Tensor:
        inverse_norm = _sum_channels(x * x).add_(_EPSILON).rsqrt_()
        y = _turn(x, rotation).mul_(inverse_norm * scale)
        ctx.save_for_backward(y, inverse_norm, rotation, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        y, inverse_norm, rotation, scale = ctx.saved_tensors
        along = _sum_channels(gradients[0] * y) / scale  # of the unit vector y / s
        across = torch.addcmul(gradients[0], y, along / scale, value=-1)
        by_x = _turn(across.mul_(inverse_norm * scale), rotation.conj())
        return by_x, None, along.sum((0, 1))


def normalize_and_turn(query_key: Tensor, rotation: Tensor, temperature: Tensor) -> Tensor:
    """(B, N, 2, H, W) queries of length `temperature` and keys of length 1, turned by their place.

    Args:
        query_key: (B, N, 2, H, W).
        rotation: (N, 1, 1, W / 2) complex numbers of length 1.
        temperature: (H, 1), the scale of each head's logits.
    """
    scale = torch.stack([temperature, torch.ones_like(temperature)])
    exact = query_key if query_key.dtype == torch.float64 else query_key.float()
    turned: Tensor = _NormalizeAndTurn.apply(exact, rotation, scale.to(exact.dtype))  # type: ignore[no-untyped-call]
    return turned.to(query_key.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, N, H W) attention, from (B, N, H, W) each; the queries already carry the scale."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if query.device.type == "cpu" and torch.is_grad_enabled() and not always_fused.get():
        # On short sequences the fused kernel's backward is the slower one on a CPU; its forward is the faster.
        batch, heads, count, width = query.shape
        flat = [x.reshape(batch * heads, count, width) for x in (query, key, value)]
        mixed = torch.bmm(torch.bmm(flat[0], flat[1].transpose(1, 2)).softmax(-1), flat[2])
        mixed = mixed.view(batch, heads, count, width)
    else:
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    return mixed.transpose(1, 2).flatten(2)
