"""Quantizers so small that a loop can check them, and vectors for them.

Vectors of small whole numbers make fp32 arithmetic exact, so that ties are ties and sums depend on no order.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from hvqd_model.codec.codebooks import EMAQuantizer, make_quantizer
from hvqd_model.codec.quantizer import CodebookStatistics, Quantizer

Kind = Literal["ema", "gradient", "simvq"]
KINDS: tuple[Kind, ...] = ("ema", "gradient", "simvq")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def whole(*shape: int, seed: int = 0, largest: int = 4) -> Tensor:
    """Whole numbers from -largest to largest."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def keys(count: int, first: int = 0) -> Tensor:
    """Keys of so many vectors."""
    return torch.arange(first, first + count)


def started(kind: Kind = "ema", codes: int = 6, dim: int = 3, **changes: object) -> Quantizer:
    """A quantizer whose codebook has started from 40 vectors."""
    quantizer = make_quantizer(kind, codes, dim, **changes)  # type: ignore[arg-type]
    quantizer.start(normal(40, dim), 0)
    return quantizer


def ema(codebook: Tensor, decay: float = 0.9, restart_threshold: float = 0.0) -> EMAQuantizer:
    """A started EMA quantizer with a given codebook (k-means of distinct vectors, one each, are those vectors)."""
    quantizer = make_quantizer("ema", *codebook.shape, decay=decay, restart_threshold=restart_threshold)
    assert isinstance(quantizer, EMAQuantizer)
    quantizer.start(codebook, 0)
    quantizer.embedding.copy_(codebook)
    return quantizer


def statistics(counts: Tensor, sums: Tensor, candidates: Tensor | None = None) -> CodebookStatistics:
    """What a step found."""
    found = torch.zeros(0, sums.shape[1]) if candidates is None else candidates
    return CodebookStatistics(counts.float(), sums.float(), found, torch.arange(len(found)))


def state(quantizer: nn.Module) -> dict[str, Tensor]:
    """A copy of everything a module keeps."""
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same tensors under the same names."""
    assert found.keys() == expected.keys() and found
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
