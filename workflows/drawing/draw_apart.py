"""Many pictures, drawn by several processes of a Ray cluster: the same pictures as one process draws.

Axes: n pictures of H x W pixels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvqd_model import HierarchicalPrior, HierarchicalVQ, load_model, save_model
from hvqd_model.prior.conditions import Conditions
from infra.storage import Store, open_store
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
    """Draws chunks with the models of a folder."""

    models: Store
    sampling: SamplingSettings

    def __post_init__(self) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with tempfile.TemporaryDirectory(prefix="hvqd-drawing-") as scratch:
            folder = self.models.download_folder(Path(scratch))
            vq, prior = load_model(folder / "vq"), load_model(folder / "prior")
        assert isinstance(vq, HierarchicalVQ) and isinstance(prior, HierarchicalPrior)
        self.vq, self.prior = vq.to(device), prior.to(device)

    def __call__(self, chunk: _Chunk) -> Summary:
        """The chunk's pictures."""
        images = draw_images(self.vq, self.prior, chunk.seeds, chunk.conditions, self.sampling)
        return {"first": chunk.first, "images": images}


@contextmanager
def laid_down(vq: HierarchicalVQ, prior: HierarchicalPrior, compute: ComputeSettings, shared: Store) -> Iterator[Store]:
    """Both models in a folder that every process of the job can read, for as long as they draw.

    Files, because the largest priors do not fit into a cluster's object store.

    Args:
        shared: a folder that all nodes of an existing cluster see; a local cluster is on this machine and needs none.
    """
    with tempfile.TemporaryDirectory(prefix="hvqd-models-") as scratch:
        save_model(vq, Path(scratch, "vq"))
        save_model(prior, Path(scratch, "prior"))
        if compute.address is None:
            yield open_store(scratch)
            return
        try:
            shared.upload_folder(Path(scratch))
            yield shared
        finally:
            shared.delete()


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
    shared: Store,
) -> Iterator[tuple[int, Pictures]]:
    """The first picture's index and the pictures of every batch, in the order in which they are done.

    Args:
        compute: the cluster; as many processes draw as it offers the job CPUs, or GPUs where the job uses them.
        shared: see `laid_down`.
    """
    chunks = [_chunk(seeds, conditions, first, sampling.batch) for first in range(0, len(seeds), sampling.batch)]
    if not chunks:
        return
    with laid_down(vq, prior, compute, shared) as models:
        found: Any
        for found in map_units(partial(_Drawer, models, sampling), chunks, compute, on_gpus=True):
            yield found["first"], found["images"]


def draw_apart(
    bundle: LoadedBundle,
    seeds: Sequence[int],
    conditions: Conditions,
    sampling: SamplingSettings,
    workers: int,
    compute: ComputeSettings,
    shared: Store,
    progress: Callable[[int, int], None],
) -> Pictures:
    """(n, H, W, 3) pictures; see `draw_images`.

    Args:
        workers: processes at most, as far as the cluster has room.
        compute: the cluster.
        shared: see `laid_down`.
        progress: called with (pictures done, n).
    """
    cluster = compute.model_copy(update={"workers": workers, "threads_per_worker": 1})
    parts: dict[int, Pictures] = {}
    for first, images in batches_apart(bundle.vq, bundle.prior, seeds, conditions, sampling, cluster, shared):
        parts[first] = images
        progress(sum(map(len, parts.values())), len(seeds))
    return np.concatenate([parts[first] for first in sorted(parts)])


def _chunk(seeds: Sequence[int], conditions: Conditions, first: int, batch: int) -> _Chunk:
    def part(values: Tensor) -> Tensor:
        return values[first : first + batch].clone()  # a view would carry all of its storage along

    return _Chunk(first, tuple(seeds[first : first + batch]), conditions.each(part))
