"""Which arithmetic a model is trained and used in, and why."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]


def choose_precision(setting: Literal["auto", "fp32", "bf16"], device: torch.device) -> tuple[Precision, str]:
    """The arithmetic and its reason. `auto` takes bf16 only where matrix units make it faster."""
    if setting != "auto":
        return setting, "as configured"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return "bf16", "the GPU computes in bf16"
        return "fp32", "the GPU has no bf16"
    if _processor_has("amx_bf16"):
        return "bf16", "the processor has AMX"
    return "fp32", "without AMX bf16 is many times slower on a CPU"


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Inside it a model computes in that arithmetic; codebooks and what is compared with them stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _processor_has(flag: str) -> bool:
    try:
        return flag in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
