"""Random numbers that depend on an item's key alone, never on its place in a batch or on the number of workers.

A counter-based generator: every number is a hash of (key, stream, counter), after the finalizer of SplitMix64 (Steele,
Lea and Flood 2014, Fig. 16 with Stafford's mix 13). Torch's own generators hand out numbers in call order, so the noise
of a picture would change with its neighbours; here it cannot.

Axes: B keyed items.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def derive_key(*parts: int | str) -> int:
    """One signed 64-bit key from any names and numbers, the same on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def split_keys(keys: Tensor, stream: int | str | Tensor) -> Tensor:
    """(B,) int64 keys for a named stream of the same items; a (B,) tensor gives each item a stream of its own."""
    if not isinstance(stream, Tensor):
        stream = torch.tensor(derive_key(stream), dtype=torch.int64, device=keys.device)
    return _mix(_mix(keys + _GOLDEN) ^ (stream * _GOLDEN))


def uniform(keys: Tensor, shape: Sequence[int] = (), stream: int | str = 0) -> Tensor:
    """(B, *shape) float64 uniform numbers in (0, 1), strictly inside.

    Args:
        keys: (B,) int64, one an item.
        shape: the numbers of one item.
        stream: draws of different streams are independent.
    """
    count = math.prod(shape)
    counters = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) * _GOLDEN
    bits = _mix(split_keys(keys, stream)[:, None] + counters)
    return ((_shift_right(bits, 12).double() + 0.5) * 2.0**-52).reshape(keys.shape[0], *shape)


def gumbel(keys: Tensor, shape: Sequence[int], stream: int | str = 0) -> Tensor:
    """(B, *shape) float64 standard Gumbel noise (fp32 would lose the tail, which lowers the temperature)."""
    return -torch.log(-torch.log(uniform(keys, shape, stream)))


def normal(keys: Tensor, shape: Sequence[int], stream: int | str = 0) -> Tensor:
    """(B, *shape) float64 standard normal numbers (Box-Muller)."""
    pairs = uniform(keys, (2, *shape), stream)
    return torch.sqrt(-2 * torch.log(pairs[:, 0])) * torch.cos(2 * math.pi * pairs[:, 1])
