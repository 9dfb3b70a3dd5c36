"""The benchmark of the no-regression gate: its shortcut gives the metric's own parts, and worse means what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hvqd_model.metrics import kid, kid_parts

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # where the scripts find their runner

from tests.benchmarks.gate_power import Kernels, Pool, _stand_in, rates, trials


@pytest.fixture(scope="module")
def pool() -> Pool:
    return _stand_in()


def test_parts_from_kernels_are_those_of_the_metric(pool: Pool) -> None:
    kernels = Kernels(pool)
    rows = np.array([3, 7, 1, 600, 650, 20])
    pictures = torch.from_numpy(np.concatenate([pool.samples, pool.marginals])[rows])
    expected = kid_parts(torch.from_numpy(pool.test), pictures, pool.groups, most_blocks=len(pool.test))
    found = kernels.parts(rows)
    assert found.within == pytest.approx(expected.within, rel=1e-5)
    assert found.across == pytest.approx(expected.across, rel=1e-5) and found.counts == expected.counts
    assert found.set_error == pytest.approx(expected.set_error, rel=1e-4)
    assert kernels.kid(found) == pytest.approx(kid(torch.from_numpy(pool.test), pictures), rel=1e-4)


def test_a_worse_mixture_is_worse_by_as_much_as_asked(pool: Pool) -> None:
    """A share of the pool's own pictures, replaced by marginals, against the whole pool's KID."""
    kernels = Kernels(pool)
    share = kernels.worse_share(0.2)
    rng, grown = np.random.default_rng(0), []
    before = kernels.kid(kernels.parts(np.arange(kernels.samples)))
    for _ in range(60):
        replaced = rng.binomial(kernels.samples, share)
        kept = rng.permutation(kernels.samples)[: kernels.samples - replaced]
        other = kernels.samples + rng.choice(kernels.marginals, replaced, replace=False)
        grown.append(kernels.kid(kernels.parts(np.concatenate([kept, other]))) / before - 1)
    assert np.mean(grown) == pytest.approx(0.2, abs=0.03)


def test_equal_versions_grow_by_nothing_on_average_and_the_stated_error_is_the_spread(pool: Pool) -> None:
    kernels, rng = Kernels(pool), np.random.default_rng(0)
    found = np.array(trials(kernels, 150, 0.0, 120, rng))
    spread = found[:, 0].std()
    assert abs(found[:, 0].mean()) < 4 * spread / 120**0.5
    assert np.median(found[:, 1]) == pytest.approx(spread, rel=0.35)


def test_more_pictures_tell_worse_versions_apart_better(pool: Pool) -> None:
    few, many = (rates(pool, count, 60, seed=1) for count in (20, 200))
    assert many["standard_error"] < few["standard_error"]
    assert many["caught_30_percent_worse"] >= many["caught_20_percent_worse"] >= many["false_refusals"]
