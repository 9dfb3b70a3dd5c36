"""Bytes that a rank holds and sends, by ZeRO stage and number of workers, against DeepSpeed's formulas.

A prior of P weights trains under gloo in steps of two micro-batches. Held are all tensors of a rank's process after a
backward pass, the larger of the two (its largest moment but for activations), less the buffer in which gradients wait
for their exchange, whose size is a setting (`bucket_megabytes`). Sent is what the kernel counts as acknowledged on the
process's TCP connections during a step. Formulas after Rajbhandari et al., arXiv:1910.02054, sections 5 and 7, for
weights and gradients of 4 bytes and Adam's state of 12 (a float32 copy of the weights and two moments; 8 without ZeRO,
which makes no copy): held 16 P; 8 P + 12 P / N; 4 P + 16 P / N; 20 P / N. With V = 4 P (N - 1) / N for a gather or a
reduce-scatter of all weights, sent is 2 V; 2 V + V; 2 x 2 V + V; 2 x 3 V: at stage 1 gradients go once a step, above it
with each micro-batch. DeepSpeed 0.19 averages gradients by an all-reduce (2 V) at stages 1 and 2, where the paper has a
reduce-scatter (V): `sent_over_paper` is the price of that.
"""

from __future__ import annotations

import gc
import os
import socket
import struct
import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from runner import REPOSITORY, Benchmark, Figures, Target, main

sys.path.insert(0, str(REPOSITORY))  # spawned ranks import this script by its path

from tests.multiprocess.ranks import run_on_ranks
from tests.tiny_training import GLOBAL_BATCH, prior_settings, prior_stage
from workflows.training import collectives
from workflows.training.stage import Position, place_on
from workflows.training.zero import ZeroEngine

STAGES, WORKERS, ACCUMULATION = (0, 1, 2, 3), (2, 4), 2
_BYTES_ACKED = 120
"""Offset of `tcpi_bytes_acked`, 8 bytes, in the kernel's `struct tcp_info`."""


def sent_bytes() -> int:
    """What all TCP connections of this process have delivered so far."""
    total = 0
    for entry in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    facts = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("=Q", facts, _BYTES_ACKED)[0]
    return total


def held_bytes() -> int:
    """All tensors of this process, each storage once."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):  # `isinstance` would wake lazy modules
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def bucket_bytes(engine: ZeroEngine) -> int:
    """Of the buffers in which gradients wait for their exchange."""
    optimizer = engine._engine.optimizer
    buffers: list[torch.Tensor] = []
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        held = bucket.buffer
        buffers += [tensor for tensor in (held if isinstance(held, list) else [held]) if tensor is not None]
    return sum(tensor.untyped_storage().nbytes() for tensor in buffers)


def rank_figures(zero_stage: int, width: int, depth: int) -> dict[str, float]:
    """Of this rank, in its third step."""
    world = collectives.world_size()
    micro = GLOBAL_BATCH // ACCUMULATION // world
    settings = prior_settings(8, zero_stage=zero_stage, micro_batch=micro)
    before = held_bytes()
    stage = prior_stage(settings, width=width, depth=depth, heads=4)
    weights = sum(parameter.numel() for parameter in stage.objective.parameters())
    engine = ZeroEngine(stage.objective, settings, torch.device("cpu"))
    held = sent = bucket = 0
    for step in range(3):  # the first makes the optimizer's state
        collectives.barrier()
        sent, held = sent_bytes(), 0
        for part in range(ACCUMULATION):
            offset = (part * world + engine.rank) * micro
            inputs = place_on(engine.device, *stage.batch(Position(step * GLOBAL_BATCH, offset, micro, GLOBAL_BATCH)))
            engine.backward(engine.forward(*inputs).loss)
            bucket = max(bucket, bucket_bytes(engine))
            held = max(held, held_bytes() - before - bucket_bytes(engine))
        engine.step(1e-4)
        collectives.barrier()
        sent = sent_bytes() - sent
    buffers = sum(buffer.nbytes for buffer in engine.module.buffers())
    return {"weights": weights, "held": held - buffers, "sent": sent, "bucket": bucket}


def all_stages(width: int, depth: int) -> dict[int, dict[str, float]]:
    """This rank's figures by ZeRO stage; one group of processes for all, because a start takes many seconds."""
    return {zero_stage: rank_figures(zero_stage, width, depth) for zero_stage in STAGES}


def expected(weights: float, zero_stage: int, workers: int) -> tuple[float, float, float]:
    """Bytes held, sent by DeepSpeed's operations, and sent by the paper's, by the formulas above."""
    held = (16, 8 + 12 / workers, 4 + 16 / workers, 20 / workers)[zero_stage]
    volume, parts = 4 * weights * (workers - 1) / workers, ACCUMULATION
    sent, paper = ((2, 2), (3, 2), (2 * parts + 1, parts + 1), (3 * parts, 3 * parts))[zero_stage]
    return held * weights, sent * volume, paper * volume


def measure(workers: int, quick: bool, seed: int) -> Figures:
    """Every ZeRO stage with so many workers; of the ranks, the one that is farthest from the formula in memory."""
    os.environ["OMP_NUM_THREADS"] = "1"
    width, depth = (256, 4) if quick else (384, 6)
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="hvqd-zero-") as folder:
        found = run_on_ranks(all_stages, Path(folder), width, depth, world=workers)
    for zero_stage in STAGES:
        ranks = [rank[zero_stage] for rank in found]
        held, sent, paper = expected(ranks[0]["weights"], zero_stage, workers)
        mean_sent = sum(rank["sent"] for rank in ranks) / workers
        name = f"zero{zero_stage}_{workers}w"
        figures[f"held_megabytes_{name}"] = max(rank["held"] for rank in ranks) / 1e6
        figures[f"held_ratio_{name}"] = max(rank["held"] for rank in ranks) / held
        figures[f"sent_megabytes_{name}"] = mean_sent / 1e6
        figures[f"sent_ratio_{name}"] = mean_sent / sent
        figures[f"sent_over_paper_{name}"] = mean_sent / paper
    figures[f"bucket_megabytes_{workers}w"] = max(rank["bucket"] for rank in ranks) / 1e6
    for kind in ("held", "sent"):
        ratios = [value for name, value in figures.items() if name.startswith(f"{kind}_ratio_")]
        figures[f"largest_{kind}_error_{workers}w"] = max(abs(ratio - 1) for ratio in ratios)
    return figures


BENCHMARK = Benchmark(
    name="zero_memory",
    what=__doc__ or "",
    parts={f"{workers} workers": partial(measure, workers) for workers in WORKERS},
    targets=tuple(
        Target(f"largest_{kind}_error_{workers}w", "<=", 0.1) for kind in ("held", "sent") for workers in WORKERS
    ),
    repeats=1,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
