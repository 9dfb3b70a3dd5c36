"""DeepSpeed on two gloo ranks against plain torch on one: every ZeRO stage trains the same model.

Codes are discrete, so a rounding error that moves one would change everything after it: with codes, one step is
compared; twenty steps are compared where no code is chosen.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.multiprocess.ranks import WORLD, run_on_ranks
from tests.multiprocess.scenes import Facts, Outcome, Tensors, all_facts, compared_scenes, plain_cast
from tests.tiny_training import GLOBAL_BATCH

ZERO_STAGES = (0, 1, 2, 3)
every_zero_stage = pytest.mark.parametrize("zero_stage", ZERO_STAGES)


@pytest.fixture(scope="module")
def plain() -> dict[str, Outcome]:
    """One process, full batch."""
    return compared_scenes(plain_cast())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, Facts]]:
    """What each of two ranks found at every ZeRO stage; started once, because a start takes many seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    found: list[dict[int, Facts]] = run_on_ranks(all_facts, folder, folder)
    assert len(found) == WORLD
    assert all(set(facts) == set(ZERO_STAGES) for facts in found)
    return found


def largest_difference(one: Tensors, other: Tensors) -> float:
    """Over all elements of tensors with the same names."""
    assert one.keys() == other.keys()
    assert len(one) > 20
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def mean_difference(one: Tensors, other: Tensors) -> float:
    """The root of the mean square over all elements of tensors with the same names."""
    assert one.keys() == other.keys()
    squares = torch.cat([(one[name].double() - other[name].double()).square().reshape(-1) for name in one])
    return float(squares.mean().sqrt())


