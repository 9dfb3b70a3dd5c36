"""The C library's heap on a CPU: memory that a step frees, back to the machine at once.

glibc gives large pieces pages of their own only until it has seen one freed; then pieces of up to that size (32 MiB at
most) come from its heap, which the small results that stay behind cut up. Activation checkpointing frees a block's
activations and keeps its inputs, block after block: the heap grows by a part of every block, and what checkpointing
saves is lost again. A fixed threshold keeps large pieces out of the heap, for the time of getting their pages anew.
"""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE_BYTES = 128 << 10
"""Where glibc begins by itself."""


def give_back_freed_memory() -> bool:
    """Large pieces get pages of their own from here on, for good; whether the C library is one that can."""
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES))
    except (AttributeError, OSError):  # no glibc
        return False
