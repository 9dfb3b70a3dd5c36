"""What a sweep's trials say: ranking, Pareto front, importance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.analysis import Axis, _front, importance, ranked, running_best, trade_off
from tuning.loading import space_from
from tuning.records import Rung, Status, TrialRecord
from tuning.space import Drawn, SearchSpace


def space(**changes: Any) -> SearchSpace:
    values: dict[str, Any] = {
        "name": "small",
        "base": {"preset": "integration"},
        "job": "vq",
        "parameters": {
            "levels": {"choice": [1, 2], "ordered": True},
            "one": {"key": "vq.model.strides", "choice": [[8], [4]], "when": "levels == 1"},
            "two": {"key": "vq.model.strides", "choice": [[8, 4], [16, 8]], "when": "levels == 2"},
            "vq.model.codebook_sizes": {"choice": [16, 64], "ordered": True, "length": "levels"},
            "vq.train.learning_rate": {"log_uniform": [0.001, 0.01]},
        },
        "metrics": [{"name": "cost", "expression": "10 ** (-val_psnr / 10) + 0.01 * bits_per_pixel"}],
        "budget": {"images": 640, "min_images": 160},
    }
    return space_from({**values, **changes}, "space.yaml")


def plain() -> SearchSpace:
    """Three independent numbers that set nothing."""
    return space(
        parameters={name: {"uniform": [0.0, 1.0]} for name in "abc"}, metrics=[{"name": "val_psnr", "direction": "max"}]
    )


def record(number: int, value: float, images: int = 640, status: Status = "finished", **drawn: Any) -> TrialRecord:
    return TrialRecord(number, drawn, {}, status, (Rung(images, {"cost": value, "val_psnr": value}),), 10.0 + number)


def trials(of: SearchSpace, count: int, value: Callable[[Drawn], float], name: str = "val_psnr") -> list[TrialRecord]:
    generator = np.random.default_rng(1)
    draws = [of.draw_any(generator) for _ in range(count)]
    return [
        TrialRecord(number, drawn, {}, "finished", (Rung(640, {name: value(drawn)}),))
        for number, drawn in enumerate(draws)
    ]


# ---- ranking ----


def test_finished_trials_come_first_then_those_that_went_further() -> None:
    records = [
        record(0, 3.0),
        record(1, 1.0, 160, "stopped"),
        record(2, 2.0),
        record(3, 5.0, 320, "stopped"),
        TrialRecord(4, {}, {}, "failed"),
        record(5, float("nan")),
    ]
    assert [found.number for found in ranked(space(), records)] == [2, 0, 3, 1]
    highest = space(metrics=[{"name": "val_psnr", "direction": "max"}])
    assert [found.number for found in ranked(highest, records)] == [0, 2, 3, 1]


def test_the_running_best_only_gets_better_and_counts_all_trials() -> None:
    records = [record(0, 3.0), record(1, 0.1, 160, "stopped"), record(2, 4.0), record(3, 2.0)]
    assert running_best(space(), records) == [(1, 3.0), (3, 3.0), (4, 2.0)]


# ---- the Pareto front ----


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=14)


@given(points, st.sampled_from(["min", "max"]), st.sampled_from(["min", "max"]))
def test_the_front_is_what_no_other_point_beats(found: list[tuple[int, int]], first: Any, second: Any) -> None:
    cost, quality = Axis("x", first), Axis("y", second)
    by_number = {number: (float(x), float(y)) for number, (x, y) in enumerate(found)}

    def beaten(point: tuple[float, float]) -> bool:
        return any(
            (cost.better(x, point[0]) and not quality.better(point[1], y))
            or (quality.better(y, point[1]) and not cost.better(point[0], x))
            for x, y in by_number.values()
        )

    expected = {number for number, point in by_number.items() if not beaten(point)}
    assert set(_front(by_number, cost, quality)) == expected


def test_a_tokenizers_trade_is_its_psnr_against_its_bits() -> None:
    found = space()
    draws = [
        {"levels": 1, "one": [8], "vq.model.codebook_sizes": [16], "vq.train.learning_rate": 0.002},
        {"levels": 1, "one": [4], "vq.model.codebook_sizes": [16], "vq.train.learning_rate": 0.002},
        {"levels": 2, "two": [8, 4], "vq.model.codebook_sizes": [16, 64], "vq.train.learning_rate": 0.002},
    ]
    psnr = [10.0, 14.0, 13.0]
    records = [
        TrialRecord(number, drawn, {}, "finished", (Rung(640, {"val_psnr": value}),))
        for number, (drawn, value) in enumerate(zip(draws, psnr, strict=True))
    ]
    trade = trade_off(found, records)
    assert trade is not None
    assert (trade.cost, trade.quality) == (Axis("bits", "min"), Axis("val_psnr", "max"))
    assert trade.points == {0: (4 * 4, 10.0), 1: (16 * 4, 14.0), 2: (4 * 4 + 16 * 6, 13.0)}
    assert trade.front == (0, 1)
    assert trade_off(found, records[:1]) is None


def test_two_metrics_are_the_two_sides() -> None:
    both = space(metrics=[{"name": "val_psnr", "direction": "max"}, {"name": "rate", "expression": "bits"}])
    rungs = [(Rung(640, {"val_psnr": psnr, "rate": rate}),) for psnr, rate in ((20.0, 3.0), (21.0, 2.0), (22.0, 5.0))]
    trade = trade_off(both, [TrialRecord(n, {}, {}, "finished", rung) for n, rung in enumerate(rungs)])
    assert trade is not None
    assert trade.front == (1, 2)


# ---- importance ----


def test_effects_approach_the_analytic_shares_of_the_variance() -> None:
    found = importance(plain(), trials(plain(), 150, lambda drawn: 2 * drawn["a"] + drawn["b"]), resamples=4)
    assert found is not None
    shares = {effect.name: effect for effect in found.effects}
    assert [effect.name for effect in found.effects] == ["a", "b", "c"]
    assert shares["a"].share == pytest.approx(0.8, abs=0.1)  # 4 / 12 of (4 + 1) / 12
    assert shares["b"].share == pytest.approx(0.2, abs=0.1)
    assert shares["c"].share < 0.02
    assert found.explained > 0.9
    for effect in found.effects:
        assert effect.low <= effect.share <= effect.high


def test_parameters_that_act_together_share_more_than_the_whole() -> None:
    found = importance(
        plain(), trials(plain(), 300, lambda drawn: (drawn["a"] - 0.5) * (drawn["b"] - 0.5)), resamples=4
    )
    assert found is not None
    shares = {effect.name: effect.share for effect in found.effects}
    assert shares["a"] > 0.7 and shares["b"] > 0.7 and shares["c"] < 0.1


def test_intervals_narrow_with_more_trials() -> None:
    generator = np.random.default_rng(5)

    def noisy(drawn: Drawn) -> float:
        return float(drawn["a"] + generator.normal(0, 0.2))

    few = importance(plain(), trials(plain(), 12, noisy), resamples=12)
    many = importance(plain(), trials(plain(), 150, noisy), resamples=12)
    assert few is not None and many is not None
    widths = [max(effect.high - effect.low for effect in found.effects) for found in (few, many)]
    assert widths[1] < 0.6 * widths[0]
    assert many.explained > few.explained


def test_noise_is_explained_by_nothing() -> None:
    generator = np.random.default_rng(3)
    found = importance(plain(), trials(plain(), 40, lambda drawn: float(generator.normal())), resamples=4)
    assert found is not None
    assert found.explained < 0.2


def test_what_depends_on_a_parameter_follows_it() -> None:
    conditional = space()
    records = trials(conditional, 200, lambda drawn: float(drawn["levels"]), "cost")
    found = importance(conditional, records, resamples=4)
    assert found is not None
    shares = {effect.name: effect.share for effect in found.effects}
    assert shares["levels"] > 0.8
    others = [share for name, share in shares.items() if name != "levels"]
    assert max(others) < 0.1
    decided = trials(conditional, 200, lambda drawn: float(drawn.get("two") == [8, 4]), "cost")
    found = importance(conditional, decided, resamples=4)
    assert found is not None
    shares = {effect.name: effect.share for effect in found.effects}
    assert shares["two"] > 0.5 and shares["levels"] > 0.5 > shares["one"]


def test_trials_are_compared_where_most_of_them_were() -> None:
    def curve(number: int) -> TrialRecord:
        drawn = plain().draw_any(np.random.default_rng(number))
        rungs = [Rung(images, {"val_psnr": drawn["a"] * images}) for images in (160, 320, 640)]
        kept = rungs if number < 4 else rungs[:1]
        return TrialRecord(number, drawn, {}, "finished" if number < 4 else "stopped", tuple(kept))

    found = importance(plain(), [curve(number) for number in range(16)], resamples=2)
    assert found is not None
    assert (found.images, found.trials) == (160, 16)


def test_too_few_or_equal_trials_say_nothing() -> None:
    assert importance(plain(), trials(plain(), 7, lambda drawn: drawn["a"])) is None
    assert importance(plain(), trials(plain(), 20, lambda drawn: 1.0)) is None
    assert importance(plain(), []) is None
