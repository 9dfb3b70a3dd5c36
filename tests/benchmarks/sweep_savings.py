"""What early stopping saves: the same sixteen configurations with and without it."""

from __future__ import annotations

import sys

from runner import Benchmark, Figures, Target, main
from sweeps import quick_space, root_with_dataset, search


def _savings(quick: bool, seed: int) -> Figures:
    with root_with_dataset("savings", "integration" if quick else "tiny") as root:
        space, trials = (quick_space(root.parent), 4) if quick else ("vq", 16)
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


BENCHMARK = Benchmark(
    name="sweep_savings",
    what=(
        "Sixteen random configurations of the space `vq` (16,000 images each), all trained to the end, and the same "
        "ones under ASHA (rungs at 4,000 and 8,000 images, one in two goes on): how much worse the best of those that "
        "were trained to the end is, and the images that it took. A trial's figures depend on neither."
    ),
    parts={"savings": _savings},
    targets=(Target("image_share", "<=", 0.45), Target("cost_above_best", "<=", 0.02)),
    repeats=3,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
