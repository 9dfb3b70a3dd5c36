"""Many pictures, drawn by several processes of a Ray cluster: the same pictures as one process draws.

Axes: n pictures of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.prior.conditions import Conditions
from hvqd_model.prior.prior import HierarchicalPrior
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

    vq: HierarchicalVQ
    prior: HierarchicalPrior
    sampling: SamplingSettings

    def __post_init__(self) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.vq.to(device)
        self.prior.to(device)

    def __call__(self, chunk: _Chunk) -> Summary:
        """The chunk's pictures."""
        images = draw_images(self.vq, self.prior, chunk.seeds, chunk.conditions, self.sampling)
        return {"first": chunk.first, "images": images}


_WORTH_BATCHES = 8
"""Batches for each process, below which starting processes takes longer than drawing on a CPU."""


def in_this_process(batches: int, compute: ComputeSettings) -> bool:
    """Whether other processes would hardly draw faster: there is little to draw, and no GPU to draw on."""
    return compute.gpus_per_worker == 0 and (
        compute.most_workers == 1 or batches < _WORTH_BATCHES * compute.most_workers
    )


def batches_apart(
    vq: HierarchicalVQ,
    prior: HierarchicalPrior,
    seeds: Sequence[int],
    conditions: Conditions,
    sampling: SamplingSettings,
    compute: ComputeSettings,
) -> Iterator[tuple[int, Pictures]]:
    """The first picture's index and the pictures of every batch, in the order in which they are done.

    Args:
        compute: the cluster; as many processes draw as it offers the job CPUs, or GPUs where the job uses them.
    """
    vq.cpu(), prior.cpu()
    chunks = [_chunk(seeds, conditions, first, sampling.batch) for first in range(0, len(seeds), sampling.batch)]
    found: Any
    for found in map_units(lambda: _Drawer(vq, prior, sampling), chunks, compute, on_gpus=True):
        yield found["first"], found["images"]


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
    cluster = compute.model_copy(update={"workers": workers, "threads_per_worker": 1})
    parts: dict[int, Pictures] = {}
    for first, images in batches_apart(bundle.vq, bundle.prior, seeds, conditions, sampling, cluster):
        parts[first] = images
        progress(sum(map(len, parts.values())), len(seeds))
    return np.concatenate([parts[first] for first in sorted(parts)])


def _chunk(seeds: Sequence[int], conditions: Conditions, first: int, batch: int) -> _Chunk:
    def part(values: Tensor) -> Tensor:
        return values[first : first + batch].clone()  # a view would carry all of its storage along

    return _Chunk(first, tuple(seeds[first : first + batch]), conditions.each(part))
