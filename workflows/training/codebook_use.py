"""How much of each codebook training uses, over windows of steps that a resumed run finds again.

A window begins where an interval of logging or of checkpoints begins, so what a window has counted is no part of the
state where checkpoints are due: after one it would be empty anyway. It is when a training is asked to stop in between.

Axes: K codes of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvqd_model.codec.quantizer import CodebookStatistics
from workflows.config import TrainSettings


def window_start(images: int, settings: TrainSettings) -> int:
    """Images seen when the window began that the step ending at `images` belongs to."""
    before, batch = images - settings.global_batch, settings.global_batch
    intervals = (settings.log_every_images, settings.checkpoint_every_images)
    return max(-(-(before // interval * interval) // batch) * batch for interval in intervals)


class CodebookUse:
    """Counts of the present window."""

    def __init__(self) -> None:
        self._start = -1
        self._counts: list[Tensor] = []

    def state(self) -> dict[str, Any]:
        """JSON values of the present window."""
        return {"start": self._start, "counts": [counts.double().tolist() for counts in self._counts]}

    def load(self, state: dict[str, Any]) -> None:
        """Go on with what `state` told; with nothing, a window begins."""
        self._start = state.get("start", -1)
        self._counts = [torch.tensor(counts, dtype=torch.float32) for counts in state.get("counts", [])]

    def add(
        self, statistics: Sequence[CodebookStatistics], images_seen: int, settings: TrainSettings
    ) -> dict[str, Tensor]:
        """Count a step's codes; at the end of a logging interval say what the window's use was.

        Args:
            statistics: of every level, merged over micro-batches and ranks.
            images_seen: before the step.

        Returns:
            Scalars by level, empty in most steps and for a level without codes: usage_0 (share of the K codes that
            occurred), dead_codes_0 (those that did not), window_perplexity_0 (of all codes of the window).
        """
        after = images_seen + settings.global_batch
        start = window_start(after, settings)
        counts = [found.counts for found in statistics]
        fresh = start != self._start or len(counts) != len(self._counts)
        self._counts = counts if fresh else [a.to(b) + b for a, b in zip(self._counts, counts, strict=True)]
        self._start = start
        interval = settings.log_every_images
        if images_seen // interval == after // interval and after < settings.images:
            return {}
        return {
            name: value
            for level, total in enumerate(self._counts)
            if float(total.sum()) > 0
            for name, value in _figures(level, total).items()
        }


def _figures(level: int, counts: Tensor) -> dict[str, Tensor]:
    used, share = (counts > 0).sum(), counts / counts.sum()
    return {
        f"usage_{level}": used / len(counts),
        f"dead_codes_{level}": len(counts) - used,
        f"window_perplexity_{level}": torch.exp(-torch.xlogy(share, share).sum()),
    }
