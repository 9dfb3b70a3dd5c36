"""Many pictures, drawn by several processes of a Ray cluster: the same pictures as one process draws.

Axes: n pictures of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvqd_model.prior.conditions import Conditions
from workflows.config import ComputeSettings, SamplingSettings
from workflows.data.distributed import Summary, map_units
from workflows.drawing.bundle import LoadedBundle
from workflows.drawing.generate import Pictures, draw_images


@dataclass(frozen=True)
class _Chunk:
    """One batch of pictures."""

    first: int
    seeds: tuple[int, ...]
    conditions: Conditions


@dataclass
class _Drawer:
    """Draws chunks with models that travelled here once."""

    bundle: LoadedBundle
    sampling: SamplingSettings

    def __post_init__(self) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.bundle.vq.to(device)
        self.bundle.prior.to(device)

    def __call__(self, chunk: _Chunk) -> Summary:
        """The chunk's pictures."""
        images = draw_images(self.bundle.vq, self.bundle.prior, chunk.seeds, chunk.conditions, self.sampling)
        return {"first": chunk.first, "images": images}


def draw_apart(
    bundle: LoadedBundle,
    seeds: Sequence[int],
    conditions: Conditions,
    sampling: SamplingSettings,
    workers: int,
    compute: ComputeSettings,
    progress: Callable[[int, int], None],
) -> Pictures:
    """(n, H, W, 3) pictures; see `draw_images`.

    Args:
        workers: processes at most, as far as the cluster has room.
        compute: the cluster.
        progress: called with (pictures done, n).
    """
    bundle = replace(bundle, text=None)  # captions are vectors by now
    bundle.vq.cpu(), bundle.prior.cpu()
    cluster = compute.model_copy(update={"workers": workers, "threads_per_worker": 1})
    chunks = [_chunk(seeds, conditions, first, sampling.batch) for first in range(0, len(seeds), sampling.batch)]
    parts: dict[int, Pictures] = {}
    done = 0
    found: Any
    for found in map_units(lambda: _Drawer(bundle, sampling), chunks, cluster, on_gpus=True):
        parts[found["first"]] = found["images"]
        done += len(found["images"])
        progress(done, len(seeds))
    return np.concatenate([parts[first] for first in sorted(parts)])


def _chunk(seeds: Sequence[int], conditions: Conditions, first: int, batch: int) -> _Chunk:
    def part(values: Tensor) -> Tensor:
        return values[first : first + batch].clone()  # a view would carry all of its storage along

    return _Chunk(first, tuple(seeds[first : first + batch]), conditions.each(part))
