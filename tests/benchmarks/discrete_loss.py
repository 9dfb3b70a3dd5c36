"""The prior's loss on codes, forward and backward, against VQ-Diffusion's formulation with one-hot vectors.

The other side is written from the paper (Gu et al., arXiv:2111.14822, sections 4.1 and 4.2): every distribution is a
tensor of log-probabilities (B, K + 1, N), and clean and noisy codes enter as logarithms of one-hot vectors. Both sides
get the same logits, codes, times and schedule, and their losses and gradients are compared before anything is timed.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from runner import Benchmark, Figures, Target, main
from torch import Tensor

from hvqd_model.diffusion.chunks import row_terms
from hvqd_model.diffusion.discrete import Rates, corrupt, posterior_kl, rates
from hvqd_model.diffusion.schedules import Schedule, mask_and_replace

STEPS = 100
AUXILIARY = 5e-4
UNIFORM_SHARE = 0.1
REPEATS = {"quick": 3, "full": 3}
_ALMOST_NEVER = -70.0
"""What the formulation takes for the logarithm of zero."""


@dataclass(frozen=True)
class Case:
    """One batch."""

    images: int
    positions: int
    codes: int


CASES = {"quick": Case(4, 256, 1024), "full": Case(8, 1024, 8192)}


@dataclass(frozen=True)
class Batch:
    """What both sides get."""

    logits: Tensor
    """(B, N, K)"""
    clean: Tensor
    """(B, N)"""
    noisy: Tensor
    """(B, N)"""
    step: Tensor
    """(B,) 1 to STEPS."""
    schedule: Schedule


def make_batch(case: Case, seed: int) -> Batch:
    """Codes at random times of the chain, and logits of a network that knows a little."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.images, case.positions)
    clean = torch.randint(case.codes, shape, generator=generator)
    step = torch.randint(2, STEPS + 1, (case.images,), generator=generator)
    schedule = mask_and_replace(UNIFORM_SHARE)
    uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)
    noisy = corrupt(clean, step / STEPS, uniforms, schedule, case.codes)
    logits = torch.randn(*shape, case.codes, generator=generator)
    logits.scatter_add_(2, clean[..., None], torch.full((*shape, 1), 2.0))
    return Batch(logits, clean, noisy, step, schedule)


# ---- the project's side ----


def project_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean nats a code: the KL of posteriors, and the auxiliary cross-entropy on clean codes, as the prior has them."""
    clean, noisy = batch.clean.flatten(), batch.noisy.flatten()
    times = batch.step.double().repeat_interleave(logits.shape[1])

    def terms(scores: Tensor, rows: slice) -> tuple[Tensor, ...]:
        log_p0, t = scores.log_softmax(1), times[rows]
        kl = posterior_kl(log_p0, clean[rows], noisy[rows], (t - 1) / STEPS, t / STEPS, batch.schedule)
        return (kl.float() + AUXILIARY * F.nll_loss(log_p0, clean[rows], reduction="none"),)

    return row_terms(logits.flatten(0, 1), terms)[0].mean()


# ---- the formulation with one-hot vectors ----


def log_one_hot(codes: Tensor, size: int) -> Tensor:
    """(B, K + 1, N) logarithms of one-hot vectors."""
    return F.one_hot(codes, size).permute(0, 2, 1).float().clamp_min(1e-30).log()


def _column(probability: Tensor) -> Tensor:
    return probability.clamp_min(1e-30).log().float()[:, None, None]


def diffused(log_x: Tensor, keep: Tensor, replace: Tensor, mask: Tensor) -> Tensor:
    """(B, K + 1, N) log-probabilities after noise, from those before, for all x_t at once."""
    codes = torch.logaddexp(log_x[:, :-1] + _column(keep), _column(replace))
    masks = torch.logaddexp(log_x[:, -1:] + _column(1 - mask), _column(mask))
    return torch.cat([codes, masks], 1)


def reversed_once(log_x0: Tensor, noisy: Tensor, log_noisy: Tensor, between: Rates) -> Tensor:
    """(B, K + 1, N) log q(x_{t-1} | x_t) summed over x_0 with its probabilities."""
    is_mask = (noisy == log_x0.shape[1] - 1)[:, None]
    # The likelihood of x_t given each x_0: the noise is symmetric among codes.
    likelihood = torch.logaddexp(log_noisy[:, :-1] + _column(between.keep_t), _column(between.replace_t))
    likelihood = torch.where(is_mask, _column(between.mask_t), likelihood)
    ratio = log_x0[:, :-1] - likelihood
    total = torch.logsumexp(ratio, 1, keepdim=True)
    share = torch.cat([ratio - total, torch.full_like(total, _ALMOST_NEVER)], 1)
    source = diffused(share, between.keep_s, between.replace_s, between.mask_s) + total
    step = torch.logaddexp(log_noisy[:, :-1] + _column(between.keep_between), _column(between.replace_between))
    step = torch.where(is_mask, _column(between.mask_between), step)
    stay = torch.where(is_mask, 0.0, _ALMOST_NEVER)
    return (source + torch.cat([step, stay], 1)).clamp_min(_ALMOST_NEVER)


def one_hot_loss(logits: Tensor, batch: Batch) -> Tensor:
    """The same loss: KL over all K + 1 values of x_{t-1} at every position, and the KL of x_0."""
    size = logits.shape[2] + 1
    log_x0, log_noisy = log_one_hot(batch.clean, size), log_one_hot(batch.noisy, size)
    predicted = logits.permute(0, 2, 1).log_softmax(1)
    predicted = torch.cat([predicted, torch.full_like(predicted[:, :1], _ALMOST_NEVER)], 1).clamp_min(_ALMOST_NEVER)
    t = batch.step.double() / STEPS
    between = rates(batch.schedule, t - 1 / STEPS, t, size - 1)
    exact = reversed_once(log_x0, batch.noisy, log_noisy, between)
    model = reversed_once(predicted, batch.noisy, log_noisy, between)
    kl = (exact.exp() * (exact - model)).sum(1)
    auxiliary = (log_x0[:, :-1].exp() * (log_x0[:, :-1] - predicted[:, :-1])).sum(1)
    return (kl + AUXILIARY * auxiliary).mean()


# ---- time and memory ----

Loss = Callable[[Tensor, Batch], Tensor]
SIDES: dict[str, Loss] = {"project": project_loss, "one_hot": one_hot_loss}


def forward_and_backward(loss: Loss, batch: Batch) -> tuple[float, Tensor]:
    """The loss, and its gradient with respect to the logits."""
    logits = batch.logits.detach().requires_grad_()
    value = loss(logits, batch)
    value.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    return float(value.detach()), logits.grad


def _resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most since the mark was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def spent_seconds(work: Callable[[], object], device: torch.device) -> float:
    """What the work takes: time on a GPU, else processor time, which a busy machine hardly changes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    work()
    return time.process_time() - start


