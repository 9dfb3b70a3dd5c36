"""The cost model of docs/scaling.md: its formulas against slow references, and its limits against the planner."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from tests.benchmarks.scaling_model import (
    Assumptions,
    best_interval,
    footprint,
    messages,
    on_gpus,
    overhead,
    project,
    table,
)
from workflows.loading import load_config
from workflows.planning.planner import machine_for, plan_stage
from workflows.planning.prices import read_prices

IDEAL = Assumptions(hop_seconds=0.0, slowest_rank=1.0, gpu_hours_between_failures=1e12, picture_bytes=1e-9)


def test_the_best_interval_is_the_one_that_costs_least() -> None:
    blocked, between, restart = 3.0, 200_000.0, 300.0
    grid = np.geomspace(10, 1e5, 20_001)
    cheapest = grid[np.argmin([overhead(blocked, interval, between, restart) for interval in grid])]
    assert best_interval(blocked, between) == pytest.approx(cheapest, rel=1e-3)


def test_failures_and_checkpoints_cost_what_a_simulation_of_them_costs() -> None:
    """A job that fails at random and goes back to its last checkpoint, step by step of a second."""
    blocked, between, restart = 10.0, 20_000.0, 200.0
    interval = best_interval(blocked, between)
    generator = np.random.default_rng(0)
    useful, wall = 0.0, 0.0
    while wall < 2_000 * between:
        left = generator.exponential(between)
        periods = int(left // (interval + blocked))
        useful += periods * interval
        wall += left + restart
    assert 1 - useful / wall == pytest.approx(overhead(blocked, interval, between, restart), rel=0.1)


def test_without_latency_failures_and_slow_ranks_the_model_is_the_planner() -> None:
    config = load_config("small")
    (row,) = project(config, "prior", (1,), assumed=replace(IDEAL, decode_per_core=1e12))
    here = on_gpus(config, 1, weak=True)
    machine = machine_for(here, read_prices(), "h100-80gb", 25.0)
    plan = plan_stage(here, "prior", footprint(here, "prior"), machine)
    assert row.step_seconds == pytest.approx(max(plan.compute_seconds, plan.exchange_seconds))
    assert row.hours * 3600 == pytest.approx(plan.steps * row.step_seconds, rel=0.01)
    assert row.efficiency == 1


def test_more_gpus_fail_more_often_and_none_is_more_efficient_than_few() -> None:
    rows = project(load_config("small"), "vq", (8, 64, 512, 1024))
    for few, many in itertools.pairwise(rows):
        assert many.goodput < few.goodput <= 1
        assert many.efficiency <= few.efficiency * 1.01, "but for the optimizer's work, which ZeRO shares among more"
        assert many.checkpoint_every_seconds < few.checkpoint_every_seconds
        assert many.plan.global_batch > few.plan.global_batch
    assert len(table(rows).splitlines()) == 2 + len(rows)


def test_a_batch_that_stays_is_divided_until_a_gpu_has_one_picture() -> None:
    config = load_config("large")
    for gpus in (32, 128, 256, 1024, 4096):
        train = on_gpus(config, gpus, weak=False).prior.train
        assert train.global_batch == max(2048, gpus)
        assert train.global_batch % (train.micro_batch * gpus) == 0


@pytest.mark.parametrize(("zero_stage", "expected"), [(0, 20), (1, 20), (2, 50), (3, 4 * (2 * 40 + 10))])
def test_messages_of_a_step_are_those_of_the_zero_stage(zero_stage: int, expected: int) -> None:
    assert messages(500_000_000, zero_stage, accumulation=4, layers=40) == expected
