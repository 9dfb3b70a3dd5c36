"""What early stopping saves: the same sixteen configurations with and without it."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from runner import Benchmark, Figures, Target, main
from sweeps import quick_space, root_with_dataset, search

_SPACE = Path(__file__).parent / "recorded" / "tokenizers.yaml"
_BUDGET = {"trials": 16, "images": 3_600, "min_images": 400, "reduction_factor": 3}
"""The shape of the ready spaces' budgets, a quarter of their length."""


def _savings(quick: bool, seed: int) -> Figures:
    with root_with_dataset("savings", "integration") as root:
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


def _space(folder: Path) -> str:
    """The recorded grid's space with a budget of its own."""
    path = folder / "savings.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(_SPACE.read_text()), "budget": _BUDGET}))
    return str(path)


BENCHMARK = Benchmark(
    name="sweep_savings",
    what=(
        "Sixteen random configurations of small tokenizers (`recorded/tokenizers.yaml`, 16 x 16 pixels, 3,600 images "
        "each, two trials at once), all trained to the end, and the same ones under ASHA with the ready spaces' shape "
        "(compared after a ninth and a third, one in three goes on): how much worse the best of those that ended whole "
        "is, and the images that it took. A trial's figures depend on neither."
    ),
    parts={"savings": _savings},
    targets=(Target("image_share", "<=", 0.45), Target("cost_above_best", "<=", 0.02)),
    repeats=3,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
