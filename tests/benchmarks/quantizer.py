"""A training step of the EMA quantizer against vector-quantize-pytorch's `VectorQuantize`: time and peak memory.

Forward, backward and the codebook's update on the same vectors from the same codebook, with equal settings (Euclidean
distance, straight-through gradient, decay .99, commitment .25, restarts below 5 % of the expected use). Each side runs
in a fresh process and the two take turns, a step each.
"""

from __future__ import annotations

import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from runner import Benchmark, Figures, Target, main
from torch import Tensor, nn

SideName = Literal["ours", "peer"]
SIDES: tuple[SideName, ...] = ("ours", "peer")
SIZES = tuple((codes, dim) for codes in (8_192, 65_536) for dim in (8, 64))
VECTORS = {"quick": 2_048, "full": 16_384}
ROUNDS = {"quick": 2, "full": 4}
"""Timed steps of each side, after one that is not."""
DECAY, COMMITMENT, RESTART_SHARE = 0.99, 0.25, 0.05
SPARE_SHARE = 0.9
"""Of the memory that is free when a side starts, what it may take; more is refused to it, not taken from others."""
STEP_SECONDS = 900.0
MIB = 1 << 20

Step = Callable[[Tensor], Tensor]
"""Forward, backward and update of (N, D) vectors; returns their (N,) codes."""


class OutOfMemoryError(RuntimeError):
    """A side needs more memory than it may take."""


# ---- the two sides ----


def our_step(codebook: Tensor, vectors: int) -> Step:
    """The project's quantizer, starting from (K, D) codes."""
    from hvqd_model.codec.codebooks import EMAQuantizer, make_quantizer

    quantizer = make_quantizer(
        "ema", *codebook.shape, commitment=COMMITMENT, decay=DECAY, restart_threshold=RESTART_SHARE
    )
    assert isinstance(quantizer, EMAQuantizer)
    quantizer.embedding.copy_(codebook)
    quantizer.counts.zero_()  # the first update takes the codes as seen at the mean use
    quantizer.started.fill_(True)
    keys = torch.arange(vectors)

    def step(z: Tensor) -> Tensor:
        quantized = quantizer(z, keys)
        backward(z, quantized.values, quantized.loss)
        quantizer.update(quantized.statistics, 0)
        indices: Tensor = quantized.indices
        return indices

    return step


def peer_step(codebook: Tensor, vectors: int) -> Step:
    """vector-quantize-pytorch's quantizer, starting from (K, D) codes."""
    from vector_quantize_pytorch import VectorQuantize

    codes, dim = codebook.shape
    mean_use = vectors / codes
    quantizer: nn.Module = VectorQuantize(
        dim=dim,
        codebook_size=codes,
        decay=DECAY,
        commitment_weight=COMMITMENT,
        threshold_ema_dead_code=RESTART_SHARE * mean_use,
        rotation_trick=False,
    )
    state: Any = quantizer._codebook
    state.embed.copy_(codebook[None])
    state.embed_avg.copy_(codebook[None] * mean_use)
    state.cluster_size.fill_(mean_use)
    state.reset_cluster_size = mean_use

    def step(z: Tensor) -> Tensor:
        values, indices, loss = quantizer(z[None])
        backward(z, values[0], loss)
        found: Tensor = indices[0]
        return found

    return step


def backward(z: Tensor, values: Tensor, loss: Tensor) -> None:
    """The gradient at the vectors, of a loss that is linear in the values, and of the alignment."""
    (values.sum() + loss).backward()  # type: ignore[no-untyped-call]
    z.grad = None


# ---- a side's process ----


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS, VmHWM (its peak), VmSize."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, field
    return int(found[1]) << 10


