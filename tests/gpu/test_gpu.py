"""What GPUs do differently: NCCL, bf16, fused kernels, compiled blocks, page-locked batches, and what all of it costs.

Everything here skips where no NVIDIA GPU is; with two or more, ZeRO shards over two of them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from hvqd_model.prior.attention import attend
from tests.tiny_training import GLOBAL_BATCH, GoOn, Heard, prior_settings, prior_stage, vq_settings, vq_stage
from workflows.training.compiled import compile_blocks, should_compile
from workflows.training.engine import make_optimizer
from workflows.training.feed import Feed
from workflows.training.loop import train
from workflows.training.plain import PlainEngine
from workflows.training.precision import choose_precision
from workflows.training.stage import Position, pinned, place_on
from workflows.training.zero import ZeroEngine, zero_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU"),
]
DEVICE = torch.device("cuda", 0)
WORKERS = min(2, torch.cuda.device_count())
_STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone, as Ray Train makes it on a worker."""
    torch.cuda.set_device(DEVICE)
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("nccl", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def on_ranks(target: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `target(*arguments)` returned on each of WORKERS processes with a GPU each."""
    context = torch.multiprocessing.start_processes(
        _enter, args=(target, folder, arguments), nprocs=WORKERS, join=True, start_method="spawn"
    )
    assert context is None
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(WORKERS)]


def _enter(rank: int, target: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORKERS)
    torch.save(target(torch.device("cuda", rank), *arguments), folder / f"result-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# ---- collectives, arithmetic and kernels ----


def _sums(device: torch.device) -> dict[str, torch.Tensor]:
    own = torch.full((1000,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(own)
    rows = [torch.empty(3, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, torch.full((3,), float(dist.get_rank()), device=device))
    return {"sum": own.cpu(), "rows": torch.stack(rows).cpu()}


def test_nccl_sums_and_gathers(tmp_path: Path) -> None:
    for found in on_ranks(_sums, tmp_path):
        assert found["sum"].unique().tolist() == [WORKERS * (WORKERS + 1) / 2]
        assert found["rows"][:, 0].tolist() == list(map(float, range(WORKERS)))


def test_auto_is_bf16_and_its_loss_is_near_that_of_fp32() -> None:
    assert choose_precision("auto", DEVICE)[0] == ("bf16" if torch.cuda.is_bf16_supported() else "fp32")
    losses = []
    for precision in ("fp32", "bf16"):
        stage = prior_stage(prior_settings(1), precision=precision)
        stage.objective.to(DEVICE)
        losses.append(float(stage.objective(*place_on(DEVICE, *first_batch(stage))).loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[1] != losses[0], "bf16 rounds"


def test_adamw_is_fused_and_steps_as_the_plain_one() -> None:
    settings = prior_settings(1)
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).to(DEVICE)
        optimizer = make_optimizer(module, settings, DEVICE)
        assert optimizer.defaults["fused"] is True
        for group in optimizer.param_groups:
            group["fused"] = fused
        for seed in range(3):
            torch.manual_seed(seed)
            module(torch.randn(8, 64, device=DEVICE)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([parameter.detach().clone() for parameter in module.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_attention_takes_the_fused_kernel_and_equals_the_formula() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 80, 4, 32, device=DEVICE, requires_grad=True) for _ in range(3))
    with torch.profiler.profile() as profile:
        mixed = attend(query, key, value)
    assert any("scaled_dot_product" in event.key for event in profile.key_averages())
    scores = torch.einsum("bnhw,bmhw->bhnm", query, key).softmax(-1)
    expected = torch.einsum("bhnm,bmhw->bnhw", scores, value).flatten(2)
    torch.testing.assert_close(mixed, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["vq", "prior"])
def test_blocks_are_compiled_and_give_the_loss_and_gradient_of_uncompiled_ones(name: str) -> None:
    assert should_compile("auto", DEVICE, 1) == (True, "the GPU has Triton")
    found = []
    for compiled in (False, True):
        stage = prior_stage(prior_settings(1)) if name == "prior" else vq_stage(vq_settings(1))
        stage.objective.to(DEVICE)
        if compiled:
            assert compile_blocks(stage.objective, strict=True) > 0
        output = stage.objective(*place_on(DEVICE, *first_batch(stage)))
        output.loss.backward()
        gradients = {key: p.grad for key, p in stage.objective.named_parameters() if p.grad is not None}
        found.append((float(output.loss.detach()), gradients))
    (loss, plain), (compiled_loss, other) = found
    assert compiled_loss == pytest.approx(loss, rel=1e-4)
    assert plain.keys() == other.keys() and len(plain) > 10
    for key, value in plain.items():
        torch.testing.assert_close(other[key], value, rtol=1e-2, atol=1e-4, msg=key)


def test_batches_are_made_early_in_page_locked_memory() -> None:
    stage = prior_stage(prior_settings(4))
    assert all(tensor.is_pinned() for tensor in pinned(*first_batch(stage)) if isinstance(tensor, torch.Tensor))
    feed = Feed(stage.batch, DEVICE)
    for images_seen in (0, 8, 16):
        place, following = (Position(n, 0, GLOBAL_BATCH, GLOBAL_BATCH) for n in (images_seen, images_seen + 8))
        taken, expected = feed.take(place, following), place_on(DEVICE, *stage.batch(place))
        assert taken[-1].device == DEVICE
        assert torch.equal(taken[-1], expected[-1]) and torch.equal(taken[0][0], expected[0][0])
    feed.close()


# ---- ZeRO ----


def _trained(device: torch.device, zero_stage: int) -> dict[str, torch.Tensor]:
    """What is exported after some steps."""
    settings = prior_settings(_STEPS, zero_stage=zero_stage, micro_batch=GLOBAL_BATCH // dist.get_world_size())
    stage = prior_stage(settings)
    engine = ZeroEngine(stage.objective, settings, device)
    train(engine, stage, GoOn(), Heard())
    return engine.export()


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_zero_stage_takes_the_steps_of_plain_torch(tmp_path: Path, zero_stage: int) -> None:
    settings = prior_settings(_STEPS)
    stage = prior_stage(settings)
    start = {name: value.clone() for name, value in stage.objective.state_dict().items()}
    engine = PlainEngine(stage.objective, settings, DEVICE)
    train(engine, stage, GoOn(), Heard())
    plain = engine.export()
    found = on_ranks(_trained, tmp_path, zero_stage)[0]
    assert found.keys() == plain.keys() and len(plain) > 20
    for name, value in plain.items():
        torch.testing.assert_close(found[name].cpu(), value.cpu(), rtol=1e-3, atol=1e-4, msg=name)
    assert any(float((value.cpu() - start[name].cpu()).abs().max()) > 1e-3 for name, value in plain.items())


def test_zero_3_prefetches_and_overlaps() -> None:
    zero = zero_config(prior_settings(1, zero_stage=3), 1)["zero_optimization"]
    assert zero["overlap_comm"] is True
    assert zero["stage3_prefetch_bucket_size"] > 0
    offloaded = zero_config(prior_settings(1, zero_stage=2, offload_optimizer=True), 1)["zero_optimization"]
    assert offloaded["offload_optimizer"]["pin_memory"] is True


# ---- what it costs ----


def first_batch(stage: Any) -> tuple[Any, ...]:
    return tuple(stage.batch(Position(0, 0, GLOBAL_BATCH, GLOBAL_BATCH)))


class Ends(Heard):
    """Notes when each step ended, the GPU's work included."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def progress(self, images_seen: int, total: int, note: str) -> None:
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def test_a_step_takes_no_more_than_five_per_cent_longer_than_in_plain_pytorch(
    record_property: Callable[[str, object], None],
) -> None:
    """The loop with DeepSpeed against a hand-written loop, both eager, in turns; also the share of peak flops."""
    batch, architecture = 64, {"width": 768, "depth": 12, "heads": 12}
    settings = prior_settings(
        20, global_batch=batch, micro_batch=batch, images=20 * batch, log_every_images=10**9, precision="bf16"
    )
    ratios = []
    for _ in range(3):
        stage = prior_stage(settings, precision="bf16", **architecture)
        engine, ends = ZeroEngine(stage.objective, settings, DEVICE), Ends()
        train(engine, stage, GoOn(), ends)
        ours = statistics.median(after - before for before, after in zip(ends.ends[5:], ends.ends[6:], strict=False))
        del engine

        stage = prior_stage(settings, precision="bf16", **architecture)
        module = stage.objective.to(DEVICE)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
        seconds = []
        for step in range(20):
            started = time.perf_counter()
            inputs = place_on(DEVICE, *stage.batch(Position(step * batch, 0, batch, batch)))
            module(*inputs).loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        ratios.append(ours / statistics.median(seconds[5:]))
    record_property("step_time_ratio", ratios)
    record_property("peak_share", matrix_flops(architecture["width"], architecture["depth"], batch) / ours / peak())
    assert statistics.median(ratios) <= 1.05, ratios


def matrix_flops(width: int, depth: int, batch: int, tokens: int = 20) -> float:
    """Of a step's matrix products in the blocks: 12 width² weights each, 6 operations a weight and token."""
    return 6.0 * 12 * width**2 * depth * batch * tokens


def peak() -> float:
    """Flops a second of a large bf16 product, which is what the GPU reaches at best."""
    size = 8192
    one, other = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    F.relu(one @ other)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        one @ other
    torch.cuda.synchronize()
    return 10 * 2 * size**3 / (time.perf_counter() - started)
