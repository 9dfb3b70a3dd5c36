"""Losses a few rows at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hvqd_model.diffusion import chunks
from hvqd_model.diffusion.chunks import row_terms

TARGETS = torch.randint(7, (23,), generator=torch.Generator().manual_seed(1))
LOGITS = torch.randn(23, 7, generator=torch.Generator().manual_seed(0))


def terms(scores: Tensor, rows: slice) -> tuple[Tensor, ...]:
    log_p = scores.log_softmax(1)
    loss = F.nll_loss(log_p, TARGETS[rows], reduction="none")
    return loss + (log_p.exp() * log_p).sum(1), loss, log_p.argmax(1) == TARGETS[rows]


@pytest.mark.parametrize("elements", [1, 7 * 5, 7 * 23, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_terms_and_gradient_are_those_of_all_rows_at_once(
    elements: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", elements)
    weights = torch.linspace(-1, 2, 23)
    found, whole = (LOGITS.to(dtype, copy=True).requires_grad_() for _ in range(2))
    objective, loss, correct = row_terms(found, terms)
    expected = terms(whole.float(), slice(None))
    (objective * weights).sum().backward()
    (expected[0] * weights).sum().backward()
    assert found.grad is not None and whole.grad is not None and found.grad.dtype == dtype
    torch.testing.assert_close(objective, expected[0])
    torch.testing.assert_close(loss, expected[1].detach())
    assert torch.equal(correct, expected[2]) and not loss.requires_grad
    rounding = 1e-6 if dtype == torch.float32 else 0.02  # in bfloat16 once for each factor
    torch.testing.assert_close(found.grad, whole.grad, rtol=rounding, atol=rounding / 10)
    assert found.grad is not whole.grad


def test_without_gradients_and_without_rows_the_terms_are_there_all_the_same() -> None:
    with torch.no_grad():
        for logits in (LOGITS, LOGITS.clone().requires_grad_()):
            torch.testing.assert_close(row_terms(logits, terms)[0], terms(LOGITS, slice(None))[0])
    empty = torch.zeros(0, 7, requires_grad=True)
    objective, loss, correct = row_terms(empty, lambda scores, rows: (scores.sum(1), scores.sum(1), scores[:, 0] > 0))
    assert objective.shape == loss.shape == correct.shape == (0,)
    objective.sum().backward()
    assert empty.grad is not None
