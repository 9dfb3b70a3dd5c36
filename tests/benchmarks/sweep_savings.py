"""What early stopping saves: the same sixteen configurations with and without it."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import yaml
from runner import REPOSITORY, Benchmark, Figures, Target, main
from sweeps import quick_space, root_with_dataset, search

sys.path.insert(0, str(REPOSITORY))  # the recorder shares its code with other benchmarks

from tests.benchmarks.record_curves import SPACE, read_table
from tuning.loading import load_space
from tuning.records import TrialRecord
from tuning.search import _scheduler

_BUDGET = {"trials": 16, "images": 3_600, "min_images": 400, "reduction_factor": 3}
"""The shape of the ready spaces' budgets, a quarter of their length."""


def _savings(quick: bool, seed: int) -> Figures:
    with root_with_dataset("savings", "integration", seed) as root:
        space, trials = (quick_space(root.parent), 4) if quick else (_space(root.parent), _BUDGET["trials"])
        options = ("--searcher", "random", "--seed", str(seed), "--trials", str(trials))
        whole = search(root, space, "whole", "--scheduler", "none", *options)
        early = search(root, space, "early", "--scheduler", "asha", *options)
    assert [record["drawn"] for record in whole.records] == [record["drawn"] for record in early.records]
    best, found = whole.answer["best"]["cost"], early.answer["best"]["cost"]
    return {
        "image_share": early.answer["images"] / whole.answer["images"],
        "time_share": early.seconds / whole.seconds,
        "cost_above_best": found / best - 1,
        "same_best": float(whole.answer["best"]["trial"] == early.answer["best"]["trial"]),
        "best_cost": best,
        "trials_stopped": early.answer["trials"].get("stopped", 0),
    }


def _replayed(quick: bool, seed: int) -> Figures:
    """What ASHA does when its first rung is at a quarter of the budget: decisions of the product's, recorded curves."""
    table, found = read_table(), {}
    for factor in (2, 4):
        space = load_space(SPACE)
        space = space.model_copy(update={"budget": space.budget.model_copy(update={"reduction_factor": factor})})
        shares, above = [], []
        for draw in range(50 if quick else 500):
            chosen = np.random.default_rng([seed, draw]).choice(len(table), _BUDGET["trials"], replace=False)
            scheduler = _scheduler("asha", space, SimpleNamespace(records=[]))
            ends = [_replay(scheduler, table[index], space.images) for index in chosen]
            costs = [_cost(table[index]) for index in chosen]
            whole = [cost for cost, images in zip(costs, ends, strict=True) if images == space.images]
            shares.append(sum(ends) / (len(ends) * space.images))
            above.append(min(whole) / min(costs) - 1)
        found[f"quarter_first_{factor}_image_share"] = statistics.mean(shares)
        found[f"quarter_first_{factor}_within_2_percent"] = statistics.mean(each <= 0.02 for each in above)
    return found


def _replay(scheduler: object, record: TrialRecord, whole: int) -> int:
    """Images after which the scheduler stops the trial."""
    trial = SimpleNamespace(trial_id=str(record.number))
    scheduler.on_trial_add(None, trial)  # type: ignore[attr-defined]
    for rung in record.rungs:
        result = {"images": rung.images, "objective": rung.metrics["cost"]}
        if scheduler.on_trial_result(None, trial, result) == "STOP" and rung.images < whole:  # type: ignore[attr-defined]
            return rung.images
    return whole


def _cost(record: TrialRecord) -> float:
    found = record.value("cost")
    assert found is not None
    return found


def _space(folder: Path) -> str:
    """The recorded grid's space with a budget of its own."""
    path = folder / "savings.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(SPACE.read_text()), "budget": _BUDGET}))
    return str(path)


BENCHMARK = Benchmark(
    name="sweep_savings",
    what=(
        "Sixteen random configurations of small tokenizers (`recorded/tokenizers.yaml`, 16 x 16 pixels, 3,600 images "
        "each, two trials at once), all trained to the end, and the same ones under ASHA with the ready spaces' shape "
        "(compared after a ninth and a third, one in three goes on): how much worse the best of those that ended whole "
        "is, and the images that it took. A trial's figures depend on neither. `quarter_first`: ASHA replayed on the "
        "recorded grid with its first rung at a quarter of the budget and one in 2 or 4 going on (500 draws of 16 "
        "trials, one after the other)."
    ),
    parts={"savings": _savings, "replayed": _replayed},
    targets=(Target("image_share", "<=", 0.45), Target("cost_above_best", "<=", 0.02)),
    repeats=3,
    once=frozenset({"replayed"}),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
