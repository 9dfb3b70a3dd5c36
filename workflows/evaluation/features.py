"""Features of pictures from the offline EfficientNet-Lite0 with its ImageNet weights.

Its numbers are comparable with each other, never with figures made with Inception.

Axes: n pictures of H x W pixels, 1,280 features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from workflows.evaluation.feature_network import load_network, weights_digest

EXTRACTOR = "EfficientNet-Lite0"
_BATCH = 64


class FeatureExtractor:
    """The feature network, at one size of pictures."""

    def __init__(self, size: int) -> None:
        """Load the network.

        Args:
            size: side in pixels that pictures are resized to.
        """
        self.size = size
        self.weights_digest = weights_digest(None)
        self._network: Any = load_network(size)

    @property
    def protocol(self) -> dict[str, Any]:
        """What must travel with every figure that these features made."""
        return {
            "name": EXTRACTOR,
            "weights_sha256": self.weights_digest,
            "features": "1280, mean of the last feature map",
            "size": self.size,
            "resize": "bicubic with antialiasing, the whole picture, no crop",
            "normalisation": "(pixel - 127) / 128",
        }

    @torch.inference_mode()
    def __call__(
        self, images: NDArray[np.uint8], progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]:
        """(n, 1280) features of (n, H, W, 3) pictures; a picture's features do not depend on the others.

        Args:
            progress: called with (pictures done, n).
        """
        found = np.empty((len(images), 1280), dtype=np.float32)
        for start in range(0, len(images), _BATCH):
            part = np.array(images[start : start + _BATCH])  # a copy: a mapped file may not be written to
            missing = _BATCH - len(part)
            if missing:  # a fixed batch: other shapes may round differently
                part = np.concatenate([part, np.repeat(part[:1], missing, axis=0)])
            features = self._features(torch.from_numpy(part))
            found[start : start + _BATCH] = features[: _BATCH - missing].numpy()
            if progress is not None:
                progress(min(start + _BATCH, len(images)), len(images))
        return found

    def _features(self, pictures: Tensor) -> Tensor:
        x = pictures.permute(0, 3, 1, 2).float()
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
            x = x.clamp(0, 255)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        features: Tensor = self._network.extract_features(x)
        return features.mean((2, 3))
