"""A linear judge of classes: multinomial logistic regression on standardized features of real training pictures.

Axes: n pictures, D features, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_MOST_STEPS = 100


class ClassJudge:
    """Says which class a picture shows."""

    def __init__(self, features: NDArray[np.float32], labels: NDArray[np.int64], classes: int, ridge: float) -> None:
        """Fit; the same input gives the same judge.

        Args:
            features: (n, D) of real training pictures.
            labels: (n,) classes, -1 for none; pictures without a class teach nothing.
            classes: C.
            ridge: weight of the squared weights beside the mean cross-entropy.
        """
        self.classes = classes
        known = labels >= 0
        x = torch.from_numpy(np.ascontiguousarray(features[known])).double()
        y = torch.from_numpy(np.ascontiguousarray(labels[known])).long()
        self._mean = x.mean(0)
        self._scale = x.std(0, correction=0).clamp_min(1e-6)
        x = (x - self._mean) / self._scale
        self._weights = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
        self._bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [self._weights, self._bias], max_iter=_MOST_STEPS, history_size=20, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(x @ self._weights + self._bias, y) + ridge * self._weights.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def judge(self, features: NDArray[np.float32]) -> NDArray[np.int64]:
        """(n,) the most likely class of (n, D) features."""
        x = (torch.from_numpy(np.ascontiguousarray(features)).double() - self._mean) / self._scale
        found: NDArray[np.int64] = (x @ self._weights + self._bias).argmax(1).numpy()
        return found
