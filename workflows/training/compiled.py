"""torch.compile for the blocks that models are made of, where the machine gains by it.

The blocks alone, because they are alike: one is compiled for all of a shape, in seconds, and what is around them (keyed
noise, codebooks, checks) stays as it is. ZeRO-3 gathers parameters in hooks inside of a block, so nothing is compiled
there.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn

from hvqd_model.codec.encoder import ResidualBlock
from hvqd_model.prior.denoiser import Block

log = logging.getLogger(__name__)

Setting = Literal["auto", "on", "off"]
_SHAPES = 64
"""Of blocks, grids and batches that are compiled before torch leaves the rest as it is (its default is 8)."""
_LEAST_CAPABILITY = (7, 0)
"""Of a GPU that Triton compiles for."""


def should_compile(setting: Setting, device: torch.device, zero_stage: int) -> tuple[bool, str]:
    """Whether blocks are compiled, and why."""
    if setting != "auto":
        return setting == "on", "as configured"
    if device.type != "cuda":
        return False, "the CPU's kernels leave little to gain"
    if zero_stage == 3:
        return False, "ZeRO-3 gathers parameters inside of blocks"
    if find_spec("triton") is None or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return False, "there is no Triton for this GPU"
    return True, "the GPU has Triton"


def compile_blocks(module: nn.Module, backend: str = "inductor", *, strict: bool = False) -> int:
    """Have the blocks of a module compiled when they are first used; returns how many there are.

    Args:
        strict: whether a block that cannot be compiled is an error; otherwise it stays as it is.
    """
    torch._dynamo.config.recompile_limit = _SHAPES
    torch._dynamo.config.suppress_errors = not strict
    found = [part for part in module.modules() if isinstance(part, Block | ResidualBlock)]
    for part in found:
        part.compile(backend=backend)
    return len(found)