def peak_mebibytes(work: Callable[[], object], device: torch.device) -> float:
    """Memory that the work takes beyond what is there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else the work would find room in what was freed before it
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (proc(5))
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def measure(quick: bool, seed: int) -> Figures:
    """Seconds and memory of both sides in turns, and by how much their losses and gradients differ."""
    torch.set_num_threads(1)  # beside other work, threads would wait for each other, and waiting is processor time
    name = "quick" if quick else "full"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole = make_batch(CASES[name], seed)
    batch = Batch(*(part.to(device) for part in (whole.logits, whole.clean, whole.noisy, whole.step)), whole.schedule)
    found = {side: forward_and_backward(loss, batch) for side, loss in SIDES.items()}
    ours, theirs = found["project"], found["one_hot"]
    scale = float(theirs[1].abs().max())
    figures = {
        "loss_difference": abs(ours[0] - theirs[0]) / abs(theirs[0]),
        "gradient_difference": float((ours[1] - theirs[1]).abs().max()) / scale,
    }
    del found, ours, theirs
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(REPEATS[name]):
        for side, loss in SIDES.items():
            seconds[side].append(spent_seconds(lambda loss=loss: forward_and_backward(loss, batch), device))  # type: ignore[misc]
    for side, loss in SIDES.items():
        figures[f"seconds_{side}"] = statistics.median(seconds[side])
        figures[f"peak_mebibytes_{side}"] = peak_mebibytes(lambda loss=loss: forward_and_backward(loss, batch), device)  # type: ignore[misc]
    figures["speed_ratio"] = figures["seconds_one_hot"] / figures["seconds_project"]
    figures["memory_ratio"] = figures["peak_mebibytes_project"] / figures["peak_mebibytes_one_hot"]
    return figures


BENCHMARK = Benchmark(
    name="discrete_loss",
    what=(
        "The loss on codes (KL of posteriors and auxiliary cross-entropy, mask-and-replace noise), forward and "
        "backward in float32 at B = 8, N = 1,024, K = 8,192, against VQ-Diffusion's formulation with logarithms of "
        "one-hot vectors, written from the paper. Both get the same logits; time is the median of turns (on a CPU the "
        "processor time of one thread), memory the peak beyond the inputs. The quick form is smaller (4, 256, 1,024)."
    ),
    parts={"loss": measure},
    targets=(
        Target("speed_ratio", ">=", 4.0),
        Target("memory_ratio", "<=", 1 / 3),
        Target("loss_difference", "<=", 1e-3),
    ),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
