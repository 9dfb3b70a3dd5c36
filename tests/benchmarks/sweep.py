"""Whether a sweep is worth its time: the space `vq` on the bundled emoji, against four random configurations."""

from __future__ import annotations

import statistics
import sys

from runner import Benchmark, Figures, Target, main
from sweeps import quick_space, root_with_dataset, search

_RANDOM = 4


def _sweep(quick: bool, seed: int) -> Figures:
    with root_with_dataset("sweep", "integration" if quick else "tiny", seed) as root:
        space, trials = (quick_space(root.parent), 4) if quick else ("vq", 12)
        options = ("--seed", str(seed))
        found = search(root, space, "searched", "--trials", str(trials), *options)
        plain = ("--searcher", "random", "--scheduler", "none", "--trials", str(_RANDOM), *options)
        baseline = search(root, space, "random", *plain).finals()
    best, median = found.answer["best"]["cost"], statistics.median(baseline)
    counts = found.answer["trials"]
    return {
        "minutes": found.seconds / 60,
        "best_cost": best,
        "random_median_cost": median,
        "random_best_cost": min(baseline),
        "below_random_median": 1 - best / median,
        "trials_finished": counts.get("finished", 0),
        "trials_stopped": counts.get("stopped", 0),
        "trials_failed": counts.get("failed", 0),
        "images": found.answer["images"],
        "cpus_not_free": found.answer["cpus"] - found.answer["cpus_free"],
    }


BENCHMARK = Benchmark(
    name="sweep",
    what=(
        "`hvqd tune vq` (TPE and ASHA, 12 trials of up to 14,400 images, emoji at 32 x 32, two workers a trial) "
        f"against the median of {_RANDOM} random configurations of the same space at full budget. The cost is judged "
        "on the validation split: 10^(-PSNR/10), the pictures' geometric mean squared error, plus 0.004 times the "
        "bits a pixel of the codes."
    ),
    parts={"sweep": _sweep},
    targets=(
        Target("minutes", "<=", 30),
        Target("below_random_median", ">=", 0.1),
        Target("cpus_not_free", "<=", 0),
    ),
    repeats=1,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
