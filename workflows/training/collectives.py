"""Sums, gathers and broadcasts over the ranks of a job; with one rank nothing is sent."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hvqd_model.codec.quantizer import CANDIDATES, CodebookStatistics

Value = TypeVar("Value")


def world_size() -> int:
    """How many ranks there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place and returned."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean_metrics(metrics: dict[str, Tensor]) -> dict[str, float]:
    """The mean over ranks of scalars with the same names everywhere."""
    if not metrics:
        return {}
    names = sorted(metrics)
    stacked = torch.stack([metrics[name].detach().double().reshape(()) for name in names])
    means = (sum_over_ranks(stacked) / world_size()).tolist()
    return dict(zip(names, means, strict=True))


def gather_rows(tensor: Tensor) -> Tensor:
    """(world n, ...) rows of all ranks in rank order, from (n, ...) of the same shape everywhere."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather_objects(value: Value) -> list[Value]:
    """Every rank's value, in rank order."""
    if world_size() == 1:
        return [value]
    found: list[Value | None] = [None] * world_size()
    dist.all_gather_object(found, value)
    return [item for item in found if item is not None]


def broadcast_object(value: Value) -> Value:
    """Rank 0's value."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_number(value: int, device: torch.device) -> int:
    """Rank 0's number; cheap enough for every step."""
    if world_size() == 1:
        return value
    box = torch.tensor([value], device=device)
    dist.broadcast(box, src=0)
    return int(box)


def broadcast_buffers(tensors: list[Tensor]) -> None:
    """Overwrite tensors by rank 0's."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def merge_over_ranks(statistics: CodebookStatistics) -> CodebookStatistics:
    """The statistics of the whole global batch, equal on all ranks."""
    if world_size() == 1:
        return statistics
    sums = torch.cat([statistics.counts[:, None], statistics.sums], 1).contiguous()
    sum_over_ranks(sums)
    priorities = gather_rows(statistics.candidate_priorities)
    candidates = gather_rows(statistics.candidates)
    kept = torch.argsort(priorities, stable=True)[:CANDIDATES]
    return CodebookStatistics(sums[:, 0].contiguous(), sums[:, 1:].contiguous(), candidates[kept], priorities[kept])
