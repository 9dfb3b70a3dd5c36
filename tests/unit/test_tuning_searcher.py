"""Searchers: they propose only what is possible and new, and one made anew from the records goes on as the old one."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from infra.errors import InputError
from tuning.loading import space_from
from tuning.records import Rung, TrialRecord
from tuning.searcher import SEARCHERS, Searcher, SearcherName, make_searcher
from tuning.space import Drawn, SearchSpace

CONTRADICTORY = ("levels == 1", "levels == 2")


def space(**changes: Any) -> SearchSpace:
    """Codebook sizes of one or two levels, and a learning rate; 32-bit codes at most."""
    values: dict[str, Any] = {
        "name": "small",
        "base": {"preset": "integration"},
        "job": "vq",
        "parameters": {
            "levels": {"choice": [1, 2], "ordered": True},
            "one": {"key": "vq.model.strides", "choice": [[8], [4]], "when": "levels == 1"},
            "two": {"key": "vq.model.strides", "choice": [[8, 4]], "when": "levels == 2"},
            "sizes": {"key": "vq.model.codebook_sizes", "choice": [16, 32, 64], "length": "levels"},
            "vq.train.learning_rate": {"log_uniform": [0.0001, 0.01]},
        },
        "constraints": ["max(sizes) + min(sizes) < 128"],
        "metrics": [{"name": "val_psnr", "direction": "max"}],
    }
    return space_from(values | changes, "the test's space")


DISCRETE = {
    "parameters": {
        "vq.model.codebook_sizes": {"choice": [[16, 16], [32, 16], [64, 64], [64, 32]]},
        "vq.model.code_dim": {"choice": [4, 8, 16]},
    },
    "constraints": ["vq.model.codebook_sizes[0] + vq.model.codebook_sizes[1] < 128"],
}


def score(drawn: Drawn) -> float:
    """A PSNR that likes large codebooks and a rate near 0.001."""
    from math import log10

    return 20 + sum(drawn["sizes"]) / 20 - 4 * abs(log10(drawn["vq.train.learning_rate"]) + 3)


def ended(number: int, drawn: Drawn, value: float) -> TrialRecord:
    return TrialRecord(number, drawn, {}, "finished", (Rung(640, {"val_psnr": value}),))


def sweep(searcher: Searcher, numbers: range) -> list[TrialRecord]:
    """Trials one after the other, each told when it ends."""
    records = []
    for number in numbers:
        drawn = searcher.propose(number)
        assert drawn is not None
        records.append(ended(number, drawn, score(drawn)))
        searcher.tell(records[-1])
    return records


@pytest.mark.parametrize("name", SEARCHERS)
def test_all_proposals_are_possible_and_different(name: SearcherName) -> None:
    searcher = make_searcher(name, space(**DISCRETE), seed=0)
    found = []
    while (drawn := searcher.propose(len(found))) is not None:
        space(**DISCRETE).check(drawn)
        found.append(drawn)
    assert len(found) == 9  # 3 of the 4 pairs x 3 dimensions
    assert all(one != other for place, one in enumerate(found) for other in found[:place])
    assert set(searcher.refused) == set(DISCRETE["constraints"])


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_searcher_made_from_the_records_goes_on_as_the_old_one(name: SearcherName) -> None:
    old = make_searcher(name, space(), seed=3)
    records = sweep(old, range(9))
    new = make_searcher(name, space(), seed=3)
    for record in records:
        new.tell(record)
    assert [record.drawn for record in sweep(old, range(9, 13))] == [r.drawn for r in sweep(new, range(9, 13))]


def test_tpe_made_anew_knows_the_trials_under_way() -> None:
    old = make_searcher("tpe", space(), seed=1)
    records = sweep(old, range(8))
    under_way = old.propose(8)
    assert under_way is not None
    new = make_searcher("tpe", space(), seed=1)
    for record in [*records, TrialRecord(8, under_way, {}, "running")]:
        new.tell(record)
    assert old.propose(9) == new.propose(9)
    end = ended(8, under_way, score(under_way))
    old.tell(end)
    new.tell(end)
    assert old.propose(10) == new.propose(10)


def test_another_seed_proposes_other_trials() -> None:
    for name in ("tpe", "random"):
        assert make_searcher(name, space(), seed=0).propose(0) != make_searcher(name, space(), seed=1).propose(0)


def test_tpe_learns_where_the_good_trials_are() -> None:
    means = {}
    for name in ("tpe", "random"):
        late = [
            score(dict(r.drawn)) for seed in range(4) for r in sweep(make_searcher(name, space(), seed), range(30))[15:]
        ]
        means[name] = sum(late) / len(late)
    assert means["tpe"] > means["random"] + 1


def late_share_of_one_level(stopped: Literal["stopped", "finished"]) -> float:
    """How many of the later proposals have one level, when those of two end after 160 images with a better figure."""
    good = []
    for seed in (0, 1):
        searcher = make_searcher("tpe", space(), seed)
        for number in range(30):
            drawn = searcher.propose(number)
            assert drawn is not None
            good.append(len(drawn["sizes"]) == 1)
            rung = Rung(640, {"val_psnr": 21.0}) if good[-1] else Rung(160, {"val_psnr": 25.0})
            searcher.tell(TrialRecord(number, drawn, {}, "finished" if good[-1] else stopped, (rung,)))
        del good[-30:-15]
    return sum(good) / len(good)


def test_a_trial_that_was_stopped_early_ranks_behind_those_that_went_further() -> None:
    assert late_share_of_one_level("stopped") > 2 * late_share_of_one_level("finished")


def test_a_trial_that_failed_is_not_proposed_again_and_stops_nothing() -> None:
    searcher = make_searcher("tpe", space(**DISCRETE), seed=0)
    found = []
    while (drawn := searcher.propose(len(found))) is not None:
        searcher.tell(TrialRecord(len(found), drawn, {}, "failed", error="out of memory"))
        found.append(drawn)
    assert len(found) == 9


def test_tpe_seeks_the_front_of_two_metrics() -> None:
    two = [{"name": "val_psnr", "direction": "max"}, {"name": "rate", "direction": "min", "expression": "bits"}]
    searcher = make_searcher("tpe", space(metrics=two), seed=0)
    for number in range(10):
        drawn = searcher.propose(number)
        assert drawn is not None
        rung = Rung(640, {"val_psnr": score(drawn), "rate": float(sum(drawn["sizes"]))})
        searcher.tell(TrialRecord(number, drawn, {}, "stopped" if number % 2 else "finished", (rung,)))
    assert searcher.propose(10) is not None


def test_what_a_former_space_had_and_this_one_has_not_is_passed_over() -> None:
    searcher = make_searcher("tpe", space(), seed=0)
    former = {"levels": 3, "sizes": [8, 8, 8], "vq.train.learning_rate": 0.5}
    searcher.tell(ended(0, former, 99.0))
    assert searcher.propose(1) == make_searcher("tpe", space(), seed=0).propose(1)


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_a_space_in_which_nothing_is_possible_says_what_refused_how_often(name: SearcherName) -> None:
    possible = space()  # reading a contradictory one would say so already
    searcher = make_searcher(name, SearchSpace(**{**dict(possible), "constraints": CONTRADICTORY}), seed=0)
    said = r"space small: none of 1000 draws is possible: levels == \d \(\d+ times\); levels == \d .*\nhint: widen"
    with pytest.raises(InputError, match=said):
        searcher.propose(0)
