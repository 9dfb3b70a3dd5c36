"""Finite scalar quantization against its definition: round each squashed dimension to its own few steps."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hvqd_model.codec.codebooks import FSQQuantizer, make_quantizer
from hvqd_model.codec.search import nearest_codes
from hvqd_model.config import VQArchitecture, even_steps


def fsq(*steps: int) -> FSQQuantizer:
    quantizer = make_quantizer("fsq", math.prod(steps), len(steps), steps=steps)
    assert isinstance(quantizer, FSQQuantizer)
    quantizer.start(torch.zeros(1, len(steps)), 0)
    return quantizer


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 2


def test_the_codebook_is_every_combination_of_even_steps_first_dimension_fastest() -> None:
    expected = [(a, b, c) for c, b, a in itertools.product([-1.0, 1.0], [-1.0, 0.0, 1.0], [-1.0, -1 / 3, 1 / 3, 1.0])]
    torch.testing.assert_close(fsq(4, 3, 2).codebook, torch.tensor(expected))


@pytest.mark.parametrize("steps", [(2,), (4, 3, 2), (8, 5, 5), (8, 8, 4, 4)])
def test_rounding_a_dimension_at_a_time_finds_the_nearest_code(steps: tuple[int, ...]) -> None:
    quantizer = fsq(*steps)
    vectors = normal(500, len(steps))
    indices = quantizer.assign(vectors)
    assert torch.equal(indices, nearest_codes(torch.tanh(vectors), quantizer.codebook))
    assert len(indices.unique()) > 1


def test_a_value_halfway_between_two_steps_takes_one_of_them_and_far_ones_the_ends() -> None:
    quantizer = fsq(3, 2)
    far = torch.tensor([[-50.0, -50.0], [50.0, 50.0], [0.0, 0.0]])
    assert quantizer.lookup(quantizer.assign(far))[:2].tolist() == [[-1, -1], [1, 1]]
    assert int(quantizer.assign(far)[2]) in (1, 4)


def test_the_gradient_is_that_of_the_squashing() -> None:
    quantizer = fsq(4, 3)
    vectors = normal(20, 2).requires_grad_()
    quantizer(vectors, torch.arange(20)).values.sum().backward()
    expected = 1 - torch.tanh(vectors.detach()) ** 2
    assert vectors.grad is not None
    torch.testing.assert_close(vectors.grad, expected)


def test_nothing_is_aligned_restarted_or_learned() -> None:
    quantizer = fsq(4, 3)
    out = quantizer(normal(20, 2).requires_grad_(), torch.arange(20))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    assert float(out.loss) == 0 and float(quantizer.update(out.statistics, 0)) == 0
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert not list(quantizer.parameters())
    assert int(out.statistics.counts.sum()) == 20


def test_the_grid_is_rebuilt_from_the_steps_and_not_stored() -> None:
    quantizer = fsq(4, 3)
    assert set(quantizer.state_dict()) == {"started"}
    assert quantizer.bfloat16().codebook.dtype == torch.float32


def test_steps_are_as_few_and_even_as_can_be_and_multiply_to_the_size() -> None:
    for size in range(2, 600):
        steps = even_steps(size, ())
        if steps:
            assert math.prod(steps) == size and max(steps) <= 8 and min(steps) >= 2
            fewer = [
                other
                for count in range(1, len(steps))
                for other in itertools.combinations_with_replacement(range(2, 9), count)
                if math.prod(other) == size
            ]
            assert not fewer
        else:
            assert any(size % prime == 0 for prime in range(9, size + 1) if all(prime % n for n in range(2, prime)))
    assert even_steps(1024) == (8, 8, 4, 4)


def test_sizes_and_steps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no factors up to 8: 22\nhint: a power of two always has some"):
        even_steps(22)
    with pytest.raises(
        ValueError, match=r"the 2 fsq_steps must multiply to the codebook size \(13\): \[4, 3\]\nhint: fsq_steps=\[8,8"
    ):
        make_quantizer("fsq", 13, 2, steps=(4, 3))
    assert VQArchitecture(quantizer="fsq").steps == ((8, 8, 4, 4), (8, 8, 4, 4))
