"""What a trial costs besides its training: from the moment it is asked for to its first step, and between trials."""

from __future__ import annotations

import statistics
import sys
from itertools import pairwise

from runner import Benchmark, Figures, Target, main
from sweeps import quick_space, root_with_dataset, search


def _overhead(quick: bool, seed: int) -> Figures:
    with root_with_dataset("overhead", "integration", seed) as root:
        options = ("--searcher", "random", "--scheduler", "none", "--max-concurrent", "1", "--seed", str(seed))
        trials = "3" if quick else "8"
        found = search(root, quick_space(root.parent), "overhead", "--trials", trials, *options)
    facts = [record["facts"] for record in found.records]
    starts = [fact["first_step"] - fact["started"] for fact in facts]
    gaps = [later["first_step"] - earlier["ended"] for earlier, later in pairwise(facts)]
    return {
        "first_start_to_first_step_seconds": starts[0],
        "start_to_first_step_seconds": statistics.median(starts[1:]),
        "end_to_next_first_step_seconds": statistics.median(gaps),
        "whole_trial_seconds": statistics.median([record["seconds"] for record in found.records]),
        "sweep_without_trials_seconds": found.seconds - sum(record["seconds"] for record in found.records),
    }


BENCHMARK = Benchmark(
    name="trial_overhead",
    what=(
        "Trials of a second of training, one after the other, each with one worker: the time from asking for a trial "
        "to its first step (the first one, and the median of the others, whose cluster is warm), from the end of a "
        "trial to the next one's first step, and what the command takes besides its trials (starting and stopping "
        "the cluster, the tracking store)."
    ),
    parts={"overhead": _overhead},
    targets=(Target("start_to_first_step_seconds", "<=", 12),),
    repeats=1,
    quick_decides=True,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
