"""Planned against measured: peak memory above the resting process, and step time, of trainings under DeepSpeed."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from overhead import Nothing
from runner import Benchmark, Figures, Target, main

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # spawned ranks import this script by its path

import numpy as np

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.config import PriorConfig
from hvqd_model.prior.prior import HierarchicalPrior
from tests.multiprocess.ranks import run_on_ranks
from workflows.config import RunConfig
from workflows.data.batches import CodeTable, ImageTable
from workflows.loading import config_from
from workflows.planning.calibration import calibrate
from workflows.planning.model_walk import Pictures, StageName, stage_footprint
from workflows.planning.planner import Machine, plan_stage, settings_of
from workflows.training.heap import HUGE_PAGES, gives_back, shape_heap
from workflows.training.judges import Judges
from workflows.training.loop import train
from workflows.training.prior_stage import PriorStage
from workflows.training.stage import Stage
from workflows.training.vq_stage import VQStage

STEPS = 6
CLASSES = 4
STRIDES: dict[int, list[int]] = {1: [4], 2: [8, 4], 3: [16, 8, 4]}


@dataclass(frozen=True)
class Case:
    """One training."""

    stage: StageName
    levels: int
    side: int
    micro: int
    workers: int
    zero: int
    accumulation: int = 1
    width: int = 32
    depth: int = 4
    checkpointing: bool = False
    average: bool = False

    @property
    def name(self) -> str:
        """For figures."""
        extra = "_checkpointing" * self.checkpointing
        return f"{self.stage}_{self.levels}l_{self.side}px_zero{self.zero}_{self.workers}w{extra}"

    @property
    def config(self) -> RunConfig:
        """The complete configuration."""
        batch = self.micro * self.workers * self.accumulation
        train_settings = {
            "images": STEPS * batch,
            "global_batch": batch,
            "micro_batch": self.micro,
            "zero_stage": self.zero,
            "precision": "fp32",
            "ema_half_life_images": 1000 if self.average else 0,
            **{f"{name}_every_images": 1_000_000 for name in ("log", "evaluate", "checkpoint")},
        }
        return config_from(
            {
                "data": {"image_size": [self.side, self.side]},
                "vq": {
                    "model": {
                        "strides": STRIDES[self.levels],
                        "codebook_sizes": [128] * self.levels,
                        "width": self.width if self.stage == "vq" else 16,
                    },
                    "train": train_settings | {"codebook_start": 0.0},
                },
                "prior": {
                    "model": {
                        "width": self.width,
                        "depth": self.depth,
                        "heads": 4,
                        "activation_checkpointing": self.checkpointing,
                    },
                    "train": train_settings,
                },
                "compute": {"workers": self.workers},
            }
        )


CASES = (
    Case("vq", 2, 32, micro=64, workers=1, zero=1),
    Case("prior", 2, 32, micro=64, workers=2, zero=1, width=192),
    Case("vq", 1, 32, micro=64, workers=2, zero=0),
    Case("vq", 2, 64, micro=24, workers=1, zero=0, width=48),
    Case("vq", 3, 64, micro=16, workers=2, zero=2, width=48, accumulation=2),
    Case("vq", 3, 64, micro=12, workers=2, zero=3, width=48),
    Case("vq", 2, 48, micro=24, workers=2, zero=1, width=64),
    Case("prior", 1, 48, micro=24, workers=1, zero=1, width=256, average=True),
    Case("prior", 2, 32, micro=48, workers=2, zero=2, width=256, depth=6, accumulation=2),
    Case("prior", 3, 64, micro=8, workers=2, zero=3, width=256, depth=6),
    Case("prior", 2, 64, micro=16, workers=1, zero=0, width=192, depth=8, checkpointing=True),
    Case("prior", 3, 32, micro=64, workers=1, zero=1, width=128, depth=6, accumulation=2, average=True),
)
QUICK = (CASES[0], CASES[1], CASES[7])


@dataclass
class StepTimes(Nothing):
    """Notes when each step ended."""

    ends: list[float] = field(default_factory=list)

    def progress(self, images_seen: int, total: int, note: str) -> None:
        """A step is over."""
        self.ends.append(time.perf_counter())


def made_up_stage(case: Case) -> Stage:
    """The case's stage on random pictures or codes."""
    config, settings = case.config, settings_of(case.config, case.stage)
    generator = np.random.default_rng(0)
    count = max(settings.global_batch, 64)
    names, labels = np.array([f"p{i}" for i in range(count)]), np.arange(count, dtype=np.int64) % CLASSES
    if case.stage == "vq":
        images = generator.integers(0, 255, (count, case.side, case.side, 3), dtype=np.uint8)
        table = ImageTable(names, labels, names, names, names, images)
        model = HierarchicalVQ(config.vq_config)
        return VQStage(model, config.vq.train, 0, "fp32", table, table, Judges())
    vq = config.vq_config
    grids = zip(vq.grids, vq.codebook_sizes, strict=True)
    codes = tuple(generator.integers(0, size, (count, *grid)).astype(np.int32) for grid, size in grids)
    rows = CodeTable(names, labels, names, names, codes)
    prior_config = PriorConfig(
        **config.prior.model.model_dump(),
        grids=vq.grids,
        codebook_sizes=vq.codebook_sizes,
        code_dim=vq.code_dims,
        classes=tuple(map(str, range(CLASSES))),
    )
    model = HierarchicalPrior(
        prior_config, [torch.randn(shape) for shape in zip(vq.codebook_sizes, vq.code_dims, strict=True)]
    )
    return PriorStage(model, config.prior.train, 0, "fp32", rows, rows)


