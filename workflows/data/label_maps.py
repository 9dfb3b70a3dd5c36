"""Label maps: pictures of one byte a pixel, as a prior is told them.

Axes: H x W pixels.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NO_LABEL = 255
"""The value of pixels that have no label."""


def fitted_map(content: bytes | None, size: tuple[int, int]) -> NDArray[np.int16]:
    """(H, W) labels of an encoded map of at most that size, -1 where it has none."""
    found = np.full(size, -1, dtype=np.int16)
    if content is not None:
        labels = np.asarray(Image.open(io.BytesIO(content))).astype(np.int16)
        found[: labels.shape[0], : labels.shape[1]] = np.where(labels == NO_LABEL, -1, labels)
    return found
