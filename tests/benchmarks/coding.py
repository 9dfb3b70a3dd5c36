"""A real entropy coder, which says what codes cost; `VQConfig.bits` is what they cost at most.

The coder is an arithmetic one (Rissanen and Langdon, IBM J. Res. Dev. 23, 1979) whose interval is two whole numbers of
any size, so nothing is rounded; a picture becomes the fewest bytes that lie in its interval. Its tables are part of the
codec, as the weights are: they are counted on training pictures.

Axes: N symbols, K codes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

PRECISION = 20
"""Frequencies of a table sum to 2^PRECISION."""


def size_for_bits(tokens: int, bits: float) -> int:
    """The largest codebook with which `tokens` codes cost at most `bits`; at least 2."""
    size = max(2, int(2 ** (bits / tokens)) + 1)
    while size > 2 and tokens * math.log2(size) > bits + 1e-9:
        size -= 1
    return size


@dataclass(frozen=True)
class Table:
    """How often each of K codes is expected."""

    frequencies: tuple[int, ...]
    """At least 1 each; they sum to 2^PRECISION."""
    starts: tuple[int, ...]
    """The sum of the frequencies before."""

    @classmethod
    def counted(cls, codes: Array, size: int) -> Table:
        """The table of codes seen in training; each of `size` codes counts half a time more than it was seen."""
        return cls.weighted(np.bincount(codes.ravel(), minlength=size) + 0.5)

    @classmethod
    def weighted(cls, seen: Array) -> Table:
        """The table of (K,) weights, above 0."""
        size = len(seen)
        spare = (1 << PRECISION) - size
        exact = seen / seen.sum() * spare
        frequencies = np.floor(exact).astype(np.int64)
        missing = spare - int(frequencies.sum())
        frequencies[np.argsort(frequencies - exact, kind="stable")[:missing]] += 1
        frequencies += 1
        starts = np.concatenate([[0], np.cumsum(frequencies)[:-1]])
        return cls(tuple(frequencies.tolist()), tuple(starts.tolist()))

    def bits(self, code: int) -> float:
        """What a code costs: the logarithm of its share."""
        return PRECISION - math.log2(self.frequencies[code])


def encode(symbols: Sequence[tuple[int, Table]]) -> bytes:
    """The bytes of (code, table) symbols in order; how many symbols there are is not in them."""
    low, width, precision = 0, 1, 0  # the interval [low, low + width) in units of 2^-precision
    for code, table in symbols:
        low = (low << PRECISION) + width * table.starts[code]
        width *= table.frequencies[code]
        precision += PRECISION
    count = max(0, precision - width.bit_length()) // 8
    while True:
        unit = max(0, precision - 8 * count)  # a string of this many bytes is a multiple of 2^unit
        number = -(-low >> unit)
        if number << unit < low + width:
            return (number << max(0, 8 * count - precision)).to_bytes(count, "big")
        count += 1


class Reader:
    """The codes that `encode` was given, one after the other; each table may depend on the codes before."""

    def __init__(self, content: bytes) -> None:
        self._value, self._length = int.from_bytes(content, "big"), 8 * len(content)
        self._low, self._width, self._precision = 0, 1, 0

    def take(self, table: Table) -> int:
        """The next code."""
        self._precision += PRECISION
        place = (((self._value << self._precision) >> self._length) - (self._low << PRECISION)) // self._width
        code = bisect_right(table.starts, place) - 1
        self._low = (self._low << PRECISION) + self._width * table.starts[code]
        self._width *= table.frequencies[code]
        return code


def decode(content: bytes, tables: Sequence[Table]) -> list[int]:
    """The codes that `encode` was given, from its bytes and the tables of its symbols."""
    reader = Reader(content)
    return [reader.take(table) for table in tables]
