"""Whether TPE finds better configurations than random draws do, replayed many times on a grid that was trained here.

The grid is `recorded/tokenizers.json.gz`, which `record_curves.py` made: a proposal is answered from the table, so that
hundreds of sweeps take minutes. The searchers are the product's, asked and told as a sweep of one trial at a time does.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace

import numpy as np
from runner import REPOSITORY, Benchmark, Figures, Target, main

sys.path.insert(0, str(REPOSITORY))  # the recorder shares its code with other benchmarks

from tests.benchmarks.record_curves import SPACE, read_table
from tuning.loading import load_space
from tuning.records import TrialRecord
from tuning.searcher import SearcherName, make_searcher
from tuning.space import Drawn, SearchSpace

TRIALS = 24
_EARLY = 12
_SEEDS, _QUICK_SEEDS = 200, 20


@dataclass(frozen=True)
class Grid:
    """The recorded trials by what was drawn."""

    space: SearchSpace
    trials: dict[str, TrialRecord]

    @classmethod
    def read(cls) -> Grid:
        """The table of this repository."""
        return cls(load_space(SPACE), {_key(dict(record.drawn)): record for record in read_table()})

    def cost(self, record: TrialRecord) -> float:
        """What is sought, at the end of the training."""
        found = record.value(self.space.metrics[0].name)
        assert found is not None
        return found

    def replayed(self, searcher: SearcherName, seed: int) -> list[float]:
        """The cost of each trial of a simulated sweep, in order."""
        asked, found = make_searcher(searcher, self.space, seed), []
        for number in range(TRIALS):
            drawn = asked.propose(number)
            assert drawn is not None, "the grid has more configurations than a sweep asks for"
            record = replace(self.trials[_key(drawn)], number=number)
            asked.tell(record)
            found.append(self.cost(record))
        return found


def _key(drawn: Drawn) -> str:
    return json.dumps(drawn, sort_keys=True)


def _searchers(quick: bool, seed: int) -> Figures:
    grid = Grid.read()
    costs = np.sort([grid.cost(record) for record in grid.trials.values()])
    seeds = range(1_000 * seed, 1_000 * seed + (_QUICK_SEEDS if quick else _SEEDS))
    regrets: dict[SearcherName, np.ndarray] = {}
    for name in ("tpe", "random"):
        best = np.array([np.minimum.accumulate(grid.replayed(name, each)) for each in seeds])
        regrets[name] = best / costs[0] - 1  # (sweeps, trials)
    last, early = -1, _EARLY - 1
    gain = regrets["random"] - regrets["tpe"]
    low, high = _interval(gain[:, last])
    ranks = {
        name: np.searchsorted(costs, (1 + found[:, last]) * costs[0] * (1 - 1e-9)) for name, found in regrets.items()
    }
    return {
        "tpe_mean_regret": regrets["tpe"][:, last].mean(),
        "random_mean_regret": regrets["random"][:, last].mean(),
        "mean_gain": gain[:, last].mean(),
        "mean_gain_low": low,
        "mean_gain_high": high,
        f"tpe_mean_regret_after_{_EARLY}": regrets["tpe"][:, early].mean(),
        f"random_mean_regret_after_{_EARLY}": regrets["random"][:, early].mean(),
        f"mean_gain_after_{_EARLY}_low": _interval(gain[:, early])[0],
        f"mean_gain_after_{_EARLY}_high": _interval(gain[:, early])[1],
        "tpe_found_the_best": float((ranks["tpe"] == 0).mean()),
        "random_found_the_best": float((ranks["random"] == 0).mean()),
        "tpe_mean_rank": 1 + ranks["tpe"].mean(),
        "random_mean_rank": 1 + ranks["random"].mean(),
        "configurations": len(grid.trials),
        "sweeps": len(seeds),
    }


def _interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean over independent sweeps, by the central limit theorem."""
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


BENCHMARK = Benchmark(
    name="searchers",
    what=(
        f"TPE against random draws on the recorded grid of small tokenizers: {_SEEDS} simulated sweeps of {TRIALS} "
        "trials each, one trial at a time. The regret of a sweep is how far its best cost lies above the grid's "
        "(relative); a gain is the regret of random draws less that of TPE with the same seed, its mean with a 95 % "
        "interval over sweeps. The table comes from `PYTHONPATH=. python tests/benchmarks/record_curves.py`."
    ),
    parts={"searchers": _searchers},
    targets=(Target("mean_gain_low", ">=", 0),),
    repeats=1,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
