"""What the rows of a split are beside their class: columns that hand out conditions.

Axes: N rows, U distinct captions of E dimensions, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvqd_model.prior.conditions import Conditions

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ConditionColumns:
    """What the rows of a split are beside their class; None for what the prior is not told."""

    styles: Array | None = None
    """(N,) int64, -1 for none."""
    captions: Array | None = None
    """(N,) int64 rows of `embeddings`."""
    embeddings: Array | None = None
    """(U, E) float32 of the distinct captions."""
    maps: Array | None = None
    """(N, H, W) int16 labels of the pixels, -1 for none."""

    def batch(self, labels: Tensor, indices: Array) -> Conditions:
        """The conditions of some rows, beside their (n,) classes."""

        def taken(column: Array | None, dtype: Any) -> Tensor | None:
            return None if column is None else torch.from_numpy(np.asarray(column[indices]).astype(dtype))

        texts = None
        if self.captions is not None and self.embeddings is not None:
            texts = torch.from_numpy(np.asarray(self.embeddings[self.captions[indices]], dtype=np.float32))
        return Conditions(labels, taken(self.styles, np.int64), texts, taken(self.maps, np.int16))
