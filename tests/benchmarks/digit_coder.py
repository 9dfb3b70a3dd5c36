"""Codes of quantizer fsq as bytes: digit by digit, each with the table that what is known of its surroundings chooses.

Such a code is a number whose digits are the steps of its dimensions. Digits are mostly near the middle, and the more so
the calmer their surroundings are: what a digit is expected to be depends on the same digit of the cells to the left and
above, on how much all digits of those cells, of the cell on the coarser level and the earlier ones of the same cell
differ from what was expected. Dimensions of many steps (the brightness of a patch) are coded as the difference from
those two cells' mean. Tables are counted on training pictures and belong to the codec.

Axes: N pictures, h x w cells, D digits of a cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from coding import Reader, Table, encode

Array = np.ndarray[Any, Any]

PREDICTED = 17
"""Steps from which on a digit is coded as a difference."""
NEAR = 4
"""Kinds of the same digit beside and above: the sum of their sizes, the last for all larger ones."""
CALM = (1, 3, 6, 10, 16, 26, 40)
"""Where the kinds of surroundings end, from calm to lively."""
CONTEXTS = NEAR * (len(CALM) + 1)
_OF_ALL = 2.0
"""What all contexts together count for in the table of each."""


class Place(NamedTuple):
    """A digit of a cell."""

    level: int
    row: int
    column: int
    digit: int


Visit = Callable[[Place, Array, Array], Array]
"""(N,) digits at a place, from their (N,) contexts and (N,) predictions."""


@dataclass(frozen=True)
class DigitCoder:
    """The tables for the codes of one tokenizer."""

    steps: tuple[tuple[int, ...], ...]
    """Of each level's dimensions."""
    grids: tuple[tuple[int, int], ...]
    """Of each level: rows and columns of cells."""
    tables: dict[tuple[int, int, int], Table]
    """By level, digit and context."""

    @classmethod
    def counted(cls, codes: Sequence[Array], steps: tuple[tuple[int, ...], ...]) -> DigitCoder:
        """The coder of codes like those of training pictures, (N, h, w) of each level."""
        grids = tuple((level.shape[1], level.shape[2]) for level in codes)
        seen = {
            (level, digit): np.zeros((CONTEXTS, symbols(count)))
            for level, counts in enumerate(steps)
            for digit, count in enumerate(counts)
        }

        def count(place: Place, contexts: Array, found: Array) -> None:
            np.add.at(seen[place.level, place.digit], (contexts, found), 1)

        cls(steps, grids, {})._visit_known(codes, count)
        tables = {}
        for (level, digit), counts in seen.items():
            together = counts.sum(0) + 0.1
            for context, own in enumerate(counts):
                weights = own + _OF_ALL * together / together.sum()
                tables[level, digit, context] = Table.weighted(weights)
        return cls(steps, grids, tables)

    def encode(self, codes: Sequence[Array]) -> list[bytes]:
        """The bytes of each picture's codes."""
        pictures: list[list[tuple[int, Table]]] = [[] for _ in codes[0]]

        def collect(place: Place, contexts: Array, found: Array) -> None:
            for picture, context, symbol in zip(pictures, contexts.tolist(), found.tolist(), strict=True):
                picture.append((symbol, self.tables[place.level, place.digit, context]))

        self._visit_known(codes, collect)
        return [encode(picture) for picture in pictures]

    def decode(self, contents: Sequence[bytes]) -> list[Array]:
        """The codes of each level, from each picture's bytes."""
        readers = [Reader(content) for content in contents]

        def read(place: Place, contexts: Array, predicted: Array) -> Array:
            both = zip(readers, contexts.tolist(), strict=True)
            found = [reader.take(self.tables[place.level, place.digit, context]) for reader, context in both]
            return np.array(found) - self._middle(place) + predicted

        digits = self._walk(len(contents), read)
        return [joined(level, steps) for level, steps in zip(digits, self.steps, strict=True)]

    def _middle(self, place: Place) -> int:
        """The symbol of a digit that is as predicted."""
        return symbols(self.steps[place.level][place.digit]) // 2

    def _visit_known(self, codes: Sequence[Array], visit: Callable[[Place, Array, Array], None]) -> None:
        """Show every symbol of codes that are known, with its contexts."""
        known = [split(level, steps) for level, steps in zip(codes, self.steps, strict=True)]

        def tell(place: Place, contexts: Array, predicted: Array) -> Array:
            found: Array = known[place.level][:, place.row, place.column, place.digit]
            visit(place, contexts, found - predicted + self._middle(place))
            return found

        self._walk(len(codes[0]), tell)

    def _walk(self, count: int, visit: Visit) -> list[Array]:
        """The (N, h, w, D) digits of each level, (N,) of which `visit` gives in turn."""
        levels: list[Array] = []
        coarser: Array | None = None
        for level, ((rows, columns), steps) in enumerate(zip(self.grids, self.steps, strict=True)):
            digits = np.zeros((count, rows, columns, len(steps)), dtype=np.int64)
            surprise = np.zeros((count, rows + 1, columns + 1), dtype=np.int64)
            coarse_rows, coarse_columns = (1, 1) if coarser is None else coarser.shape[1:]
            for row in range(rows):
                for column in range(columns):
                    around = surprise[:, row + 1, column] + surprise[:, row, column + 1]
                    if coarser is not None:
                        around = around + coarser[:, row * coarse_rows // rows, column * coarse_columns // columns]
                    here = np.zeros(count, dtype=np.int64)
                    for digit, size in enumerate(steps):
                        place = Place(level, row, column, digit)
                        predicted = prediction(digits, place, size)
                        near = np.zeros(count, dtype=np.int64)
                        if size < PREDICTED:
                            near += np.abs(digits[:, row, column - 1, digit]) if column else 0
                            near += np.abs(digits[:, row - 1, column, digit]) if row else 0
                        kinds = np.digitize(around + 2 * here, CALM)
                        contexts = np.minimum(near, NEAR - 1) * (len(CALM) + 1) + kinds
                        digits[:, row, column, digit] = found = visit(place, contexts, predicted)
                        here = here + np.abs(found - predicted)
                    surprise[:, row + 1, column + 1] = here
            levels.append(digits)
            coarser = surprise[:, 1:, 1:]
        return levels


def symbols(steps: int) -> int:
    """How many symbols a digit of so many steps is coded with."""
    return 2 * steps - 1 if steps >= PREDICTED else steps


def prediction(digits: Array, place: Place, steps: int) -> Array:
    """(N,) what a digit is coded as the difference from, given a level's (N, h, w, D) digits of the cells before."""
    _, row, column, digit = place
    if steps < PREDICTED or not (row or column):
        return np.zeros(len(digits), dtype=np.int64)
    beside = digits[:, row, column - 1, digit] if column else digits[:, row - 1, column, digit]
    above = digits[:, row - 1, column, digit] if row else beside
    mean: Array = (beside + above) // 2
    return mean


def split(codes: Array, steps: Sequence[int]) -> Array:
    """(N, h, w, D) digits of (N, h, w) codes, counted from the middle step."""
    rest, digits = codes.astype(np.int64), []
    for size in steps:
        digits.append(rest % size - size // 2)
        rest = rest // size
    return np.stack(digits, -1)


def joined(digits: Array, steps: Sequence[int]) -> Array:
    """(N, h, w) codes of the digits that `split` makes."""
    codes: Array = np.zeros(digits.shape[:-1], dtype=np.int64)
    for place in range(len(steps) - 1, -1, -1):
        codes = codes * steps[place] + digits[..., place] + steps[place] // 2
    return codes
