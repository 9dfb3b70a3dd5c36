"""How fast this machine is at what a training does, measured in a second or two, as a row of the price table.

The shapes are middling ones: peaks are reached by no model. What one thread does is measured while the others of the
job's workers on this machine are idle or busy as they are at the moment.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from workflows.planning.prices import Device, Shares

_FRAGMENTS = 0.3
"""Of glibc's allocator, measured on trainings of the size that fits a CPU."""
_MATRIX = 384
_CHANNELS, _SIDE, _BATCH = 64, 16, 16
_ELEMENTS = 1 << 18
_SECONDS = 0.12
_BURSTS = 5


def calibrate(memory_gib: float, hour: float = 0.0) -> tuple[Device, Shares]:
    """This machine at the present number of threads, as a device whose peaks are what was reached.

    Args:
        memory_gib: what a worker may take.
        hour: its price.
    """
    matrix = _matrix(torch.float32)
    half = _matrix(torch.bfloat16)
    convolution = _convolution()
    best = max(matrix, convolution)
    device = Device(
        memory_gib=memory_gib,
        fp32_tflops=best / 1e12,
        bf16_tflops=max(half * best / matrix, 1.0) / 1e12,
        memory_gb_s=_memory() / 1e9,
        link_gb_s=1.0,
        network_gb_s=1.0,
        launch_us=_launch() * 1e6,
        fragments=_FRAGMENTS,
        reserved_gib=0.0,
        per_node=max(1, torch.get_num_threads()),
        hour=hour,
    )
    return device, Shares(matrix=matrix / best, convolution=convolution / best, memory=1.0)


def _seconds(work: Callable[[], object]) -> float:
    """Of one call: the median over bursts of calls."""
    work()
    found = []
    for _ in range(_BURSTS):
        started, calls = time.perf_counter(), 0
        while time.perf_counter() - started < _SECONDS / _BURSTS:
            work()
            calls += 1
        found.append((time.perf_counter() - started) / calls)
    return statistics.median(found)


def _matrix(kind: torch.dtype) -> float:
    """Operations a second of a linear layer, forward and backward."""
    x = torch.randn(4 * _MATRIX, _MATRIX).to(kind)
    weight = torch.randn(_MATRIX, _MATRIX).to(kind)

    def work() -> None:
        _ = x @ weight.t(), x @ weight, x.t() @ x

    return 3 * 2 * 4 * _MATRIX**3 / _seconds(work)


def _convolution() -> float:
    """Operations a second of a 3 x 3 convolution, forward and backward."""
    x = torch.randn(_BATCH, _CHANNELS, _SIDE, _SIDE).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(_CHANNELS, _CHANNELS, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    cotangent = torch.randn(_BATCH, _CHANNELS, _SIDE, _SIDE).to(memory_format=torch.channels_last)

    def work() -> None:
        torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), cotangent)

    return 3 * 2 * 9 * _BATCH * _SIDE**2 * _CHANNELS**2 / _seconds(work)


def _memory() -> float:
    """Bytes a second read and written by element-wise operations with results of their own."""
    x = torch.randn(_ELEMENTS)
    return 3 * 4 * _ELEMENTS / _seconds(lambda: x + x)


def _launch() -> float:
    """Seconds that a small operation takes, with what autograd adds."""
    x = torch.randn(8, requires_grad=True)

    def work() -> None:
        torch.autograd.grad((x * 2 + 1).sum(), x)

    return _seconds(work) / 6