def assert_identical(one: Tensors, other: Tensors) -> None:
    """To the bit, not-a-number refused."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_same_state(one: Outcome, other: Outcome) -> None:
    """All that a rank holds, to the bit."""
    for part in ("exported", "weights", "moments", "buffers"):
        assert_identical(getattr(one, part), getattr(other, part))


def recorded(outcome: Outcome, name: str) -> float:
    """The last value of a metric."""
    values: list[float] = [record[name] for record in outcome.history if name in record]
    return values[-1]


@every_zero_stage
@pytest.mark.parametrize(
    "scene",
    ["prior, one step", "gaussian prior, one step", "vq, one step", "pyramid, one step", "nested pyramid, one step"],
)
def test_two_halves_of_a_batch_give_the_gradient_of_the_whole(
    plain: dict[str, Outcome], ranks: list[dict[int, Facts]], zero_stage: int, scene: str
) -> None:
    whole = plain[scene]
    # A nested pyramid shows nearly the whole picture before it has learned anything.
    floor = 3e-4 if scene == "nested pyramid, one step" else 1e-3
    assert max(float(moment.abs().max()) for moment in whole.moments.values()) > floor, "there is a gradient"
    for facts in ranks:
        halves = facts[zero_stage].compared[scene]
        assert largest_difference(halves.moments, whole.moments) < 1e-6
        for name in ("loss", "gradient_norm"):
            assert math.isclose(recorded(halves, name), recorded(whole, name), rel_tol=2e-5)


@every_zero_stage
def test_accumulated_micro_batches_give_the_gradient_and_the_codebooks_of_the_whole(
    plain: dict[str, Outcome], ranks: list[dict[int, Facts]], zero_stage: int
) -> None:
    whole = plain["vq, one step"]
    for facts in ranks:
        parts = facts[zero_stage].accumulated["vq, one step"]
        assert largest_difference(parts.moments, whole.moments) < 1e-6
        torch.testing.assert_close(parts.buffers, whole.buffers, rtol=1e-5, atol=1e-5)


@every_zero_stage
@pytest.mark.parametrize("scene", ["prior, twenty steps", "gaussian prior, twenty steps", "vq, twenty steps"])
def test_twenty_steps_on_two_ranks_equal_twenty_on_one(
    plain: dict[str, Outcome], ranks: list[dict[int, Facts]], zero_stage: int, scene: str
) -> None:
    whole, halves = plain[scene], ranks[0][zero_stage].compared[scene]
    assert largest_difference(halves.weights, whole.weights) < 1e-4
    assert largest_difference(halves.exported, whole.exported) < 1e-4
    named = {name: whole.exported[name] for name in whole.weights}
    assert largest_difference(named, whole.weights) > 1e-3, "the average is not the weights"


@every_zero_stage
def test_in_bf16_two_ranks_are_nearer_to_one_than_bf16_is_to_fp32(
    plain: dict[str, Outcome], ranks: list[dict[int, Facts]], zero_stage: int
) -> None:
    exact, rounded = plain["prior, twenty steps"], plain["prior, twenty steps in bf16"]
    halves = ranks[0][zero_stage].compared["prior, twenty steps in bf16"]
    for kind in ("weights", "exported"):
        by_rounding = mean_difference(getattr(rounded, kind), getattr(exact, kind))
        assert 0 < mean_difference(getattr(halves, kind), getattr(rounded, kind)) < by_rounding


@every_zero_stage
def test_twenty_steps_of_accumulated_micro_batches_equal_twenty_of_whole_ones(
    plain: dict[str, Outcome], ranks: list[dict[int, Facts]], zero_stage: int
) -> None:
    whole, parts = plain["prior, twenty steps"], ranks[0][zero_stage].accumulated["prior, twenty steps"]
    assert largest_difference(parts.weights, whole.weights) < 1e-4
    assert largest_difference(parts.exported, whole.exported) < 1e-4
    assert len(parts.history) == len(whole.history) == 21


@every_zero_stage
def test_ranks_that_see_different_levels_stay_in_step(
    plain: dict[str, Outcome], ranks: list[dict[int, Facts]], zero_stage: int
) -> None:
    for facts in ranks:
        halves = facts[zero_stage].compared["prior, levels apart"]
        assert largest_difference(halves.weights, plain["prior, levels apart"].weights) < 1e-4


@every_zero_stage
@pytest.mark.parametrize("scene", ["gradient codebook", "simvq codebook"])
def test_codebooks_that_learn_by_gradient_start_and_decode_when_sharded(
    plain: dict[str, Outcome], ranks: list[dict[int, Facts]], zero_stage: int, scene: str
) -> None:
    whole, halves = plain[scene], ranks[0][zero_stage].compared[scene]
    assert [record["codebooks_started"] for record in halves.history if "codebooks_started" in record] == [2.0]
    assert largest_difference(halves.weights, whole.weights) < 1e-4
    assert largest_difference(halves.exported, whole.exported) < 1e-4
    assert math.isclose(recorded(halves, "val_psnr"), recorded(whole, "val_psnr"), rel_tol=1e-3)


@every_zero_stage
def test_codebooks_stay_bit_equal_on_all_ranks_over_fifty_steps_with_restarts(
    ranks: list[dict[int, Facts]], zero_stage: int
) -> None:
    one, other = (facts[zero_stage].fifty_steps for facts in ranks)
    assert_identical(one.buffers, other.buffers)
    assert_identical(one.weights, other.weights)
    assert sum(record.get("restarts_1", 0) for record in one.history) > 10
    assert one.history[-1]["images"] == 50 * GLOBAL_BATCH


@every_zero_stage
@pytest.mark.parametrize("stage", ["vq", "prior"])
def test_resume_equals_an_uninterrupted_run(ranks: list[dict[int, Facts]], zero_stage: int, stage: str) -> None:
    for facts in ranks:
        whole, broken = facts[zero_stage].resumed[stage]
        assert_same_state(broken, whole)
        assert broken.history == whole.history
    assert (
        ranks[0][zero_stage].resumed[stage][0].exported.keys() >= ranks[0][zero_stage].resumed[stage][0].weights.keys()
    )


@every_zero_stage
def test_a_bad_picture_on_one_rank_leaves_everything_untouched_on_both(
    plain: dict[str, Outcome], ranks: list[dict[int, Facts]], zero_stage: int
) -> None:
    for facts in ranks:
        before, after = facts[zero_stage].around_poison
        assert_same_state(after, before)
        following = facts[zero_stage].compared["poisoned"]
        assert largest_difference(following.weights, before.weights) > 1e-4, "the next step is taken"
        assert largest_difference(following.moments, plain["poisoned"].moments) < 1e-6


@every_zero_stage
def test_recomputing_activations_changes_nothing(ranks: list[dict[int, Facts]], zero_stage: int) -> None:
    for facts in ranks:
        kept, recomputed = facts[zero_stage].recomputed
        assert_same_state(recomputed, kept)
        assert recomputed.history == kept.history
