"""How fast this machine is at what a training does, measured in a few seconds, as a row of the price table.

Matrix products and small operations are timed alone, in middling shapes: peaks are reached by no model. Memory and
convolutions are not: what passes over memory in a training is a mixture of copies, reductions and exponentials, near
in the cache or far from it, that no single loop resembles. So a micro-batch of a small prior and of a small tokenizer
is timed, forward and backward, and what its matrix products and the starts of its operations do not explain is memory's
(the prior) and the convolutions' (the tokenizer), by the same count that a plan goes by.

What one thread does is measured while the others of the job's workers on this machine are idle or busy as they are at
the moment.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from workflows.loading import config_from
from workflows.planning.footprint import Footprint
from workflows.planning.made_up import made_up_prior, made_up_vq
from workflows.planning.model_walk import Pictures, StageName, stage_footprint
from workflows.planning.prices import Device, Shares
from workflows.training.heap import keep_freed_memory

_FRAGMENTS = 0.3
"""Of glibc's allocator, measured on trainings of the size that fits a CPU."""
_MATRIX = 384
_SECONDS = 0.4
_BURSTS = 7
_CLASSES = 4
_PROBE = {
    "data": {"image_size": [32, 32]},
    "vq": {
        "model": {"strides": [8, 4], "codebook_sizes": [128, 128], "width": 32},
        "train": {"images": 32, "global_batch": 32, "micro_batch": 32, "precision": "fp32"},
    },
    "prior": {
        "model": {"width": 128, "depth": 2, "heads": 4},
        "train": {"images": 32, "global_batch": 32, "micro_batch": 32, "precision": "fp32"},
    },
}
_LEAST_SHARE = 0.05
"""Of a micro-batch's time that is put down to what is found by subtraction, however small the remainder."""


def calibrate(memory_gib: float, hour: float = 0.0) -> tuple[Device, Shares]:
    """This machine at the present number of threads, as a device whose peaks are what was reached.

    The process keeps the memory that it frees from here on, as a training's worker does.

    Args:
        memory_gib: what a worker may take.
        hour: its price.
    """
    keep_freed_memory()
    matrix, half, launch = _matrix(torch.float32), _matrix(torch.bfloat16), _launch()
    micro, seconds = _micro_batch("prior")
    memory = micro.moved_bytes / _left(seconds, micro.flops["matrix_fp32"] / matrix + micro.operations * launch)
    micro, seconds = _micro_batch("vq")
    others = micro.flops.get("matrix_fp32", 0.0) / matrix + micro.moved_bytes / memory + micro.operations * launch
    convolution = micro.flops["convolution_fp32"] / _left(seconds, others)
    best = max(matrix, convolution)
    device = Device(
        memory_gib=memory_gib,
        fp32_tflops=best / 1e12,
        bf16_tflops=max(half * best / matrix, 1.0) / 1e12,
        memory_gb_s=memory / 1e9,
        link_gb_s=1.0,
        network_gb_s=1.0,
        launch_us=launch * 1e6,
        fragments=_FRAGMENTS,
        reserved_gib=0.0,
        per_node=max(1, torch.get_num_threads()),
        hour=hour,
    )
    return device, Shares(matrix=matrix / best, convolution=convolution / best, memory=1.0)


def _micro_batch(stage: StageName) -> tuple[Footprint, float]:
    """The count of the stage's probe, and the seconds of its forward and backward."""
    config = config_from(_PROBE)
    walked = stage_footprint(config, stage, Pictures(None, _CLASSES))
    with torch.random.fork_rng():
        objective, inputs = (
            made_up_vq(config, "fp32", torch.device("cpu"))
            if stage == "vq"
            else made_up_prior(config, _CLASSES, "fp32")
        )

    def work() -> None:
        objective(*inputs).loss.backward()
        objective.zero_grad()

    work()
    return walked.micro, _seconds(work)


def _left(seconds: float, explained: float) -> float:
    return max(seconds - explained, _LEAST_SHARE * seconds)


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


def _launch() -> float:
    """Seconds that a small operation takes, with what autograd adds."""
    x = torch.randn(8, requires_grad=True)

    def work() -> None:
        torch.autograd.grad((x * 2 + 1).sum(), x)

    return _seconds(work) / 6
