"""Whether pictures show what was asked for: judges that learn from real training pictures, against shuffled requests.

style    a linear judge of styles, as of classes (`workflows.evaluation.judge`)
caption  a linear map from picture features to caption vectors; where the asked caption ranks among all candidates
map      the label whose mean colour is nearest, pixel by pixel; how many pixels have the asked one

A judge's figure means little alone: beside it stand the same figure for real pictures and reconstructions, and for the
same pictures with requests that belong to others.

Axes: n pictures of H x W pixels and D features, U captions of E dimensions, M labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvqd_model.randomness import derive_key
from workflows.drawing.generate import Pictures
from workflows.evaluation.figures import Figure, Resampling

Scores = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""(n,) scores of the pictures, higher is better, when picture i was asked for what row order[i] asks for."""


class CaptionJudge:
    """Says which captions fit a picture."""

    def __init__(self, features: NDArray[np.float32], vectors: NDArray[np.float32], ridge: float = 100.0) -> None:
        """Fit by ridge regression on standardized features; the same input gives the same judge.

        Args:
            features: (n, D) of real training pictures.
            vectors: (n, E) of their captions.
            ridge: weight of the squared weights beside the sum of squared errors.
        """
        x = features.astype(np.float64)
        self._mean, self._scale = x.mean(0), np.maximum(x.std(0), 1e-6)
        self._centre = vectors.astype(np.float64).mean(0)
        x = (x - self._mean) / self._scale
        gram = x.T @ x + ridge * np.eye(x.shape[1])
        self._weights = np.linalg.solve(gram, x.T @ (vectors - self._centre))

    def rank_shares(
        self, features: NDArray[np.float32], candidates: NDArray[np.float32], own: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """(n,) share of the other candidates that fit worse than the asked one: 1 is best, chance is a half.

        Args:
            features: (n, D).
            candidates: (U, E) vectors of distinct captions, at least two.
            own: (n,) which of them was asked for.
        """
        found = (features - self._mean) / self._scale @ self._weights
        # Centred cosines: what all captions have in common tells none of them apart.
        centred = candidates - self._centre
        centred = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
        fits = found @ centred.T
        asked = np.take_along_axis(fits, own[:, None], 1)
        ties = (fits == asked).sum(1) - 1
        worse = (fits < asked).sum(1) + ties / 2
        return np.asarray(worse / (len(candidates) - 1))


class MapJudge:
    """Says which label a pixel has, by its colour."""

    def __init__(self, pictures: Pictures, maps: NDArray[np.int16], labels: int) -> None:
        """Learn each label's mean colour.

        Args:
            pictures: (n, H, W, 3) real training pictures.
            maps: (n, H, W) their labels, -1 for none.
            labels: M.
        """
        known = maps >= 0
        flat, colours = maps[known].astype(np.int64), pictures[known].astype(np.float64)
        counts = np.bincount(flat, minlength=labels)
        sums = np.stack([np.bincount(flat, colours[:, channel], labels) for channel in range(3)], 1)
        self._means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], np.inf)

    def judge(self, pictures: Pictures) -> NDArray[np.int64]:
        """(n, H, W) the label of each pixel."""
        distances = np.stack([((pictures - mean) ** 2).sum(3) for mean in self._means], 3)
        return np.asarray(distances.argmin(3))

    def agreement(self, pictures: Pictures, maps: NDArray[np.int16]) -> NDArray[np.float64]:
        """(n,) share of each map's labelled pixels that the picture shows so; nan for a map without labels."""
        known = maps >= 0
        right = ((self.judge(pictures) == maps) & known).sum((1, 2))
        return np.asarray(right / np.where(known.any((1, 2)), known.sum((1, 2)), np.nan))


def against_shuffled(name: str, scores: Scores, groups: NDArray[Any], resampling: Resampling) -> dict[str, Figure]:
    """The mean score of the right requests, of those of other concepts, and the difference picture by picture.

    Args:
        name: of the figures; `_shuffled` and `_gain` are added.
        groups: (n,) concepts; no picture is given its own concept's request, as far as there are others.
    """
    right = scores(np.arange(len(groups)))
    wrong = scores(_of_others(groups, resampling.seed))
    return {
        name: resampling.mean(right, groups),
        f"{name}_shuffled": resampling.mean(wrong, groups),
        f"{name}_gain": resampling.mean(right - wrong, groups),
    }


def _of_others(groups: NDArray[Any], seed: int) -> NDArray[np.int64]:
    """(n,) rows of other concepts, each row once: concepts in a keyed order, handed on by the largest one's size."""
    names, numbers, counts = np.unique(groups, return_inverse=True, return_counts=True)
    rank = np.array([derive_key("shuffled", seed, str(group)) for group in names])
    order = np.argsort(rank[numbers], kind="stable")
    found = np.empty(len(groups), dtype=np.int64)
    found[order] = np.roll(order, -int(counts.max()))
    return found