def free_memory() -> int:
    """Bytes that the machine could give to a process."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 10


def serve(side: SideName, codes: int, dim: int, vectors: int, seed: int, connection: Connection) -> None:
    """Answer "step" with its seconds, "codes" with the first step's codes, "peak" with the bytes above the start.

    The start is with libraries loaded and used, vectors and codebook in place; the peak since then is the kernel's
    own (VmHWM after its reset).
    """
    generator = torch.Generator().manual_seed(seed)
    make = our_step if side == "ours" else peer_step
    make(torch.randn(64, dim, generator=generator), 128)(torch.randn(128, dim, requires_grad=True))
    z = torch.randn(vectors, dim, generator=generator).requires_grad_()
    step = make(torch.randn(codes, dim, generator=generator), vectors)
    limit = int(SPARE_SHARE * free_memory())
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + limit, resource.RLIM_INFINITY))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = memory("VmRSS")
    first: Tensor | None = None
    while (asked := connection.recv()) != "end":
        match asked:
            case "step":
                began = time.perf_counter()
                try:
                    found = step(z)
                except (MemoryError, RuntimeError) as error:
                    if not isinstance(error, MemoryError) and "memory" not in str(error):
                        raise
                    connection.send(OutOfMemoryError(f"{side} needs more than {limit / MIB:.0f} MiB"))
                    return
                connection.send(time.perf_counter() - began)
                first = found if first is None else first
            case "codes":
                assert first is not None
                connection.send(first.numpy())
            case "peak":
                connection.send(memory("VmHWM") - start)


def ask(connection: Connection, what: str) -> Any:
    """What a side answers.

    Raises:
        OutOfMemoryError: the side could not have the memory.
        TimeoutError: no answer.
        EOFError: the side has ended.
    """
    connection.send(what)
    if not connection.poll(STEP_SECONDS):
        raise TimeoutError(f"waited {STEP_SECONDS:.0f} s for a side's {what}")
    answer = connection.recv()
    if isinstance(answer, OutOfMemoryError):
        raise answer
    return answer


@contextmanager
def sides(codes: int, dim: int, vectors: int, seed: int) -> Iterator[dict[SideName, Connection]]:
    """A process a side, which end with the block."""
    context = get_context("spawn")
    processes, connections = [], {}
    try:
        for side in SIDES:
            connections[side], theirs = context.Pipe()
            processes.append(context.Process(target=serve, args=(side, codes, dim, vectors, seed, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
        yield connections
    finally:
        for process in processes:
            process.terminate()
            process.join()


# ---- the benchmark ----


def measure(codes: int, dim: int, quick: bool, seed: int) -> Figures:
    """One size's figures, with as many of the vectors as the machine can hold for both sides."""
    form = "quick" if quick else "full"
    vectors = VECTORS[form]
    while True:
        try:
            with sides(codes, dim, vectors, seed) as connections:
                return compare(connections, f"{codes}x{dim}", vectors, ROUNDS[form])
        except OutOfMemoryError as error:
            print(f"{codes} codes, {vectors} vectors: {error}; half the vectors")
            vectors //= 2


def compare(connections: dict[SideName, Connection], size: str, vectors: int, rounds: int) -> Figures:
    """Steps in turns: medians of the paired ratios, and the peaks."""
    for side in SIDES:
        ask(connections[side], "step")
    found = {side: ask(connections[side], "codes") for side in SIDES}
    seconds: dict[SideName, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 else reversed(SIDES):
            seconds[side].append(ask(connections[side], "step"))
    peaks = {side: ask(connections[side], "peak") for side in SIDES}
    pairs = zip(seconds["ours"], seconds["peer"], strict=True)
    return {
        f"time_ratio_{size}": statistics.median(peer / ours for ours, peer in pairs),
        f"memory_ratio_{size}": peaks["ours"] / peaks["peer"],
        **{f"{side}_ms_{size}": 1e3 * statistics.median(seconds[side]) for side in SIDES},
        **{f"{side}_peak_mib_{size}": peaks[side] / MIB for side in SIDES},
        f"same_codes_{size}": float((found["ours"] == found["peer"]).mean()),
        f"vectors_{size}": float(vectors),
    }


BENCHMARK = Benchmark(
    name="quantizer",
    what=(
        "Forward, backward and codebook update of 16,384 vectors by the EMA quantizer and by vector-quantize-pytorch's "
        "`VectorQuantize`, from the same codebook with equal settings. Each side is a fresh process; they take turns, "
        "a step each, and `time_ratio` (theirs over ours) is the median of the paired steps. Memory is the peak of the "
        "process's resident set above its size with libraries loaded and vectors and codebook in place, as the kernel "
        "counts it; `memory_ratio` is ours over theirs. `same_codes` is the share of vectors to which both give the "
        "same code in the first step. Where the peer's matrices don't fit into the free memory, both take half the "
        "vectors (`vectors`)."
    ),
    parts={f"{codes}x{dim}": partial(measure, codes, dim) for codes, dim in SIZES},
    targets=tuple(
        target
        for codes, dim in SIZES
        for target in (
            Target(f"time_ratio_{codes}x{dim}", ">=", 2.0),
            Target(f"memory_ratio_{codes}x{dim}", "<=", 0.25),
        )
    ),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
