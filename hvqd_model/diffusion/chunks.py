"""Losses over many codes a few rows at a time: what lies between logits and loss is never whole in memory.

A chain of operations on (R, K) logits keeps a tensor of that size for almost every link until backward. Here each chunk
of rows goes through loss and gradient at once, while it is in the cache, and only its gradient is kept.

Axes: R rows, K codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Terms = Callable[[Tensor, slice], tuple[Tensor, ...]]
"""(r, K) float32 logits and their place among the rows -> (r,) terms; gradients flow from the first alone."""
_CHUNK_ELEMENTS = 1 << 18


class _RowTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, terms: Terms, rows: int) -> tuple[Tensor, ...]:
        gradient = torch.empty_like(logits)
        found = []
        for start in range(0, len(logits), rows):
            place = slice(start, start + rows)
            with torch.enable_grad():
                chunk = logits[place].detach().float().requires_grad_()
                values = terms(chunk, place)
                (own,) = torch.autograd.grad(values[0].sum(), chunk)
            gradient[place] = own.to(gradient.dtype)
            found.append([value.detach() for value in values])
        ctx.save_for_backward(gradient)
        whole = tuple(torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.mark_non_differentiable(*whole[1:])
        return whole

    @staticmethod
    def backward(ctx: Any, *by_terms: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * by_terms[0][:, None].to(gradient.dtype), None, None


def row_terms(logits: Tensor, terms: Terms) -> tuple[Tensor, ...]:
    """(R,) of each term; the first can be differentiated with respect to the logits, once.

    Args:
        logits: (R, K), any floating type; terms see float32.
        terms: what is computed for some rows. All else that it uses is taken as constant.
    """
    elements = _CHUNK_ELEMENTS if logits.device.type == "cpu" else 64 * _CHUNK_ELEMENTS  # fewer launches
    rows = max(1, elements // logits.shape[1])
    if len(logits) == 0 or not (torch.is_grad_enabled() and logits.requires_grad):
        places = [slice(start, start + rows) for start in range(0, max(len(logits), 1), rows)]
        found = [terms(logits[place].float(), place) for place in places]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
    whole: tuple[Tensor, ...] = _RowTerms.apply(logits, terms, rows)  # type: ignore[no-untyped-call]
    return whole