def resident(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def measure_rank(case: Case) -> dict[str, Any]:
    """One rank's training: its calibration, its peak above rest, and the median seconds of a step."""
    from workflows.training import collectives
    from workflows.training.zero import ZeroEngine

    warm_up(case)
    collectives.barrier()
    device, shares = calibrate(memory_gib=1000)
    link = link_speed()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed so far shall not count as resting
    rest = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    shape_heap(case.config, case.stage)
    stage = made_up_stage(case)
    engine = ZeroEngine(stage.objective, stage.settings, torch.device("cpu"))
    reporter = StepTimes()
    train(engine, stage, Nothing(), reporter)
    seconds = [after - before for before, after in zip(reporter.ends, reporter.ends[1:], strict=False)]
    return {
        "device": device.model_copy(update={"link_gb_s": link / 1e9}),
        "shares": shares,
        "peak": resident("VmHWM") - rest,
        "seconds": statistics.median(seconds[:-1]) if seconds else 0.0,  # the last one also evaluates
    }


def warm_up(case: Case) -> None:
    """Load what the libraries load when they are first used, with a training too small to be seen."""
    from workflows.training.zero import ZeroEngine

    small = Case(case.stage, case.levels, case.side, 1, case.workers, case.zero, width=16, depth=1)
    stage = made_up_stage(small)
    engine = ZeroEngine(stage.objective, stage.settings, torch.device("cpu"))
    train(engine, stage, Nothing(), StepTimes())


def link_speed() -> float:
    """Bytes a second that a rank sends in an all-reduce; a large number where there is nobody to send to."""
    from workflows.training import collectives

    world = collectives.world_size()
    if world == 1:
        return 1e12
    tensor = torch.ones(1 << 21)
    collectives.sum_over_ranks(tensor)
    started = time.perf_counter()
    for _ in range(4):
        collectives.sum_over_ranks(tensor)
    seconds = (time.perf_counter() - started) / 4
    return 2 * tensor.numel() * 4 * (world - 1) / world / seconds


def compare(case: Case) -> Figures:
    """Planned over measured, of memory and time."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name, value in HUGE_PAGES.items():  # as a training's launch does
        if gives_back(case.config, case.stage):
            os.environ[name] = value
        else:
            os.environ.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="hvqd-plan-") as folder:
        found = run_on_ranks(measure_rank, Path(folder), case, world=case.workers)
    peak = max(rank["peak"] for rank in found)
    chief = found[0]
    machine = Machine("here", chief["device"], chief["shares"])
    walked = stage_footprint(case.config, case.stage, Pictures(None, CLASSES))
    planned = plan_stage(case.config, case.stage, walked, machine)
    return {
        f"memory_{case.name}": planned.memory.total / peak,
        f"seconds_{case.name}": planned.step_seconds / chief["seconds"],
    }


def measure(quick: bool, seed: int) -> Figures:
    """All cases, and the largest errors."""
    figures: Figures = {}
    for case in QUICK if quick else CASES:
        figures |= compare(case)
    for kind in ("memory", "seconds"):
        ratios = [value for name, value in figures.items() if name.startswith(f"{kind}_")]
        figures[f"largest_{kind}_error"] = max(abs(ratio - 1) for ratio in ratios)
    return figures


BENCHMARK = Benchmark(
    name="plan_accuracy",
    what=(
        "Peak memory above the resting process and the median step time of small trainings under DeepSpeed (gloo, one "
        "thread a worker), as `hvqd plan` foretells them over what was measured. Each training runs in processes of "
        "its own that first load every library with a smaller one. The speed of matrix products, convolutions, memory "
        "and all-reduce is calibrated in the same processes just before."
    ),
    parts={"cases": measure},
    targets=(Target("largest_memory_error", "<=", 0.15), Target("largest_seconds_error", "<=", 0.30)),
    repeats=3,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
