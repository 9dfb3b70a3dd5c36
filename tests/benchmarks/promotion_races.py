"""Promoters that run at once and are killed at random moments: how often is the registry's state not explained?

A round lets three promoters work on one registry (promotions of random versions, rollbacks), kills each with SIGKILL
after a random while, and checks: the champion is the old or the new one of the journal's last decision; after the next
turn champion and previous are what the journal says, every promoted version passed its gates, and the chain holds.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from runner import REPOSITORY, Benchmark, Figures, Target, main

sys.path.insert(0, str(REPOSITORY))  # the registry that the tests use, too

from tests.registry_place import KIDS, Place, race

_ROUNDS, _QUICK_ROUNDS = 200, 8


def measure(quick: bool, seed: int) -> Figures:
    """Rounds, decisions and violations."""
    rounds = _QUICK_ROUNDS if quick else _ROUNDS
    decisions, violations = 0, 0
    with tempfile.TemporaryDirectory(prefix="hvqd-races-") as folder:
        place = Place(Path(folder) / "run")
        for kid in KIDS:
            place.version(kid_samples=kid)
        for number in range(rounds):
            try:
                decisions += race(place, promoters=3, seed=10_000 * seed + number)
            except AssertionError as error:
                violations += 1
                print(f"round {number}: {error}", file=sys.stderr)
    return {"rounds": float(rounds), "decisions": float(decisions), "violations": float(violations)}


BENCHMARK = Benchmark(
    name="promotion_races",
    what=__doc__ or "",
    parts={"races": measure},
    targets=(Target("violations", "<=", 0),),
    repeats=1,
    quick_decides=True,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
