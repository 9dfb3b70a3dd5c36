"""The picture grids of an evaluation.

Axes: n pictures of H x W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workflows.drawing.generate import Pictures, image_grid
from workflows.evaluation.figures import PictureSet

COLUMNS = 12
_CELL = 64


@dataclass(frozen=True)
class Grid:
    """A PNG and what its rows show."""

    png: bytes
    rows: tuple[str, ...]
    """A name for each row, or none when the rows mean nothing."""

    @property
    def layout(self) -> dict[str, Any]:
        """Its entry in metrics.json."""
        return {"rows": list(self.rows), "columns": COLUMNS}


def _grid(pictures: Pictures, rows: Sequence[str] = ()) -> Grid:
    content = io.BytesIO()
    image_grid(pictures, COLUMNS, max(1, _CELL // pictures.shape[1])).save(content, "PNG")
    return Grid(content.getvalue(), tuple(rows))


def _row(pictures: Pictures) -> Pictures:
    """One row, filled up with white."""
    row = np.full((COLUMNS, *pictures.shape[1:]), 255, dtype=np.uint8)
    row[: len(pictures[:COLUMNS])] = pictures[:COLUMNS]
    return row


def draw_grids(
    originals: Pictures,
    prefixes: Sequence[Pictures],
    sets: Mapping[str, PictureSet],
    classes: Sequence[str],
    train: Pictures,
    train_rows: NDArray[np.int64],
    neighbours: tuple[NDArray[np.float64], NDArray[np.int64]],
) -> dict[str, Grid]:
    """The grids by file name.

    Args:
        originals: (N, H, W, 3) test pictures.
        prefixes: their reconstructions from the first 1, 2, … levels.
        sets: samples, marginals and untrained.
        classes: names of the classes; empty for an unconditional prior.
        train: training pictures.
        train_rows: which of them the neighbours index.
        neighbours: distance and index of each sample's nearest training picture.
    """
    some = np.unique(np.linspace(0, len(originals) - 1, COLUMNS).round().astype(np.int64))
    names = ["original"] + [f"levels 1 to {level}" if level > 1 else "level 1" for level in range(1, len(prefixes) + 1)]
    grids = {
        "reconstructions.png": _grid(
            np.concatenate([_row(pictures[some]) for pictures in (originals, *prefixes)]), names
        )
    }
    samples = sets["samples"]
    present = [index for index in range(len(classes)) if (samples.labels == index).any()]
    if present:
        grids["samples_by_class.png"] = _grid(
            np.concatenate([_row(samples.pictures[samples.labels == index]) for index in present]),
            [classes[index] for index in present],
        )
    grids["samples.png"] = _grid(samples.pictures[: 5 * COLUMNS])
    for name in ("marginals", "untrained"):
        grids[f"{name}.png"] = _grid(sets[name].pictures[: 2 * COLUMNS])
    distances, places = neighbours
    closest = np.argsort(distances, kind="stable")[:COLUMNS]
    typical = np.arange(min(COLUMNS, len(distances)))
    rows = [
        pictures
        for chosen in (closest, typical)
        for pictures in (_row(samples.pictures[chosen]), _row(train[train_rows[places[chosen]]]))
    ]
    captions = [
        "closest samples",
        "their nearest training pictures",
        "first samples",
        "their nearest training pictures",
    ]
    grids["nearest.png"] = _grid(np.concatenate(rows), captions)
    return grids
