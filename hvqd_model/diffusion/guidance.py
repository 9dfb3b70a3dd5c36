"""From logits to a drawn code: classifier-free guidance, temperature, truncation, exact categorical draws.

Guidance of Ho and Salimans, arXiv:2207.12598, on log-probabilities: log p = log p_u + s (log p_c - log p_u), then
renormalised. Truncation comes after it. Draws invert the cumulative distribution in float64: fp32 Gumbel noise loses
its tail and with it lowers the temperature.

Axes: ... any leading axes, K codes last.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """(..., K) guided logits, not normalised; each input may be off by a constant a row.

    Scale 0 is unconditional, 1 conditional, more exaggerates the condition.
    """
    return torch.lerp(unconditional, conditional, scale)


def truncate(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """(..., K) logits with -inf outside the k most likely codes and the smallest set of mass top_p (never empty).

    Raises:
        ValueError: top_k < 1, or top_p outside (0, 1].
    """
    check_truncation(top_k, top_p)
    if top_k is not None and top_k < logits.shape[-1]:
        lowest = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probability = ordered.softmax(-1, dtype=torch.float64)
        outside = probability.cumsum(-1) - probability >= top_p  # the mass before a code already suffices
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), float("-inf"))
    return logits


def check_truncation(top_k: int | None, top_p: float | None) -> None:
    """Refuse values outside their ranges."""
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1: {top_k}\nhint: leave it out to keep every code")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1: {top_p}\nhint: leave it out to keep every code")


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """(...,) int64 codes drawn in proportion to weights: the inverse of the cumulative distribution, in float64.

    Args:
        weights: (..., K) non-negative, not all zero, need not be normalised.
        uniforms: (...,) float64 in (0, 1).
    """
    num_codes = weights.shape[-1]
    width = max(1, math.isqrt(num_codes))
    # Two searches of about sqrt(K): a float64 cumulative sum over all K codes costs several times as much.
    padded = F.pad(weights, (0, -num_codes % width))
    blocks = padded.view(*weights.shape[:-1], padded.shape[-1] // width, width)
    block = _search(blocks.sum(-1, dtype=torch.float64), uniforms)
    within = blocks.gather(-2, block[0][..., None, None].expand(*block[0].shape, 1, width))[..., 0, :]
    return block[0] * width + _search(within, block[1])[0]


def _search(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen entry, and the place of the uniform number within it, itself uniform in [0, 1)."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[..., -1]
    # Strictly below the total, whatever the rounding of the product, so that no entry of weight zero is drawn.
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))[..., None]
    chosen = torch.searchsorted(cumulative, target, right=True)
    end = cumulative.gather(-1, chosen)
    start = torch.where(chosen > 0, cumulative.gather(-1, (chosen - 1).clamp_min(0)), 0.0)
    return chosen[..., 0], ((target - start) / (end - start)).clamp(0, 1)[..., 0]
