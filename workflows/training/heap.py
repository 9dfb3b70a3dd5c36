"""The C library's heap on a CPU: memory that a step frees is kept for the next step, or given back at once.

glibc gives large pieces pages of their own until it has seen one freed; then pieces of up to that size come from its
heap, whose free end it gives back to the machine when that has grown. So a training step takes thousands of pages anew
that the step before has just given back, each filled with zeros and mapped by the kernel: a prior's step is 3 to 10 %
longer. Kept, they are paid for once, and the process is no larger at its peak.

Activation checkpointing is the exception. It frees a block's activations and keeps its inputs, block after block: the
heap is cut up, it grows by a part of every block, and what checkpointing saves is lost again. There a fixed threshold
keeps large pieces out of the heap. That their pages are new each time costs little where the kernel gives them in units
of 2 MiB, which torch asks for when it is told so before it is imported.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Literal

from workflows.config import RunConfig

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_NEVER = -1
_LARGE_BYTES = 128 << 10
"""Where glibc begins by itself."""
_LARGEST_BYTES = 32 << 20
"""The most that it takes from its heap."""
HUGE_PAGES: Mapping[str, str] = {"THP_MEM_ALLOC_ENABLE": "1"}
"""The environment of a process that gives back: torch asks for units of 2 MiB."""


def gives_back(config: RunConfig, stage: Literal["vq", "prior"]) -> bool:
    """Whether the stage's workers give back what a step frees: those of a checkpointed prior on a CPU."""
    return stage == "prior" and config.prior.model.activation_checkpointing and not config.compute.gpus_per_worker


def shape_heap(config: RunConfig, stage: Literal["vq", "prior"]) -> None:
    """Keep or give back, as the stage's training is best served; for good, and nothing on a GPU."""
    if gives_back(config, stage):
        give_back_freed_memory()
    elif not config.compute.gpus_per_worker:
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """What is freed is kept for what comes next, for good; whether the C library is one that can."""
    settings = {_M_MMAP_THRESHOLD: _LARGEST_BYTES, _M_TRIM_THRESHOLD: _NEVER, _M_ARENA_MAX: 1}
    return all(_set(name, value) for name, value in settings.items())


def give_back_freed_memory() -> bool:
    """Large pieces get pages of their own from here on, for good; whether the C library is one that can."""
    return all(_set(name, _LARGE_BYTES) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def _set(name: int, value: int) -> bool:
    try:
        return bool(ctypes.CDLL(None).mallopt(name, value))
    except (AttributeError, OSError):  # no glibc
        return False
