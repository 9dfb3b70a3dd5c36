"""Keyed random numbers against a pure-Python SplitMix64, their laws, and their independence of place."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from hvqd_model.randomness import derive_key, gumbel, normal, split_keys, uniform

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
COUNT = 100_000
KOLMOGOROV = 1.95 / math.sqrt(COUNT)  # exceeded with probability 0.001


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def reference_uniform(key: int, stream: int, counter: int) -> float:
    split = mix(mix((key + GOLDEN) & MASK) ^ ((stream * GOLDEN) & MASK))
    bits = mix((split + (counter + 1) * GOLDEN) & MASK)
    return ((bits >> 12) + 0.5) / 2**52


def largest_gap(cumulative: Tensor) -> float:
    """Kolmogorov's distance of probability-transformed numbers to the uniform law."""
    ordered = cumulative.flatten().sort().values
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float((ordered - steps).abs().max())


def test_the_reference_gives_the_published_outputs_of_splitmix64() -> None:
    outputs = [mix(index * GOLDEN & MASK) for index in (1, 2, 3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_uniform_equals_splitmix64_in_python() -> None:
    keys = [0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789]
    drawn = uniform(torch.tensor(keys), (3, 2), "noise")
    stream = derive_key("noise")
    expected = [[reference_uniform(key, stream, counter) for counter in range(6)] for key in keys]
    assert drawn.shape == (6, 3, 2)
    assert drawn.reshape(6, 6).tolist() == expected


def test_derived_keys_are_the_same_on_every_machine_and_differ_by_type() -> None:
    text = "int:7\x1fstr:prior"
    expected = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
    assert derive_key(7, "prior") == expected
    assert len({derive_key(7), derive_key("7"), derive_key(7, 7), derive_key(77), derive_key("7", "")}) == 5


@pytest.mark.parametrize("shape", [(1, COUNT), (COUNT, 1), (400, COUNT // 400)])
def test_uniform_numbers_are_uniform_over_keys_and_over_counters(shape: tuple[int, int]) -> None:
    drawn = uniform(torch.arange(shape[0]), shape[1:], "a")
    assert float(drawn.min()) > 0 and float(drawn.max()) < 1
    assert largest_gap(drawn) < KOLMOGOROV
    assert drawn.unique().numel() == COUNT


def test_normal_and_gumbel_numbers_have_their_laws() -> None:
    keys = torch.arange(COUNT // 100)
    assert largest_gap(torch.special.ndtr(normal(keys, (100,), "n"))) < KOLMOGOROV
    assert largest_gap(torch.exp(-torch.exp(-gumbel(keys, (100,), "g")))) < KOLMOGOROV


def test_streams_keys_and_neighbours_are_uncorrelated() -> None:
    keys = torch.arange(1000)
    base = uniform(keys, (100,), "a")
    others = {
        "another stream": uniform(keys, (100,), "b"),
        "a numbered stream": uniform(keys, (100,), 1),
        "the next key": uniform(keys + 1, (100,), "a"),
        "the next number": base.roll(1, 1),
        "a split key": uniform(split_keys(keys, "a"), (100,), "a"),
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 3.3 / math.sqrt(COUNT), name
        assert not (base == other).any(), name
    assert len(others) == 5


def test_an_items_numbers_do_not_depend_on_its_neighbours() -> None:
    keys = torch.tensor([5, -3, 99, 2**40])
    together = uniform(keys, (4, 4), "x")
    for place, key in enumerate(keys):
        torch.testing.assert_close(uniform(key[None], (4, 4), "x")[0], together[place], rtol=0, atol=0)
    torch.testing.assert_close(uniform(keys.flip(0), (4, 4), "x"), together.flip(0), rtol=0, atol=0)


def test_the_first_numbers_do_not_depend_on_how_many_are_drawn() -> None:
    keys = torch.arange(3)
    assert torch.equal(uniform(keys, (10,), "x"), uniform(keys, (100,), "x")[:, :10])


def test_a_tensor_of_streams_gives_each_item_the_keys_of_its_own_stream() -> None:
    keys = torch.tensor([10, 20, 30])
    streams = torch.tensor([derive_key("a"), derive_key("b"), derive_key("a")])
    split = split_keys(keys, streams)
    assert split[:1].tolist() == split_keys(keys[:1], "a").tolist()
    assert split[1:2].tolist() == split_keys(keys[1:2], "b").tolist()


def test_split_keys_do_not_collide() -> None:
    keys = torch.arange(10_000)
    assert torch.cat([split_keys(keys, stream) for stream in range(10)]).unique().numel() == 100_000
