"""Hierarchical VQ-Diffusion: the science alone, in torch.

    codes = vq.encode(images)          a tuple of (B, h_l, w_l) int64, coarse first
    images = vq.decode(codes[:1])      any prefix of the levels
    codes = prior.sample(seeds, labels)

Names are loaded when they are first used: reading a configuration must not cost an import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvqd_model.codec.hierarchy import HierarchicalVQ
    from hvqd_model.config import PriorConfig, VQConfig
    from hvqd_model.export import load_model, save_model
    from hvqd_model.prior.prior import HierarchicalPrior

__all__ = ["HierarchicalPrior", "HierarchicalVQ", "PriorConfig", "VQConfig", "load_model", "save_model"]

_HOMES = {
    "HierarchicalPrior": "hvqd_model.prior.prior",
    "HierarchicalVQ": "hvqd_model.codec.hierarchy",
    "PriorConfig": "hvqd_model.config",
    "VQConfig": "hvqd_model.config",
    "load_model": "hvqd_model.export",
    "save_model": "hvqd_model.export",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
