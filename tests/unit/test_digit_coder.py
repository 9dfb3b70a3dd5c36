"""Codes of quantizer fsq as bytes: there and back, and fewer of them where pictures are calm."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # where the scripts find each other

from tests.benchmarks.digit_coder import DigitCoder, joined, split

STEPS = ((21, 5), (3, 4, 2))
GRIDS = ((3, 2), (6, 4))


def codes(count: int, seed: int, spread: float = 0.7) -> list[np.ndarray]:  # type: ignore[type-arg]
    """Digits that are mostly in the middle, and alike in all of a picture."""
    generator = np.random.default_rng(seed)
    found = []
    for steps, (rows, columns) in zip(STEPS, GRIDS, strict=True):
        sizes = np.array(steps)
        lively = generator.choice([0.2, 3.0], (count, 1, 1, 1)) * spread
        drawn = np.rint(generator.laplace(0, 1, (count, rows, columns, len(steps))) * lively).astype(np.int64)
        found.append(joined(np.clip(drawn, -(sizes // 2), (sizes - 1) // 2), steps))
    return found


@pytest.mark.parametrize("steps", [(21, 5), (3, 4, 2), (2,), (81, 25, 25, 5)])
def test_digits_are_those_of_the_quantizers_grid(steps: tuple[int, ...]) -> None:
    every = np.arange(math.prod(steps)).reshape(1, 1, -1)[:, :, :5000]
    digits = split(every, steps)
    assert np.array_equal(joined(digits, steps), every)
    places = digits + np.array(steps) // 2
    assert places.min() == 0 and all(places[..., d].max() < size for d, size in enumerate(steps))
    assert np.array_equal(places[0, 0, 1], [1, *[0] * (len(steps) - 1)]), "the first dimension is the fastest"


def test_what_is_written_is_read_again_whatever_was_counted() -> None:
    coder = DigitCoder.counted(codes(40, 0), STEPS)
    for wanted in (codes(30, 1), codes(5, 2, spread=9.0)):
        contents = coder.encode(wanted)
        assert len(contents) == len(wanted[0])
        for found, level in zip(coder.decode(contents), wanted, strict=True):
            assert np.array_equal(found, level)
    alone = coder.encode([level[7:8] for level in codes(30, 1)])
    assert alone == [coder.encode(codes(30, 1))[7]], "a picture's bytes depend on no other picture"


def test_surroundings_save_bytes() -> None:
    """Against what the digits would cost at least if each had one table for all places."""
    train, held_out = codes(400, 0), codes(100, 1)
    found = sum(map(len, DigitCoder.counted(train, STEPS).encode(held_out))) * 8
    without = 0.0
    for known, level, steps in zip(train, held_out, STEPS, strict=True):
        for seen, digits in zip(
            np.moveaxis(split(known, steps), -1, 0), np.moveaxis(split(level, steps), -1, 0), strict=True
        ):
            counts = np.bincount(seen.ravel() + 32, minlength=64) + 0.1
            without -= float(np.log2(counts / counts.sum())[digits.ravel() + 32].sum())
    assert found < 0.9 * without
