"""Attention with normalised, rotated queries and keys, against its plain form."""

from __future__ import annotations

import torch
from torch import Tensor

from hvqd_model.prior.attention import attend, normalize_and_turn, rotary_angles


def attention_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 6, 3, 2, 8, generator=generator, dtype=torch.float64)
    angles = rotary_angles([(1, 2), (2, 2)], 8)
    rotation = torch.polar(torch.ones_like(angles), angles)[:, None, None]
    return wide[:, :, :2].requires_grad_(), rotation, torch.tensor([[2.0], [3.0]], dtype=torch.float64).requires_grad_()


def plain_normalize_and_turn(query_key: Tensor, rotation: Tensor, temperature: Tensor) -> Tensor:
    unit = query_key / query_key.norm(dim=-1, keepdim=True)
    pairs = unit.unflatten(-1, (-1, 2))  # type: ignore[no-untyped-call]
    cosine, sine = rotation.real, rotation.imag
    even = pairs[..., 0] * cosine - pairs[..., 1] * sine
    odd = pairs[..., 0] * sine + pairs[..., 1] * cosine
    turned = torch.stack([even, odd], -1).flatten(-2)
    return turned * torch.stack([temperature, torch.ones_like(temperature)])


def test_the_written_out_gradient_of_normalised_queries_passes_gradcheck() -> None:
    query_key, rotation, temperature = attention_inputs()
    assert torch.autograd.gradcheck(lambda x, scale: normalize_and_turn(x, rotation, scale), (query_key, temperature))


def test_normalised_queries_and_their_gradients_equal_plain_autograd() -> None:
    query_key, rotation, temperature = attention_inputs()
    outward = torch.randn(2, 6, 2, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, expected = (
        function(query_key, rotation, temperature) for function in (normalize_and_turn, plain_normalize_and_turn)
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[:, :, 1].norm(dim=-1), torch.ones(2, 6, 2, dtype=torch.float64))
    inputs = (query_key, temperature)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, outward), torch.autograd.grad(expected, inputs, outward)
    )


def test_attention_with_and_without_gradients_is_the_same_softmax() -> None:
    query, key, value = torch.randn(3, 2, 6, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = torch.einsum("bnhw,bmhw->bhnm", query, key).softmax(-1)
    expected = torch.einsum("bhnm,bmhw->bnhw", scores, value).flatten(2)
    torch.testing.assert_close(attend(query, key, value), expected)
    with torch.no_grad():
        torch.testing.assert_close(attend(query, key, value), expected)


def test_a_rotated_product_depends_on_the_displacement_alone() -> None:
    angles = rotary_angles([(4, 4)], 16)
    rotation = torch.polar(torch.ones_like(angles), angles)[:, None, None]
    one = torch.randn(1, 1, 2, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = normalize_and_turn(one.expand(1, 16, 2, 1, 16), rotation, torch.ones(1, 1, dtype=torch.float64))
    query, key = turned[0, :, :, 0].unbind(1)
    products = (query @ key.T).view(4, 4, 4, 4)  # from (row, column) to (row, column)
    torch.testing.assert_close(products[0, 0, 1, 2], products[2, 1, 3, 3])
    torch.testing.assert_close(products[3, 3, 0, 1], products[3, 2, 0, 0])
    assert not torch.isclose(products[0, 0, 1, 2], products[0, 0, 2, 1])


def test_a_coarse_cell_lies_at_the_middle_of_its_fine_cells() -> None:
    angles = rotary_angles([(2, 3), (4, 12)], 8)
    coarse, fine = angles[:6].view(2, 3, 4), angles[6:].view(4, 12, 4)
    torch.testing.assert_close(fine.view(2, 2, 3, 4, 4).mean((1, 3)), coarse)
