"""Promoters that run at once and are killed at random moments: how often is the registry's state not explained?

A round lets three promoters work on one registry (promotions of random versions, rollbacks), kills each with SIGKILL
after a random while, and checks: the champion is the old or the new one of the journal's last decision; after the next
turn champion and previous are what the journal says, every promoted version passed its gates, and the chain holds.
The full form has 200 rounds in ten parts, each on a registry of its own: an interrupted one goes on with the next part.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

from runner import REPOSITORY, Benchmark, Figures, Target, main

sys.path.insert(0, str(REPOSITORY))  # the registry that the tests use, too

from infra.errors import InputError
from tests.registry_place import KIDS, Place, race

_ROUNDS, _PARTS, _QUICK_ROUNDS = 200, 10, 6


def measure(part: int, quick: bool, seed: int) -> Figures:
    """Rounds, decisions and violations of one part, on a registry of its own; the quick form has one part."""
    rounds = (_QUICK_ROUNDS if part == 0 else 0) if quick else _ROUNDS // _PARTS
    decisions, violations = 0, 0
    with tempfile.TemporaryDirectory(prefix="hvqd-races-") as folder:
        place = Place(Path(folder) / "run")
        for kid in KIDS if rounds else ():
            place.version(kid_samples=kid)
        for number in range(rounds):
            try:
                decisions += race(place, promoters=3, seed=10_000 * seed + _ROUNDS * part + number)
            except (AssertionError, InputError) as error:
                violations += 1
                print(f"part {part}, round {number}: {error}", file=sys.stderr)
    found = {"rounds": float(rounds), "decisions": float(decisions), "violations": float(violations)}
    return {f"{name}_{part}": value for name, value in found.items()}


BENCHMARK = Benchmark(
    name="promotion_races",
    what=__doc__ or "",
    parts={f"races {part}": partial(measure, part) for part in range(_PARTS)},
    targets=tuple(Target(f"violations_{part}", "<=", 0) for part in range(_PARTS)),
    repeats=1,
    quick_decides=True,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
